"""Notes and leases: what survives a crash, and who may restore."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.errors import DeadlineExceeded
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import TraceReason, TraceUnavailable
from qmp_memlistener.qmp.trace_notes import LAG_LIMIT, Place, Redirection, sweep
from tests.support.own_state import SCRIPT, keep_state_in


@pytest.fixture(autouse=True)
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    keep_state_in(tmp_path, monkeypatch)
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
    assert stat.S_IMODE(os.stat(place.path).st_mode) == 0o700
    assert note.path == ""
    changed = place.new_note({})
    log = Redirection(path="/l", restore_path="/dev/stderr", kept=True)
    changed = msgspec.structs.replace(note, pid=1, start_ticks=2, events={}, log=log)
    place.write_note(changed)
    assert place.read_note() == changed
    assert changed.path == "/l"


def test_a_dead_or_a_stopped_agent_does_not_keep_what_it_has_not_read(place: Place) -> None:
    here = place.claim(["a"], 100)
    script = SCRIPT + (
        "from qmp_memlistener.host.processes import Process\n"
        "from qmp_memlistener.qmp.trace_notes import Place\n"
        f"place = Place(Process.read({place.process.pid}))\n"
        "lease = place.claim(['b'], 10)\n"
        "print('claimed', flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        (sys.executable, "-c", script), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        assert place.lowest_position(100) == 10
        assert place.lowest_position(LAG_LIMIT + 5) == 10
        # it lives, but does not read
        assert place.lowest_position(LAG_LIMIT + 1000) == 1000
        other.kill()
        other.wait()
        here.set_position(100)
        assert place.lowest_position(100) == 100
    here.release()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"schema":1}', b"\xff"])
def test_a_note_that_is_none(place: Place, text: bytes) -> None:
    place.write_note(place.new_note({}))
    Path(place.path, "note.json").write_bytes(text)
    assert place.read_note() is None


def test_a_note_of_another_boot_does_not_count(place: Place) -> None:
    note = place.new_note({"runstate_set": True})
    place.write_note(msgspec.structs.replace(note, boot="another boot"))
    assert place.read_note() is None


def test_a_note_of_a_later_version_is_respected(place: Place) -> None:
    note = place.new_note({})
    place.write_note(msgspec.structs.replace(note, schema=2))
    with pytest.raises(TraceUnavailable) as refused:
        place.read_note()
    assert refused.value.reason is TraceReason.OTHER_AGENT
    assert refused.value.exit_code == 4


def test_leases_live_with_their_owner(place: Place) -> None:
    assert place.live_events() == []
    one = place.claim(["a", "b"], 10)
    two = place.claim(["c"], 5)
    assert sorted(map(sorted, place.live_events())) == [["a", "b"], ["c"]]
    assert place.lowest_position(100) == 5
    two.set_position(50)
    assert place.lowest_position(100) == 10
    one.release()
    one.release()
    assert place.live_events() == [{"c"}]
    two.release()
    assert place.live_events() == []
    assert place.lowest_position(100) == 100


AGENT = f"""
{SCRIPT}
import sys
from qmp_memlistener.qmp import trace_notes as notes
from qmp_memlistener.host.processes import Process
lease = notes.Place(Process.read(int(sys.argv[1]))).claim(["x"], 0)
print("claimed", flush=True)
input()
"""


def test_a_killed_agent_has_no_lease(place: Place, sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, str(sleeper.pid)],
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
        assert not [n for n in os.listdir(place.path) if n.startswith("agent-")]


@pytest.mark.asyncio
async def test_one_at_a_time(place: Place) -> None:
    async with place.locked(1):
        with pytest.raises(DeadlineExceeded):
            async with place.locked(0.05):
                pass
    async with place.locked(0.05):
        pass
    assert os.listdir(os.path.dirname(place.path)) == []


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
    assert os.listdir(os.path.dirname(place.path)) == []


def test_sweep_removes_only_what_belongs_to_the_dead(
    place: Place, sleeper: subprocess.Popen[bytes]
) -> None:
    place.write_note(place.new_note({}))
    Path(os.path.dirname(place.path), "999999999-1").mkdir()
    Path(os.path.dirname(place.path), "999999999-1.live").touch()
    Path(os.path.dirname(place.path), f"{sleeper.pid}-1").mkdir()
    Path(os.path.dirname(place.path), "unrelated").mkdir()
    assert sweep() == 2
    assert sorted(os.listdir(os.path.dirname(place.path))) == sorted([place.key, "unrelated"])
    sleeper.kill()
    sleeper.wait()
    assert sweep() == 1
    assert os.listdir(os.path.dirname(place.path)) == ["unrelated"]


def test_a_directory_that_others_may_write_is_not_used(
    sleeper: subprocess.Popen[bytes], shm: Path
) -> None:
    process = Process.read(sleeper.pid)
    assert process is not None
    base = shm / f"qmp-memlistener-{os.geteuid()}"
    base.mkdir()
    base.chmod(0o777)
    (base / process.key).mkdir()
    (base / process.key / "note.json").write_text("{}")
    place = Place(process)
    assert place.path.startswith(f"{base}.")
    assert place.read_note() is None


def test_without_a_directory_there_is_no_place(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_state_in(Path("/nowhere"), monkeypatch)
    process = Process.read(sleeper.pid)
    assert process is not None
    with pytest.raises(TraceUnavailable) as refused:
        Place(process)
    assert refused.value.reason is TraceReason.NO_PLACE
    assert sweep() == 0


def test_a_place_is_found_where_an_earlier_run_had_it(place: Place, shm: Path) -> None:
    note = place.new_note({"runstate_set": True})
    place.write_note(note)
    base = Path(place.path).parent
    base.rename(f"{base}.0123456789abcdef")
    again = Place(place.process)
    assert again.read_note() == note
    assert again.path == f"{base}.0123456789abcdef/{place.key}"
    again.clear()
    assert not list(shm.glob("*/*"))


def odd_fifo(path: Path) -> None:
    os.mkfifo(path)


def odd_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


def odd_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def odd_directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("odd", [odd_fifo, odd_huge, odd_link, odd_directory])
@pytest.mark.timeout(20)
def test_odd_files_do_not_make_us_wait(place: Place, odd: Callable[[Path], None]) -> None:
    base = Path(place.path).parent
    place.write_note(place.new_note({}))
    os.unlink(base / place.key / "note.json")
    for name in (
        f"{place.key}.lock",
        f"{place.key}.live",
        *(f"{place.key}/{n}" for n in ("note.json", "note.json.new", "agent-1.json")),
        *(f"{place.key}/{n}" for n in ("agent-1.pos", "agent-2.pos", "trace.log")),
    ):
        odd(base / name)
    again = Place(place.process)
    assert again.read_note() is None
    assert again.live_events() == []

    async def use() -> None:
        async with again.locked(1):
            note = again.new_note({"runstate_set": True})
            again.write_note(note)
            assert again.read_note() == note
            lease = again.claim(["x"], 7)
            assert again.live_events() == [{"x"}]
            assert again.lowest_position(100) == 7
            os.close(again.create_log(limited=False)[0])
            assert os.stat(again.log_path).st_size == 0
            lease.release()
            again.clear()

    asyncio.run(use())
    assert os.listdir(base) == []
    assert sweep() == 0


def test_whatever_a_note_says_it_is_read_or_none(place: Place) -> None:
    """A bounded fuzz of notes and leases."""
    note = place.new_note({"runstate_set": True, "flatview_new": False})
    place.write_note(note)
    place.claim(["x"], 5)
    good = {p.name: p.read_bytes() for p in Path(place.path).iterdir()}
    dice = random.Random(2)
    for _ in range(400):
        for name, content in good.items():
            data = bytearray(content or b"12345678")
            for _ in range(dice.randrange(4)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            cut = data[: dice.randrange(len(data) + 1)] if dice.randrange(2) else data
            Path(place.path, name).write_bytes(cut)
        with contextlib.suppress(TraceUnavailable):  # of a later version
            found = place.read_note()
            assert found is None or found.boot == note.boot
        assert place.lowest_position(100) <= 100
        for events in place.live_events():
            assert all(isinstance(e, str) for e in events)
