"""Notes about what is switched on: they tell the living from the dead, and go when it is undone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_memlistener.host import state
from qmp_memlistener.host.processes import Process
from qmp_memlistener.probes.leftover_notes import LeftoverNote, find, note, stale
from tests.support.own_state import SCRIPT, keep_state_in

WHAT = "sync-profile"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    keep_state_in(tmp_path, monkeypatch)
    return Path(state.own_directory().path)


@pytest.fixture
def guest() -> Iterator[Process]:
    """Some process that lives as long as the test."""
    with subprocess.Popen(["sleep", "60"]) as process:
        found = Process.read(process.pid)
        assert found is not None
        yield found
        process.kill()


def test_a_note_of_the_living_is_nothing_left_over(place: Path, guest: Process) -> None:
    claim = note(guest.pid, guest.start_ticks, WHAT)
    assert claim is not None
    assert find() == []
    assert stale(guest.pid, guest.start_ticks, WHAT) is None
    # another of ours must not switch it off
    assert note(guest.pid, guest.start_ticks, WHAT) is None
    assert [p.name for p in place.iterdir()] == [f"{guest.pid}-{guest.start_ticks}.{WHAT}"]
    claim.remove()
    claim.remove()
    assert list(place.iterdir()) == []


def test_a_note_of_the_dead_is_found_and_taken_over(place: Path, guest: Process) -> None:
    claim = note(guest.pid, guest.start_ticks, WHAT)
    assert claim is not None
    claim.close()
    left = LeftoverNote(guest.pid, guest.start_ticks, WHAT, claim.path)
    assert find() == [left]
    assert str(guest.pid) in left.text
    again = note(guest.pid, guest.start_ticks, WHAT)
    assert again is not None
    assert find() == []
    again.remove()
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("place")
def test_the_kernel_tells_that_the_owner_was_killed(guest: Process) -> None:
    code = (
        f"{SCRIPT}\n"
        "import signal, sys\n"
        "from qmp_memlistener.probes import leftover_notes as notes\n"
        "assert notes.note(int(sys.argv[1]), int(sys.argv[2]), 'sync-profile')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [str(guest.pid), str(guest.start_ticks)]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], check=False, timeout=30)
    assert ended.returncode < 0
    assert [left.pid for left in find()] == [guest.pid]


def test_notes_about_processes_that_are_gone_are_removed(place: Path, guest: Process) -> None:
    claim = note(guest.pid, guest.start_ticks + 1, WHAT)
    assert claim is not None
    claim.close()
    assert find() == []
    assert list(place.iterdir()) == []


def test_what_is_no_whole_note_of_this_boot_is_removed(place: Path, guest: Process) -> None:
    path = place / f"{guest.pid}-{guest.start_ticks}.{WHAT}"
    for text in ("", "{", '{"schema": 1}', '{"schema":1,"boot":"x","pid":1,"start_ticks":1}'):
        path.write_text(text)
        assert find() == []
        assert not path.exists()


def test_a_note_in_another_directory_of_ours_is_found(place: Path, guest: Process) -> None:
    """As after a run that found the name taken, or an earlier version."""
    claim = note(guest.pid, guest.start_ticks, WHAT)
    assert claim is not None
    claim.close()
    other = place.parent / f"{place.name}.0123456789abcdef"
    place.rename(other)
    place.mkdir()
    (left,) = find()
    assert left == stale(guest.pid, guest.start_ticks, WHAT)
    again = note(guest.pid, guest.start_ticks, WHAT)
    assert again is not None
    assert again.path.startswith(f"{other}/")
    again.remove()
    assert find() == []


def test_other_files_are_left_alone(place: Path, guest: Process) -> None:
    key = f"{guest.pid}-{guest.start_ticks}"
    names = [f"{key}.lock", f"{key}.live", "freeze", f"x-1.{WHAT}", f"1.{WHAT}", key]
    for name in names:
        (place / name).touch()
    assert find() == []
    assert sorted(p.name for p in place.iterdir()) == sorted(names)


def test_a_link_is_not_followed(place: Path, guest: Process, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.symlink(victim, place / f"{guest.pid}-{guest.start_ticks}.{WHAT}")
    assert find() == []
    claim = note(guest.pid, guest.start_ticks, WHAT)
    assert claim is not None
    assert not os.path.islink(claim.path)
    claim.close()
    assert victim.read_text() == "precious"
