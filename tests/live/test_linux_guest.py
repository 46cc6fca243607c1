"""The Linux guest on QEMU under TCG: it sees what is plugged, and lets go what is unplugged.

Plain QMP does the plugging, so what fails here is the image or QEMU.
"""

from __future__ import annotations

import re

import pytest

from qmp_memlistener.guests import Pulse, QemuBuild
from qmp_memlistener.guests.linux import LinuxSpec
from tests.support.linux import LinuxVm, booted_linux, image
from tests.support.linux_views import MemoryBlocks
from tests.support.live import NO_QEMU, QEMUS, builds

pytestmark = [pytest.mark.qemu, pytest.mark.full]

MIB = 1 << 20
MAC = "52:54:00:12:34:56"
VIRTIO = 0x1AF4
NET = (0x1000, 0x1041)
BLK = (0x1001, 0x1042)
IVSHMEM = 0x1110
OLDEST = QEMUS[:2]  # two are enough here: booting takes seconds


def whole(bytes_online: int) -> MemoryBlocks:
    """That much memory, all of it online."""
    blocks = bytes_online // (128 * MIB)
    return MemoryBlocks(128 * MIB, blocks, blocks)


async def sees(vm: LinuxVm, bytes_online: int) -> None:
    await vm.guest.until(vm.guest.memory_blocks, lambda b: b == whole(bytes_online), timeout=60)


async def net_there_and_back(vm: LinuxVm) -> None:
    guest = vm.guest
    await vm.monitor.execute("netdev_add", {"type": "hubport", "id": "n0", "hubid": 0})
    await vm.plug("virtio-net-pci", "net0", netdev="n0", bus=vm.bus, mac=MAC)
    found = await guest.until(guest.net_devices, lambda n: len(n) == 1)
    assert [n.mac for n in found] == [MAC]
    assert (await vm.device(VIRTIO, *NET)).driver == "virtio-pci"
    await vm.check_bars()
    await vm.unplug("net0")
    assert await guest.net_devices() == ()
    await vm.check_bars()


async def dimm_there_and_back(vm: LinuxVm, before: int) -> None:
    await vm.add("memory-backend-ram", "m0", size=256 * MIB)
    await vm.plug("pc-dimm", "d0", memdev="m0")
    await sees(vm, before + 256 * MIB)
    await vm.unplug("d0")
    await sees(vm, before)
    await vm.monitor.execute("object-del", {"id": "m0"})


async def resize(vm: LinuxVm, size: int) -> None:
    where = {"path": "/machine/peripheral/vmem0", "property": "requested-size"}
    await vm.monitor.execute("qom-set", {**where, "value": size})


@pytest.mark.parametrize(("machine", "smp"), [("pc", 1), ("q35", 2)])
@builds(OLDEST)
@pytest.mark.asyncio
async def test_hotplug_under_a_workload(build: QemuBuild, machine: str, smp: int) -> None:
    spec = LinuxSpec(machine=machine, smp=smp, virtio_mem=1024 * MIB)
    async with booted_linux(build, spec) as vm:
        guest = vm.guest
        before = spec.memory
        total = await guest.memory_total()
        assert 0.7 * before < total < before
        assert await guest.memory_blocks() == whole(before)
        assert (await vm.device(VIRTIO, IVSHMEM)).bars[-1].size == 4 * MIB
        assert (await guest.net_devices(), await guest.block_devices()) == ((), ())
        await vm.check_bars()

        await guest.set_workload(True)
        await net_there_and_back(vm)
        await dimm_there_and_back(vm, before)
        await resize(vm, 384 * MIB)
        await sees(vm, before + 384 * MIB)
        assert await guest.memory_total() >= total + 380 * MIB
        await resize(vm, 0)
        await sees(vm, before)

        assert (await guest.run("workload status")).status == 0
        await guest.set_workload(False)
        assert (await guest.run("workload status")).status != 0
        if guest.image.has_pulse:
            with Pulse(guest.page) as pulse:
                await pulse.wait_ready(smp)
                await pulse.wait_beats(2, smp - 1)
        assert not re.search("BUG|Oops|panic|Call Trace", guest.log()), guest.log()


@builds(OLDEST[:1])
@pytest.mark.asyncio
async def test_native_pcie_hotplug_and_what_else_can_be_plugged(build: QemuBuild) -> None:
    native = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
    async with booted_linux(build, LinuxSpec(args=native, pulse_us=None)) as vm:
        guest = vm.guest
        await vm.add("memory-backend-ram", "v0m", size=256 * MIB)
        await vm.plug("nvdimm", "v0", memdev="v0m")
        await vm.monitor.execute("netdev_add", {"type": "hubport", "id": "n0", "hubid": 0})
        await vm.plug("virtio-net-pci", "net0", netdev="n0", bus="rp0", mac=MAC)
        null = {"driver": "null-co", "node-name": "b0", "size": 64 * MIB, "read-zeroes": True}
        await vm.monitor.execute("blockdev-add", null)
        await vm.plug("virtio-blk-pci", "blk0", drive="b0", bus="rp1")
        await guest.until(guest.net_devices, lambda n: len(n) == 1)
        disks = await guest.until(guest.block_devices, lambda b: len(b) == 2)
        assert [(d.name, d.size) for d in disks] == [("pmem0", 256 * MIB), ("vda", 64 * MIB)]
        for devices in (NET, BLK):
            assert (await vm.device(VIRTIO, *devices)).driver == "virtio-pci"
        assert "pciehp" in await guest.check("dmesg | grep -i 'slot(.*link up'")

        # Large enough a BAR not to fit into the window that a port has without a reservation.
        await vm.add("memory-backend-ram", "iv0m", size=16 * MIB, share=True)
        await vm.plug("ivshmem-plain", "iv0", memdev="iv0m", bus="rp2")

        async def ivshmem() -> list[int]:
            return [
                bar.size
                for d in await guest.pci_devices()
                if (d.vendor, d.device) == (VIRTIO, IVSHMEM) and d.address.bus
                for bar in d.bars
            ]

        await guest.until(ivshmem, lambda sizes: sizes == [256, 16 * MIB])
        await vm.check_bars()
        # Linux waits five seconds before it lets go: a second press would have cancelled that.
        await vm.unplug("net0", "blk0", "iv0")
        assert (await guest.net_devices(), len(await guest.block_devices())) == ((), 1)
        await vm.check_bars()


@builds(OLDEST[:1])
@pytest.mark.asyncio
async def test_the_newer_kernel(build: QemuBuild) -> None:
    """It dies of cmpxchg16b on QEMU 7.2 unless that is kept from it."""
    async with booted_linux(build, LinuxSpec(machine="pc", virtio_mem=512 * MIB), "6.12") as vm:
        assert "6.12." in vm.guest.image.release
        assert await vm.guest.check("uname -r") == f"{vm.guest.image.release}\n"
        await net_there_and_back(vm)
        await dimm_there_and_back(vm, vm.guest.spec.memory)
        assert vm.guest.agent.boots == 1


@pytest.mark.skipif(not QEMUS, reason=NO_QEMU)
def test_every_module_is_loaded_or_built_in() -> None:
    found = image()
    wanted = {"virtio_pci", "virtio_net", "virtio_blk", "virtio_mem", "virtio_console", "nfit"}
    assert wanted <= {*found.modules, *found.builtin}
