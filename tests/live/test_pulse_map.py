"""The pulse guest and the qtest client change the memory map, on every QEMU here."""

from __future__ import annotations

import itertools

import pytest

from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    High,
    HostBridge,
    PciAddress,
    QemuBuild,
)
from qmp_memlistener.topology import Kind
from tests.live.pulse_support import BRIDGES, MEMORY, Vm, accels, kind, machines, running
from tests.support.live import builds
from tests.support.qtest import QTest

pytestmark = [pytest.mark.qemu, pytest.mark.full]


@builds()
@accels
@machines
@pytest.mark.asyncio
async def test_register_writes_change_the_map(build: QemuBuild, accel: str, machine: str) -> None:
    bridge = BRIDGES[machine]
    async with running(build, machine, accel, "-device", "VGA") as vm:
        pulse = vm.pulse
        await pam_changes_the_map(vm, bridge, accel)
        # Without SMM (KVM that cannot, QEMU >= 10) Q35 leaves out SMRAM and TSEG, and the
        # default of ESMRAMC with them (`has_smm_ranges` in hw/pci-host/q35.c).
        esmramc = bridge.esmramc
        smm = esmramc is None or await pulse.read_config(HOST_BRIDGE, esmramc, 1) != 0
        if smm:
            # RAM behind the VGA window opens and closes.
            await pulse.write_config(HOST_BRIDGE, bridge.smram, 0x4A, 1)
            assert kind(await vm.at(0xA0000)) is Kind.RAM
            await pulse.write_config(HOST_BRIDGE, bridge.smram, 0x0A, 1)
            assert kind(await vm.at(0xA0000)) is Kind.IO
        if esmramc is not None and smm:
            assert kind(await vm.at(MEMORY - 1)) is Kind.RAM
            await pulse.write_config(HOST_BRIDGE, esmramc, 0x01, 1)
            tseg = await vm.at(MEMORY - 1)
            assert tseg is not None
            assert (tseg.kind, tseg.start) == (Kind.IO, MEMORY - (1 << 20))
            await pulse.write_config(HOST_BRIDGE, esmramc, 0x00, 1)
            assert kind(await vm.at(MEMORY - 1)) is Kind.RAM
        if bridge.pciexbar is not None:
            await pulse.write_config(HOST_BRIDGE, bridge.pciexbar, 0x1000_0001, 8)
            window = await vm.at(0x1000_0000)
            assert window is not None
            assert (window.kind, window.start, window.size) == (Kind.IO, 256 << 20, 256 << 20)
            # The guest sees it too: configuration space of 00:00.0 in place of RAM.
            assert await pulse.peek(0x1000_0000, 2) == 0x8086
            await pulse.write_config(HOST_BRIDGE, bridge.pciexbar, 0, 8)
            assert kind(await vm.at(0x1000_0000)) is Kind.RAM


async def pam_changes_the_map(vm: Vm, bridge: HostBridge, accel: str) -> None:
    """The BIOS area and one 16 KiB segment through all that PAM can say."""
    pulse = vm.pulse
    for register, address, shift in ((bridge.pam, 0xF0000, 4), (bridge.pam + 1, 0xC4000, 4)):
        await pulse.write_config(HOST_BRIDGE, register, 0, 1)
        closed = await vm.at(address)
        assert closed is None or closed.name != "pc.ram"
        await pulse.write_config(HOST_BRIDGE, register, 0x3 << shift, 1)
        opened = await vm.at(address)
        assert opened is not None
        assert (opened.kind, opened.name) == (Kind.RAM, "pc.ram")
        await pulse.poke(address, 0xA5A5_0001, 4)
        await pulse.write_config(HOST_BRIDGE, register, 0x1 << shift, 1)
        locked = await vm.at(address)
        assert locked is not None
        assert (locked.kind, locked.name) == (Kind.ROM, "pc.ram")
        # QEMU's slot flags follow the region, not the read-only alias: KVM lets this write pass.
        if accel == "tcg":
            await pulse.poke(address, 0, 4)
        assert await pulse.peek(address, 4) == 0xA5A5_0001
        await pulse.write_config(HOST_BRIDGE, register, 0, 1)
        assert await vm.at(address) == closed


@builds()
@accels
@machines
@pytest.mark.asyncio
async def test_a_bar_of_a_hotplugged_device_is_mapped_and_unmapped(
    build: QemuBuild, accel: str, machine: str
) -> None:
    port = ("-device", "pcie-root-port,id=rp0,slot=1,addr=3") if machine == "q35" else ()
    async with running(build, machine, accel, *port) as vm:
        pulse = vm.pulse
        await vm.execute(
            "object-add", **{"qom-type": "memory-backend-ram", "id": "m0", "size": 1 << 20}
        )
        where: dict[str, object] = {"addr": "5"}
        device = PciAddress(0, 5)
        if machine == "q35":
            # What a BIOS does for a root port: bus numbers, a window, decoding.
            where = {"bus": "rp0"}
            device = PciAddress(1, 0)
            await pulse.write_config(PciAddress(0, 3), 0x18, 0x010100, 4)
            await pulse.write_config(PciAddress(0, 3), 0x20, 0xFE10_FE00, 4)
            await pulse.write_config(PciAddress(0, 3), 0x04, 0x0006, 2)
        with pytest.raises(OperationFailed, match="no such device"):
            await pulse.map_bar(device, 2, 0xFE00_0000)
        await vm.execute("device_add", driver="ivshmem-plain", id="iv0", memdev="m0", **where)
        assert await pulse.read_config(device, 0, 4) == 0x1110_1AF4
        assert await vm.at(0xFE00_0000) is None
        await pulse.map_bar(device, 2, 0xFE00_0000)
        mapped = await vm.at(0xFE00_0000)
        assert mapped is not None
        assert (mapped.kind, mapped.start, mapped.size) == (Kind.RAM, 0xFE00_0000, 1 << 20)
        await pulse.poke(0xFE00_0FF8, 0x1122_3344_5566_7788, 8)
        assert await pulse.peek(0xFE00_0FF8, 8) == 0x1122_3344_5566_7788
        await pulse.unmap_bar(device)
        assert await vm.at(0xFE00_0000) is None
        if machine == "pc":
            await pulse.map_bar(device, 2, 0x20_0000_0000)
            assert kind(await vm.at(0x20_0000_0000)) is Kind.RAM


@builds()
@accels
@machines
@pytest.mark.asyncio
async def test_a_toggle_writes_as_often_as_asked(
    build: QemuBuild, accel: str, machine: str
) -> None:
    pam = BRIDGES[machine].pam
    async with running(build, machine, accel, smp=2) as vm:
        pulse = vm.pulse
        await pulse.place(1, High.DATA)
        toggle = await pulse.toggle(HOST_BRIDGE, pam, (0x30, 0x00), 41, period=20)
        assert await toggle.wait() == 41
        log = toggle.writes()
        assert log.lost == 0
        assert [w.index for w in log.writes] == list(range(41))
        assert [w.value for w in log.writes] == [0x30, 0x00] * 20 + [0x30]
        stamps = [t for w in log.writes for t in (w.begin_tsc, w.begin_tsc + w.ticks)]
        assert stamps == sorted(stamps)
        opened = await vm.at(0xF0000)
        assert opened is not None
        assert (opened.kind, opened.name) == (Kind.RAM, "pc.ram")
        await pulse.wait_beats(50, 1)

        # By ticks, with a pause between the writes; another is refused meanwhile; stopped early.
        slow = await pulse.toggle(
            HOST_BRIDGE, pam, (0x00, 0x30), 1 << 40, period=2_000_000, unit="ticks"
        )
        await pulse.wait_for(lambda: slow.done >= 3, 10, lambda: "three writes")
        with pytest.raises(OperationFailed, match="not finished"):
            await pulse.toggle(HOST_BRIDGE, pam, (0x00, 0x30), 1)
        with pytest.raises(OperationFailed, match="not finished"):
            await pulse.place(0, High.DATA)
        done = await slow.stop()
        await pulse.wait_beats(50)
        assert slow.done == done
        writes = slow.writes().writes
        for one, following in itertools.pairwise(writes):
            assert following.begin_tsc - (one.begin_tsc + one.ticks) >= 2_000_000


@builds()
@accels
@pytest.mark.asyncio
async def test_qtest_reshapes_a_running_guest(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel, smp=2, qtest=True) as vm:
        assert vm.guest.qtest is not None
        async with await QTest.connect(vm.guest.qtest) as qtest:
            assert await qtest.read_config(HOST_BRIDGE, 0, 4) == 0x1237_8086
            await qtest.write_config(HOST_BRIDGE, I440FX.pam, 0x30, 1)
            assert kind(await vm.at(0xF0000)) is Kind.RAM
            await qtest.writeq(0xF0000, 0x0123_4567_89AB_CDEF)
            assert await qtest.readq(0xF0000) == 0x0123_4567_89AB_CDEF
            assert await vm.pulse.peek(0xF0000, 8) == 0x0123_4567_89AB_CDEF
            await qtest.write_config(HOST_BRIDGE, I440FX.pam, 0x00, 1)
            assert kind(await vm.at(0xF0000)) is not Kind.RAM
            with pytest.raises(ValueError, match="value"):
                await qtest.outb(0x80, 0x100)
            with pytest.raises(ValueError, match="wide"):
                await qtest.port_in(0x80, 8)
            with pytest.raises(ValueError, match="cross"):
                await qtest.read_config(HOST_BRIDGE, 0x5B, 2)
        await vm.pulse.wait_beats(50, 1)
        # QEMU takes the next client.
        async with await QTest.connect(vm.guest.qtest) as qtest:
            assert await qtest.inl(0xCF8) == HOST_BRIDGE.config_address(I440FX.pam)
