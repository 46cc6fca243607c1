"""Fetching a guest's memory map and the few facts around it, and what that cost the guest.

Returns text; `qmp_memlistener.topology.mtree` parses it.  Only `info mtree -o -D` is ever sent:
`info mtree -f` leaks a FlatView reference per call (facts measured on 7.2 and 10.0.2: a device
whose region sits in a leaked view is never finalised), so nothing here can send it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CommandFailed
from ..host.bounded import in_thread
from .connection import Monitor
from .hmp import Flag, hmp_timed
from .identity import find_owner

__all__ = [
    "GuestFacts",
    "IdleRoundTrip",
    "MemoryDevice",
    "Snapshot",
    "measure_idle",
    "read_facts",
    "take_snapshot",
]


@dataclass(frozen=True, slots=True)
class IdleRoundTrip:
    """Round trip of a command that does next to nothing: what the way there and back costs."""

    median_ns: int
    samples: int


@dataclass(frozen=True, slots=True)
class MemoryDevice:
    """One entry of query-memory-devices; `kind` is dimm, nvdimm, virtio-mem, virtio-pmem, …"""

    kind: str
    id: str | None
    addr: int
    size: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`info mtree -o -D` as printed, taken between `t_start_ns` and `t_end_ns`.

    `bql_cost_ns` is an upper bound for how long the Big QEMU Lock was held for it: the measured
    round trip less the idle one (sending and decoding the text are still in it); None when no
    idle round trip was given.
    """

    text: str
    t_start_ns: int
    t_end_ns: int
    bql_cost_ns: int | None

    @property
    def duration_ns(self) -> int:
        return self.t_end_ns - self.t_start_ns


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """What stands beside a map.  A fact that this QEMU would not tell is None."""

    version: str
    package: str
    name: str | None
    status: str | None
    running: bool | None
    kvm: bool | None
    accel: str | None
    machine: str | None
    memory_devices: tuple[MemoryDevice, ...]


async def measure_idle(monitor: Monitor, *, samples: int = 7) -> IdleRoundTrip:
    """The median round trip of `query-name`, an in-band command that takes no time in QEMU."""
    durations = [(await monitor.timed("query-name")).duration_ns for _ in range(samples)]
    return IdleRoundTrip(int(statistics.median(durations)), samples)


async def take_snapshot(
    monitor: Monitor, idle: IdleRoundTrip | None = None, *, deadline: float = 10.0
) -> Snapshot:
    """Read the region tree with owners and disabled regions.

    Costs the guest `Snapshot.bql_cost_ns` at most (0.6 to 1.3 ms on a small pc or q35, 4.5 to
    8.4 ms with 32 root ports).  Raises CommandFailed, DeadlineExceeded, TargetLost.
    """
    reply = await hmp_timed(monitor, "info mtree", Flag("o"), Flag("D"), deadline=deadline)
    return Snapshot(
        text=str(reply.value),
        t_start_ns=reply.t_start_ns,
        t_end_ns=reply.t_end_ns,
        bql_cost_ns=None if idle is None else max(0, reply.duration_ns - idle.median_ns),
    )


async def read_facts(monitor: Monitor) -> GuestFacts:
    """Status, name, accelerator, machine and memory devices.

    A command that this QEMU refuses leaves its fact None.  Raises DeadlineExceeded, TargetLost.
    """
    status = await _object(monitor, "query-status")
    kvm = await _object(monitor, "query-kvm")
    name = await _object(monitor, "query-name")
    kvm_enabled = kvm.get("enabled")
    running = status.get("running")
    return GuestFacts(
        version=str(monitor.version),
        package=monitor.version.package,
        name=_text(name.get("name")),
        status=_text(status.get("status")),
        running=running if isinstance(running, bool) else None,
        kvm=kvm_enabled if isinstance(kvm_enabled, bool) else None,
        accel=await _accel(monitor, kvm_enabled is True),
        machine=_machine(await _value(monitor, "qom-get", path="/machine", property="type")),
        memory_devices=tuple(await _memory_devices(monitor)),
    )


async def _value(monitor: Monitor, command: str, **arguments: object) -> object:
    try:
        return await monitor.execute(command, arguments or None)
    except CommandFailed:
        return None


async def _object(monitor: Monitor, command: str) -> Mapping[str, object]:
    value = await _value(monitor, command)
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _machine(value: object) -> str | None:
    text = _text(value)
    return text.removesuffix("-machine") if text is not None else None


async def _accel(monitor: Monitor, kvm: bool) -> str | None:
    """query-kvm knows one accelerator, query-accelerators (where it exists) all; else the process
    tells, where it is visible."""
    if kvm:
        return "kvm"
    accelerators = await _object(monitor, "query-accelerators")
    enabled = _text(accelerators.get("enabled"))
    if enabled is not None:
        return enabled
    guest = await in_thread(find_owner, monitor.target, monitor.identity)
    # an answer of QEMU's is worth more than a guess: it said that it is not KVM
    return guest.accel if guest is not None and guest.accel != "kvm" else None


async def _memory_devices(monitor: Monitor) -> list[MemoryDevice]:
    value = await _value(monitor, "query-memory-devices")
    found = []
    for entry in value if isinstance(value, list) else []:
        data = entry.get("data") if isinstance(entry, Mapping) else None
        if not isinstance(data, Mapping):
            continue
        # virtio-pmem, virtio-mem and sgx name the address `memaddr` (qapi/machine.json).
        addr = data.get("addr", data.get("memaddr"))
        size = data.get("size")
        if isinstance(addr, int) and isinstance(size, int):
            found.append(MemoryDevice(str(entry.get("type")), _text(data.get("id")), addr, size))
    return found
