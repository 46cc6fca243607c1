"""Commands and blocks of code around which a real guest is paused."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from qmp_memlistener.errors import CommandFailed, OperationFailed, TargetLost, WrongGuest
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import Command, Monitor, Reply, UnixTarget
from qmp_memlistener.updates.pause import Pause, paused_guest, run_paused
from qmp_memlistener.updates.pause.guard import ResumeGuard
from tests.support.live import QEMUS, builds
from tools.soak_guard import Watcher, gone, watched

pytestmark = pytest.mark.qemu

ENDS = QEMUS[:1] + QEMUS[-1:] if len(QEMUS) > 1 else QEMUS
DEADLINE_S = 10.0
STATUS = Command("query-status")
BACKEND = {"qom-type": "memory-backend-ram", "id": "m", "size": 4 << 20}
ADD, DELETE = Command("object-add", BACKEND), Command("object-del", {"id": "m"})

each_way = pytest.mark.parametrize("pipelined", [True, False], ids=["one write", "steps"])


@asynccontextmanager
async def ready(
    build: QemuBuild, max_pause_s: float = 2.0, guard_type: type[ResumeGuard] = ResumeGuard
) -> AsyncIterator[tuple[Watcher, Monitor, ResumeGuard]]:
    """A guest, a connection to it, and a guard."""
    async with (
        watched(build, "tcg") as watcher,
        await Monitor.connect(UnixTarget(str(watcher.guest.monitors[0]))) as monitor,
        await guard_type.start(
            [UnixTarget(str(watcher.guest.monitors[1]))], max_pause_s=max_pause_s
        ) as guard,
    ):
        yield watcher, monitor, guard


async def run(
    monitor: Monitor, guard: ResumeGuard, *commands: Command, pipelined: bool = True
) -> Pause:
    return await run_paused(monitor, guard, commands, deadline=DEADLINE_S, pipelined=pipelined)


def status_in(reply: Reply | CommandFailed) -> object:
    assert isinstance(reply, Reply)
    assert isinstance(reply.value, dict)
    return reply.value["status"]


@each_way
@builds(ENDS)
@pytest.mark.asyncio
async def test_the_guest_stands_still_for_the_commands_only(
    build: QemuBuild, pipelined: bool
) -> None:
    async with ready(build) as (watcher, monitor, guard):
        result = await run(monitor, guard, STATUS, ADD, DELETE, pipelined=pipelined)
        assert status_in(result.replies[0]) == "paused"
        assert [type(r) for r in result.replies] == [Reply] * 3
        assert (result.status_before, result.paused_before) == ("running", False)
        assert (result.resumed, result.note, guard.acted) == (True, None, False)
        assert 0 < result.start_ns < result.end_ns
        assert await watcher.status() == "running"


@each_way
@builds(ENDS)
@pytest.mark.asyncio
async def test_a_command_that_fails_keeps_nothing_paused(build: QemuBuild, pipelined: bool) -> None:
    async with ready(build) as (watcher, monitor, guard):
        result = await run(monitor, guard, DELETE, ADD, DELETE, pipelined=pipelined)
        assert [type(r) for r in result.replies] == [CommandFailed, Reply, Reply]
        assert (result.resumed, result.note) == (True, None)
        assert await watcher.status() == "running"


@each_way
@builds(ENDS)
@pytest.mark.asyncio
async def test_a_guest_that_was_paused_stays_paused(build: QemuBuild, pipelined: bool) -> None:
    async with ready(build) as (watcher, monitor, guard):
        await watcher.monitor.execute("stop")
        result = await run(monitor, guard, STATUS, pipelined=pipelined)
        assert status_in(result.replies[0]) == "paused"
        assert (result.status_before, result.paused_before) == ("paused", True)
        assert not result.resumed
        assert not watcher.resumed_ns
        assert await watcher.status() == "paused"


class Overtaken(ResumeGuard):
    """Somebody else stops the guest right after this guard was armed."""

    async def arm(self, *, held: bool = True) -> str:
        status = await super().arm(held=held)
        path = str(self.target).removeprefix("unix:").replace("qmp1", "qmp0")
        await OTHERS[path].execute("stop")
        return status


OTHERS: dict[str, Monitor] = {}


@each_way
@builds(ENDS)
@pytest.mark.asyncio
async def test_one_that_is_stopped_in_the_last_moment_is_stopped_again(
    build: QemuBuild, pipelined: bool
) -> None:
    async with ready(build, guard_type=Overtaken) as (watcher, monitor, guard):
        path = str(watcher.guest.monitors[0])
        OTHERS[path] = watcher.monitor
        try:
            result = await run(monitor, guard, STATUS, pipelined=pipelined)
        finally:
            del OTHERS[path]
        assert (result.status_before, result.paused_before) == ("paused", True)
        assert not result.resumed
        if pipelined:
            assert result.note == "the guest was paused before our stop; it is again"
        await guard.close()
        assert await gone(guard.pid)
        assert await watcher.status() == "paused"


@builds(ENDS)
@pytest.mark.asyncio
async def test_a_cancelled_run_leaves_a_running_guest(build: QemuBuild) -> None:
    async with ready(build) as (watcher, monitor, guard):
        for n in range(20):
            task = asyncio.create_task(
                run(monitor, guard, ADD, STATUS, DELETE, pipelined=bool(n % 2))
            )
            await asyncio.sleep(random.uniform(0, 0.004))
            task.cancel()
            await asyncio.wait((task,))
            assert await watcher.status() == "running"
            await monitor.pipeline([DELETE])  # steps may have been cut off before it
        assert not guard.acted
        assert (await run(monitor, guard, ADD, DELETE)).note is None, "and all is as before"


@builds(ENDS)
@pytest.mark.asyncio
async def test_a_block_is_paused_and_ends_running(build: QemuBuild) -> None:
    async with ready(build) as (watcher, monitor, guard):
        async with paused_guest(monitor, guard, deadline=DEADLINE_S) as pause:
            assert await watcher.status() == "paused"
            assert (pause.status_before, pause.is_over) == ("running", False)
        assert await watcher.status() == "running"
        assert (pause.resumed, pause.note) == (True, None)
        assert pause.start_ns < pause.end_ns
        with pytest.raises(ZeroDivisionError):
            async with paused_guest(monitor, guard, deadline=DEADLINE_S):
                raise ZeroDivisionError
        assert await watcher.status() == "running"


@builds(ENDS)
@pytest.mark.asyncio
async def test_a_block_that_takes_too_long_runs_on_with_a_running_guest(build: QemuBuild) -> None:
    async with ready(build, max_pause_s=0.1) as (watcher, monitor, guard):
        resumed = asyncio.Event()
        monitor.subscribe(lambda e: resumed.set() if e.name == "RESUME" else None)
        async with paused_guest(monitor, guard, deadline=DEADLINE_S) as pause:
            await asyncio.wait_for(resumed.wait(), 10)
            assert pause.is_over
            # what somebody else does from now on is not ours to undo
            await watcher.monitor.execute("stop")
        assert await watcher.status() == "paused"
        assert guard.acted
        assert pause.note == "the resume guard resumed the guest: it was paused for more than 0.1 s"


@builds(ENDS)
@pytest.mark.asyncio
async def test_an_update_longer_than_allowed_still_ends_running(build: QemuBuild) -> None:
    """QEMU's main loop is blocked by it: the guard's `cont` waits in the queue like ours."""
    long = Command("object-add", {**BACKEND, "size": 96 << 20, "prealloc": True})
    async with ready(build, max_pause_s=0.005) as (watcher, monitor, guard):
        result = await run(monitor, guard, long, DELETE)
        assert [type(r) for r in result.replies] == [Reply] * 2
        assert result.resumed
        assert await watcher.status() == "running"
        result = await run(monitor, guard)
        assert result.resumed


@builds(ENDS[-1:])
@pytest.mark.asyncio
async def test_without_a_guard_nothing_is_stopped(build: QemuBuild) -> None:
    async with ready(build) as (watcher, monitor, guard):
        os.kill(guard.pid, signal.SIGKILL)
        with pytest.raises(OperationFailed, match="guard"):
            await run(monitor, guard, ADD)
        with pytest.raises(OperationFailed, match="guard"):
            async with paused_guest(monitor, guard, deadline=DEADLINE_S):
                pass
        assert not watcher.stopped_ns
        assert isinstance((await monitor.pipeline([DELETE]))[0], CommandFailed), "nor was it added"


@builds(ENDS[-1:])
@pytest.mark.asyncio
async def test_a_guard_of_another_guest_is_refused(build: QemuBuild) -> None:
    async with ready(build) as (_, monitor, _guard), watched(build, "tcg") as other:
        target = UnixTarget(str(other.guest.monitors[1]))
        async with await ResumeGuard.start([target]) as guard:
            with pytest.raises(WrongGuest, match=f"pid {other.guest.pid}"):
                await run(monitor, guard, ADD)


@builds(ENDS[-1:])
@pytest.mark.asyncio
async def test_a_qemu_that_dies_is_told(build: QemuBuild) -> None:
    async with ready(build) as (watcher, monitor, guard):

        async def kill_it() -> None:
            async with paused_guest(monitor, guard, deadline=DEADLINE_S):
                os.kill(watcher.guest.pid, signal.SIGKILL)
                await monitor.lost

        with pytest.raises(TargetLost, match="while the guest was being paused"):
            await kill_it()
        assert await gone(guard.pid)


@builds(ENDS)
@pytest.mark.asyncio
async def test_one_write_pauses_shorter_than_steps(build: QemuBuild) -> None:
    async with ready(build) as (_, monitor, guard):
        took: dict[bool, list[int]] = {True: [], False: []}
        for n in range(60):
            way = bool(n % 2)
            result = await run(monitor, guard, STATUS, pipelined=way)
            took[way].append(result.end_ns - result.start_ns)
        assert statistics.median(took[True]) < statistics.median(took[False])
