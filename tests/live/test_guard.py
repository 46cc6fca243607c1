"""The resume guard on real QEMUs: random moments, other people's pauses, monitors, ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from qmp_memlistener.errors import OperationFailed, TargetUnreachable
from qmp_memlistener.guests import GuestSpec, QemuBuild, launch
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import Monitor, UnixTarget, find_guest
from qmp_memlistener.qmp.freeze import process_key
from qmp_memlistener.updates.model import UpdateRefused
from qmp_memlistener.updates.pause.guard import ResumeGuard, Settled
from qmp_memlistener.updates.pause.guard_notes import take_notes
from tests.support.live import QEMUS, builds
from tools.soak_guard import MODES, WAYS, Round, Watcher, gone, one_round, watched

pytestmark = pytest.mark.qemu

ENDS = QEMUS[:1] + QEMUS[-1:] if len(QEMUS) > 1 else QEMUS
MOMENTS = 9
MAX_PAUSE_S = 0.5


@asynccontextmanager
async def guarded(
    build: QemuBuild, max_pause_s: float = 2.0
) -> AsyncIterator[tuple[Watcher, Monitor, ResumeGuard]]:
    """A guest, an agent's connection to it, and a guard."""
    async with (
        watched(build, "tcg") as watcher,
        await Monitor.connect(UnixTarget(str(watcher.guest.monitors[0]))) as monitor,
        await ResumeGuard.start(
            [UnixTarget(str(watcher.guest.monitors[1]))], max_pause_s=max_pause_s
        ) as guard,
    ):
        yield watcher, monitor, guard


def notes_about(watcher: Watcher) -> list[str]:
    process = Process.read(watcher.guest.pid)
    assert process is not None
    return [note.text for note in take_notes(process_key(process))]


# -- random moments --------------------------------------------------------------------------


async def moments(build: QemuBuild, way: str) -> list[Round]:
    async with watched(build, "tcg") as watcher:
        return [
            await one_round(watcher, way, MAX_PAUSE_S, MODES[n % len(MODES)])
            for n in range(MOMENTS)
        ]


@builds(ENDS)
@pytest.mark.asyncio
async def test_the_guest_runs_again_whatever_becomes_of_the_agent(build: QemuBuild) -> None:
    async with asyncio.TaskGroup() as group:
        ways = {way: group.create_task(moments(build, way)) for way in WAYS}
    rounds = [r for task in ways.values() for r in task.result()]
    assert [r for r in rounds if r.wrong] == []
    assert any(r.paused for r in rounds)
    assert not any(r.acted for r in ways["guard"].result()), "a dead guard does nothing"
    for r in ways["guard"].result():
        assert "the resume guard" in r.said
        assert "has ended" in r.said
    for r in ways["cut"].result():
        assert "while the guest was being paused" in r.said


# -- pauses of others ------------------------------------------------------------------------


@builds(ENDS)
@pytest.mark.asyncio
async def test_what_somebody_else_stopped_stays_stopped(build: QemuBuild) -> None:
    async with guarded(build) as (watcher, monitor, guard):
        # before: there is nothing to guard
        await watcher.monitor.execute("stop")
        assert await guard.arm() == "paused"
        assert await guard.hand_over() is Settled.RUNS
        assert await watcher.status() == "paused"
        await watcher.monitor.execute("cont")
        # after our own pause, which the agent has not reported yet
        assert await guard.arm() == "running"
        await monitor.execute("stop")
        await monitor.execute("cont")
        await watcher.monitor.execute("stop")
        await guard.close()
        await gone(guard.pid)
        assert await watcher.status() == "paused"
        assert not guard.acted
    # (its QEMU has gone, and any note with it)


@builds(ENDS)
@pytest.mark.asyncio
async def test_a_pause_that_somebody_else_ended_and_began_anew_is_theirs(build: QemuBuild) -> None:
    async with guarded(build, MAX_PAUSE_S) as (watcher, monitor, guard):
        assert await guard.arm() == "running"
        await monitor.execute("stop")
        await watcher.monitor.execute("cont")
        await watcher.monitor.execute("stop")
        await asyncio.sleep(MAX_PAUSE_S * 1.5)  # longer than we may pause it; they may
        assert await watcher.status() == "paused"
        await guard.close()
        assert await gone(guard.pid)
        assert await watcher.status() == "paused"
        assert notes_about(watcher) == []


# -- what the guard does ---------------------------------------------------------------------


@builds(ENDS)
@pytest.mark.asyncio
async def test_an_agent_that_only_closes_its_guard_leaves_no_paused_guest(build: QemuBuild) -> None:
    async with guarded(build) as (watcher, monitor, guard):
        await guard.arm()
        await monitor.execute("stop")
        await guard.close()
        assert await gone(guard.pid)
        assert await watcher.status() == "running"
        (note,) = notes_about(watcher)
        assert f"the agent (pid {os.getpid()}) closed its guard" in note


@builds(ENDS)
@pytest.mark.asyncio
async def test_a_long_pause_is_ended_and_told(build: QemuBuild) -> None:
    async with guarded(build, MAX_PAUSE_S) as (watcher, monitor, guard):
        await guard.arm()
        resumed = asyncio.Event()
        unsubscribe = monitor.subscribe(lambda e: resumed.set() if e.name == "RESUME" else None)
        await monitor.execute("stop")
        await asyncio.wait_for(resumed.wait(), 10)
        unsubscribe()
        await watcher.status()  # its connection has told the events, too
        assert watcher.resumed_ns - watcher.stopped_ns > MAX_PAUSE_S * 0.9 * 1e9
        await guard.release()
        assert guard.acted
        assert "more than 0.5 s" in guard.why
        assert notes_about(watcher) == [], "who hears it needs no note"
        # and the next pause is guarded as well
        assert await guard.arm() == "running"
        await monitor.execute("stop")
        assert await guard.hand_over() is Settled.RESUMED
        assert await watcher.status() == "running"


@builds(ENDS)
@pytest.mark.asyncio
async def test_it_ends_with_qemu(build: QemuBuild) -> None:
    async with guarded(build) as (watcher, monitor, guard):
        await guard.arm()
        await monitor.execute("stop")
        os.kill(watcher.guest.pid, signal.SIGKILL)
        assert await gone(guard.pid)
        with pytest.raises(OperationFailed, match="has ended"):
            await guard.arm()


@builds(ENDS[-1:])
@pytest.mark.asyncio
async def test_ctrl_c_is_not_for_it(build: QemuBuild) -> None:
    async with guarded(build) as (watcher, _, guard):
        assert os.getsid(guard.pid) == guard.pid
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(guard.pid, number)
        assert await guard.arm() == "running"
        await guard.release()
        assert await watcher.status() == "running"


@builds(ENDS[-1:])
@pytest.mark.asyncio
async def test_a_guard_that_does_not_answer_lets_nothing_be_stopped(build: QemuBuild) -> None:
    async with guarded(build) as (_, _monitor, guard):
        os.kill(guard.pid, signal.SIGSTOP)
        with pytest.raises(OperationFailed, match="did not answer"):
            await guard.arm()
        os.kill(guard.pid, signal.SIGCONT)
        assert await guard.arm() == "running", "it took back what nobody waited for"
        await guard.release()


# -- its monitor -----------------------------------------------------------------------------


@builds(ENDS[-1:])
@pytest.mark.asyncio
async def test_without_a_free_monitor_nothing_is_touched(build: QemuBuild) -> None:
    async with launch(GuestSpec(accel="tcg", monitors=2, shared_memory=False).on(build)) as guest:
        targets = [UnixTarget(str(path)) for path in guest.monitors]
        async with await Monitor.connect(targets[0]), await Monitor.connect(targets[1]):
            for none in (targets, []):
                with pytest.raises(UpdateRefused, match="no free monitor") as caught:
                    await ResumeGuard.start(none)
                assert "start QEMU with another -qmp" in str(caught.value.remedy)
        with pytest.raises(TargetUnreachable):
            await ResumeGuard.start([UnixTarget(f"{targets[0].path}-none")])


@builds(ENDS[-1:])
@pytest.mark.asyncio
async def test_it_takes_the_first_monitor_that_is_free(build: QemuBuild) -> None:
    async with launch(GuestSpec(accel="tcg", monitors=2, shared_memory=False).on(build)) as guest:
        targets = [UnixTarget(str(path)) for path in guest.monitors]
        async with (
            await Monitor.connect(targets[0]),
            await ResumeGuard.start(targets) as guard,
        ):
            assert guard.target == targets[1]
            assert guard.identity.pid == guest.pid
            owner = find_guest(guest.pid)
            assert owner is not None
            assert owner.free_targets() == ()
        # both are free again
        async with await Monitor.connect(targets[1]):
            pass
