"""QEMU's lock profiler and KVM's counters on real guests: what they tell, and what stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.probes import Context, ProbeUnavailable, StallKind
from qmp_memlistener.probes.kvmstats import KvmStatsProbe
from qmp_memlistener.probes.lockprofile import LockProfileProbe, left_on, switch_off
from qmp_memlistener.qmp import Monitor, hmp
from tests.support.leftovers import left_behind
from tests.support.live import QEMUS, Vm, best_accel, booted, builds, qmp
from tests.support.probes import Recorder, at_work, guest_context

pytestmark = pytest.mark.qemu

MS = 1_000_000


@asynccontextmanager
async def watched(build: QemuBuild, smp: int = 2) -> AsyncIterator[tuple[Vm, Context, Monitor]]:
    """A guest that runs, its context, and a monitor for what the test does."""
    async with (
        booted(build, best_accel(build), smp=smp, monitors=3) as vm,
        guest_context(vm.guest) as context,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        yield vm, context, monitor


async def profiler(monitor: Monitor) -> str:
    return (await hmp(monitor, "sync-profile")).strip().rpartition(" ")[2]


async def hold(monitor: Monitor, mib: int = 128) -> None:
    """Keeps the BQL for tens of milliseconds, and gives the memory back."""
    memory = {"qom-type": "memory-backend-memfd", "id": "held", "prealloc": True}
    await monitor.execute("object-add", {**memory, "size": mib << 20}, deadline=60)
    await monitor.execute("object-del", {"id": "held"}, deadline=60)


async def while_vcpus_want_the_bql(vm: Vm, monitor: Monitor) -> None:
    """Changes of the map need the BQL: the vCPU that makes them waits for the hold to end."""
    changing = asyncio.create_task(vm.toggle(400))
    await hold(monitor)
    await changing


# -- the lock profiler -----------------------------------------------------------------------------


@builds()
@pytest.mark.asyncio
async def test_a_burst_tells_who_waited_for_the_bql(build: QemuBuild) -> None:
    async with watched(build) as (vm, context, monitor):
        probe = LockProfileProbe(context)
        async with at_work(probe) as recorder:
            assert await profiler(monitor) == "off"
            start = time.monotonic_ns()
            await probe.burst(True)
            assert await profiler(monitor) == "on"
            await probe.burst(True)
            await while_vcpus_want_the_bql(vm, monitor)
            await probe.burst(False)
            assert await profiler(monitor) == "on"
            assert recorder.measurements == []
            await probe.burst(False)
            end = time.monotonic_ns()
            assert await profiler(monitor) == "off"
            (measured,) = recorder.measurements
        recorder.check_nothing_wrong()
        waits = [o for o in recorder.observations if o.at_most_ns > 10 * MS]
        assert waits, measured.values
        for seen in recorder.observations:
            assert seen.kind is StallKind.BQL_WAIT
            assert start <= seen.start_ns
            assert seen.end_ns <= end
            total = measured.values[f"bql_wait_ns@{seen.site}"]
            count = measured.values[f"count@{seen.site}"]
            assert isinstance(total, int)
            assert isinstance(count, int)
            assert seen.at_least_ns * count <= total + 10_000
            assert seen.at_most_ns <= total + 10_000
        assert left_behind(vm.guest.pid) == []


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_named_it_is_on_all_the_time(build: QemuBuild) -> None:
    async with watched(build) as (_, context, monitor):
        probe = LockProfileProbe(replace(context, named=True))
        async with at_work(probe) as recorder:
            assert await profiler(monitor) == "on"
            await probe.burst(True)
            await probe.burst(False)
            assert await profiler(monitor) == "on"
            before = len(recorder.measurements)
            await recorder.wait_for(lambda: len(recorder.measurements) > before)
            asked = time.monotonic_ns()
            await probe.flush()
            assert recorder.reached["lockprofile"] >= asked
        assert await profiler(monitor) == "off"
        spans = [(m.start_ns, m.end_ns) for m in recorder.measurements]
        assert len(spans) >= 4
        assert spans == sorted(spans)
        recorder.check_nothing_wrong()


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_what_another_user_had_on_stays_on(build: QemuBuild) -> None:
    async with watched(build) as (vm, context, monitor):
        await hmp(monitor, "sync-profile on", quiet=True)
        probe = LockProfileProbe(context)
        async with at_work(probe) as recorder:
            await probe.burst(True)
            assert left_behind(vm.guest.pid) == []
            await probe.burst(False)
            assert await profiler(monitor) == "on"
            assert len(recorder.measurements) == 1
        assert await profiler(monitor) == "on"


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_others_that_reset_it_or_switch_it_off_are_noticed(build: QemuBuild) -> None:
    async with watched(build) as (vm, context, monitor):
        probe = LockProfileProbe(context)
        async with at_work(probe) as recorder:
            await probe.burst(True)
            for _ in range(50):
                await monitor.execute("query-name")
            await probe.flush()
            recorder.check_nothing_wrong()
            await hmp(monitor, "sync-profile reset", quiet=True)
            await probe.flush()
            assert len(recorder.losses) == 1
            await hmp(monitor, "sync-profile off", quiet=True)
            await probe.flush()
            assert len(recorder.losses) == 2
            # it is left as they have it, also when they change their mind
            assert await profiler(monitor) == "off"
            assert left_behind(vm.guest.pid) == []
            await hmp(monitor, "sync-profile on", quiet=True)
            await probe.burst(False)
            assert await profiler(monitor) == "on"
        assert await profiler(monitor) == "on"
        assert len(recorder.measurements) == 3


@builds()
@pytest.mark.asyncio
async def test_stopped_or_cancelled_in_a_burst_it_is_switched_off(build: QemuBuild) -> None:
    async with watched(build) as (vm, context, monitor):
        probe = LockProfileProbe(context)
        async with at_work(probe):
            await probe.burst(True)
        assert await profiler(monitor) == "off"
        for turns in range(6):
            probe = LockProfileProbe(replace(context, named=True))
            starting = asyncio.create_task(probe.start(Recorder()))
            for _ in range(turns):
                await asyncio.sleep(0.0003)
            starting.cancel()
            await asyncio.wait({starting})
            await probe.stop()
            assert await profiler(monitor) == "off"
        assert left_behind(vm.guest.pid) == []


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_after_a_kill_the_next_start_switches_it_off(build: QemuBuild) -> None:
    """`find` shows what was left, `restore` or the next start of the probe takes it away."""
    async with watched(build) as (vm, context, monitor):
        for restored_by_start in (True, False):
            await killed_in_a_burst(vm)
            assert await profiler(monitor) == "on"
            (left,) = [n for n in left_on() if n.note.pid == vm.guest.pid]
            assert "profiler" in left.note.text
            if restored_by_start:
                async with at_work(LockProfileProbe(context)) as recorder:
                    assert await profiler(monitor) == "off"
                    assert "killed" in recorder.notes[0]
            else:
                assert await switch_off(monitor, left)
                assert not await switch_off(monitor, left)
            assert await profiler(monitor) == "off"
            assert left_behind(vm.guest.pid) == []


KILLED = """
import asyncio, sys
from qmp_memlistener.guests import LaunchedGuest
from qmp_memlistener.qmp import Monitor, UnixTarget, find_guest
from qmp_memlistener.probes.lockprofile import LockProfileProbe, left_on, switch_off
from tests.support.probes import Recorder, context_of
from dataclasses import replace

async def main():
    monitor = await Monitor.connect(UnixTarget(sys.argv[1]))
    context = replace(context_of(monitor), guest=find_guest(int(sys.argv[2])))
    probe = LockProfileProbe(context)
    await probe.start(Recorder())
    await probe.burst(True)
    print("on", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def killed_in_a_burst(vm: Vm) -> None:
    """A process with the probe in a burst, killed; its monitor is free again afterwards."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED, str(vm.guest.monitors[1]), str(vm.guest.pid)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"on\n"
    finally:
        process.send_signal(signal.SIGKILL)
        await process.communicate()


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_a_main_loop_that_does_not_answer_is_no_end(build: QemuBuild) -> None:
    """The profile of that burst is lost, and said to be; the next one is there."""
    async with watched(build) as (vm, context, monitor):
        probe = LockProfileProbe(context)
        async with at_work(probe) as recorder:
            await probe.burst(True)
            vm.guest.process.send_signal(signal.SIGSTOP)
            try:
                await probe.burst(False)
            finally:
                vm.guest.process.send_signal(signal.SIGCONT)
            assert recorder.losses
            await probe.burst(True)
            await probe.burst(False)
            assert recorder.measurements
        assert await profiler(monitor) == "off"
        assert left_behind(vm.guest.pid) == []


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_with_qemu_gone_nothing_is_left(build: QemuBuild) -> None:
    async with watched(build) as (vm, context, _):
        locks, counters = LockProfileProbe(context), KvmStatsProbe(context)
        async with at_work(locks) as recorder:
            await locks.burst(True)
            if best_accel(build) == "kvm":
                await counters.start(recorder)
            vm.guest.process.kill()
            await vm.guest.process.wait()
            await context.monitor.lost
            await locks.burst(False)
            await locks.flush()
            await counters.stop()
        recorder.check_nothing_wrong()
        assert left_behind(vm.guest.pid) == []


# -- KVM's counters --------------------------------------------------------------------------------


@builds()
@pytest.mark.asyncio
async def test_counters_of_a_burst_and_of_the_whole(build: QemuBuild) -> None:
    if best_accel(build) != "kvm":
        pytest.skip(f"KVM is not usable with QEMU {build.version}")
    async with watched(build) as (vm, context, _):
        probe = KvmStatsProbe(context)
        async with at_work(probe) as recorder:
            await probe.burst(True)
            await probe.burst(True)
            await vm.toggle(20)
            await probe.burst(False)
            assert recorder.measurements == []
            await probe.burst(False)
            (burst,) = recorder.measurements
            asked = time.monotonic_ns()
            await probe.flush()
            assert recorder.reached["kvmstats"] >= asked
        _, whole = recorder.measurements
        recorder.check_nothing_wrong()
        assert recorder.observations == []
        # each of the writes is an exit to QEMU
        exits = burst.values["exits"]
        assert isinstance(exits, int)
        assert exits >= 20
        assert whole.start_ns <= burst.start_ns < burst.end_ns <= whole.end_ns
        for name in ("exits", "insn_emulation"):
            part, total = burst.values.get(name, 0), whole.values.get(name, 0)
            assert isinstance(part, int)
            assert isinstance(total, int)
            assert part <= total
        assert not any("hist" in name for name in whole.values)


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_without_kvm_there_are_no_counters(build: QemuBuild) -> None:
    async with booted(build, "tcg") as vm, guest_context(vm.guest) as context:
        verdict = await KvmStatsProbe(context).check()
        assert not verdict.usable
        assert "KVM" in (verdict.reason or "")
        with pytest.raises(ProbeUnavailable):
            await KvmStatsProbe(replace(context, monitor=await lost(vm))).start(Recorder())


async def lost(vm: Vm) -> Monitor:
    """A monitor that is closed."""
    async with qmp(vm.guest.monitors[1]) as monitor:
        return monitor
