"""The pulse probe on running guests: every stall of a toggle is seen, where and as long as it was.

The guest notes the TSC of every register write; the test maps it to CLOCK_MONOTONIC by its own
measurement (`Pulse.calibrate`).  Thresholds are set low with `Pulse.reset`, by the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    PAM_RAM,
    GuestSpec,
    High,
    QemuBuild,
    ToggleWrite,
    TscClock,
    boot_args,
    launch,
)
from qmp_memlistener.probes import Observation, StallKind
from qmp_memlistener.probes.pulse import PulseProbe
from qmp_memlistener.qmp import (
    Monitor,
)
from tests.support.live import QEMUS, Vm, best_accel, booted, builds, cases
from tests.support.probes import Recorder, guest_context

pytestmark = pytest.mark.qemu

TOGGLES = 200
FEW = 40
ENOUGH = 0.95
LOW_US = {"kvm": 100, "tcg": 15}
"""Below what a toggle takes, above what beats take."""
HAS_CLOCK = "reports gaps above"
"""The threshold is reported once it is known in time."""


class Told(Recorder):
    """A sink that keeps gaps, and which of them came late."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps = self.observations
        self.lost_gaps = 0
        self.late: list[Observation] = []

    @property
    def complete_ns(self) -> int:
        return self.reached.get("pulse", 0)

    def observe(self, observations: list[Observation]) -> None:
        self.late += [o for o in observations if o.end_ns < self.complete_ns]
        super().observe(observations)

    def advance(self, probe: str, t_ns: int) -> None:
        assert t_ns >= self.complete_ns
        super().advance(probe, t_ns)

    def lost(self, probe: str, what: str, count: int | None = None) -> None:
        assert (probe, "gaps of CPU" in what) == ("pulse", True)
        assert count is not None
        self.lost_gaps += count

    def of(self, cpu: int) -> list[Observation]:
        return [o for o in self.gaps if o.thread == f"CPU {cpu}"]

    def said(self, text: str) -> bool:
        return any(text in note for note in self.notes)

    async def wait_note(self, text: str) -> None:
        await self.wait_for(lambda: self.said(text), 30)

    async def wait_gap(self, over_ns: int) -> Observation:
        def found() -> list[Observation]:
            return [gap for gap in self.gaps if gap.at_least_ns >= over_ns]

        await self.wait_for(lambda: bool(found()), 30)
        return found()[0]


@asynccontextmanager
async def probing(
    vm: Vm, *, started: bool = True
) -> AsyncIterator[tuple[PulseProbe, Told, Monitor]]:
    async with guest_context(vm.guest) as context:
        probe, told = PulseProbe(context), Told()
        assert (await probe.check()).usable
        if started:
            await probe.start(told)
            await told.wait_note(HAS_CLOCK)
            told.late.clear()  # gaps had to wait for the clock
        try:
            yield probe, told, context.monitor
        finally:
            await probe.stop()
            assert told.failures == []


async def calibrated(vm: Vm) -> TscClock:
    """A vCPU may have to wait long for its turn on a busy machine."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(OperationFailed):
                return await vm.pulse.calibrate(0.02)


class WriteClock:
    """TSC to CLOCK_MONOTONIC by the test's own measurements, one before and one after."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._points: list[tuple[int, int, int]] = []

    async def measure(self) -> None:
        """A point, as good as the machine gives one: a busy one needs many tries, or has none."""
        deadline = time.monotonic() + 20
        clock = await calibrated(self._vm)
        while clock.error_ns >= 300_000 and time.monotonic() < deadline:
            clock = min(clock, await calibrated(self._vm), key=lambda c: c.error_ns)
        assert clock.error_ns < 1_000_000  # of the 8 ms between two writes
        self._points.append((clock.tsc, clock.monotonic_ns, clock.error_ns))

    @property
    def error_ns(self) -> int:
        return max(error for _, _, error in self._points)

    @property
    def ticks_per_ns(self) -> float:
        (tsc0, ns0, _), (tsc1, ns1, _) = self._points[0], self._points[-1]
        return (tsc1 - tsc0) / (ns1 - ns0)

    def ns(self, tsc: int) -> float:
        tsc0, ns0, _ = self._points[0]
        return ns0 + (tsc - tsc0) / self.ticks_per_ns


async def set_thresholds(vm: Vm, cpus: int, us: int) -> None:
    clock = await calibrated(vm)
    for cpu in range(cpus):
        await vm.pulse.reset(cpu, threshold=clock.ticks(us * 1000))


async def write_many(
    vm: Vm, values: tuple[int, int], count: int = TOGGLES
) -> tuple[list[ToggleWrite], WriteClock]:
    """Writes some milliseconds apart, and the clock to map their times."""
    clock = WriteClock(vm)
    await clock.measure()
    toggle = await vm.pulse.toggle(
        HOST_BRIDGE, vm.bridge.pam, values, count, period=8_000_000, unit="ticks"
    )
    assert await toggle.wait() == count
    await clock.measure()
    return list(toggle.writes().writes), clock


def gaps_at(
    writes: list[ToggleWrite], clock: WriteClock, gaps: list[Observation]
) -> tuple[int, list[int]]:
    """How many writes lie inside exactly one gap, and the longest gap at each write."""
    inside, longest = 0, []
    slack = clock.error_ns
    for write in writes:
        begin = clock.ns(write.begin_tsc)
        end = begin + write.ticks / clock.ticks_per_ns
        inside += sum(g.start_ns - slack <= begin and end <= g.end_ns + slack for g in gaps) == 1
        at = [g.at_most_ns for g in gaps if g.start_ns < end and begin < g.end_ns]
        longest.append(max(at, default=0))
    return inside, longest


async def check_toggles(vm: Vm, probe: PulseProbe, told: Told) -> None:
    """A few toggles are seen, each in its place where the TSC is a clock.

    Under TCG on a busy host the TSC jumps, which the probe follows and the test cannot.
    """
    before = len(told.of(0))
    writes, clock = await write_many(vm, (PAM_RAM << 4, 0), FEW)
    await probe.flush()
    gaps = told.of(0)[before:]
    assert len(gaps) >= ENOUGH * FEW
    if vm.guest.spec.accel == "kvm":
        inside, _ = gaps_at(writes, clock, gaps)
        assert inside >= ENOUGH * FEW
        assert not told.said("TSC")


@cases("kvm")
@pytest.mark.asyncio
async def test_every_toggle_stands_out_from_the_control(build: QemuBuild, accel: str) -> None:
    async with booted(build, accel, smp=2) as vm:
        await set_thresholds(vm, 2, LOW_US[accel])
        async with probing(vm) as (probe, told, _):
            writes, clock = await write_many(vm, (PAM_RAM << 4, 0))
            # nothing is told after it was said that all is told, unless a CPU slept meanwhile
            assert len(told.late) <= 0.02 * len(told.gaps)
            await probe.flush()
            inside, toggles = gaps_at(writes, clock, told.of(0))
            same, clock = await write_many(vm, (0, 0))
            await probe.flush()
            _, control = gaps_at(same, clock, told.of(0))
        assert inside >= ENOUGH * TOGGLES
        assert statistics.median(toggles) > 1.2 * statistics.median(control)
        assert statistics.median(toggles) >= LOW_US[accel] * 1000
        assert {g.kind for g in told.gaps} == {StallKind.VCPU_GAP}
        # the bounds are worth something even on a busy machine
        assert statistics.median(g.end_ns - g.start_ns - g.at_most_ns for g in told.of(0)) < 500_000
        assert statistics.median(g.at_most_ns - g.at_least_ns for g in told.of(0)) < 500_000


@cases("kvm", "tcg")
@pytest.mark.asyncio
async def test_a_restart_of_the_statistics_neither_loses_nor_repeats(
    build: QemuBuild, accel: str
) -> None:
    async with booted(build, accel) as vm:
        await vm.pulse.reset(0, threshold=1 << 50)
        counted = 0
        async with probing(vm) as (probe, told, _):
            for high in (High.NOTHING, High.DATA, High.NOTHING):
                await vm.pulse.place(0, high)
                await set_thresholds(vm, 1, LOW_US[accel])
                writes = (PAM_RAM << 4, 0)
                toggle = await vm.pulse.toggle(HOST_BRIDGE, vm.bridge.pam, writes, FEW)
                await toggle.wait()
                counted += vm.pulse.heartbeat().gaps
                # at once, so that the last gaps are still unread
                await vm.pulse.reset(0, threshold=1 << 50)
            await probe.stop()
        # between the count and the restart the CPU may have been put aside
        assert counted <= len(told.gaps) + told.lost_gaps <= counted + 15
        assert len(told.gaps) >= ENOUGH * 3 * FEW


@cases("kvm", "tcg")
@pytest.mark.asyncio
async def test_more_gaps_than_the_ring_holds_are_counted(build: QemuBuild, accel: str) -> None:
    async with booted(build, accel) as vm:
        await vm.pulse.reset(0, threshold=1 << 50)
        async with probing(vm) as (probe, told, monitor):
            await vm.pulse.reset(0, threshold=0)
            await vm.pulse.wait_for(lambda: vm.pulse.heartbeat().gaps > 20_000, 20, lambda: "gaps")
            await monitor.execute("stop")
            counted = vm.pulse.heartbeat().gaps
            await probe.stop()
        assert told.lost_gaps > 0
        assert len(told.gaps) + told.lost_gaps == counted
        assert all(one.end_ns <= other.end_ns for one, other in pairwise(told.gaps))


@cases("tcg", of=QEMUS[:1])
@pytest.mark.asyncio
async def test_a_ram_file_that_is_truncated_ends_the_probe_and_not_us(
    build: QemuBuild, accel: str
) -> None:
    """QEMU ends of it too, with SIGBUS, as soon as it touches what is gone."""
    async with booted(build, accel) as vm:
        async with guest_context(vm.guest) as context:
            probe, told = PulseProbe(context), Told()
            await probe.start(told)
            await context.monitor.execute("stop")
            assert vm.guest.ram is not None
            os.truncate(vm.guest.ram, 4096)
            await probe.flush()
            await probe.stop()
        (failure,) = told.failures
        assert "truncated" in str(failure)


@cases("kvm")
@pytest.mark.asyncio
async def test_a_stop_is_one_gap_and_holds_nothing_up(build: QemuBuild, accel: str) -> None:
    async with booted(build, accel, smp=2) as vm, probing(vm) as (probe, told, monitor):
        stopping = await monitor.timed("stop")
        # silent CPUs are not waited for
        await asyncio.sleep(1.2)
        asked = time.monotonic_ns()
        await probe.flush()
        assert told.complete_ns >= asked
        going_on = await monitor.timed("cont")
        length = going_on.t_start_ns - stopping.t_end_ns
        await told.wait_gap(length - 1_000_000)
        await probe.flush()
        for cpu in (0, 1):
            (gap,) = [g for g in told.of(cpu) if g.at_least_ns > length // 2]
            assert gap.start_ns <= stopping.t_end_ns
            assert going_on.t_start_ns <= gap.end_ns
            assert gap.at_most_ns >= length
        assert not told.said("TSC")


@cases("tcg")
@pytest.mark.asyncio
async def test_a_tsc_that_stood_still_is_noticed(build: QemuBuild, accel: str) -> None:
    async with booted(build, accel) as vm:
        await set_thresholds(vm, 1, LOW_US[accel])
        async with probing(vm) as (probe, told, monitor):
            await monitor.execute("stop")
            await asyncio.sleep(0.3)
            await monitor.execute("cont")
            await told.wait_note("TSC stopped for")
            told.gaps.clear()
            await check_toggles(vm, probe, told)


@cases("kvm", "tcg")
@pytest.mark.asyncio
async def test_a_stopped_guest_is_waited_for(build: QemuBuild, accel: str) -> None:
    async with booted(build, accel, smp=2) as vm:
        await set_thresholds(vm, 2, LOW_US[accel])
        async with probing(vm, started=False) as (probe, told, monitor):
            await monitor.execute("stop")
            begun = time.monotonic_ns()
            await probe.start(told)
            await probe.flush()
            assert time.monotonic_ns() - begun < 5_000_000_000
            assert told.gaps == []
            await monitor.execute("cont")
            await told.wait_note(HAS_CLOCK)
            await check_toggles(vm, probe, told)


@cases("kvm", "tcg")
@pytest.mark.asyncio
async def test_a_guest_that_boots_again_is_followed(build: QemuBuild, accel: str) -> None:
    async with booted(build, accel, smp=2) as vm:
        begun = time.monotonic_ns()
        async with probing(vm) as (probe, told, monitor):
            await monitor.execute("system_reset")
            await told.wait_note("booted again, boot number 2")
            await set_thresholds(vm, 1, LOW_US[accel])
            await check_toggles(vm, probe, told)
            now = time.monotonic_ns()
            # under TCG the guest's TSC jumps by itself: places are not to be relied on there
            if accel == "kvm":
                assert all(begun - 100_000_000 < g.start_ns and g.end_ns < now for g in told.gaps)


@builds()
@pytest.mark.asyncio
async def test_a_qemu_that_is_killed_holds_nothing_up(build: QemuBuild) -> None:
    async with booted(build, best_accel(build)) as vm, probing(vm) as (probe, told, _):
        vm.guest.process.kill()
        await vm.guest.process.wait()
        asked = time.monotonic_ns()
        await probe.burst(True)
        await probe.flush()
        await probe.burst(False)
        assert told.complete_ns >= asked
        await probe.stop()
        await probe.stop()
        await probe.flush()


@builds()
@pytest.mark.asyncio
async def test_memory_of_any_kind_is_found(build: QemuBuild, tmp_path: Path) -> None:
    size, ram = 64 << 20, tmp_path / "ram"
    for backend, removed in (
        (f"memory-backend-memfd,id=m,share=on,size={size}", None),
        (
            f"memory-backend-file,id=m,share=on,size={size},mem-path={ram}",
            ram,
        ),
    ):
        spec = GuestSpec(
            machine="pc,memory-backend=m",
            accel="tcg",
            memory=size,
            shared_memory=False,
            args=("-object", backend, *boot_args()),
        )
        async with launch(spec.on(build)) as guest, guest_context(guest) as context:
            probe, told = PulseProbe(context), Told()
            async with asyncio.timeout(30):
                while not (await probe.check()).usable:  # noqa: ASYNC110 (until it has booted)
                    await asyncio.sleep(0.01)
            if removed is not None:
                removed.unlink()
                verdict = await probe.check()
                if os.geteuid() != 0 and not verdict.usable:
                    assert verdict.remedy is not None
                    continue
            await probe.start(told)
            await told.wait_note(HAS_CLOCK)
            await probe.stop()
            assert told.failures == []


@builds()
@pytest.mark.asyncio
async def test_a_guest_without_a_pulse_is_told_of_with_a_remedy(build: QemuBuild) -> None:
    for spec, reason in (
        (GuestSpec(accel="tcg", shared_memory=False), "shares no guest RAM"),
        (GuestSpec(accel="tcg"), "no pulse guest"),
    ):
        async with launch(spec.on(build)) as guest, guest_context(guest) as context:
            verdict = await PulseProbe(context).check()
            assert not verdict.usable
            assert verdict.reason is not None
            assert reason in verdict.reason
            assert verdict.remedy
            verdict = await PulseProbe(replace(context, guest=None)).check()
            assert verdict.reason is not None
            assert "not visible" in verdict.reason
