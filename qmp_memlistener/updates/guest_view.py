"""What an update must know of a guest before it touches anything: its state, memory, ids in use.

`qmp.guest` and `qmp.guest_devices` ask; what follows from it is in `plans`.  All reads here raise
TargetError.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..qmp import MemoryDevice, Monitor
from ..qmp.asking import qom_get
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
    PciBus,
    device_properties,
    read_block_nodes,
    read_buses,
    read_children,
    read_netdevs,
)
from .model import Addition, Intent, Plug, Role
from .pause.promise import is_migrating

__all__ = ["Facts", "GuestView", "backends_of", "read_facts", "read_guest", "read_ids"]

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
