"""What the live tests of the Linux guest share: its image, a booted guest, plugging and unplugging.

Everything that waits does so with a deadline.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import pytest

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.guests import PciAddress, QemuBuild
from qmp_memlistener.guests.linux import LinuxImage, LinuxSpec
from qmp_memlistener.qmp import Monitor, UnixTarget
from tests.support.any_monitor import AnyMonitor
from tests.support.linux_guest import LinuxGuest, boot_linux
from tests.support.linux_views import Bar, PciDevice

__all__ = ["LinuxVm", "booted_linux", "image"]

MIB = 1 << 20


@functools.cache
def _image_or_reason(label: str) -> LinuxImage | str:
    try:
        return LinuxImage.build(label)
    except MissingPrerequisite as exc:
        return exc.message


def image(label: str = "6.1") -> LinuxImage:
    """The image, built if need be; skips the test with the reason when it cannot be built."""
    found = _image_or_reason(label)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@dataclass(frozen=True, slots=True)
class LinuxVm:
    """A booted guest and a monitor of the test's own."""

    guest: LinuxGuest
    monitor: Monitor

    @property
    def bus(self) -> str:
        """Where a device can be plugged first."""
        return "rp0" if self.guest.spec.machine.startswith("q35") else "pci.0"

    async def plug(self, driver: str, name: str, **properties: object) -> None:
        await self.monitor.execute("device_add", {"driver": driver, "id": name, **properties})

    async def add(self, qom_type: str, name: str, **properties: object) -> None:
        await self.monitor.execute("object-add", {"qom-type": qom_type, "id": name, **properties})

    async def unplug(self, *names: str, seconds: float = 30.0) -> None:
        """Ask for all of them, then wait until the guest has let all of them go."""
        left = set(names)
        events = self.monitor.events()
        for name in names:
            await self.monitor.execute("device_del", {"id": name})
        async with asyncio.timeout(seconds):
            async for event in events:
                if event.name == "DEVICE_DELETED":
                    left.discard(str(event.data.get("device")))
                if not left:
                    break
        events.close()

    async def device(self, vendor: int, *devices: int, bars: int = 1) -> PciDevice:
        """The only PCI function with these numbers, once the guest sees it with so many BARs."""

        async def look() -> list[PciDevice]:
            found = await self.guest.pci_devices()
            return [d for d in found if d.vendor == vendor and d.device in devices]

        (found,) = await self.guest.until(look, lambda f: len(f) == 1 and len(f[0].bars) >= bars)
        return found

    async def check_bars(self) -> None:
        """QEMU has the same functions as the guest, with the same memory BARs."""
        guest = {d.address: d.bars for d in await self.guest.pci_devices()}
        answer = await self.monitor.execute("query-pci")
        buses = msgspec.convert(answer, type=list[_Behind])
        assert guest == dict(_bars([f for bus in buses for f in bus.devices]))


class _Region(msgspec.Struct):
    """A part of what query-pci says of a function; `address` is -1 while the BAR has none."""

    bar: int
    type: str
    address: int
    size: int


class _Behind(msgspec.Struct):
    devices: list[_Function] = []


class _Function(msgspec.Struct):
    bus: int
    slot: int
    function: int
    regions: list[_Region]
    pci_bridge: _Behind | None = None


def _bars(functions: list[_Function]) -> Iterator[tuple[PciAddress, tuple[Bar, ...]]]:
    """All functions, those behind bridges too, and the memory BARs that have an address."""
    for f in functions:
        placed = (r for r in f.regions if r.type == "memory" and r.address != -1 and r.bar < 6)
        bars = tuple(Bar(r.bar, r.address, r.size) for r in placed)
        yield PciAddress(f.bus, f.slot, f.function), bars
        if f.pci_bridge is not None:
            yield from _bars(f.pci_bridge.devices)


@asynccontextmanager
async def booted_linux(
    build: QemuBuild, spec: LinuxSpec, label: str = "6.1"
) -> AsyncIterator[LinuxVm]:
    async with (
        boot_linux(image(label), spec, build) as guest,
        await AnyMonitor.connect(UnixTarget(str(guest.guest.monitors[0]))) as monitor,
    ):
        yield LinuxVm(guest, monitor)
