"""The freeze: who sees it, who wins, what is left when its holder dies."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.errors import GuestFrozen, MissingPrerequisite
from qmp_memlistener.host import state
from qmp_memlistener.host.directory import set_lock
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import freeze
from qmp_memlistener.qmp.cmdline import parse_arguments
from qmp_memlistener.qmp.discovery import Guest
from qmp_memlistener.qmp.freeze import (
    FreezeKey,
    check_not_frozen,
    freeze_key,
    frozen_by,
    hold_freeze,
)
from qmp_memlistener.qmp.targets import PidTarget, parse_target
from tests.unit.qmp.freeze_support import (
    Holding,
    frozen_files,
    key_of,
    place,
    standing_in,
)


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with place(monkeypatch) as path:
        yield path


@pytest.fixture
def qemu() -> Iterator[subprocess.Popen[bytes]]:
    with standing_in() as process:
        yield process


@pytest.fixture
def key(qemu: subprocess.Popen[bytes]) -> FreezeKey:
    return key_of(qemu.pid)


# -- one holder ----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_freeze_lasts_as_long_as_the_block(shm: Path, key: FreezeKey) -> None:
    assert frozen_by(key) is None
    before = time.monotonic_ns()
    async with hold_freeze(key, "a control loop runs") as held:
        assert (held.key, held.remarks) == (key, ())
        holder = frozen_by(key)
        assert holder is not None
        assert (holder.pid, holder.uid) == (os.getpid(), os.geteuid())
        assert holder.reason == "a control loop runs"
        assert before <= holder.since_ns <= time.monotonic_ns()
        check_not_frozen(key)  # whoever froze it may go on
    assert frozen_by(key) is None
    assert frozen_files(shm) == []


@pytest.mark.asyncio
async def test_it_ends_with_an_exception_too(shm: Path, key: FreezeKey) -> None:
    with pytest.raises(ZeroDivisionError):
        async with hold_freeze(key, ""):
            raise ZeroDivisionError
    assert frozen_by(key) is None
    assert frozen_files(shm) == []


def test_another_process_is_refused(
    shm: Path, qemu: subprocess.Popen[bytes], key: FreezeKey
) -> None:
    with Holding(shm, qemu.pid) as holder:
        assert holder.go() == "held"
        with pytest.raises(GuestFrozen) as refused:
            check_not_frozen(key)
        assert re.fullmatch(
            rf"QEMU \(pid {qemu.pid}\) is frozen for real-time work by pid {holder.pid} "
            rf"\(uid {os.geteuid()}\) since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d: a control loop runs",
            refused.value.message,
        )
        assert refused.value.remedy
        assert refused.value.exit_code == 1
        holder.release()
        check_not_frozen(key)
    assert frozen_files(shm) == []


def test_nothing_holds_after_kill_9(
    shm: Path, qemu: subprocess.Popen[bytes], key: FreezeKey
) -> None:
    with Holding(shm, qemu.pid) as holder:
        assert holder.go() == "held"
        assert frozen_by(key) is not None
        holder.kill()
        assert len(frozen_files(shm)) == 1
        assert frozen_by(key) is None
        assert frozen_files(shm) == []
        check_not_frozen(key)
        with Holding(shm, qemu.pid) as other:
            assert other.go() == "held"


def test_looking_at_one_guest_sweeps_what_is_left_about_others(shm: Path, key: FreezeKey) -> None:
    with standing_in() as other:
        with Holding(shm, other.pid) as holder:
            assert holder.go() == "held"
            frozen_by(key)
            assert len(frozen_files(shm)) == 1
        frozen_by(key)
        assert frozen_files(shm) == []


def test_other_guests_are_not_frozen(shm: Path, qemu: subprocess.Popen[bytes]) -> None:
    with standing_in() as other, Holding(shm, qemu.pid) as holder:
        assert holder.go() == "held"
        assert frozen_by(key_of(other.pid)) is None
        # a longer pid must not be taken for this one, nor a process that had it before
        mine = key_of(qemu.pid)
        for name in (f"{qemu.pid}", f"{qemu.pid}-1", mine.name[:-1], f"{mine.name}0"):
            assert frozen_by(FreezeKey("?", name, None)) is None


# -- several -------------------------------------------------------------------------------------


def test_a_second_freeze_is_refused(shm: Path, qemu: subprocess.Popen[bytes]) -> None:
    with Holding(shm, qemu.pid) as first, Holding(shm, qemu.pid) as second:
        assert first.go() == "held"
        answer = second.go()
        assert answer.startswith("GuestFrozen QEMU ")
        assert f"by pid {first.pid} " in answer
        assert len(frozen_files(shm)) == 1


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("run", range(3))
def test_of_those_that_begin_at_once_one_wins(
    shm: Path, qemu: subprocess.Popen[bytes], count: int, run: int
) -> None:
    racers = [Holding(shm, qemu.pid) for _ in range(count)]
    try:
        for racer in racers[run % count :] + racers[: run % count]:
            racer.start()
        answers = [racer.answer() for racer in racers]
    finally:
        for racer in racers:
            racer.__exit__(None, None, None)
    assert sorted(a.split()[0] for a in answers) == ["GuestFrozen"] * (count - 1) + ["held"]


@pytest.mark.asyncio
async def test_within_a_process_one_wins_too(shm: Path, key: FreezeKey) -> None:
    """Also those that wait for others to give up: all show their claim before any has won."""
    ended = asyncio.Event()

    async def race() -> bool:
        try:
            async with hold_freeze(key, "race"):
                await ended.wait()
        except GuestFrozen:
            return False
        return True

    for _ in range(20):
        ended.clear()
        racers = [asyncio.create_task(race()) for _ in range(4)]
        done: set[asyncio.Task[bool]] = set()
        while len(done) < 3:
            done, _ = await asyncio.wait(racers, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            assert done
            await asyncio.sleep(0)
        ended.set()
        assert sum(await asyncio.gather(*racers)) == 1
    assert frozen_files(shm) == []


class Rival:
    """A claim of this process beside the one under test, with a token of its own."""

    def __init__(self, key: FreezeKey, token: str) -> None:
        self._stack = ExitStack()
        content = freeze._Content(os.getpid(), time.monotonic_ns(), "rival")
        with freeze._places(freeze.FreezeKey("", key.name, None)) as places:
            self.handle = freeze._claim_at(places[0], token, content, self._stack)

    def hold(self) -> None:
        set_lock(self.handle, fcntl.F_UNLCK, freeze._CLAIMED)

    def give_up(self) -> None:
        self._stack.close()


@pytest.mark.asyncio
async def test_of_two_claims_the_lower_one_waits(shm: Path, key: FreezeKey) -> None:
    rival = Rival(key, "~")  # higher than any pid
    assert frozen_by(key) is None  # a claim is no freeze

    async def hold() -> None:
        async with hold_freeze(key, ""):
            pass

    waiting = asyncio.create_task(hold())
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    rival.give_up()
    await asyncio.wait_for(waiting, 10)
    assert frozen_files(shm) == []


@pytest.mark.asyncio
async def test_of_two_claims_the_higher_one_gives_up(shm: Path, key: FreezeKey) -> None:
    rival = Rival(key, "!")
    with pytest.raises(GuestFrozen, match="rival"):
        async with hold_freeze(key, ""):
            pass
    assert len(frozen_files(shm)) == 1
    rival.give_up()


@pytest.mark.asyncio
async def test_a_claim_that_became_a_freeze_is_not_waited_for(shm: Path, key: FreezeKey) -> None:
    rival = Rival(key, "~")
    rival.hold()
    with pytest.raises(GuestFrozen, match="rival"):
        async with hold_freeze(key, ""):
            pass
    rival.give_up()
    assert frozen_files(shm) == []


@pytest.mark.asyncio
async def test_a_claim_that_gets_nowhere_is_not_waited_for_for_ever(
    shm: Path, key: FreezeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a process that was stopped with SIGSTOP."""
    monkeypatch.setattr(freeze, "_PATIENCE", 0.05)
    rival = Rival(key, "~")
    with pytest.raises(GuestFrozen):
        async with hold_freeze(key, ""):
            pass
    rival.give_up()
    assert frozen_files(shm) == []


@pytest.mark.asyncio
async def test_cancelled_while_it_waits(shm: Path, key: FreezeKey) -> None:
    rival = Rival(key, "~")
    entered = hold_freeze(key, "").__aenter__()
    waiting = asyncio.ensure_future(entered)
    await asyncio.wait([waiting], timeout=0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(frozen_files(shm)) == 1
    rival.give_up()
    assert frozen_files(shm) == []


# -- no place, odd contents ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_without_a_place_there_is_no_freeze(
    key: FreezeKey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(state, "SHM", str(tmp_path / "none"))
    assert frozen_by(key) is None
    check_not_frozen(key)
    with pytest.raises(MissingPrerequisite, match="no place for the lock") as refused:
        async with hold_freeze(key, ""):
            pass
    assert refused.value.remedy


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"pid":"x"}',
        b"\xff",
        b'{"pid":-1,"since_ns":-5,"reason":""}',
        b'{"pid":1e3,"since_ns":1,"reason":""}',
        b'{"pid":%d,"since_ns":%d,"reason":"\\u001b[2J\\n"}' % (10**30, 10**30),
        b'{"pid":1,"since_ns":1,"reason":"%s"}' % (b"x" * 100_000),
    ],
)
@pytest.mark.usefixtures("shm")
def test_a_holder_that_says_nonsense_holds_all_the_same(key: FreezeKey, content: bytes) -> None:
    rival = Rival(key, "x")
    rival.hold()
    os.ftruncate(rival.handle, 0)
    os.pwrite(rival.handle, content, 0)
    holder = frozen_by(key)
    assert holder is not None
    assert holder.uid == os.geteuid()
    text = str(holder)
    assert text.isprintable()
    assert len(text) < 300
    with pytest.raises(GuestFrozen):
        check_not_frozen(key)
    rival.give_up()


@pytest.mark.usefixtures("shm")
def test_a_process_that_is_gone_is_a_key_of_its_own() -> None:
    with standing_in() as process:
        key = key_of(process.pid)
    assert frozen_by(key) is None
    assert freeze_key(PidTarget(process.pid), None).name == f"gone-{process.pid}"


# -- keys ----------------------------------------------------------------------------------------


def guest(process: Process) -> Guest:
    line = parse_arguments("qemu-system-x86_64", ())
    return Guest(process, line, None, None, None, None, ())


def test_all_monitors_of_a_guest_have_one_key(qemu: subprocess.Popen[bytes]) -> None:
    process = Process.read(qemu.pid)
    assert process is not None
    keys = {
        freeze_key(parse_target(text), guest(process))
        for text in ("unix:/run/a", "unix:@b", "localhost:4444", f"pid:{qemu.pid}")
    }
    assert keys == {key_of(qemu.pid)}
    assert freeze_key(PidTarget(qemu.pid), None) in keys
    (one,) = keys
    assert one.owner == os.geteuid()
    assert one.name == one.inner_name == f"{qemu.pid}-{process.start_ticks}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("localhost:4444", "127.0.0.1:4444"),
        ("[2001:DB8:0:0::1]:4444", "[2001:db8::1]:4444"),
        ("Host.Example:4444", "tcp:host.example:4444"),
        ("unix:@name", "unix:@name"),
    ],
)
def test_one_address_has_one_key(one: str, other: str) -> None:
    names = {freeze_key(parse_target(text), None).name for text in (one, other)}
    assert len(names) == 1
    assert re.fullmatch(r"[a-z]+-[0-9a-f-]+", names.pop())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("localhost:4444", "localhost:4445"),
        ("10.0.0.1:1", "10.0.0.11:1"),
        ("unix:@name", "unix:@name2"),
        ("unix:/nonexistent/a", "unix:/nonexistent/b"),
    ],
)
def test_other_addresses_have_other_keys(one: str, other: str) -> None:
    assert freeze_key(parse_target(one), None).name != freeze_key(parse_target(other), None).name


def test_a_socket_is_known_by_what_it_is_and_not_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").touch()
    a, b, c = (freeze_key(parse_target(f"unix:{tmp_path}/{n}"), None) for n in "abc")
    assert a.name == b.name != c.name
    assert a.owner == os.geteuid()


@pytest.mark.usefixtures("shm")
@pytest.mark.asyncio
async def test_an_address_can_be_frozen() -> None:
    key = freeze_key(parse_target("10.0.0.1:4444"), None)
    async with hold_freeze(key, "") as held:
        assert held.remarks == ()
        holder = frozen_by(freeze_key(parse_target("tcp:10.0.0.1:4444"), None))
        assert holder is not None
        assert holder is not None
        assert msgspec.to_builtins(holder) == {
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "since_ns": holder.since_ns,
            "reason": "",
        }
    assert frozen_by(key) is None
