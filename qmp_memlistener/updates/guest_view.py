"""What an update must know of a guest: its state, memory and ids in use, and where a device is.

`qmp.guest` and `qmp.guest_devices` ask; what follows from it is in `plans`.  All reads here raise
TargetError.  A device is looked for by what QEMU reports of it, whatever it is called: its bus by
QOM, its number among PCI functions by query-pci, its memory by query-memory-devices, and by
query-acpi-ospm-status whether the guest answers for it by ACPI _OST.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..qmp import MemoryDevice, Monitor
from ..qmp.asking import qom_get, qom_list
from ..qmp.guest import (
    read_backends,
    read_block_jobs,
    read_device_memory,
    read_machine,
    read_memory_devices,
    read_memory_sizes,
    read_migration,
    read_status,
    takes_nvdimm,
)
from ..qmp.guest_devices import (
    PERIPHERAL,
    PciBar,
    PciBus,
    device_properties,
    read_block_nodes,
    read_buses,
    read_children,
    read_netdevs,
    read_ospm_devices,
    read_pci_functions,
    slot_text,
)
from .model import Addition, Intent, Placed, Plug, Range, Role
from .pause.promise import is_migrating

__all__ = [
    "Facts",
    "GuestView",
    "Seen",
    "backends_of",
    "look_at",
    "read_facts",
    "read_guest",
    "read_ids",
]


_DIMMS = ("dimm", "nvdimm")
_OTHERS = ("virtio-pmem", "hv-balloon")


@dataclass(frozen=True, slots=True)
class GuestView:
    """A guest as it is before an update; sizes are bytes.

    `migration` is its status while it is under way, None otherwise.  `dimm_slots` is what
    `-m slots=` gave, `max_memory` what `maxmem=` gave, None when that is not known.
    `device_memory` is the range that the machine keeps for memory devices, None when it has none;
    `base_memory` what the guest booted with.
    """

    status: str
    migration: str | None
    jobs: tuple[str, ...]
    machine: str
    nvdimm: bool
    base_memory: int
    max_memory: int | None
    dimm_slots: int
    memory_devices: tuple[MemoryDevice, ...]
    device_memory: tuple[int, int] | None

    @property
    def dimms(self) -> list[MemoryDevice]:
        """Those that take a slot, NVDIMMs among them."""
        return [d for d in self.memory_devices if d.kind in _DIMMS]

    @property
    def virtio_mems(self) -> list[MemoryDevice]:
        return [d for d in self.memory_devices if d.kind == "virtio-mem"]

    @property
    def memory(self) -> int:
        """All memory the guest has, or is about to have of virtio-mem devices."""
        plugged = sum(d.size or 0 for d in self.dimms) + sum(v.requested for v in self.virtio_mems)
        return self.base_memory + plugged

    @property
    def free_dimm_slots(self) -> int:
        return self.dimm_slots - len(self.dimms)

    @property
    def free_device_memory(self) -> int | None:
        """Room between `-m size` and `maxmem`; a virtio-mem device takes all that it may become.

        Without slots the range for memory devices is as large as that; with slots some machines
        make it larger, to align DIMMs (pc_memory_init of hw/i386/pc.c).  None when the machine has
        no such range.
        """
        if self.device_memory is None:
            return None
        start, end = self.device_memory
        room = end - start if self.max_memory is None else self.max_memory - self.base_memory
        taken = sum(v.max_size for v in self.virtio_mems)
        taken += sum(d.size or 0 for d in self.memory_devices if d.kind in (*_DIMMS, *_OTHERS))
        return max(0, room - taken)


async def read_guest(monitor: Monitor) -> GuestView:
    """What every update must know."""
    status = await read_status(monitor)
    migration = await read_migration(monitor)
    sizes = await read_memory_sizes(monitor)
    return GuestView(
        status=status.status,
        migration=migration if is_migrating(migration) else None,
        jobs=await read_block_jobs(monitor),
        machine=await read_machine(monitor),
        nvdimm=await takes_nvdimm(monitor),
        base_memory=sizes.size,
        max_memory=sizes.max_size,
        dimm_slots=sizes.slots,
        memory_devices=await read_memory_devices(monitor),
        device_memory=await read_device_memory(monitor),
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """What the plan for a certain intent needs beside the view.

    `backends` are the memory backends that exist, with their sizes in bytes; `pci` says whether the
    device to be plugged is a PCI device, `memory` whether it is one that is mapped as memory beside
    the boot memory, `slot` whether that needs a slot for a DIMM; `buses` are those for a PCI
    device; `used` are the ids there are, by what they are ids of.
    """

    backends: Mapping[str, int]
    pci: bool = False
    used: Mapping[Role, frozenset[str]] = field(default_factory=dict)
    memory: bool = False
    slot: bool = False
    buses: Sequence[PciBus] = ()

    def ids(self, role: Role) -> frozenset[str]:
        return self.used.get(role, frozenset())


async def read_facts(monitor: Monitor, intent: Intent) -> Facts:
    """What the plan for `intent` needs."""
    backends = await read_backends(monitor)
    roles = {b.role for b in intent.backends} if isinstance(intent, Plug) else set()
    used = await read_ids(monitor, roles)
    if not isinstance(intent, Plug):
        return Facts(backends, used=used)
    # qom-list-types would load all of QEMU's modules
    types = await device_properties(monitor, intent.device.type)
    pci = "multifunction" in types  # every PCI device has it (hw/pci/pci.c)
    # of a PCI device `addr` is its place on the bus
    dimm = not pci and "memdev" in types and types.get("addr") == "uint64"
    return Facts(
        backends,
        pci,
        used,
        memory=dimm or "memaddr" in types,
        slot=dimm and "slot" in types,
        buses=await read_buses(monitor) if pci else (),
    )


async def read_ids(monitor: Monitor, roles: Collection[Role]) -> dict[Role, frozenset[str]]:
    """The ids that are in use, of devices and objects and what else is among `roles`."""
    used = {
        Role.DEVICE: frozenset(await read_children(monitor, PERIPHERAL)),
        Role.OBJECT: frozenset(await read_children(monitor, "/objects")),
    }
    if Role.NETDEV in roles:
        used[Role.NETDEV] = await read_netdevs(monitor)
    if Role.BLOCKDEV in roles:
        used[Role.BLOCKDEV] = await read_block_nodes(monitor)
    return used


async def backends_of(monitor: Monitor, device: str) -> tuple[Addition, ...]:
    """The backends of a device, which can be removed after it: memory, network, block.

    A backend that is part of QEMU's own command line is among them; QEMU removes it like others.
    """
    found = []
    for name, role in (
        ("memdev", Role.OBJECT),
        ("netdev", Role.NETDEV),
        ("drive", Role.BLOCKDEV),
    ):
        value = await qom_get(monitor, f"{PERIPHERAL}/{device}", name, str, "")
        backend = value.rpartition("/")[2] if role is Role.OBJECT else value
        if backend:
            found.append(Addition(role, backend, {role.id_key: backend}, typed=True))
    return tuple(found)


# -- where a device is -------------------------------------------------------------------------


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
