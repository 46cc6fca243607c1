"""What is in a guest: devices and backends by their ids, types of devices, PCI functions and buses.

The questions, as in `guest`.  QEMU plugs a device into a bus only if the bus has a
`hotplug-handler` (qbus_is_hotpluggable of hw/core/qdev.c), and the handler has conditions of its
own.  All of it can be read by QOM; checked on 7.2, 10.0 and 11.1:

- A port with the property `hotplug` takes devices only if that is on (pcie_cap_slot_pre_plug_cb of
  hw/pci/pcie.c).
- An ACPI controller serves only buses that it has given an `acpi-pcihp-bsel`
  (acpi_pcihp_device_pre_plug_cb of hw/acpi/pcihp.c).
- A conventional bridge that is its own handler is an SHPC, which has no slot 0
  (shpc_device_get_slot of hw/pci/shpc.c).

A bus behind a PCIe port has slot 0 only; every other one has 32 slots.  query-pci is asked for
windows and BARs alone: it shows nothing behind a bridge that the guest has not numbered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from ..errors import CommandFailed
from .asking import QomProperty, ask, converted, qom_list
from .connection import COMMAND_DEADLINE, Command, Monitor
from .hmp import hmp

__all__ = [
    "PERIPHERAL",
    "PciBar",
    "PciBus",
    "PciFunction",
    "Window",
    "device_properties",
    "read_block_nodes",
    "read_buses",
    "read_children",
    "read_netdevs",
    "read_ospm_devices",
    "read_pci_functions",
    "read_windows",
    "slot_text",
]

T = TypeVar("T")
PERIPHERAL = "/machine/peripheral"
"""The QOM path of the devices that have an id."""
Window = tuple[int, int]
"""A range that a bridge passes on, half open; empty when it is closed."""

_ROOTS = ("pcie.0", "pci.0", "pci")
"""What machines call their own bus; QOM finds it by that name wherever it is."""
_TYPES = frozenset({"PCI", "PCIE", "CXL"})
_EXPRESS = frozenset({"PCIE", "CXL"})
_BSEL = "acpi-pcihp-bsel"
_BY_ACPI = "acpi-pci-hotplug-with-bridge-support"  # a property of every ACPI controller for PCI
_AT_ONCE = 16
_SLOTS = 32


# -- devices and backends ------------------------------------------------------------------------


async def read_children(monitor: Monitor, path: str) -> dict[str, str]:
    """The children of an object and their types: of PERIPHERAL the devices that have an id, of
    /objects the objects that users made."""
    found = await qom_list(monitor, path)
    return {p.name: p.child for p in found if p.child is not None}


async def device_properties(
    monitor: Monitor, driver: str, *, deadline: float = COMMAND_DEADLINE
) -> dict[str, str]:
    """The properties of a type of device, and their types.

    QEMU makes an instance for that and drops it (`allowed.may_be_examined` says of which types it
    may be asked).  Raises CommandFailed when it has no such type.
    """
    found = await ask(
        monitor, "device-list-properties", list[QomProperty], typename=driver, deadline=deadline
    )
    return {p.name: p.type for p in found}


async def read_netdevs(monitor: Monitor) -> frozenset[str]:
    """The names of all network clients; no QMP command lists them."""
    try:
        text = await hmp(monitor, "info network")
    except CommandFailed:
        return frozenset()
    return frozenset(name for line in text.splitlines() for name in _net_names(line))


def _net_names(line: str) -> Iterator[str]:
    """Of `net1: index=0,type=user,…`, ` \\ net1: index=…` for a peer, and for the port of a hub
    ` \\ net1` or ` \\ net1: peer: index=…` (hmp_info_network of net/net.c, net_hub_info of
    net/hub.c; 7.2 to 11.1)."""
    if not line.startswith("hub "):
        for part in line.removeprefix(" \\ ").split(": "):
            if not part or part.startswith("index="):
                return
            yield part


class _Node(msgspec.Struct):
    name: str = msgspec.field(name="node-name", default="")


async def read_block_nodes(monitor: Monitor) -> frozenset[str]:
    """The names of all block nodes."""
    found = await ask(monitor, "query-named-block-nodes", list[_Node], [], flat=True)
    return frozenset(node.name for node in found)


class _Ospm(msgspec.Struct):
    device: str | None = None


async def read_ospm_devices(monitor: Monitor) -> frozenset[str | None]:
    """The ids of the devices that the guest answers for by ACPI _OST."""
    found = await ask(monitor, "query-acpi-ospm-status", list[_Ospm], [])
    return frozenset(ospm.device for ospm in found)


# -- PCI functions -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PciBar:
    """A BAR as query-pci shows it; `start` is None while the guest has given it no address."""

    start: int | None
    size: int


@dataclass(frozen=True, slots=True)
class PciFunction:
    """A PCI function by the number that the guest gave it; `id` is empty where it has none.

    `windows` are the memory and the prefetchable window of a bridge, None for another function.
    """

    id: str
    bus: int
    slot: int
    function: int
    bars: tuple[PciBar, ...]
    windows: tuple[Window, Window] | None


class _Range(msgspec.Struct):
    base: int
    limit: int

    @property
    def half_open(self) -> Window:
        return (self.base, self.limit + 1) if self.base <= self.limit else (0, 0)


class _Numbers(msgspec.Struct):
    memory_range: _Range
    prefetchable_range: _Range


class _Behind(msgspec.Struct):
    bus: _Numbers
    devices: list[_Function] = []


class _Region(msgspec.Struct):
    address: int
    size: int

    @property
    def bar(self) -> PciBar:
        """-1 is a BAR without an address (pci_device_regions of hw/pci)."""
        return PciBar(None if self.address in (-1, (1 << 64) - 1) else self.address, self.size)


class _Function(msgspec.Struct):
    bus: int
    slot: int
    function: int
    regions: list[_Region] = []
    qdev_id: str = ""
    pci_bridge: _Behind | None = None


class _Root(msgspec.Struct):
    devices: list[_Function] = []


async def read_pci_functions(monitor: Monitor) -> list[PciFunction]:
    """All that the guest has numbered, a bridge before what is behind it."""
    roots = await ask(monitor, "query-pci", list[_Root], [])
    return list(_flat(function for root in roots for function in root.devices))


def _flat(functions: Iterable[_Function]) -> Iterator[PciFunction]:
    for f in functions:
        behind = f.pci_bridge
        windows = None if behind is None else (
            behind.bus.memory_range.half_open, behind.bus.prefetchable_range.half_open
        )  # fmt: skip
        bars = tuple(region.bar for region in f.regions)
        yield PciFunction(f.qdev_id, f.bus, f.slot, f.function, bars, windows)
        if behind is not None:
            yield from _flat(behind.devices)


async def read_windows(monitor: Monitor) -> dict[str, tuple[Window, Window]]:
    """Memory and prefetchable window of each bridge that has an id."""
    functions = await read_pci_functions(monitor)
    return {f.id: f.windows for f in functions if f.windows is not None and f.id}


# -- PCI buses -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PciBus:
    """A bus that has a name.

    `bridge` is the id of the device that it is behind, None for the machine's own.  `express`: of
    PCI Express.  `refusal` says why it takes no device while the guest runs, None when it does.
    `taken` has the devices: (slot, function) and the QOM path.  `windows` are those of its bridge.
    """

    name: str
    bridge: str | None
    express: bool
    refusal: str | None = None
    shpc: bool = False
    taken: Mapping[tuple[int, int], str] = field(default_factory=dict)
    windows: tuple[Window, Window] = ((0, 0), (0, 0))

    @property
    def slots(self) -> range:
        if self.bridge is not None and self.express:
            return range(1)
        return range(1 if self.shpc else 0, _SLOTS)

    @property
    def free(self) -> int | None:
        """The first slot with nothing in it."""
        used = {slot for slot, _ in self.taken}
        return next((slot for slot in self.slots if slot not in used), None)

    @property
    def room(self) -> int:
        """The larger one of its windows, in bytes."""
        return max(end - start for start, end in self.windows)


def slot_text(place: tuple[int, int]) -> str:
    """Slot and function as QEMU writes them in `addr=`."""
    return f"{place[0]:x}.{place[1]:x}"


async def read_buses(monitor: Monitor) -> tuple[PciBus, ...]:
    """The machine's own bus first, then those behind bridges with an id, in QOM's order."""
    return await _Reading(monitor).run()


class _Reading:
    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._windows: dict[str, tuple[Window, Window]] = {}
        self._controllers: dict[str, bool] = {}

    async def run(self) -> tuple[PciBus, ...]:
        found = []
        for name in _ROOTS:
            entries = await qom_list(self._monitor, name, [])
            kind = await self._get(name, "type", str) if entries else None
            if kind in _TYPES:
                found.append(await self._bus(name, name, kind, None, False, entries))
        self._windows = await read_windows(self._monitor)
        devices = await qom_list(self._monitor, PERIPHERAL, [])
        ids = [d.name for d in devices if d.child is not None]
        parts = await self._lists([f"{PERIPHERAL}/{name}" for name in ids])
        for device, entries in zip(ids, parts, strict=True):
            for part in entries:
                if part.child in _TYPES:
                    path = f"{PERIPHERAL}/{device}/{part.name}"
                    has = any(e.name == "hotplug" and e.type == "bool" for e in entries)
                    (inside,) = await self._lists([path])
                    bus = await self._bus(path, part.name, part.child, device, has, inside)
                    found.append(bus)
        return tuple(found)

    async def _bus(
        self,
        path: str,
        name: str,
        kind: str,
        bridge: str | None,
        has_switch: bool,
        entries: Sequence[QomProperty],
    ) -> PciBus:
        handler = await self._get(path, "hotplug-handler", str)
        own = bridge is not None and handler == f"{PERIPHERAL}/{bridge}"
        express = kind in _EXPRESS
        refusal = None
        if has_switch and not await self._get(f"{PERIPHERAL}/{bridge}", "hotplug", bool):
            refusal = f"{name} has hotplug=off"
        elif not handler:
            refusal = f"QEMU has no hotplug for the bus {name}"
        elif not own and _BSEL not in {e.name for e in entries} and await self._is_acpi(handler):
            refusal = f"ACPI hotplug does not serve the bus {name}"
        return PciBus(
            name,
            bridge,
            express,
            refusal,
            own and not express,
            await self._taken(path, entries),
            self._windows.get(bridge or "", ((0, 0), (0, 0))),
        )

    async def _taken(self, path: str, entries: Sequence[QomProperty]) -> dict[tuple[int, int], str]:
        """A bus has a link to each of its devices (hw/core/qdev.c), and each has its devfn."""
        links = [e.name for e in entries if e.name.startswith("child[")]
        devices = await self._gets([(path, name) for name in links])
        paths = [d for d in devices if isinstance(d, str) and d]
        numbers = await self._gets([(device, "addr") for device in paths])
        return {
            (number >> 3, number & 7): device
            for device, number in zip(paths, numbers, strict=True)
            if isinstance(number, int) and number >= 0
        }

    async def _is_acpi(self, handler: str) -> bool:
        if handler not in self._controllers:
            (entries,) = await self._lists([handler])
            self._controllers[handler] = _BY_ACPI in {e.name for e in entries}
        return self._controllers[handler]

    async def _get(self, path: str, name: str, kind: type[T]) -> T | None:
        (value,) = await self._gets([(path, name)])
        return value if isinstance(value, kind) else None

    async def _gets(self, wanted: Sequence[tuple[str, str]]) -> list[object]:
        return await self._all(
            [Command("qom-get", {"path": path, "property": name}) for path, name in wanted]
        )

    async def _lists(self, paths: Sequence[str]) -> list[list[QomProperty]]:
        answers = await self._all([Command("qom-list", {"path": path}) for path in paths])
        return [
            converted(self._monitor, "qom-list", answer or [], list[QomProperty])
            for answer in answers
        ]

    async def _all(self, commands: Sequence[Command]) -> list[object]:
        """The answers; None where QEMU refused, as for a device that goes meanwhile."""
        found: list[object] = []
        for start in range(0, len(commands), _AT_ONCE):
            replies = await self._monitor.pipeline(commands[start : start + _AT_ONCE])
            found += [None if isinstance(r, CommandFailed) else r.value for r in replies]
        return found
