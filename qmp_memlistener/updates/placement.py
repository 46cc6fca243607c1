"""Where a device is in a guest, and what QEMU can show of the guest's part in it.

A device is looked for by what QEMU reports of it, whatever it is called: its bus by QOM, its number
among PCI functions by query-pci, its memory by query-memory-devices, and by query-acpi-ospm-status
whether the guest answers for it by ACPI _OST.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..qmp import MemoryDevice, Monitor
from ..qmp.asking import qom_get, qom_list
from ..qmp.guest import read_memory_devices
from ..qmp.guest_devices import (
    PERIPHERAL,
    PciBar,
    read_ospm_devices,
    read_pci_functions,
    slot_text,
)
from .model import Placed, Range

__all__ = ["Seen", "look_at"]

_PLACES = ("port", "channel", "scsi-id", "lun", "unit", "nr", "slot", "devno", "address", "iobase",
           "node", "socket-id", "die-id", "cluster-id", "core-id", "thread-id")  # fmt: skip
"""Properties in which devices of all kinds keep their place; those that one has are read."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A device with what can be seen of the guest's part in it.

    `bars` is None for what is no PCI function, or one that query-pci does not show yet because the
    guest has not numbered its bus.  `function` is slot and function of a PCI device, `alone`: the
    guest is not notified of it, function 0 of its slot is not there.  `answers` by ACPI _OST.
    """

    placed: Placed
    function: tuple[int, int] | None = None
    bars: tuple[PciBar, ...] | None = None
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
            return "QEMU reports it to the guest when function 0 of its slot is plugged"
        if self.bars == ():
            return f"a {self.placed.driver} has no BAR that the guest could program"
        return None


async def look_at(monitor: Monitor, device: str) -> Seen | None:
    """The device with this id as it is now; None when QEMU has none.  Raises TargetError."""
    path = f"{PERIPHERAL}/{device}"
    has = {c.name for c in await qom_list(monitor, path, [])}
    if "type" not in has:
        return None

    async def text(name: str, of: str = path) -> str:
        return await qom_get(monitor, of, name, str, "")

    bus_path = await text("parent_bus") if "parent_bus" in has else ""
    bus_type = await text("type", bus_path) if bus_path else ""
    address: dict[str, int | str] = {}
    function = None
    is_pci = "multifunction" in has
    if is_pci and (number := await qom_get(monitor, path, "addr", int, -1)) >= 0:
        function = (number >> 3, number & 7)
        address["addr"] = slot_text(function)
    for name in _PLACES:
        if name in has and not is_pci:
            value = await qom_get(monitor, path, name, object, "")
            if isinstance(value, int | str) and value not in ("", -1):
                address[name] = value
    functions = await read_pci_functions(monitor) if is_pci else []
    shown = next((f for f in functions if f.id == device), None)
    memory = next((d for d in await read_memory_devices(monitor) if d.id == device), None)
    resizable = memory if memory is not None and memory.kind == "virtio-mem" else None
    placed = Placed(
        id=device,
        driver=await text("type"),
        bus=bus_path.rpartition("/")[2] or None,
        bus_type=bus_type or None,
        address=address,
        pci=f"{shown.bus:02x}:{shown.slot:02x}.{shown.function}" if shown is not None else None,
        memory=_extent(memory),
        size=resizable.size if resizable is not None else None,
        requested=resizable.requested if resizable is not None else None,
    )
    answers = device in await read_ospm_devices(monitor)
    memdev = await text("memdev") if "memdev" in has else ""
    return Seen(
        placed,
        function,
        None if shown is None else shown.bars,
        function is not None and function[1] > 0 and await _is_alone(monitor, bus_path, function),
        answers,
        frozenset({memdev}) if memdev else frozenset(),
    )


def _extent(memory: MemoryDevice | None) -> Range | None:
    size = None if memory is None else memory.max_size or memory.size
    if memory is None or memory.addr is None or size is None:
        return None
    return Range(memory.addr, size)


async def _is_alone(monitor: Monitor, bus: str, function: tuple[int, int]) -> bool:
    """Whether function 0 of its slot is missing."""
    for link in await qom_list(monitor, bus, []):
        if not link.name.startswith("child["):
            continue
        other = await qom_get(monitor, bus, link.name, str, "")
        if await qom_get(monitor, other, "addr", int, -1) == function[0] << 3:
            return False
    return True
