"""QEMUs that cannot be traced are left as they were; those of other users and containers can."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import (
    Monitor,
    TraceReason,
    TraceUnavailable,
    restore_stale,
    start_tracing,
    trace_control,
    trace_setup,
)
from tests.support.bare_qemu import running
from tests.support.leftovers import left_behind
from tests.support.live import NO_QEMU, QEMUS, builds
from tests.support.tracing import read_all, states, writing

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
]


@pytest.mark.asyncio
@builds()
@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ("/nonexistent/log", TraceReason.LOG_REFUSED),
        ("/dev/null", TraceReason.NOT_LOGGED),
    ],
)
async def test_a_log_that_qemu_does_not_write_to(
    build: QemuBuild,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    theirs: str,
    reason: TraceReason,
) -> None:
    """As with a QEMU that may not open our file, or whose trace backend is not the log."""

    @asynccontextmanager
    async def other_place(*_: object) -> AsyncIterator[str]:
        yield theirs

    monkeypatch.setattr(trace_setup, "open_to_qemu", other_place)
    reader, writer = os.pipe()
    async with running(build, tmp_path, stderr=writer) as qemu:
        os.close(writer)
        os.set_blocking(reader, False)
        async with await Monitor.connect(qemu.a) as monitor:
            before = await states(monitor)
            with pytest.raises(TraceUnavailable) as refused:
                await start_tracing(monitor)
            assert refused.value.reason is reason
            assert refused.value.remedy is not None
            assert await states(monitor) == before
            assert left_behind(qemu.pid) == []
            # 7.2 has no log at all after a file that it could not open: it is put back too.
            await monitor.execute("trace-event-set-state", {"name": "vm_state*", "enable": True})
            await monitor.execute("cont")
            assert b"vm_state_notify running 1" in read_all(reader)
    os.close(reader)


@pytest.mark.asyncio
async def test_a_log_per_thread_is_refused(tmp_path: Path) -> None:
    # With an event on, the main thread has its log open and writes the marker to it; the
    # lines of the vCPUs would go elsewhere.
    args = ("-d", "tid,guest_errors", "-D", f"{tmp_path}/log-%d", "-trace", "runstate_set")
    async with running(QEMUS[0], tmp_path, *args) as qemu, await Monitor.connect(qemu.a) as monitor:
        before = await states(monitor)
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor)
        assert refused.value.reason is TraceReason.LOG_PER_THREAD
        assert await states(monitor) == before
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
async def test_a_log_that_two_qemus_share_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    async with AsyncExitStack() as stack:
        with writing(tmp_path / "log") as log:
            start = stack.enter_async_context
            qemu = await start(running(QEMUS[0], tmp_path / "1", stderr=log))
            await start(running(QEMUS[0], tmp_path / "2", stderr=log))
        monitor = await stack.enter_async_context(await Monitor.connect(qemu.a))
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor)
        assert refused.value.reason is TraceReason.LOG_SHARED


@pytest.mark.asyncio
async def test_a_guest_whose_process_is_not_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_control, "find_owner", lambda *_: None)
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor)
        assert refused.value.reason is TraceReason.NO_PROCESS
        assert await restore_stale(monitor) is None


@pytest.mark.asyncio
async def test_another_users_agent_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root's agent is at work; to us, as any other user, its place is another one's."""
    if os.geteuid() != 0:
        pytest.skip("needs root to stand for two users")
    async with (
        running(QEMUS[0], tmp_path) as qemu,
        await Monitor.connect(qemu.a) as a,
        await Monitor.connect(qemu.b) as b,
    ):
        async with await start_tracing(a):
            monkeypatch.setattr(os, "geteuid", lambda: 65534)
            with pytest.raises(TraceUnavailable) as refused:
                await start_tracing(b)
            monkeypatch.undo()
            assert refused.value.reason is TraceReason.OTHER_AGENT
            assert refused.value.remedy is not None
        assert left_behind(qemu.pid) == []
