"""Notes of the resume guard: what is written, found, taken and thrown away."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import time
from pathlib import Path

import msgspec
import pytest

from qmp_memlistener import attach
from qmp_memlistener.errors import TargetError, TargetUnreachable
from qmp_memlistener.host import state
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp.freeze import FreezeKey, freeze_key, process_key
from qmp_memlistener.qmp.targets import UnixTarget
from qmp_memlistener.updates.pause.guard_notes import all_notes, new_note, take_notes, unfinished
from tests.support.own_state import keep_state_in


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the user's own, which may hold real notes."""
    keep_state_in(tmp_path, monkeypatch)
    return Path(state.own_directory().path)


@pytest.fixture
def key() -> FreezeKey:
    """A process that lives: ours."""
    process = Process.read(os.getpid())
    assert process is not None
    return process_key(process)


def write(key: FreezeKey, **changes: object) -> Path:
    """A note as the guard's process writes it."""
    form = new_note(key)
    assert form.held is not None
    done = {"state": "over", "why": "the agent ended", "resumed": True, "t_ns": time.monotonic_ns()}
    with form.held as held:
        held.write(msgspec.json.encode({**form.content, **done, **changes}))
    return Path(form.path)


def test_a_note_is_taken_once(key: FreezeKey) -> None:
    path = write(key)
    (note,) = take_notes(key)
    assert note.guest == f"QEMU (pid {os.getpid()})"
    assert (note.pid, note.resumed, note.remedy) == (os.getpid(), True, None)
    assert "resumed QEMU" in note.text
    assert "the agent ended" in note.text
    assert not path.exists()
    assert take_notes(key) == []


def test_who_reads_a_note_hides_it_from_nobody(key: FreezeKey) -> None:
    path = write(key)
    with path.open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)  # as `all_notes` of another process does meanwhile
        assert len(all_notes()) == 1
    with path.open() as author:
        fcntl.flock(author, fcntl.LOCK_EX)
        assert all_notes() == []


@pytest.mark.asyncio
async def test_a_note_stays_until_the_guest_has_answered(tmp_path: Path) -> None:
    """Nobody answers at the socket, and then somebody hangs up: what the guard did is not told."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        target = UnixTarget(str(tmp_path / "s"))
        path = write(freeze_key(target, None))
        with pytest.raises(TargetUnreachable):
            async with attach(target):
                pass
        listener.listen()
        failing = asyncio.create_task(attach(target, deadline=5).__aenter__())
        theirs, _ = await asyncio.get_running_loop().sock_accept(unblocked(listener))
        theirs.close()
        with pytest.raises(TargetError):
            await failing
    assert path.exists()
    (note,) = take_notes(freeze_key(target, None))
    assert note.resumed


def unblocked(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    return sock


def test_one_that_was_not_resumed_has_a_remedy(key: FreezeKey) -> None:
    write(key, resumed=False, obstacle="the guest is internal-error")
    (note,) = take_notes(key)
    assert "could not resume" in note.text
    assert "internal-error" in note.text
    assert note.remedy is not None


def test_all_notes_stay_and_are_in_order(key: FreezeKey) -> None:
    now = time.monotonic_ns()
    for ago in (1, 3, 2):
        write(key, t_ns=now - ago)
    assert [now - n.t_ns for n in all_notes()] == [3, 2, 1]
    assert len(all_notes()) == 3


def test_other_guests_notes_are_not_taken(key: FreezeKey) -> None:
    other = FreezeKey("localhost:4444", "tcp-0123456789abcdef", None)
    path = write(other)
    assert take_notes(key) == []
    assert path.exists()
    (note,) = take_notes(other)
    assert (note.guest, note.pid) == ("localhost:4444", None)


@pytest.mark.parametrize(
    "changes", [{"start_ticks": 1}, {"pid": 1 << 30}, {"boot": "another"}, {"schema": 99}]
)
def test_notes_about_what_is_gone_are_removed(key: FreezeKey, changes: dict[str, object]) -> None:
    path = write(key, **changes)
    assert all_notes() == []
    assert not path.exists()


def test_what_is_no_note_is_removed_and_other_files_stay(key: FreezeKey, directory: Path) -> None:
    path = write(key)
    path.write_bytes(b'{"schema":')
    (directory / "1-2.lock").touch()
    assert take_notes(key) == []
    assert [p.name for p in directory.iterdir()] == ["1-2.lock"]


def test_a_symbolic_link_is_not_followed(key: FreezeKey, directory: Path) -> None:
    real = write(key)
    (directory / "secret").write_bytes(real.read_bytes())
    real.unlink()
    real.symlink_to(directory / "secret")
    assert take_notes(key) == []
    assert (directory / "secret").exists()


def test_without_a_directory_there_is_no_note(
    key: FreezeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_state_in(Path("/nowhere"), monkeypatch)
    assert new_note(key).path == ""
    assert take_notes(key) == all_notes() == []


@pytest.mark.timeout(20)
def test_odd_files_are_no_notes_and_do_not_make_us_wait(key: FreezeKey, directory: Path) -> None:
    kept = write(key)
    os.mkfifo(directory / f"{key.name}.guard-fifo")
    with (directory / f"{key.name}.guard-huge").open("wb") as file:
        file.truncate(40 << 30)
    (directory / f"{key.name}.guard-null").symlink_to("/dev/zero")
    assert len(all_notes()) == 1
    assert list(directory.iterdir()) == [kept]


def test_notes_in_another_directory_of_ours_are_found(key: FreezeKey, directory: Path) -> None:
    write(key)
    directory.rename(f"{directory}.0123456789abcdef")
    write(key)
    assert len(all_notes()) == 2
    assert len(take_notes(key)) == 2
    assert all_notes() == []


def test_each_note_has_a_name_of_its_own(key: FreezeKey) -> None:
    forms = [new_note(key), new_note(key)]
    assert len({form.path for form in forms}) == 2
    assert not all_notes(), "they are held"
    assert not unfinished()
    for form in forms:
        assert form.held is not None
        form.held.remove()


DEAD = {"agent": 1 << 30, "agent_start": 1}


@pytest.mark.parametrize("state", ["armed", "stopped"])
def test_a_pause_is_unfinished_when_agent_and_guard_are_dead(key: FreezeKey, state: str) -> None:
    write(key, state=state, **DEAD)
    (left,) = unfinished()
    assert [x.note for x in unfinished(key)] == [left.note]
    assert left.note.state == state
    assert all_notes() == take_notes(key) == []
    assert len(unfinished()) == 1, "it stays"


@pytest.mark.parametrize(
    ("state", "agent"), [("stopped", {}), ("armed", {}), ("idle", DEAD), ("over", DEAD)]
)
def test_other_notes_are_no_unfinished_pauses(
    key: FreezeKey, state: str, agent: dict[str, object]
) -> None:
    """The agent lives and resumes the guest itself, or nothing is promised."""
    path = write(key, state=state, **agent)
    assert unfinished() == []
    assert path.exists() == (state != "idle")


def test_what_a_guard_holds_is_nobody_elses(key: FreezeKey) -> None:
    form = new_note(key)
    assert form.held is not None
    with form.held as held:
        held.write(msgspec.json.encode({**form.content, **DEAD, "state": "stopped"}))
        assert unfinished() == []
    assert len(unfinished()) == 1
