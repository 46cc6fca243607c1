"""Several agents that trace one QEMU, agents that are killed or cancelled, a QEMU that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import TRACE_EVENTS, Monitor, UnixTarget, restore_stale, start_tracing
from tests.support.bare_qemu import running
from tests.support.host import patience
from tests.support.leftovers import left_behind
from tests.support.live import NO_QEMU, QEMUS, builds
from tests.support.tracing import check_traced, read_until_marker, states, steps, toggle_pam

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
]


AGENT = """
import asyncio, sys
from qmp_memlistener.qmp import Monitor, UnixTarget, start_tracing
async def main():
    monitor = await Monitor.connect(UnixTarget(sys.argv[1]))
    session = await start_tracing(monitor)
    print(session.path, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@asynccontextmanager
async def agent_process(
    target: UnixTarget,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Another agent, in a process of its own, that traces; and the path of its log."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, target.path),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            path = (await process.stdout.readline()).decode().strip()
        yield process, path
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.asyncio
@builds()
@pytest.mark.parametrize("then", ["restore", "trace"])
async def test_a_killed_agent_is_cleaned_up_after(
    build: QemuBuild, tmp_path: Path, then: str
) -> None:
    async with running(build, tmp_path) as qemu, await Monitor.connect(qemu.b) as monitor:
        before = await states(monitor)
        async with agent_process(qemu.a) as (agent, path):
            assert path
            assert await states(monitor) != before
            # As long as it lives, nobody restores behind its back.
            assert await restore_stale(monitor) is None
            agent.send_signal(signal.SIGKILL)
            await agent.wait()
        assert await states(monitor) != before
        assert left_behind(qemu.pid)
        if then == "restore":
            restored = await restore_stale(monitor)
            assert restored is not None
            assert restored.log == "/dev/stderr"
            assert set(restored.events) >= set(TRACE_EVENTS) & before.keys()
        else:
            async with await start_tracing(monitor) as session:
                assert not session.shared
                await check_traced(qemu, session, "tcg")
        assert await states(monitor) == before
        assert left_behind(qemu.pid) == []
        assert await restore_stale(monitor) is None


@pytest.mark.asyncio
@builds()
async def test_two_agents_share_the_log(build: QemuBuild, tmp_path: Path) -> None:
    async with (
        running(build, tmp_path) as qemu,
        await Monitor.connect(qemu.a) as a,
        await Monitor.connect(qemu.b) as b,
    ):
        before = await states(a)
        one = await start_tracing(a, ["flatview_new", "runstate_set"])
        two = await start_tracing(b, ["flatview_new", "vm_state_notify"])
        assert (one.shared, two.shared) == (False, True)
        assert one.path == two.path
        async with one.tail() as first, two.tail() as second:
            await toggle_pam(qemu, 2)
            seen = [steps(await read_until_marker(t, s)) for t, s in ((first, one), (second, two))]
            assert seen[0] == seen[1] != []
            left = await one.stop()
            assert set(left.events) == {"runstate_set"}
            assert left.log is None
            await toggle_pam(qemu, 1)
            assert steps(await read_until_marker(second, two)) == seen[1][: len(seen[1]) // 2]
        assert (await two.stop()).log == "/dev/stderr"
        assert await states(a) == before
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
async def test_an_agent_beside_one_that_is_killed(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.b) as monitor:
        before = await states(monitor)
        async with agent_process(qemu.a) as (agent, path):
            session = await start_tracing(monitor)
            assert session.shared
            assert session.path == path
            agent.send_signal(signal.SIGKILL)
            await agent.wait()
            await check_traced(qemu, session, "tcg")
            assert (await session.stop()).log == "/dev/stderr"
        assert await states(monitor) == before
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
async def test_a_lost_monitor_is_replaced_for_restoring(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu:
        monitor = await Monitor.connect(qemu.a)
        before = await states(monitor)
        session = await start_tracing(monitor)
        await monitor.close()
        restored = await session.stop()
        assert restored.remarks == ()
        async with await Monitor.connect(qemu.b) as other:
            assert await states(other) == before
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
async def test_qemu_dies_while_it_is_traced(tmp_path: Path) -> None:
    async with (
        running(QEMUS[0], tmp_path) as qemu,
        await Monitor.connect(qemu.a) as monitor,
        await start_tracing(monitor) as session,
        session.tail() as tail,
    ):
        await toggle_pam(qemu, 50)
        os.kill(qemu.pid, signal.SIGKILL)
        await monitor.lost
        tail.finish()
        async with asyncio.timeout(patience(5)):
            records = [r async for batch in tail for r in batch.records]
        seen = steps(records)
        assert seen == seen[: len(seen) // 50] * 50 != []
        await session.stop()
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
async def test_cancelling_a_start_anywhere_restores(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        before = await states(monitor)
        guest = qemu.guest()
        loop = asyncio.get_running_loop()
        started = loop.time()
        await (await start_tracing(monitor, guest=guest)).stop()
        whole = loop.time() - started
        cancelled = 0
        for part in range(60):
            task = asyncio.create_task(start_tracing(monitor, guest=guest))
            handle = loop.call_later(whole * part / 50, task.cancel)
            try:
                await (await task).stop()
            except asyncio.CancelledError:
                cancelled += 1
            handle.cancel()
            assert await states(monitor) == before
            assert left_behind(qemu.pid) == []
        assert cancelled
