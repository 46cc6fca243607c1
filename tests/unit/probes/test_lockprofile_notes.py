"""Notes about what is switched on: they tell the living from the dead, and go when it is undone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_memlistener.host import state
from qmp_memlistener.host.processes import Process
from qmp_memlistener.probes.lockprofile import left_on, note_profiler
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
    claim = note_profiler(guest)
    assert claim is not None
    assert left_on() == []
    assert left_on(guest) == []
    # another of ours must not switch it off
    assert note_profiler(guest) is None
    assert [p.name for p in place.iterdir()] == [f"{guest.pid}-{guest.start_ticks}.{WHAT}"]
    claim.remove()
    claim.remove()
    assert list(place.iterdir()) == []


def test_a_note_of_the_dead_is_found_and_taken_over(place: Path, guest: Process) -> None:
    claim = note_profiler(guest)
    assert claim is not None
    claim.close()
    (left,) = left_on()
    assert left.path == claim.path
    assert left.note.pid == guest.pid
    assert str(guest.pid) in left.note.text
    again = note_profiler(guest)
    assert again is not None
    assert left_on() == []
    again.remove()
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("place")
def test_the_kernel_tells_that_the_owner_was_killed(guest: Process) -> None:
    code = (
        f"{SCRIPT}\n"
        "import signal, sys\n"
        "from qmp_memlistener.host.processes import Process\n"
        "from qmp_memlistener.probes.lockprofile import note_profiler\n"
        "assert note_profiler(Process.read(int(sys.argv[1])))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(guest.pid)], check=False, timeout=30)
    assert ended.returncode < 0
    assert [left.note.pid for left in left_on()] == [guest.pid]


def test_notes_about_processes_that_are_gone_are_removed(place: Path, guest: Process) -> None:
    claim = note_profiler(replace(guest, start_ticks=guest.start_ticks + 1))
    assert claim is not None
    claim.close()
    assert left_on() == []
    assert list(place.iterdir()) == []


def test_what_is_no_whole_note_of_this_boot_is_removed(place: Path, guest: Process) -> None:
    path = place / f"{guest.pid}-{guest.start_ticks}.{WHAT}"
    for text in ("", "{", '{"schema": 1}', '{"schema":1,"boot":"x","pid":1,"start_ticks":1}'):
        path.write_text(text)
        assert left_on() == []
        assert not path.exists()


def test_a_note_in_another_directory_of_ours_is_found(place: Path, guest: Process) -> None:
    """As after a run that found the name taken, or an earlier version."""
    claim = note_profiler(guest)
    assert claim is not None
    claim.close()
    other = place.parent / f"{place.name}.0123456789abcdef"
    place.rename(other)
    place.mkdir()
    (left,) = left_on()
    assert [again.path for again in left_on(guest)] == [left.path]
    again = note_profiler(guest)
    assert again is not None
    assert again.path.startswith(f"{other}/")
    again.remove()
    assert left_on() == []


def test_other_files_are_left_alone(place: Path, guest: Process) -> None:
    key = f"{guest.pid}-{guest.start_ticks}"
    names = [f"{key}.lock", f"{key}.live", "freeze", f"x-1.{WHAT}", f"1.{WHAT}", key]
    for name in names:
        (place / name).touch()
    assert left_on() == []
    assert sorted(p.name for p in place.iterdir()) == sorted(names)


def test_a_link_is_not_followed(place: Path, guest: Process, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.symlink(victim, place / f"{guest.pid}-{guest.start_ticks}.{WHAT}")
    assert left_on() == []
    claim = note_profiler(guest)
    assert claim is not None
    assert not os.path.islink(claim.path)
    claim.close()
    assert victim.read_text() == "precious"
