"""The pulse guest on every QEMU here, under KVM and TCG: beats, gaps, boots, refusals.

Times are reported by benchmarks, not here.
"""

from __future__ import annotations

import itertools

import pytest

from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.guests import HOST_BRIDGE, High, PciAddress, Pulse, QemuBuild
from qmp_memlistener.topology import Kind
from tests.live.pulse_support import EVERYTHING, accels, machines, running
from tests.support.live import builds

pytestmark = [pytest.mark.qemu, pytest.mark.full]


@builds()
@accels
@machines
@pytest.mark.parametrize("smp", [1, 2])
@pytest.mark.asyncio
async def test_every_cpu_beats_wherever_its_parts_lie(
    build: QemuBuild, accel: str, machine: str, smp: int
) -> None:
    async with running(build, machine, accel, smp=smp) as vm:
        pulse = vm.pulse
        for cpu in range(smp):
            before = pulse.heartbeat(cpu)
            assert await pulse.wait_beats(50, cpu) >= before.count + 50
            assert pulse.heartbeat(cpu).last_tsc > before.last_tsc
            for high in (High.CODE, High.DATA, High.TABLES, EVERYTHING, High.NOTHING):
                await pulse.place(cpu, high)
                state = pulse.cpu_state(cpu)
                assert state.alive
                assert state.high == high
                await pulse.wait_beats(50, cpu)
            assert pulse.heartbeat(cpu).count > before.count
        # The mailbox went along, and nothing faulted on the way.
        assert await pulse.read_config(HOST_BRIDGE, 0, 2) == 0x8086
        header = pulse.header()
        assert header is not None
        assert header.boots == 1


@builds()
@accels
@machines
@pytest.mark.asyncio
async def test_boots_from_disk_through_the_bios(build: QemuBuild, accel: str, machine: str) -> None:
    async with running(build, machine, accel, smp=2, disk=True) as vm:
        for cpu in range(2):
            await vm.pulse.wait_beats(50, cpu)
        # The BIOS has copied itself into RAM and locked it: nobody did that without firmware.
        found = await vm.at(0xF0000)
        assert found is not None
        assert (found.kind, found.name) == (Kind.ROM, "pc.ram")


async def many_gaps(pulse: Pulse, cpu: int) -> None:
    await pulse.wait_for(lambda: pulse.heartbeat(cpu).gaps > 300, 10, lambda: "gaps")


@builds()
@accels
@pytest.mark.asyncio
async def test_gaps_above_the_threshold_are_kept(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel, smp=2) as vm:
        pulse = vm.pulse
        for cpu in range(2):
            # Every beat is a gap of at least a tick: the ring fills and wraps.
            await pulse.reset(cpu, threshold=0)
            await many_gaps(pulse, cpu)
            await pulse.reset(cpu, threshold=1 << 50)
            beat = pulse.heartbeat(cpu)
            assert (beat.gaps, beat.threshold) == (0, 1 << 50)
            assert pulse.gaps(cpu).gaps == ()
            await pulse.wait_beats(50, cpu)
            after = pulse.heartbeat(cpu)
            assert after.gaps == 0
            assert after.max_gap > 0
            assert beat.reset_tsc < after.max_gap_tsc <= pulse.heartbeat(cpu).last_tsc

        # Stopped: frozen and readable.  Then the stop itself is a gap where the TSC went on.
        await vm.execute("stop")
        frozen = pulse.heartbeat()
        assert pulse.heartbeat() == frozen
        await vm.execute("cont")
        await pulse.wait_beats(50)
        assert pulse.heartbeat().count > frozen.count


@builds()
@accels
@pytest.mark.asyncio
async def test_the_gap_ring_holds_the_latest_gaps(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel) as vm:
        pulse = vm.pulse
        await pulse.reset(threshold=0)
        await many_gaps(pulse, 0)
        await vm.execute("stop")
        log = pulse.gaps()
        beat = pulse.heartbeat()
        assert len(log.gaps) + log.lost == beat.gaps
        assert len(log.gaps) == 127
        assert [g.count for g in log.gaps] == sorted({g.count for g in log.gaps})
        for one, following in itertools.pairwise(log.gaps):
            assert following.end_tsc - following.ticks >= one.end_tsc
        assert max(g.ticks for g in log.gaps) <= beat.max_gap


@builds()
@accels
@pytest.mark.asyncio
async def test_a_reset_boots_the_guest_again(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel, smp=2) as vm:
        await vm.pulse.place(1, EVERYTHING)
        await vm.execute("system_reset")

        def again() -> bool:
            header = vm.pulse.header()
            return header is not None and header.boots == 2 and header.ready

        await vm.pulse.wait_for(again, 20, lambda: "its second boot")
        assert vm.pulse.cpu_state(1).high == High.NOTHING
        await vm.pulse.wait_beats(50, 1)


@builds()
@accels
@pytest.mark.asyncio
async def test_the_clock_agrees_with_a_round_trip(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel) as vm:
        clock = await vm.pulse.calibrate(0.1)
        assert clock.error_ns > 0
        first = await vm.pulse.port_out(0x80, 1, 1)
        second = await vm.pulse.port_out(0x80, 2, 1)
        assert first.begin_tsc < first.end_tsc < second.begin_tsc < second.end_tsc
        assert clock.to_ns(second.begin_tsc) > clock.to_ns(first.begin_tsc)


@builds()
@pytest.mark.asyncio
async def test_refusals_leave_the_guest_beating(build: QemuBuild) -> None:
    async with running(build, "pc", "tcg") as vm:
        pulse = vm.pulse
        for refused in (
            pulse.command(99),
            pulse.read_config(HOST_BRIDGE, 0x59, 2),
            pulse.read_config(HOST_BRIDGE, 0x100, 1),
            pulse.port_in(0x10000, 1),
            pulse.peek(1 << 32, 4),
            pulse.map_bar(HOST_BRIDGE, 6, 0xFE000000),
            pulse.unmap_bar(PciAddress(0, 31)),
        ):
            with pytest.raises(OperationFailed, match="refused"):
                await refused
        with pytest.raises(OperationFailed, match="no such device or CPU"):
            await pulse.command(10, 1, 0)
        await pulse.wait_beats(50)
        assert await pulse.port_in(0x61, 1) is not None
