"""Guests that die of a missing slot, and those that do not, as an attached agent tells it.

CPU 0 toggles PAM, which deletes and adds again the slot of all RAM above 1 MiB; CPU 1 has its code
or its page tables there (vm-images/pulse/README.md, "What it shows").
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener import Agent, attach
from qmp_memlistener.agent.failures import FailureWatch
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    PAM_RAM,
    GuestSpec,
    High,
    Pulse,
    QemuBuild,
    Toggle,
    boot_args,
    launch,
)
from qmp_memlistener.records import GuestFailure, GuestReset, Record
from tests.support.host import patience
from tests.support.live import QEMUS, Seen, Vm, booted, cases, qmp, skip_without_kvm
from tests.support.qtest import QTest

pytestmark = pytest.mark.qemu

TOGGLES = 200
# vCPUs are kept out while slots are replaced since 8.0
RACING = [b for b in QEMUS if int(b.version.split(".")[0]) < 8]
ATOMIC = [b for b in QEMUS if b not in RACING]


class Found:
    """The failures and resets that a watch of the test's own publishes."""

    def __init__(self) -> None:
        self.failures: list[GuestFailure] = []
        self.resets: list[GuestReset] = []
        self.news = asyncio.Event()

    def __call__(self, records: Iterable[Record]) -> None:
        for record in records:
            if isinstance(record, GuestFailure):
                self.failures.append(record)
            elif isinstance(record, GuestReset):
                self.resets.append(record)
        self.news.set()

    async def reset(self) -> GuestReset:
        """The first one."""
        async with asyncio.timeout(30):
            while not self.resets:
                self.news.clear()
                await self.news.wait()
        return self.resets[0]


@asynccontextmanager
async def watched(agent: Agent, pid: int) -> AsyncIterator[Found]:
    found = Found()
    watch = FailureWatch(
        agent.monitor,
        found,
        settle=agent.settle,
        view=lambda: agent.map,
        machine=agent.facts.machine,
        pid=pid,
    )
    stop = agent.subscribe(watch.record)
    agent.monitor.subscribe(watch.event)
    try:
        yield found
    finally:
        stop()
        await watch.close()


async def toggle_until(vm: Vm, found: Found) -> Toggle:
    """Toggle until something is told or all is done."""
    toggle = await vm.pulse.toggle(
        HOST_BRIDGE, vm.bridge.pam, (PAM_RAM << 4, 0), TOGGLES, period=100, unit="turns"
    )
    done = asyncio.create_task(toggle.wait())
    told = asyncio.create_task(found.news.wait())
    try:
        async with asyncio.timeout(30):
            await asyncio.wait({done, told}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        done.cancel()
        told.cancel()
        await asyncio.gather(done, told, return_exceptions=True)
    return toggle


@cases("kvm", of=RACING)
@pytest.mark.asyncio
async def test_code_that_had_no_slot_is_found_out(build: QemuBuild, accel: str) -> None:
    named = 0
    for _ in range(5):
        seen = Seen()
        async with booted(build, accel, smp=2) as vm:
            await vm.pulse.place(1, High.CODE)
            async with (
                attach(vm.target, on_record=seen) as agent,
                watched(agent, vm.guest.pid) as found,
            ):
                await toggle_until(vm, found)
                if len(found.failures) != 1:
                    continue
                (failure,) = found.failures
                ops = [op for op in seen.ops(failure.transition) if op.op == "delete"]
        named += (
            failure.status == "internal-error"
            and failure.proven
            and failure.cpu == 1
            and failure.gpa == failure.ip
            and failure.gpa is not None
            and any(op.gpa <= failure.gpa < op.gpa + op.size for op in ops)
            and "in RAM block pc.ram" in failure.what
        )
    assert named >= 4


@cases("kvm", of=RACING)
@pytest.mark.asyncio
async def test_page_tables_that_had_no_slot_end_in_a_reset(build: QemuBuild, accel: str) -> None:
    """It looks like any other: the suspicion is told, and not that the guest failed."""
    told = 0
    for _ in range(3):
        seen = Seen()
        async with booted(build, accel, smp=2) as vm:
            await vm.pulse.place(1, High.TABLES)
            async with (
                attach(vm.target, on_record=seen) as agent,
                watched(agent, vm.guest.pid) as found,
            ):
                await toggle_until(vm, found)
        assert found.failures == []
        for reset in found.resets:
            assert (reset.reason, reset.guest) == ("guest-reset", True)
            if reset.possible is not None:
                assert reset.transition in [t.seq for t in seen.transitions]
                assert "1 of 2 vCPUs could run" in reset.possible
                told += 1
    assert told >= 2


@cases("kvm", of=RACING)
@pytest.mark.asyncio
async def test_an_only_vcpu_that_reboots_is_not_suspected(build: QemuBuild, accel: str) -> None:
    """It has just changed PAM itself, which took all RAM above 1 MiB away meanwhile."""
    async with (
        booted(build, accel) as vm,
        attach(vm.target) as agent,
        watched(agent, vm.guest.pid) as found,
    ):
        await vm.open_pam()
        asked = asyncio.create_task(vm.pulse.port_out(0x64, 0xFE, 1))
        reset = await found.reset()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    assert (reset.reason, reset.guest, reset.possible) == ("guest-reset", True, None)
    assert found.failures == []


# waits until CMOS byte 0x50 is 0xaa, clears it, and has a triple fault: lidt of a limit 0, then
# paging is switched on without page tables
FAULTY_ROM = bytes.fromhex(
    "b050e670e4713caa75f630c0e671 2e0f011e00ff 0f20c0 6625ffffff9f 0c01 0f22c0 660d00000080 0f22c0"
)


@cases("kvm", of=RACING)
@pytest.mark.asyncio
async def test_resets_that_have_nothing_to_do_with_memory(
    build: QemuBuild, accel: str, tmp_path: Path
) -> None:
    """A triple fault, and one that QMP asks for."""
    skip_without_kvm(build, accel)
    rom = bytearray(0x10000)
    rom[0xFE00 : 0xFE00 + len(FAULTY_ROM)] = FAULTY_ROM
    rom[0xFFF0:0xFFF3] = b"\xe9\x0d\xfe"  # jmp 0xfe00
    image = tmp_path / "rom"
    image.write_bytes(rom)
    spec = GuestSpec(accel=accel, args=("-bios", str(image)), smp=2, qtest=True)
    async with (
        launch(spec.on(build)) as guest,
        attach(f"unix:{guest.monitors[0]}") as agent,
        watched(agent, guest.pid) as found,
    ):
        assert guest.qtest is not None
        async with await QTest.connect(guest.qtest) as qtest:
            await qtest.outb(0x70, 0x50)
            await qtest.outb(0x71, 0xAA)
            fault = await found.reset()
            found.resets.clear()
            async with qmp(guest.monitors[1]) as monitor:
                await monitor.execute("system_reset")
            asked = await found.reset()
    assert (fault.reason, fault.guest, fault.possible) == ("guest-reset", True, None)
    assert (asked.reason, asked.guest, asked.possible) == ("host-qmp-system-reset", False, None)
    assert found.failures == []


@cases("kvm", of=ATOMIC)
@pytest.mark.parametrize("high", [High.CODE, High.TABLES])
@pytest.mark.asyncio
async def test_an_atomic_update_kills_nobody(build: QemuBuild, accel: str, high: High) -> None:
    async with booted(build, accel, smp=2) as vm:
        await vm.pulse.place(1, high)
        async with attach(vm.target) as agent, watched(agent, vm.guest.pid) as found:
            toggle = await toggle_until(vm, found)
            assert toggle.done == TOGGLES
            await agent.settle()
        await vm.pulse.wait_beats(10, 1)
    assert found.failures == []


@cases("kvm", of=RACING)
@pytest.mark.asyncio
async def test_a_reboot_is_no_failure(build: QemuBuild, accel: str) -> None:
    """SeaBIOS reopens PAM and resets the machine a second time; nobody died of that."""
    skip_without_kvm(build, accel)
    spec = GuestSpec(accel=accel, args=(*boot_args("disk"), "-device", "VGA"))
    async with launch(spec.on(build)) as guest:
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            first = await pulse.wait_ready(timeout=patience(30.0))
            async with (
                attach(f"unix:{guest.monitors[0]}") as agent,
                watched(agent, guest.pid) as found,
            ):
                # a reset by the keyboard controller: what a guest that reboots asks for
                asked = asyncio.create_task(pulse.port_out(0x64, 0xFE, 1))

                def again() -> bool:
                    header = pulse.header()
                    return (
                        header is not None and header.ready and header.ready_tsc != first.ready_tsc
                    )

                await pulse.wait_for(again, 30, lambda: "its second boot")
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                await agent.settle()
    assert found.failures == []
    assert {(r.reason, r.possible) for r in found.resets} == {("guest-reset", None)}
