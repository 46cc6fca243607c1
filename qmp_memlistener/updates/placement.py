"""Where a device is in a guest, and what QEMU can show of the guest's part in it.

A device is looked for by what QEMU reports of it, whatever it is called: its bus by QOM, its number
among PCI functions by query-pci, its memory by query-memory-devices, and by query-acpi-ospm-status
whether the guest answers for it by ACPI _OST.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ..qmp import Monitor
from .guest_view import ask
from .model import Placed, Range

__all__ = ["Bar", "Seen", "look_at"]

_ACPI = "query-acpi-ospm-status"
_PLACES = ("port", "channel", "scsi-id", "lun", "unit", "nr", "slot", "devno", "address", "iobase",
           "node", "socket-id", "die-id", "cluster-id", "core-id", "thread-id")  # fmt: skip
"""Properties in which devices of all kinds keep their place; those that one has are read."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A BAR as query-pci shows it; `start` is None while the guest has given it no address."""

    start: int | None
    size: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A device with what can be seen of the guest's part in it.

    `bars` is None for what is no PCI function, or one that query-pci does not show yet because the
    guest has not numbered its bus.  `function` is slot and function of a PCI device, `alone` says
    that the guest is not told of it: function 0 of its slot is not there.  `answers` by ACPI _OST.
    """

    placed: Placed
    function: tuple[int, int] | None = None
    bars: tuple[Bar, ...] | None = None
    alone: bool = False
    answers: bool = False
    links: frozenset[str] = field(default_factory=frozenset)

    @property
    def owners(self) -> frozenset[str]:
        """Who owns the regions of its BARs: itself, or the memory behind it."""
        return self.links | {self.placed.id}

    @property
    def why_unseen(self) -> str | None:
        """Why the guest's part cannot be seen; None when it can."""
        if self.answers:
            return None
        if self.function is None:
            on = f" of the bus {self.placed.bus}" if self.placed.bus else ""
            return f"QEMU shows no sign of it for a {self.placed.driver}{on}"
        if self.alone:
            return "the guest is told of it when function 0 of its slot comes"
        if self.bars == ():
            return f"a {self.placed.driver} has no BAR that the guest could program"
        return None


class _Child(msgspec.Struct):
    name: str


class _Region(msgspec.Struct):
    address: int
    size: int


class _Behind(msgspec.Struct):
    devices: list[_Function] = []


class _Function(msgspec.Struct):
    bus: int
    slot: int
    function: int
    regions: list[_Region] = []
    qdev_id: str = ""
    pci_bridge: _Behind | None = None


class _Memory(msgspec.Struct, rename="kebab"):
    """`data` of query-memory-devices; virtio ones say `memaddr`, DIMMs `addr`."""

    id: str | None = None
    addr: int | None = None
    memaddr: int | None = None
    size: int | None = None
    max_size: int | None = None
    requested_size: int | None = None


class _MemoryDevice(msgspec.Struct):
    data: _Memory


class _Ospm(msgspec.Struct):
    device: str | None = None


async def look_at(monitor: Monitor, device: str) -> Seen | None:
    """The device with this id as it is now; None when QEMU has none.  Raises TargetError."""
    path = f"/machine/peripheral/{device}"
    has = {c.name for c in await ask(monitor, "qom-list", list[_Child], [], path=path)}
    if "type" not in has:
        return None

    async def text(name: str, of: str = path) -> str:
        return await ask(monitor, "qom-get", str, "", path=of, property=name)

    bus_path = await text("parent_bus") if "parent_bus" in has else ""
    bus_type = await text("type", bus_path) if bus_path else ""
    address: dict[str, int | str] = {}
    function = None
    is_pci = "multifunction" in has
    if (
        is_pci
        and (number := await ask(monitor, "qom-get", int, -1, path=path, property="addr")) >= 0
    ):
        function = (number >> 3, number & 7)
        address["addr"] = f"{function[0]:x}.{function[1]:x}"
    for name in _PLACES:
        if name in has and not is_pci:
            value = await ask(monitor, "qom-get", object, "", path=path, property=name)
            if isinstance(value, int | str) and value not in ("", -1):
                address[name] = value
    shown = _find(await _functions(monitor), device) if is_pci else None
    memory = await _memory(monitor, device)
    placed = Placed(
        id=device,
        driver=await text("type"),
        bus=bus_path.rpartition("/")[2] or None,
        bus_type=bus_type or None,
        address=address,
        pci=f"{shown.bus:02x}:{shown.slot:02x}.{shown.function}" if shown is not None else None,
        memory=_extent(memory),
        size=memory.size if memory is not None and memory.requested_size is not None else None,
        requested=memory.requested_size if memory is not None else None,
    )
    ospm = await ask(monitor, _ACPI, list[_Ospm], [])
    memdev = await text("memdev") if "memdev" in has else ""
    return Seen(
        placed,
        function,
        None if shown is None else _bars(shown),
        function is not None and function[1] > 0 and await _is_alone(monitor, bus_path, function),
        device in {o.device for o in ospm},
        frozenset({memdev}) if memdev else frozenset(),
    )


async def _memory(monitor: Monitor, device: str) -> _Memory | None:
    found = await ask(monitor, "query-memory-devices", list[_MemoryDevice], [])
    return next((m.data for m in found if m.data.id == device), None)


def _extent(memory: _Memory | None) -> Range | None:
    if memory is None:
        return None
    start = memory.addr if memory.memaddr is None else memory.memaddr
    size = memory.size if memory.max_size is None else memory.max_size
    return None if start is None or size is None else Range(start, size)


async def _functions(monitor: Monitor) -> list[_Function]:
    return [f for bus in await ask(monitor, "query-pci", list[_Behind], []) for f in bus.devices]


def _find(functions: list[_Function], device: str) -> _Function | None:
    for function in functions:
        if function.qdev_id == device:
            return function
        if function.pci_bridge is not None:
            inside = _find(function.pci_bridge.devices, device)
            if inside is not None:
                return inside
    return None


def _bars(function: _Function) -> tuple[Bar, ...]:
    """query-pci gives -1 for a BAR without an address (pci_device_regions of hw/pci)."""
    return tuple(
        Bar(None if r.address in (-1, (1 << 64) - 1) else r.address, r.size)
        for r in function.regions
    )


async def _is_alone(monitor: Monitor, bus: str, function: tuple[int, int]) -> bool:
    """Whether function 0 of its slot is missing."""
    links = await ask(monitor, "qom-list", list[_Child], [], path=bus)
    for link in links:
        if not link.name.startswith("child["):
            continue
        other = await ask(monitor, "qom-get", str, "", path=bus, property=link.name)
        if await ask(monitor, "qom-get", int, -1, path=other, property="addr") == function[0] << 3:
            return False
    return True
