"""STOP and RESUME of real guests as windows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from qmp_memlistener.guests import GuestSpec, QemuBuild, launch
from qmp_memlistener.probes import Context, ProbeUnavailable, StallKind
from qmp_memlistener.probes.runstate import RunStateProbe
from qmp_memlistener.qmp import Monitor
from tests.support.live import QEMUS, builds, qmp
from tests.support.probes import Recorder, at_work, guest_context

pytestmark = pytest.mark.qemu

MS = 1_000_000


@asynccontextmanager
async def machine(build: QemuBuild, *args: str) -> AsyncIterator[tuple[Context, Monitor]]:
    """A guest without firmware to speak of; a monitor for what the test does to it."""
    spec = GuestSpec(machine="none", accel="tcg", shared_memory=False, args=args)
    async with (
        launch(spec.on(build)) as guest,
        guest_context(guest) as context,
        qmp(guest.monitors[1]) as monitor,
    ):
        yield context, monitor


@builds()
@pytest.mark.asyncio
async def test_each_pause_is_between_its_two_commands(build: QemuBuild) -> None:
    """To a few microseconds: what QEMU's own stamps leave open."""
    async with machine(build) as (context, monitor):
        probe = RunStateProbe(context)
        bounds = []
        async with at_work(probe) as recorder:
            for wait in (0.0, 0.001, 0.01, 0.1):
                stop = await monitor.timed("stop")
                await asyncio.sleep(wait)
                cont = await monitor.timed("cont")
                bounds.append((stop, cont))
            asked = time.monotonic_ns()
            await probe.flush()
            assert recorder.reached["runstate"] >= asked
            assert len(recorder.observations) == len(bounds)
        assert len(recorder.observations) == len(bounds)
        recorder.check_nothing_wrong()
        for seen, (stop, cont) in zip(recorder.observations, bounds, strict=True):
            assert seen.kind is StallKind.VCPU_PAUSE
            assert stop.t_start_ns - 10_000 <= seen.start_ns <= stop.t_end_ns
            assert cont.t_start_ns <= seen.end_ns <= cont.t_end_ns + 10_000
            assert seen.at_least_ns <= cont.t_end_ns - stop.t_start_ns
            assert seen.at_most_ns >= cont.t_start_ns - stop.t_end_ns
            assert seen.at_most_ns - seen.at_least_ns < MS


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_a_guest_that_was_stopped_before(build: QemuBuild) -> None:
    """It is reported when it resumes, from when the probe began; otherwise not at all."""
    async with machine(build, "-S") as (context, monitor):
        async with at_work(RunStateProbe(context)) as recorder:
            pass
        assert recorder.observations == []
        start = time.monotonic_ns()
        probe = RunStateProbe(context)
        async with at_work(probe) as recorder:
            began = time.monotonic_ns()
            await asyncio.sleep(0.05)
            await monitor.execute("cont")
            await probe.flush()
            end = time.monotonic_ns()
            (seen,) = recorder.observations
            assert start <= seen.start_ns <= began
            assert 50 * MS <= seen.at_least_ns <= seen.at_most_ns <= end - start
            assert "before" in recorder.notes[0]
            # and from then on as any other
            await monitor.execute("stop")
            await monitor.execute("cont")
        assert len(recorder.observations) == 2
        assert len(recorder.notes) == 1


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_a_guest_that_is_still_stopped_at_the_end(build: QemuBuild) -> None:
    async with machine(build) as (context, monitor):
        probe = RunStateProbe(context)
        async with at_work(probe) as recorder:
            stop = await monitor.timed("stop")
            await asyncio.sleep(0.05)
            asked = time.monotonic_ns()
        (seen,) = recorder.observations
        assert seen.end_ns >= asked
        assert seen.at_least_ns >= asked - stop.t_end_ns - MS
        assert seen.at_most_ns <= time.monotonic_ns() - stop.t_start_ns + MS
        assert "still stopped" in recorder.notes[0]
        await probe.stop()
        assert len(recorder.observations) == 1


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_a_guest_that_dies_while_it_is_stopped(build: QemuBuild) -> None:
    async with machine(build) as (context, monitor):
        probe = RunStateProbe(context)
        async with at_work(probe) as recorder:
            stop = await monitor.timed("stop")
            await asyncio.sleep(0.3)
            assert context.guest is not None
            quit_ = asyncio.create_task(monitor.execute("quit"))
            await context.monitor.lost
            gone = time.monotonic_ns()
            await asyncio.wait({quit_})
            await asyncio.sleep(0.3)
            await probe.flush()
        (seen,) = recorder.observations
        assert seen.end_ns <= gone
        assert seen.at_least_ns > 50 * MS
        assert stop.t_start_ns - 10_000 <= seen.start_ns
        with pytest.raises(ProbeUnavailable):
            await RunStateProbe(context).start(Recorder())


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_without_the_process_only_the_stamps_tell(build: QemuBuild) -> None:
    """As for a guest on another host: how long is exact, when is not."""
    async with machine(build) as (context, monitor):
        probe = RunStateProbe(replace(context, pid=None, guest=None))
        async with at_work(probe) as recorder:
            await monitor.execute("stop")
            await asyncio.sleep(0.05)
            await monitor.execute("cont")
        (seen,) = recorder.observations
        assert 45 * MS < seen.at_least_ns <= seen.at_most_ns < seen.at_least_ns + MS


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_progress_is_told_without_being_asked(build: QemuBuild) -> None:
    async with machine(build) as (context, _), at_work(RunStateProbe(context)) as recorder:
        start = time.monotonic_ns()
        await recorder.wait_for(lambda: recorder.reached.get("runstate", 0) > start)
