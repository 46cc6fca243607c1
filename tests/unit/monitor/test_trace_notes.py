"""Notes and leases: what survives a crash, and who may restore."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_memlistener.errors import DeadlineExceeded
from qmp_memlistener.host.processes import Process
from qmp_memlistener.monitor import TraceReason, TraceUnavailable, private_dir
from qmp_memlistener.monitor.trace_notes import LogChange, Place, sweep


@pytest.fixture(autouse=True)
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(private_dir, "SHM", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for QEMU."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def place(sleeper: subprocess.Popen[bytes]) -> Place:
    process = Process.read(sleeper.pid)
    assert process is not None
    return Place(process)


def test_a_note_is_read_back_as_written(place: Place) -> None:
    assert place.read_note() is None
    note = place.new_note({"runstate_set": True, "flatview_new": False})
    place.write_note(note)
    assert place.read_note() == note
    assert stat.S_IMODE(os.stat(place.directory).st_mode) == 0o700
    assert note.path == ""
    changed = place.new_note({})
    changed = type(note)(1, note.boot, 1, 2, {}, LogChange("/l", "/dev/stderr", True))
    place.write_note(changed)
    assert place.read_note() == changed
    assert changed.path == "/l"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"schema":1}', b"\xff"])
def test_a_note_that_is_none(place: Place, text: bytes) -> None:
    place.write_note(place.new_note({}))
    Path(place.directory, "note.json").write_bytes(text)
    assert place.read_note() is None


def test_a_note_of_another_boot_does_not_count(place: Place) -> None:
    note = place.new_note({"runstate_set": True})
    place.write_note(type(note)(1, "another boot", note.pid, note.start_ticks, note.events))
    assert place.read_note() is None


def test_a_note_of_a_later_version_is_respected(place: Place) -> None:
    note = place.new_note({})
    place.write_note(type(note)(2, note.boot, note.pid, note.start_ticks, {}))
    with pytest.raises(TraceUnavailable) as refused:
        place.read_note()
    assert refused.value.reason is TraceReason.OTHER_AGENT
    assert refused.value.exit_code == 4


def test_leases_live_with_their_owner(place: Place) -> None:
    assert place.live_events() == []
    one = place.claim(["a", "b"], 10)
    two = place.claim(["c"], 5)
    assert sorted(map(sorted, place.live_events())) == [["a", "b"], ["c"]]
    assert place.live_events(but=one) == [{"c"}]
    assert place.lowest_position(100) == 5
    two.set_position(50)
    assert place.lowest_position(100) == 10
    one.release()
    one.release()
    assert place.live_events() == [{"c"}]
    two.release()
    assert place.live_events() == []
    assert place.lowest_position(100) == 100


AGENT = """
import os, sys
from qmp_memlistener.monitor import private_dir
from qmp_memlistener.monitor import trace_notes as notes
from qmp_memlistener.host.processes import Process
private_dir.SHM = sys.argv[1]
lease = notes.Place(Process.read(int(sys.argv[2]))).claim(["x"], 0)
print("claimed", flush=True)
input()
"""


def test_a_killed_agent_has_no_lease(
    place: Place, sleeper: subprocess.Popen[bytes], shm: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, str(shm), str(sleeper.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"claimed\n"
        assert place.live_events() == [{"x"}]
        agent.kill()
        agent.wait()
        assert place.live_events() == []
        assert not [n for n in os.listdir(place.directory) if n.startswith("agent-")]


@pytest.mark.asyncio
async def test_one_at_a_time(place: Place) -> None:
    async with place.locked(1):
        with pytest.raises(DeadlineExceeded):
            async with place.locked(0.05):
                pass
    async with place.locked(0.05):
        pass
    assert os.listdir(place.base) == []


@pytest.mark.asyncio
async def test_the_lock_is_handed_on(place: Place) -> None:
    order: list[str] = []
    entered = asyncio.Event()

    async def first() -> None:
        async with place.locked(1):
            entered.set()
            await asyncio.sleep(0.05)
            order.append("first")

    async def second() -> None:
        await entered.wait()
        async with place.locked(1):
            order.append("second")

    async with asyncio.TaskGroup() as group:
        group.create_task(first())
        group.create_task(second())
    assert order == ["first", "second"]


def test_clear_removes_everything(place: Place) -> None:
    place.write_note(place.new_note({}))
    lease = place.claim([], 0)
    Path(place.log_path).touch()
    lease.release()
    place.clear()
    assert os.listdir(place.base) == []


def test_sweep_removes_only_what_belongs_to_the_dead(
    place: Place, sleeper: subprocess.Popen[bytes]
) -> None:
    place.write_note(place.new_note({}))
    Path(place.base, "999999999-1").mkdir()
    Path(place.base, "999999999-1.live").touch()
    Path(place.base, f"{sleeper.pid}-1").mkdir()
    Path(place.base, "unrelated").mkdir()
    assert sweep() == 2
    assert sorted(os.listdir(place.base)) == sorted([place.key, "unrelated"])
    sleeper.kill()
    sleeper.wait()
    assert sweep() == 1
    assert os.listdir(place.base) == ["unrelated"]


def test_a_directory_that_others_may_write_is_not_used(
    sleeper: subprocess.Popen[bytes], shm: Path
) -> None:
    process = Process.read(sleeper.pid)
    assert process is not None
    base = shm / f"qmp-memlistener-{os.geteuid()}"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(TraceUnavailable) as refused:
        Place(process)
    assert refused.value.reason is TraceReason.NO_PLACE
    base.rmdir()
    base.symlink_to(shm)
    with pytest.raises(TraceUnavailable):
        Place(process)
    assert sweep() == 0
