"""The agent and devices: what it says caused a transition, RAM that comes and goes whole, aarch64.

The guest has no driver, so what a driver would do is done through the pulse guest: it maps BARs and
lets ACPI eject devices by writing QEMU's own ACPI registers (docs/specs/acpi_pci_hotplug.rst and
acpi_mem_hotplug.rst in QEMU's tree).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qmp_memlistener.agent import Agent
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    PAM_RAM,
    GuestSpec,
    PciAddress,
    QemuBuild,
    launch,
)
from qmp_memlistener.guests.pci import COMMAND, COMMAND_MEMORY
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.records import Cause, QmpEvent, SlotOp, TransitionRecord
from qmp_memlistener.topology import Kind
from tests.support.live import NO_QEMU, QEMUS, Seen, Vm, attach_bare, booted, cases, qmp
from tests.support.qtest import QTest

pytestmark = pytest.mark.qemu

MIB = 1 << 20
BAR = 0xE000_0000
DEVICE = PciAddress(0, 5)
DIMMS = ("-m", "slots=4,maxmem=2G")
HOTPLUG_BASE = 4 << 30  # pc and q35 put memory devices behind the RAM above 4 GiB, here none
PCI_EJECT, PCI_SELECT = 0xAE08, 0xAE10
DIMM_SELECT, DIMM_CONTROL, DIMM_EJECT = 0xA00, 0xA14, 0x8


@dataclass(slots=True)
class Watched:
    """A guest, the agent that watches it, and a monitor for the test."""

    vm: Vm
    agent: Agent
    monitor: Monitor
    seen: Seen
    taken: int = 0

    async def next(self) -> list[TransitionRecord]:
        """The transitions since the last call."""
        await self.agent.settle()
        new = self.seen.transitions[self.taken :]
        self.taken += len(new)
        return new

    async def only(self) -> TransitionRecord:
        """The one transition since the last call."""
        (found,) = await self.next()
        return found

    async def add_memory(self, name: str, size: int) -> None:
        arguments = {"qom-type": "memory-backend-ram", "id": name, "size": size}
        await self.monitor.execute("object-add", arguments)

    async def plug(self, driver: str, name: str, **options: object) -> None:
        await self.monitor.execute("device_add", {"driver": driver, "id": name, **options})

    async def eject_pci(self, slot: int) -> None:
        """As a guest does when ACPI asks for it."""
        await self.vm.pulse.port_out(PCI_SELECT, 0, 4)
        await self.vm.pulse.port_out(PCI_EJECT, 1 << slot, 4)

    async def eject_dimm(self, slot: int) -> None:
        await self.vm.pulse.port_out(DIMM_SELECT, slot, 4)
        await self.vm.pulse.port_out(DIMM_CONTROL, DIMM_EJECT, 1)

    async def deleted(self, device: str, times: int = 1) -> None:
        """Until QEMU has told so `times` times.

        It does when RCU has freed the last view that shows the device; a vCPU that spins under
        TCG can hold that up for ever, so the guest is stopped meanwhile.
        """

        def told() -> bool:
            events = [e for e in self.seen.of(QmpEvent) if e.event == "DEVICE_DELETED"]
            return [e.data.get("device") for e in events].count(device) == times

        await self.monitor.execute("stop")
        await self.seen.wait_for(told)
        await self.monitor.execute("cont")


def appeared(t: TransitionRecord) -> list[tuple[str, int, int]]:
    return [(r.name, r.start, r.size) for r in t.ram_appeared]


def vanished(t: TransitionRecord) -> list[tuple[str, int, int]]:
    return [(r.name, r.start, r.size) for r in t.ram_vanished]


def check_bar(cause: Cause, device: str, bar: int, verb: str, address: int, size: int) -> None:
    assert cause.type == "pci_bar"
    assert cause.device == device
    assert cause.detail is not None
    for word in (f"BAR {bar} ", f"{verb} ", f"{address:#x}", f"{size:#x}"):
        assert word in cause.detail


def check_ops(
    watched: Watched, t: TransitionRecord, accel: str, *what: tuple[str, int, int]
) -> None:
    """The operations of a transition: what, gpa, size; predicted ones under TCG."""
    ops = watched.seen.ops(t.seq)
    assert [(op.op, op.gpa, op.size) for op in ops] == list(what)
    assert all(op.predicted == (accel == "tcg") for op in ops)


@cases()
@pytest.mark.asyncio
async def test_a_bar_is_mapped_and_unmapped(build: QemuBuild, accel: str, seen: Seen) -> None:
    args = (
        *("-object", f"memory-backend-ram,id=m0,size={MIB}"),
        *("-device", "ivshmem-plain,id=iv0,memdev=m0,addr=5"),
        *("-device", "edu,id=edu0,addr=6"),
    )
    async with (
        booted(build, accel, "pc", *args) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        watched = Watched(vm, agent, monitor, seen)
        # RAM of a device: it comes whole, with one slot.
        await vm.pulse.map_bar(DEVICE, 2, BAR)
        t = await watched.only()
        check_bar(t.cause, "ivshmem-plain 00:05.0", 2, "mapped", BAR, MIB)
        assert appeared(t) == [("m0", BAR, MIB)]
        check_ops(watched, t, accel, ("add", BAR, MIB))
        mapped = agent.map.view.lookup(BAR)
        assert mapped is not None
        assert (mapped.kind, mapped.start, mapped.size) == (Kind.RAM, BAR, MIB)

        await vm.pulse.unmap_bar(DEVICE)
        t = await watched.only()
        check_bar(t.cause, "ivshmem-plain 00:05.0", 2, "unmapped", BAR, MIB)
        assert vanished(t) == [("m0", BAR, MIB)]
        check_ops(watched, t, accel, ("delete", BAR, MIB))
        assert agent.map.view.lookup(BAR) is None

        # Registers of a device: no slot is concerned.
        other = PciAddress(0, 6)
        await vm.pulse.map_bar(other, 0, BAR)
        t = await watched.only()
        check_bar(t.cause, "edu 00:06.0", 0, "mapped", BAR, MIB)
        assert [(s.kind, s.start, s.size) for s in t.added] == [("i/o", BAR, MIB)]
        check_ops(watched, t, accel)
        await vm.pulse.unmap_bar(other)
        t = await watched.only()
        check_bar(t.cause, "edu 00:06.0", 0, "unmapped", BAR, MIB)
        assert [(s.kind, s.start, s.size) for s in t.removed] == [("i/o", BAR, MIB)]

        # Over RAM a BAR stays hidden on pc: PCI lies below RAM, so nothing changes.
        for act in (vm.pulse.map_bar(DEVICE, 2, 16 * MIB), vm.pulse.unmap_bar(DEVICE)):
            await act
            assert await watched.next() == []
        # What was hidden caused nothing of what comes next.
        await vm.open_pam()
        t = await watched.only()
        assert (t.cause.type, t.cause.regions) == ("region", ["pc.bios"])
    seen.check_nothing_wrong()


@cases()
@pytest.mark.parametrize("driver", ["pc-dimm", "nvdimm"])
@pytest.mark.asyncio
async def test_a_dimm_is_plugged_and_ejected(
    build: QemuBuild, accel: str, driver: str, seen: Seen
) -> None:
    machine = "pc" if driver == "pc-dimm" else "q35,nvdimm=on"
    async with (
        booted(build, accel, machine, *DIMMS) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        watched = Watched(vm, agent, monitor, seen)
        await watched.add_memory("m0", 16 * MIB)
        await watched.plug(driver, "dimm0", memdev="m0")
        t = (await watched.next())[-1]
        assert (t.cause.type, t.cause.device) == ("memory_device", "dimm0")
        assert t.cause.detail is not None
        assert "plugged" in t.cause.detail
        assert f"{HOTPLUG_BASE:#x}" in t.cause.detail
        assert appeared(t) == [("m0", HOTPLUG_BASE, 16 * MIB)]
        check_ops(watched, t, accel, ("add", HOTPLUG_BASE, 16 * MIB))

        # A second and a third at once, each a transition of its own.
        for name in ("m1", "m2"):
            await watched.add_memory(name, 32 * MIB)
        await watched.plug(driver, "dimm1", memdev="m1")
        await watched.plug(driver, "dimm2", memdev="m2")
        new = await watched.next()
        plugged = [t.cause.device for t in new if t.cause.type == "memory_device"]
        assert plugged == ["dimm1", "dimm2"]
        # An nvdimm also makes QEMU rebuild its views for nothing, which TCG does not tell apart.
        assert len(new) == 2 or (driver, accel) == ("nvdimm", "tcg")
        assert [s.size // MIB for s in agent.slots if s.gpa >= HOTPLUG_BASE] == [16, 32, 32]

        if driver == "pc-dimm":  # QEMU does not unplug an nvdimm
            await watched.eject_dimm(0)
            await watched.deleted("dimm0")
            t = await watched.only()
            assert (t.cause.type, t.cause.device) == ("memory_device", "dimm0")
            assert t.cause.detail is not None
            assert "unplugged" in t.cause.detail
            assert vanished(t) == [("m0", HOTPLUG_BASE, 16 * MIB)]
            check_ops(watched, t, accel, ("delete", HOTPLUG_BASE, 16 * MIB))
    seen.check_nothing_wrong()


@cases()
@pytest.mark.asyncio
async def test_ivshmem_is_plugged_mapped_and_ejected(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    """Twice, the second time with another size under the same names."""
    async with (
        booted(build, accel) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        watched = Watched(vm, agent, monitor, seen)
        for turn, size in enumerate((MIB, 4 * MIB)):
            await watched.add_memory("m0", size)
            await watched.plug("ivshmem-plain", "iv0", memdev="m0", addr="5")
            await watched.next()
            await vm.pulse.map_bar(DEVICE, 2, BAR)
            t = await watched.only()
            check_bar(t.cause, "ivshmem-plain 00:05.0", 2, "mapped", BAR, size)
            assert appeared(t) == [("m0", BAR, size)]
            check_ops(watched, t, accel, ("add", BAR, size))
            # Ejected while it is mapped: its RAM goes with it.
            await monitor.execute("device_del", {"id": "iv0"})
            await watched.eject_pci(DEVICE.device)
            await watched.deleted("iv0", turn + 1)
            t = await watched.only()
            assert vanished(t) == [("m0", BAR, size)]
            check_ops(watched, t, accel, ("delete", BAR, size))
            await monitor.execute("object-del", {"id": "m0"})
    seen.check_nothing_wrong()


@cases()
@pytest.mark.asyncio
async def test_ivshmem_behind_a_root_port(build: QemuBuild, accel: str, seen: Seen) -> None:
    device, window = PciAddress(1, 0), 0xFE00_0000
    port = ("-device", "pcie-root-port,id=rp0,slot=1,addr=3")
    async with (
        booted(build, accel, "q35", *port) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        watched = Watched(vm, agent, monitor, seen)
        # What a BIOS does for a root port: bus numbers, a window, decoding.
        for register, value, width in ((0x18, 0x010100, 4), (0x20, 0xFE10_FE00, 4), (0x04, 6, 2)):
            await vm.pulse.write_config(PciAddress(0, 3), register, value, width)
        await agent.settle()
        start = agent.transitions
        await watched.add_memory("m0", MIB)
        await watched.plug("ivshmem-plain", "iv0", memdev="m0", bus="rp0")
        await vm.pulse.map_bar(device, 2, window)
        await agent.settle()
        mapped = [t for t in seen.transitions[start:] if t.ram_appeared]
        (t,) = mapped
        assert t.cause.type == "pci_bar"
        assert t.cause.device is not None
        assert t.cause.device.startswith("ivshmem-plain ")
        assert appeared(t) == [("m0", window, MIB)]
        await vm.pulse.unmap_bar(device)
        await agent.settle()
        (t,) = [t for t in seen.transitions[start:] if t.ram_vanished]
        assert vanished(t) == [("m0", window, MIB)]
        assert {op.op for op in seen.of(SlotOp) if op.gpa == window} == {"add", "delete"}
    seen.check_nothing_wrong()


@cases()
@pytest.mark.asyncio
async def test_hotplug_while_the_guest_reshapes_its_map(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    """Main thread and vCPU change the map at the same time; both are told apart."""
    toggles = 100
    async with (
        booted(build, accel, "pc", *DIMMS) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        watched = Watched(vm, agent, monitor, seen)
        for i in range(3):
            await watched.add_memory(f"m{i}", 8 * MIB)
        toggle = await vm.pulse.toggle(
            HOST_BRIDGE, vm.bridge.pam, (PAM_RAM << 4, 0), toggles, period=200
        )
        for i in range(3):
            await watched.plug("pc-dimm", f"dimm{i}", memdev=f"m{i}")
        assert await toggle.wait() == toggles
        await agent.settle()
        plugged = [t.cause.device for t in seen.transitions if t.cause.type == "memory_device"]
        assert plugged == ["dimm0", "dimm1", "dimm2"]
        assert agent.transitions == toggles + 3
        if accel == "kvm":
            for t in seen.transitions:
                ops = seen.ops(t.seq)
                assert (len(ops) == 1) == (t.cause.type == "memory_device"), t
        assert len([b for b in agent.map.ram_blocks if b.name in ("m0", "m1", "m2")]) == 3
    seen.check_nothing_wrong()


@cases()
@pytest.mark.asyncio
async def test_a_burst_of_bar_mappings_is_seen_one_by_one(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    """A driver that probes a device does this; no slot is concerned, so only the trace tells."""
    times = 40
    device = PciAddress(0, 6)
    async with (
        booted(build, accel, "pc", "-device", "edu,id=edu0,addr=6") as vm,
        attach_bare(vm.target, on_record=seen) as agent,
    ):
        await vm.pulse.map_bar(device, 0, BAR)
        await vm.pulse.unmap_bar(device)
        await agent.settle()
        start = agent.transitions
        toggle = await vm.pulse.toggle(device, COMMAND, (COMMAND_MEMORY, 0), times, width=2)
        assert await toggle.wait() == times
        await agent.settle()
        causes = [t.cause for t in seen.transitions[start:]]
        assert [c.type for c in causes] == ["pci_bar"] * times
        for i, cause in enumerate(causes):
            check_bar(cause, "edu 00:06.0", 0, "unmapped" if i % 2 else "mapped", BAR, MIB)
    seen.check_nothing_wrong()


# -- aarch64 -------------------------------------------------------------------------------------

AARCH64 = [b for b in QEMUS if b.aarch64_binary is not None]
ECAM = 0x40_1000_0000  # virt: PCI configuration space, high
WINDOW = 0x1000_0000  # virt: 32-bit PCI memory


@pytest.mark.parametrize(
    "build",
    [pytest.param(b, id=b.version) for b in AARCH64]
    or [
        pytest.param(
            None,
            id="none",
            marks=pytest.mark.skip(
                reason="qemu-system-aarch64 is not installed" if QEMUS else NO_QEMU
            ),
        )
    ],
)
@pytest.mark.asyncio
async def test_aarch64_virt(build: QemuBuild, seen: Seen) -> None:
    """No guest code: configuration space is memory, which qtest writes."""
    assert build.aarch64_binary is not None
    spec = GuestSpec(
        binary=build.aarch64_binary,
        machine="virt",
        accel="tcg",
        qtest=True,
        env=build.env,
        args=(
            *build.args,
            *("-cpu", "cortex-a57", "-S"),
            *("-object", f"memory-backend-ram,id=m0,size={MIB}"),
            *("-device", "ivshmem-plain,id=iv0,memdev=m0,addr=5"),
        ),
    )
    async with launch(spec) as guest:
        assert guest.qtest is not None
        async with (
            await QTest.connect(guest.qtest) as qtest,
            attach_bare(f"unix:{guest.monitors[0]}", on_record=seen) as agent,
        ):
            assert agent.source == "trace"
            assert (agent.facts.accel, agent.facts.version) == ("tcg", build.version)
            ram = agent.map.view.lookup(0x4000_0000)
            assert ram is not None
            assert (ram.kind, ram.name, ram.size) == (Kind.RAM, "mach-virt.ram", 64 * MIB)

            config = ECAM + (DEVICE.bdf << 12)
            assert await qtest.memory_read(config, 4) == 0x1110_1AF4
            await qtest.memory_write(config + 0x10, WINDOW + MIB, 4)  # BAR 0, registers
            await qtest.memory_write(config + 0x18, WINDOW, 4)  # BAR 2, 64 bits wide
            await qtest.memory_write(config + 0x1C, 0, 4)
            await agent.settle()
            assert agent.transitions == 0
            await qtest.memory_write(config + 0x04, 2, 2)
            await agent.settle()
            # QEMU maps the BARs one after the other.
            assert agent.transitions == 2
            assert [t.cause.type for t in seen.transitions] == ["pci_bar", "pci_bar"]
            check_bar(seen.transitions[-1].cause, "ivshmem-plain 00:05.0", 2, "mapped", WINDOW, MIB)
            assert [appeared(t) for t in seen.transitions if t.ram_appeared] == [
                [("m0", WINDOW, MIB)]
            ]
            await qtest.memory_write(config + 0x04, 0, 2)
            await agent.settle()
            assert agent.transitions == 4
            assert [vanished(t) for t in seen.transitions if t.ram_vanished] == [
                [("m0", WINDOW, MIB)]
            ]
            assert [(op.op, op.gpa, op.predicted) for op in seen.of(SlotOp)] == [
                ("add", WINDOW, True),
                ("delete", WINDOW, True),
            ]
    seen.check_nothing_wrong()
