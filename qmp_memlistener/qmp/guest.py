"""What a guest is asked for: its state and migration, its vCPUs, its machine and its memory.

Every question is here or, about its devices, in `guest_devices`, and has a typed answer and a
deadline.  They read only, with commands that cost QEMU well under a millisecond each, and raise as
`asking` says.  Where a QEMU or a machine may not have the command the answer says so, by None or
as noted: unknown is not zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ..errors import CommandFailed, ProtocolViolation
from ..host.bounded import in_thread
from .asking import ask, qom_get, qom_list, told
from .connection import COMMAND_DEADLINE, Command, Monitor, Reply
from .hmp import Flag, hmp
from .identity import find_owner

__all__ = [
    "LOOK",
    "GuestFacts",
    "GuestLook",
    "MemoryDevice",
    "MemorySizes",
    "RunStatus",
    "GuestVcpu",
    "count_ram_blocks",
    "look",
    "read_backends",
    "read_block_jobs",
    "read_device_memory",
    "read_facts",
    "read_machine",
    "read_memory_devices",
    "read_memory_sizes",
    "read_migration",
    "read_registers",
    "read_status",
    "read_vcpus",
    "takes_nvdimm",
    "translate",
    "try_status",
]

T = TypeVar("T")


# -- state ---------------------------------------------------------------------------------------


class RunStatus(msgspec.Struct, frozen=True):
    """QEMU's RunState, and whether the guest runs (query-status)."""

    status: str
    running: bool


async def read_status(monitor: Monitor) -> RunStatus:
    """Every QEMU has the command."""
    return await ask(monitor, "query-status", RunStatus)


async def try_status(monitor: Monitor, *, deadline: float) -> RunStatus | None:
    """None when QEMU does not answer in time, or is gone."""
    return await told(monitor, "query-status", RunStatus, deadline=deadline)


class _Migration(msgspec.Struct):
    status: str = "none"


async def read_migration(monitor: Monitor) -> str:
    """QEMU's MigrationStatus; `none` as well for a QEMU without the command: it cannot migrate."""
    return (await ask(monitor, "query-migrate", _Migration, _Migration())).status


LOOK = (Command("query-migrate"), Command("query-status"))
"""In this order: a migration that completes between the two leaves a guest that does not run."""


@dataclass(frozen=True, slots=True)
class GuestLook:
    """QEMU's answers to LOOK: its RunState and MigrationStatus, and what differs from one
    migration to the next (times in ms, bytes)."""

    status: str
    migration: str
    which: tuple[object, ...]

    @classmethod
    def of(
        cls,
        migrate: Reply | CommandFailed,
        status: Reply | CommandFailed,
        *,
        untold: str | None = None,
    ) -> GuestLook:
        """`untold` is the status when QEMU refuses to tell it; without, that is raised.

        Raises CommandFailed, ProtocolViolation.
        """
        state: object = untold
        if isinstance(status, Reply):
            state = status.value.get("status") if isinstance(status.value, dict) else None
        elif untold is None:
            raise status
        if not isinstance(state, str):
            raise ProtocolViolation("the answer to query-status has no status that is text")
        # (a QEMU without the command cannot migrate)
        value = migrate.value if isinstance(migrate, Reply) else None
        migration = value if isinstance(value, dict) else {}
        which = tuple(migration.get(name) for name in ("total-time", "downtime", "setup-time"))
        ram = migration.get("ram")
        sent = ram.get("transferred") if isinstance(ram, dict) else None
        return cls(state, str(migration.get("status", "none")), (*which, sent))

    def ran_twice(self, before: GuestLook) -> bool:
        """`cont` was accepted between the two looks, but a migration had completed before it."""
        return (
            self.status == "running"
            and self.migration == "completed"
            and (before.migration, before.which) != (self.migration, self.which)
        )


async def look(
    monitor: Monitor, *, deadline: float = COMMAND_DEADLINE, untold: str | None = None
) -> GuestLook:
    """Ask both at once.  Raises as `Monitor.pipeline` and `GuestLook.of`."""
    return GuestLook.of(*await monitor.pipeline(LOOK, deadline=deadline), untold=untold)


class _Job(msgspec.Struct):
    type: str


async def read_block_jobs(monitor: Monitor) -> tuple[str, ...]:
    """The types of the block jobs at work."""
    return tuple(job.type for job in await ask(monitor, "query-block-jobs", list[_Job], []))


# -- vCPUs ---------------------------------------------------------------------------------------


class GuestVcpu(msgspec.Struct, frozen=True, rename="kebab"):
    """A vCPU, and its thread as QEMU's namespace counts."""

    cpu_index: int
    thread_id: int


async def read_vcpus(monitor: Monitor, *, deadline: float) -> list[GuestVcpu] | None:
    """None when QEMU does not answer."""
    return await told(monitor, "query-cpus-fast", list[GuestVcpu], deadline=deadline)


async def read_registers(monitor: Monitor, *, deadline: float) -> str:
    """The state of every vCPU as text, of a guest that an error has stopped."""
    return await hmp(monitor, "info registers", Flag("a"), deadline=deadline)


_GPA = re.compile(r"\s*gpa: (0x[0-9a-f]+|0)\s*")


async def translate(
    monitor: Monitor, cpu_index: int, address: int, *, deadline: float
) -> int | None:
    """The gpa of a linear address of this vCPU; None when its page tables have none.

    `cpu-index` spares the monitor a change of its current CPU.
    """
    arguments = {"command-line": f"gva2gpa {address:#x}", "cpu-index": cpu_index}
    text = await monitor.execute("human-monitor-command", arguments, deadline=deadline)
    match = _GPA.fullmatch(text) if isinstance(text, str) else None
    return int(match[1], 16) if match is not None else None


# -- machine -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """What is shown beside a map.  A fact that this QEMU does not report is None."""

    version: str
    package: str
    name: str | None
    status: str | None
    running: bool | None
    kvm: bool | None
    accel: str | None
    machine: str | None
    memory_devices: tuple[MemoryDevice, ...]


class _Kvm(msgspec.Struct):
    enabled: bool


class _Name(msgspec.Struct):
    name: str | None = None


class _Accelerators(msgspec.Struct):
    enabled: str


async def read_facts(monitor: Monitor) -> GuestFacts:
    """Status, name, accelerator, machine and memory devices.

    What this QEMU refuses, or answers oddly, leaves its fact None.  Raises DeadlineExceeded,
    TargetLost.
    """

    async def fact(command: str, kind: type[T]) -> T | None:
        try:
            return await ask(monitor, command, kind)
        except (CommandFailed, ProtocolViolation):
            return None

    status = await fact("query-status", RunStatus)
    kvm = await fact("query-kvm", _Kvm)
    name = await fact("query-name", _Name)
    accel = "kvm" if kvm is not None and kvm.enabled else None
    if accel is None and (found := await fact("query-accelerators", _Accelerators)) is not None:
        accel = found.enabled  # (10.2 and later: all accelerators)
    if accel is None:
        owner = await in_thread(find_owner, monitor.target, monitor.identity)
        # an answer of QEMU's is worth more than a guess: it said that it is not KVM
        accel = owner.accel if owner is not None and owner.accel != "kvm" else None
    devices = await fact("query-memory-devices", list[_MemoryDevice])
    return GuestFacts(
        version=str(monitor.version),
        package=monitor.version.package,
        name=name.name if name is not None else None,
        status=status.status if status is not None else None,
        running=status.running if status is not None else None,
        kvm=kvm.enabled if kvm is not None else None,
        accel=accel,
        machine=await read_machine(monitor) or None,
        memory_devices=tuple(device.flat for device in devices or ()),
    )


async def read_machine(monitor: Monitor) -> str:
    """QEMU's name of the machine, alias resolved; empty when it is not known."""
    return (await qom_get(monitor, "/machine", "type", str, "")).removesuffix("-machine")


async def takes_nvdimm(monitor: Monitor) -> bool:
    """The machine was started with nvdimm=on."""
    return await qom_get(monitor, "/machine", "nvdimm", bool, False)


# -- memory --------------------------------------------------------------------------------------


class MemorySizes(msgspec.Struct, frozen=True, rename="kebab"):
    """`-m size,slots=,maxmem=` (MemorySizeConfiguration of qapi/machine.json); `max_size` is None
    without slots, whatever `maxmem=` was (machine_get_mem of hw/core/machine.c)."""

    size: int
    max_size: int | None = None
    slots: int = 0


async def read_memory_sizes(monitor: Monitor) -> MemorySizes:
    """Of the machine."""
    return await qom_get(monitor, "/machine", "memory", MemorySizes, MemorySizes(0))


@dataclass(frozen=True, slots=True)
class MemoryDevice:
    """An entry of query-memory-devices; `kind` is dimm, nvdimm, virtio-mem, virtio-pmem, …

    `addr` is its gpa and `size` what the guest has of it, in bytes.  Of a virtio-mem device that
    is part of `max_size`, in blocks of `block_size`; `requested` are wanted.  `memdev` is the QOM
    path of the backend, empty where QEMU does not report it.
    """

    kind: str
    id: str | None
    addr: int | None
    size: int | None
    memdev: str = ""
    hotpluggable: bool = False
    requested: int = 0
    max_size: int = 0
    block_size: int = 1


class _Device(msgspec.Struct, rename="kebab"):
    """`data` of all types (MemoryDeviceInfo of qapi/machine.json); virtio ones and sgx-epc say
    `memaddr`, DIMMs `addr`."""

    id: str | None = None
    addr: int | None = None
    memaddr: int | None = None
    size: int | None = None
    memdev: str | None = None
    hotpluggable: bool = False
    requested_size: int = 0
    max_size: int = 0
    block_size: int = 1


class _MemoryDevice(msgspec.Struct):
    type: str
    data: _Device

    @property
    def flat(self) -> MemoryDevice:
        d = self.data
        addr = d.memaddr if d.addr is None else d.addr
        return MemoryDevice(self.type, d.id, addr, d.size, d.memdev or "", d.hotpluggable,
                            d.requested_size, d.max_size, d.block_size)  # fmt: skip


async def read_memory_devices(monitor: Monitor) -> tuple[MemoryDevice, ...]:
    """In QEMU's order."""
    found = await ask(monitor, "query-memory-devices", list[_MemoryDevice], [])
    return tuple(device.flat for device in found)


_DEVICE_MEMORY = "device-memory[0]"
"""The region that every machine makes which has one (machine_memory_devices_init of
hw/core/machine.c and its forerunners in 7.2)."""


async def read_device_memory(monitor: Monitor) -> tuple[int, int] | None:
    """The range, half open, that the machine keeps for memory devices; None when it has none."""
    if _DEVICE_MEMORY not in {child.name for child in await qom_list(monitor, "/machine")}:
        return None
    start, size = [
        await qom_get(monitor, f"/machine/{_DEVICE_MEMORY}", name, int) for name in ("addr", "size")
    ]
    return (start, start + size)


class _Backend(msgspec.Struct):
    size: int
    id: str = ""


async def read_backends(monitor: Monitor) -> dict[str, int]:
    """The memory backends that have an id, and their sizes in bytes."""
    found = await ask(monitor, "query-memdev", list[_Backend], [])
    return {backend.id: backend.size for backend in found if backend.id}


async def count_ram_blocks(monitor: Monitor) -> int | None:
    """The RAM blocks there are; None when this QEMU does not list them."""
    try:
        text = await hmp(monitor, "info ramblock")
    except CommandFailed:
        return None
    return sum(" 0x" in line for line in text.splitlines())
