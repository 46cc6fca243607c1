"""What an update must know of a guest before it touches anything: its state and its memory.

Reads only, with commands that cost QEMU well under a millisecond each.  What follows from it is
the business of `plans`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ..errors import CommandFailed, ProtocolViolation
from ..qmp import Monitor
from .promise import is_migrating

__all__ = [
    "Dimm",
    "GuestView",
    "VirtioMem",
    "ask",
    "read_guest",
    "read_status",
    "read_virtio_mem",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Dimm:
    """A pc-dimm or nvdimm; `id` is None when it was given none."""

    id: str | None
    kind: str
    size: int
    memdev: str
    hotpluggable: bool


@dataclass(frozen=True, slots=True)
class VirtioMem:
    """A virtio-mem device: the guest has `size` of `max_size` bytes, `requested` are wanted."""

    id: str | None
    size: int
    requested: int
    max_size: int
    block_size: int


@dataclass(frozen=True, slots=True)
class GuestView:
    """A guest as it is before an update; sizes are bytes.

    `machine` is QEMU's name of it, alias resolved.  `dimm_slots` is what `-m slots=` gave,
    `max_memory` what `maxmem=` gave, None when that is not known: QEMU tells it only if there are
    slots (machine_get_mem of hw/core/machine.c).  `device_memory` is the range that the machine
    keeps for memory devices, None when it has none; `base_memory` what the guest booted with.
    `jobs` are block jobs that copy (types).  `migration` is the status of a migration under way,
    else None.
    """

    status: str
    running: bool
    migration: str | None
    jobs: tuple[str, ...]
    machine: str
    nvdimm: bool
    base_memory: int
    max_memory: int | None
    dimm_slots: int
    dimms: tuple[Dimm, ...]
    virtio_mems: tuple[VirtioMem, ...]
    device_memory: tuple[int, int] | None
    other_memory: int = 0
    """What memory devices of other kinds take of `device_memory`."""

    @property
    def memory(self) -> int:
        """All memory the guest has, or is about to have of virtio-mem devices."""
        plugged = sum(d.size for d in self.dimms) + sum(v.requested for v in self.virtio_mems)
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
        taken = sum(d.size for d in self.dimms) + sum(v.max_size for v in self.virtio_mems)
        return max(0, room - taken - self.other_memory)


class _Status(msgspec.Struct):
    status: str
    running: bool


class _Migration(msgspec.Struct):
    status: str | None = None


class _Job(msgspec.Struct):
    type: str
    device: str = ""


class _Sizes(msgspec.Struct, rename="kebab"):
    """MemorySizeConfiguration of qapi/machine.json: without slots there is no `slots`."""

    size: int
    max_size: int | None = None
    slots: int = 0


class _Device(msgspec.Struct, rename="kebab"):
    """`data` of query-memory-devices, of all types (qapi/machine.json, MemoryDeviceInfo)."""

    id: str | None = None
    size: int = 0
    memdev: str = ""
    hotpluggable: bool = False
    requested_size: int = 0
    max_size: int = 0
    block_size: int = 1


class _MemoryDevice(msgspec.Struct):
    type: str
    data: _Device


class _Child(msgspec.Struct):
    name: str


_MEMORY_TYPES = {"dimm": "pc-dimm", "nvdimm": "nvdimm"}
_OTHERS = frozenset({"virtio-pmem", "hv-balloon"})
_DEVICE_MEMORY = "device-memory[0]"
"""The region that every machine makes which has one (machine_memory_devices_init of
hw/core/machine.c and its forerunners in 7.2)."""


async def read_guest(monitor: Monitor) -> GuestView:
    """Raises TargetError."""
    status, running = await read_status(monitor)
    migration = await ask(monitor, "query-migrate", _Migration, _Migration())
    jobs = await ask(monitor, "query-block-jobs", list[_Job], [])
    sizes = await _machine_property(monitor, "memory", _Sizes, _Sizes(0))
    devices = await _memory_devices(monitor)
    return GuestView(
        status=status,
        running=running,
        migration=migration.status if is_migrating(migration.status or "") else None,
        jobs=tuple(job.type for job in jobs),
        machine=await _machine_property(monitor, "type", str, ""),
        nvdimm=await _machine_property(monitor, "nvdimm", bool, False),
        base_memory=sizes.size,
        max_memory=sizes.max_size,
        dimm_slots=sizes.slots,
        dimms=tuple(
            Dimm(d.data.id, _MEMORY_TYPES[d.type], d.data.size, d.data.memdev, d.data.hotpluggable)
            for d in devices
            if d.type in _MEMORY_TYPES
        ),
        virtio_mems=_virtio_mems(devices),
        device_memory=await _device_memory(monitor),
        other_memory=sum(d.data.size for d in devices if d.type in _OTHERS),
    )


async def read_status(monitor: Monitor) -> tuple[str, bool]:
    """QEMU's RunState, and whether the guest runs.  Raises TargetError."""
    found = await ask(monitor, "query-status", _Status)
    return found.status, found.running


async def _device_memory(monitor: Monitor) -> tuple[int, int] | None:
    there = await ask(monitor, "qom-list", list[_Child], path="/machine")
    if _DEVICE_MEMORY not in {child.name for child in there}:
        return None
    path = f"/machine/{_DEVICE_MEMORY}"
    start = await ask(monitor, "qom-get", int, path=path, property="addr")
    size = await ask(monitor, "qom-get", int, path=path, property="size")
    return (start, start + size)


async def read_virtio_mem(monitor: Monitor) -> tuple[VirtioMem, ...]:
    """The virtio-mem devices, in QEMU's order.  Raises TargetError."""
    return _virtio_mems(await _memory_devices(monitor))


def _virtio_mems(devices: list[_MemoryDevice]) -> tuple[VirtioMem, ...]:
    return tuple(
        VirtioMem(d.data.id, d.data.size, d.data.requested_size, d.data.max_size, d.data.block_size)
        for d in devices
        if d.type == "virtio-mem"
    )


async def _memory_devices(monitor: Monitor) -> list[_MemoryDevice]:
    return await ask(monitor, "query-memory-devices", list[_MemoryDevice], [])


async def ask(
    monitor: Monitor, command: str, kind: type[T], default: T | None = None, **arguments: object
) -> T:
    """The answer as `kind`; `default` when this QEMU or this machine does not have the command."""
    try:
        answer = await monitor.execute(command, arguments or None)
    except CommandFailed:
        if default is None:
            raise
        return default
    try:
        return msgspec.convert(answer, type=kind)
    except msgspec.ValidationError as exc:
        raise ProtocolViolation(
            f"{monitor.target}: the answer to {command} is none of QEMU's: {exc}",
            remedy="please report it with the version of QEMU",
        ) from exc


async def _machine_property(monitor: Monitor, name: str, kind: type[T], default: T) -> T:
    return await ask(monitor, "qom-get", kind, default, path="/machine", property=name)
