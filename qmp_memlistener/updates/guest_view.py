"""What an update must know of a guest before it touches anything: state, memory, PCI bridges.

Reads only, with commands that cost QEMU well under a millisecond each.  What follows from it is
the business of `plans`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ..errors import CommandFailed, ProtocolViolation
from ..monitor import Monitor

__all__ = [
    "Bridge",
    "Dimm",
    "GuestView",
    "VirtioMem",
    "ask",
    "read_bridges",
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
class Bridge:
    """A PCI-to-PCI bridge with an id, which is the name of the bus behind it.

    `driver` is its QOM type.  The windows are half-open ranges, empty when closed.  `occupied`
    says that something sits behind it.
    """

    id: str
    driver: str
    memory: tuple[int, int]
    prefetchable: tuple[int, int]
    occupied: bool


@dataclass(frozen=True, slots=True)
class GuestView:
    """A guest as it is before an update; sizes are bytes.

    `machine` is QEMU's name of it, alias resolved.  `dimm_slots` and `max_memory` are what
    `-m slots=,maxmem=` gave, `base_memory` what the guest booted with.  `jobs` are block jobs that
    copy (types).  `migration` is the status of a migration under way, else None.
    """

    status: str
    running: bool
    migration: str | None
    jobs: tuple[str, ...]
    machine: str
    nvdimm: bool
    base_memory: int
    max_memory: int
    dimm_slots: int
    dimms: tuple[Dimm, ...]
    virtio_mems: tuple[VirtioMem, ...]
    bridges: tuple[Bridge, ...]

    @property
    def memory(self) -> int:
        """All memory the guest has, or is about to have of virtio-mem devices."""
        plugged = sum(d.size for d in self.dimms) + sum(v.requested for v in self.virtio_mems)
        return self.base_memory + plugged

    @property
    def free_dimm_slots(self) -> int:
        return self.dimm_slots - len(self.dimms)

    @property
    def free_device_memory(self) -> int:
        """Room between `-m size` and `maxmem`; a virtio-mem device takes all that it may become."""
        taken = sum(d.size for d in self.dimms) + sum(v.max_size for v in self.virtio_mems)
        return max(0, self.max_memory - self.base_memory - taken)


class _Status(msgspec.Struct):
    status: str
    running: bool


class _Migration(msgspec.Struct):
    status: str | None = None


class _Job(msgspec.Struct):
    type: str
    device: str = ""


class _Sizes(msgspec.Struct, rename="kebab"):
    size: int
    max_size: int = 0
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


class _Range(msgspec.Struct):
    base: int
    limit: int

    @property
    def half_open(self) -> tuple[int, int]:
        return (self.base, self.limit + 1) if self.base <= self.limit else (0, 0)


class _Bus(msgspec.Struct):
    memory_range: _Range
    prefetchable_range: _Range


class _BridgeInfo(msgspec.Struct):
    bus: _Bus
    devices: list[_Function] = []


class _Function(msgspec.Struct):
    qdev_id: str = ""
    pci_bridge: _BridgeInfo | None = None


class _Child(msgspec.Struct):
    name: str


class _PciBus(msgspec.Struct):
    devices: list[_Function] = []


# MigrationStatus (qapi/migration.json) of a migration that is not over
_MIGRATING = frozenset(
    {
        "setup",
        "active",
        "cancelling",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover",
        "postcopy-recover-setup",
        "postcopy-device",
        "pre-switchover",
        "device",
        "colo",
        "wait-unplug",
    }
)
_MEMORY_TYPES = {"dimm": "pc-dimm", "nvdimm": "nvdimm"}


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
        migration=migration.status if migration.status in _MIGRATING else None,
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
        bridges=await read_bridges(monitor),
    )


async def read_status(monitor: Monitor) -> tuple[str, bool]:
    """QEMU's RunState, and whether the guest runs.  Raises TargetError."""
    found = await ask(monitor, "query-status", _Status)
    return found.status, found.running


async def read_bridges(monitor: Monitor) -> tuple[Bridge, ...]:
    """All bridges that have an id, in the order of query-pci; none on a machine without PCI."""
    buses = await ask(monitor, "query-pci", list[_PciBus], [])
    found = []
    for function in _functions([f for bus in buses for f in bus.devices]):
        bridge = function.pci_bridge
        if bridge is None or not function.qdev_id:
            continue
        path = f"/machine/peripheral/{function.qdev_id}"
        driver = await ask(monitor, "qom-get", str, "", path=path, property="type")
        found.append(
            Bridge(
                function.qdev_id,
                driver,
                bridge.bus.memory_range.half_open,
                bridge.bus.prefetchable_range.half_open,
                bool(bridge.devices) or await _has_children(monitor, f"{path}/{function.qdev_id}"),
            )
        )
    return tuple(found)


async def _has_children(monitor: Monitor, bus: str) -> bool:
    """query-pci does not tell what is behind a bridge without bus numbers, which a guest gives it
    (hw/pci/pci-qmp-cmds.c); the bus has a link to each of its devices (hw/core/qdev.c)."""
    found = await ask(monitor, "qom-list", list[_Child], [], path=bus)
    return any(child.name.startswith("child[") for child in found)


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


def _functions(functions: list[_Function]) -> Iterator[_Function]:
    for function in functions:
        yield function
        if function.pci_bridge is not None:
            yield from _functions(function.pci_bridge.devices)


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
