"""The PCI buses of a guest: which of them take a device while it runs, and what is on them.

QEMU plugs a device into a bus only if the bus has a `hotplug-handler` (qbus_is_hotpluggable of
hw/core/qdev.c), and the handler has conditions of its own.  All of it can be read by QOM; checked
on 7.2, 10.0 and 11.1:

- A port with the property `hotplug` takes devices only if that is on (pcie_cap_slot_pre_plug_cb of
  hw/pci/pcie.c).
- An ACPI controller serves only buses that it has given an `acpi-pcihp-bsel`
  (acpi_pcihp_device_pre_plug_cb of hw/acpi/pcihp.c).
- A conventional bridge that is its own handler is an SHPC, which has no slot 0
  (shpc_device_get_slot of hw/pci/shpc.c).

A bus behind a PCIe port has slot 0 only; every other one has 32 slots.  query-pci is asked for
windows alone: it shows nothing behind a bridge that the guest has not numbered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from ..errors import CommandFailed, ProtocolViolation
from ..qmp import Command, Monitor
from .guest_view import ask

__all__ = ["PciBus", "Window", "read_buses", "read_windows", "slot_text"]

T = TypeVar("T")
Window = tuple[int, int]
"""A range that a bridge passes on, half open; empty when it is closed."""

_PERIPHERAL = "/machine/peripheral"
_ROOTS = ("pcie.0", "pci.0", "pci")
"""What machines call their own bus; QOM finds it by that name wherever it is."""
_TYPES = frozenset({"PCI", "PCIE", "CXL"})
_EXPRESS = frozenset({"PCIE", "CXL"})
_BSEL = "acpi-pcihp-bsel"
_BY_ACPI = "acpi-pci-hotplug-with-bridge-support"  # a property of every ACPI controller for PCI
_AT_ONCE = 16
_SLOTS = 32


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


class _Entry(msgspec.Struct):
    """Of qom-list (qapi/qom.json, ObjectPropertyInfo)."""

    name: str
    type: str

    @property
    def child(self) -> str | None:
        """The type of a child."""
        return self.type[6:-1] if self.type.startswith("child<") else None


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


class _Function(msgspec.Struct):
    qdev_id: str = ""
    pci_bridge: _Behind | None = None


class _Root(msgspec.Struct):
    devices: list[_Function] = []


async def read_windows(monitor: Monitor) -> dict[str, tuple[Window, Window]]:
    """Memory and prefetchable window of each bridge that has an id.  Raises TargetError."""
    roots = await ask(monitor, "query-pci", list[_Root], [])
    functions = _functions([f for root in roots for f in root.devices])
    return {
        f.qdev_id: (f.pci_bridge.bus.memory_range.half_open,
                    f.pci_bridge.bus.prefetchable_range.half_open)
        for f in functions if f.pci_bridge is not None and f.qdev_id
    }  # fmt: skip


def _functions(functions: Iterable[_Function]) -> Iterator[_Function]:
    for function in functions:
        yield function
        if function.pci_bridge is not None:
            yield from _functions(function.pci_bridge.devices)


async def read_buses(monitor: Monitor) -> tuple[PciBus, ...]:
    """The machine's own bus first, then those behind bridges with an id, in QOM's order.

    Raises TargetError.
    """
    return await _Reading(monitor).run()


class _Reading:
    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._windows: dict[str, tuple[Window, Window]] = {}
        self._controllers: dict[str, bool] = {}

    async def run(self) -> tuple[PciBus, ...]:
        found = []
        for name in _ROOTS:
            entries = await ask(self._monitor, "qom-list", list[_Entry], [], path=name)
            kind = await self._get(name, "type", str) if entries else None
            if kind in _TYPES:
                found.append(await self._bus(name, name, kind, None, False, entries))
        self._windows = await read_windows(self._monitor)
        devices = await ask(self._monitor, "qom-list", list[_Entry], [], path=_PERIPHERAL)
        ids = [d.name for d in devices if d.child is not None]
        parts = await self._lists([f"{_PERIPHERAL}/{name}" for name in ids])
        for device, entries in zip(ids, parts, strict=True):
            for part in entries:
                if part.child in _TYPES:
                    path = f"{_PERIPHERAL}/{device}/{part.name}"
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
        entries: Sequence[_Entry],
    ) -> PciBus:
        handler = await self._get(path, "hotplug-handler", str)
        own = bridge is not None and handler == f"{_PERIPHERAL}/{bridge}"
        express = kind in _EXPRESS
        refusal = None
        if has_switch and not await self._get(f"{_PERIPHERAL}/{bridge}", "hotplug", bool):
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

    async def _taken(self, path: str, entries: Sequence[_Entry]) -> dict[tuple[int, int], str]:
        """A bus has a link to each of its devices (hw/core/qdev.c), and they know their devfn."""
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

    async def _lists(self, paths: Sequence[str]) -> list[list[_Entry]]:
        answers = await self._all([Command("qom-list", {"path": path}) for path in paths])
        try:
            return [msgspec.convert(answer or [], list[_Entry]) for answer in answers]
        except msgspec.ValidationError as exc:
            raise ProtocolViolation(
                f"{self._monitor.target}: the answer to qom-list is none of QEMU's: {exc}",
                remedy="please report it with the version of QEMU",
            ) from exc

    async def _all(self, commands: Sequence[Command]) -> list[object]:
        """The answers; None where QEMU refused, as for a device that goes meanwhile."""
        found: list[object] = []
        for start in range(0, len(commands), _AT_ONCE):
            replies = await self._monitor.pipeline(commands[start : start + _AT_ONCE])
            found += [None if isinstance(r, CommandFailed) else r.value for r in replies]
        return found
