"""From an intent and a strategy to the commands for it, or to the reason why not.  Pure.

`plan` looks at a `GuestView` and at the sizes of memory backends, and says everything that a
strategy cannot do for this guest before anything is touched.  Values are typed already (`typing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations, count

from ..monitor import Command
from .guest_view import Bridge, Dimm, GuestView, VirtioMem
from .model import Addition, Intent, Plug, Resize, Role, Strategy, Unplug, UpdateRefused

__all__ = ["Awaited", "Facts", "Step", "UpdatePlan", "check_state", "plan_update"]

MEMORY_DRIVERS = frozenset({"pc-dimm", "nvdimm"})
_FORBIDDEN_STATES = {
    "inmigrate": "it waits for an incoming migration",
    "postmigrate": "it has been migrated away",
    "finish-migrate": "it is being migrated",
    "internal-error": "it died of an internal error",
    "shutdown": "it has shut down",
    "guest-panicked": "its kernel has panicked",
    "save-vm": "a snapshot is being saved",
    "restore-vm": "a snapshot is being loaded",
    "colo": "it is a COLO secondary",
}
_PCIE_MACHINES = ("pc-q35", "virt", "microvm")
_DIMM_ALIGN = 128 << 20
"""Linux on x86 adds memory in blocks of 128 MiB at least (memory_block_size_bytes)."""


class Awaited(StrEnum):
    """What tells that the guest has done its part.

    REACTION: any sign of it, and then quiet; a guest without a driver gives none.  GONE:
    DEVICE_DELETED of the device itself.  SIZE: virtio-mem devices have the size that was asked for.
    """

    REACTION = "reaction"
    GONE = "gone"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class Step:
    """A command, what it is for in words, and the command that takes it back, if there is one."""

    command: Command
    what: str
    undo: Command | None = None
    addition: Addition | None = None


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """`prepare` runs first, with vCPUs running; `update` is what changes the map, under the
    strategy; `finish` runs once the guest has done its part.  `devices` are the ids of the devices
    that come, go or change; `sizes` what virtio-mem devices shall have.
    """

    prepare: tuple[Step, ...]
    update: tuple[Step, ...]
    finish: tuple[Step, ...]
    awaited: Awaited
    devices: tuple[str, ...]
    sizes: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What plans need beside the view.

    `backends` are the memory backends that exist, with their sizes in bytes; `pci` says whether the
    device to be plugged is a PCI device; `used` are ids that may not be used again; `devices` the
    ids of the devices there are.
    """

    backends: Mapping[str, int]
    pci: bool = False
    used: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()


def check_state(view: GuestView, strategy: Strategy) -> None:
    """Raises UpdateRefused when the guest is in no state to be changed."""
    if view.migration is not None:
        raise UpdateRefused(
            f"a migration is under way ({view.migration}); nothing was touched",
            remedy="wait until it is over, or cancel it",
        )
    why = _FORBIDDEN_STATES.get(view.status)
    if why:
        raise UpdateRefused(
            f"the guest is in the state {view.status}: {why}; nothing was touched",
            remedy="update a guest that runs",
        )
    if strategy is Strategy.PAUSE and view.jobs:
        raise UpdateRefused(
            f"a block job is at work ({', '.join(view.jobs)}), which stopping the guest would "
            "disturb; nothing was touched",
            remedy="wait for the job, or use --strategy direct",
        )


def plan_update(intent: Intent, strategy: Strategy, view: GuestView, facts: Facts) -> UpdatePlan:
    """The commands.  Raises UpdateRefused with what to add to the guest's configuration."""
    check_state(view, strategy)
    match intent:
        case Plug():
            return _plug(intent, strategy, view, facts)
        case Unplug():
            return _unplug(intent, strategy, view, facts)
        case Resize():
            return _resize(intent, strategy, view, facts)


# -- plug ------------------------------------------------------------------------------------


def _plug(intent: Plug, strategy: Strategy, view: GuestView, facts: Facts) -> UpdatePlan:
    device = intent.device
    for addition in (*intent.backends, device):
        if addition.id in facts.used:
            raise UpdateRefused(
                f"the guest has something called {addition.id} already; nothing was touched",
                remedy="choose another id",
            )
    sizes = {**facts.backends, **_sizes(intent.backends)}
    if device.type in MEMORY_DRIVERS:
        if strategy is Strategy.HOLE:
            raise UpdateRefused(
                f"a {device.type} is a memslot of its own, it cannot fill a hole; nothing was "
                "touched",
                remedy=_VIRTIO_MEM_REMEDY + ", and `resize` it",
            )
        _check_dimm(device, view, sizes)
    if device.type.startswith(("virtio-mem", "virtio-pmem")):
        _check_room(view, 0, sizes.get(str(device.arguments.get("memdev")), 0))
    if facts.pci:
        device = _on_a_bus(device, strategy, view, sizes)
    return UpdatePlan(
        prepare=tuple(_add(b) for b in intent.backends),
        update=(_add(device),),
        finish=(),
        awaited=Awaited.REACTION,
        devices=(device.id,),
        sizes={},
    )


def _add(addition: Addition) -> Step:
    """A failed device_add leaves nothing behind, and a device that is there must not be undone by
    force: only backends have an undo."""
    undo = None if addition.role is Role.DEVICE else _removal(addition)
    command = Command(addition.role.add_command, dict(addition.arguments))
    return Step(command, f"{addition.role} {addition.id}", undo, addition)


def _removal(addition: Addition) -> Command:
    return Command(addition.role.remove_command, {addition.role.id_key: addition.id})


def _sizes(backends: Sequence[Addition]) -> dict[str, int]:
    return {
        b.id: size
        for b in backends
        if b.role is Role.OBJECT and isinstance(size := b.arguments.get("size"), int)
    }


def _check_dimm(device: Addition, view: GuestView, sizes: Mapping[str, int]) -> None:
    if device.type == "nvdimm" and not view.nvdimm:
        raise UpdateRefused(
            "this machine takes no NVDIMM; nothing was touched",
            remedy="start the guest with -machine …,nvdimm=on",
        )
    _check_room(view, 1, sizes.get(str(device.arguments.get("memdev")), 0))


def _check_room(view: GuestView, slots: int, size: int) -> None:
    """As pc-dimm and memory-device check it (hw/mem/memory-device.c), but beforehand."""
    if view.free_dimm_slots < slots:
        have = f"all {view.dimm_slots} memory slots are taken" if view.dimm_slots else "no slots"
        raise UpdateRefused(
            f"the guest has no free slot for memory ({have}); nothing was touched",
            remedy="start the guest with -m size,slots=N,maxmem=SIZE, or unplug a DIMM",
        )
    if size > view.free_device_memory:
        raise UpdateRefused(
            f"the guest has room for {_mib(view.free_device_memory)} of more memory, not for "
            f"{_mib(size)}; nothing was touched",
            remedy=f"start the guest with a larger maxmem than {_mib(view.max_memory)}",
        )


def _on_a_bus(
    device: Addition, strategy: Strategy, view: GuestView, sizes: Mapping[str, int]
) -> Addition:
    """The device with a bus, where the machine's own bus takes no devices while it runs.

    A PCIe root complex does not (q35's, and gpex of virt and microvm; pcie.0); pc's pci.0 does, by
    ACPI.
    """
    bus = device.arguments.get("bus")
    ports = {b.id: b for b in view.bridges}
    if bus == "pcie.0" or (bus is None and view.machine.startswith(_PCIE_MACHINES)):
        if bus is not None:
            raise UpdateRefused(
                "the root bus pcie.0 takes no device while the guest runs; nothing was touched",
                remedy="name a free root port with bus=, or none to have one chosen",
            )
        need = _window_needed(device, sizes)
        free = [b for b in view.bridges if not b.occupied]
        if not free:
            raise UpdateRefused(
                "the guest has no free PCIe root port, and its root bus takes no device while it "
                "runs; nothing was touched",
                remedy="start the guest with -device pcie-root-port,id=rp0,chassis=1, one a device",
            )
        roomy = [b for b in free if _room(b) >= need]
        device = Addition(
            device.role,
            device.id,
            {**device.arguments, "bus": (roomy or free)[0].id},
            device.typed,
        )
        bus = device.arguments["bus"]
    port = ports.get(str(bus))
    if port is not None and port.occupied and port.driver in _ONE_DEVICE:
        raise UpdateRefused(
            f"the root port {port.id} has a device already; nothing was touched",
            remedy="name a free one with bus=, or start the guest with more",
        )
    if strategy is Strategy.HOLE and port is not None:
        need = _window_needed(device, sizes)
        if _room(port) < need:
            raise UpdateRefused(
                f"the windows of {port.id} hold {_mib(_room(port))}, the device needs "
                f"{_mib(need)}: bridge windows would have to move; nothing was touched",
                remedy="start the guest with the port's pref64-reserve= large enough, "
                f"such as -device pcie-root-port,id={port.id},pref64-reserve={need >> 20}M",
            )
    return device


_ONE_DEVICE = frozenset({"pcie-root-port", "ioh3420", "xio3130-downstream", "x3130-upstream"})


def _room(bridge: Bridge) -> int:
    return max(end - start for start, end in (bridge.memory, bridge.prefetchable))


def _window_needed(device: Addition, sizes: Mapping[str, int]) -> int:
    """A BAR is as large as the memory behind it, rounded up to a power of 2; registers take less
    than a MiB, which is what a window has at least (PCI-to-PCI bridge specification 1.2, 3.2.5.6).
    """
    memory = sizes.get(str(device.arguments.get("memdev")), 0)
    if device.type.startswith("virtio-mem"):
        memory = 0  # it is no BAR: it is mapped beside the DIMMs
    return max(1 << 20, 1 << (memory - 1).bit_length() if memory else 0)


# -- unplug ----------------------------------------------------------------------------------


def _unplug(intent: Unplug, strategy: Strategy, view: GuestView, facts: Facts) -> UpdatePlan:
    if intent.id not in facts.devices:
        have = ", ".join(sorted(facts.devices)) or "none"
        raise UpdateRefused(
            f"the guest has no device {intent.id}; those with an id: {have}",
            remedy="a device can be named if it was given an id",
        )
    dimm = next((d for d in view.dimms if d.id == intent.id), None)
    if dimm is not None and strategy is Strategy.HOLE:
        raise UpdateRefused(
            f"{intent.id} is a {dimm.kind}: taking it out deletes its memslot, there is no hole to "
            "make; nothing was touched",
            remedy="use --strategy direct or pause",
        )
    if dimm is not None and not dimm.hotpluggable:
        raise UpdateRefused(
            f"{intent.id} cannot be unplugged: it is not hotpluggable; nothing was touched",
            remedy="shut the guest down, and start it without",
        )
    return UpdatePlan(
        prepare=(),
        update=(Step(Command("device_del", {"id": intent.id}), f"device {intent.id}"),),
        finish=tuple(
            Step(_removal(backend), f"{backend.role} {backend.id}") for backend in intent.also
        ),
        awaited=Awaited.GONE,
        devices=(intent.id,),
        sizes={},
    )


# -- resize ----------------------------------------------------------------------------------

_VIRTIO_MEM_REMEDY = (
    "start the guest with a virtio-mem device (-object memory-backend-ram,id=vm0-ram,size=8G "
    "-device virtio-mem-pci,id=vm0,memdev=vm0-ram,requested-size=0, and -m …,maxmem= with room)"
)


def _resize(intent: Resize, strategy: Strategy, view: GuestView, facts: Facts) -> UpdatePlan:
    change = intent.size - view.memory if intent.sign == "=" else intent.size
    if intent.sign == "-":
        change = -change
    if not change:
        late = {str(v.id): v.requested for v in view.virtio_mems if v.size != v.requested}
        note = "that much was asked for already" if late else "the guest has that much already"
        return UpdatePlan((), (), (), Awaited.SIZE, tuple(late), late, (note,))
    if strategy is Strategy.HOLE:
        return _resize_virtio_mem(change, view)
    return _grow(change, view, facts) if change > 0 else _shrink(-change, view)


def _grow(size: int, view: GuestView, facts: Facts) -> UpdatePlan:
    if size % _DIMM_ALIGN:
        raise UpdateRefused(
            f"a DIMM of {_mib(size)} is not a multiple of {_mib(_DIMM_ALIGN)}, guests cannot use "
            "it; nothing was touched",
            remedy="choose a multiple, or --strategy hole",
        )
    _check_room(view, 1, size)
    taken = facts.used
    number = next(n for n in count() if not {f"qml-dimm{n}", f"qml-mem{n}"} & taken)
    memory, name = f"qml-mem{number}", f"qml-dimm{number}"
    backend = Addition(
        Role.OBJECT, memory, {"qom-type": "memory-backend-ram", "id": memory, "size": size}, True
    )
    device = Addition(Role.DEVICE, name, {"driver": "pc-dimm", "id": name, "memdev": memory}, True)
    return UpdatePlan(
        (_add(backend),),
        (_add(device),),
        (),
        Awaited.REACTION,
        (name,),
        {},
        (f"{name} is the new DIMM, {memory} the memory behind it",),
    )


def _shrink(size: int, view: GuestView) -> UpdatePlan:
    """DIMMs go as a whole: the fewest that make up exactly that much, the newest first."""
    movable = [d for d in reversed(view.dimms) if d.id and d.hotpluggable and d.kind == "pc-dimm"]
    chosen = _summing_up(movable, size)
    if not chosen:
        have = ", ".join(f"{d.id} {_mib(d.size)}" for d in movable) or "none"
        raise UpdateRefused(
            f"no DIMMs that can be unplugged make up {_mib(size)} (there are: {have}); "
            "nothing was touched",
            remedy="choose the size of a DIMM, or --strategy hole with a virtio-mem device",
        )
    ids = [str(d.id) for d in chosen]
    return UpdatePlan(
        (),
        tuple(Step(Command("device_del", {"id": name}), f"device {name}") for name in ids),
        tuple(
            Step(Command("object-del", {"id": memory}), f"object {memory}")
            for memory in (d.memdev.rpartition("/")[2] for d in chosen)
        ),
        Awaited.GONE,
        tuple(ids),
        {},
    )


def _summing_up(dimms: Sequence[Dimm], size: int) -> tuple[Dimm, ...]:
    """At most 4 of 32 at a time: more cannot be meant."""
    for n in range(1, 5):
        for some in combinations(dimms[:32], n):
            if sum(d.size for d in some) == size:
                return some
    return ()


def _resize_virtio_mem(change: int, view: GuestView) -> UpdatePlan:
    """`requested-size` of the devices in their order, the last one first when shrinking."""
    devices = [v for v in view.virtio_mems if v.id]
    if not devices:
        raise UpdateRefused(
            "the guest has no virtio-mem device, whose memory could change inside a region that "
            "is there already; nothing was touched",
            remedy=_VIRTIO_MEM_REMEDY,
        )
    block = max(v.block_size for v in devices)
    if change % block:
        raise UpdateRefused(
            f"{_mib(abs(change))} is not a multiple of the virtio-mem block size, {_mib(block)}; "
            "nothing was touched",
            remedy=f"choose a multiple of {_mib(block)}",
        )
    wanted: dict[str, int] = {}
    left = change
    for v in devices if change > 0 else reversed(devices):
        step = min(left, v.max_size - v.requested) if left > 0 else -min(-left, v.requested)
        if step:
            wanted[str(v.id)] = v.requested + step
            left -= step
    if left:
        raise UpdateRefused(_no_room(change, devices), remedy=_VIRTIO_MEM_REMEDY)
    return UpdatePlan(
        (),
        tuple(_request(name, size, devices) for name, size in wanted.items()),
        (),
        Awaited.SIZE,
        tuple(wanted),
        wanted,
    )


def _request(name: str, size: int, devices: Sequence[VirtioMem]) -> Step:
    before = next(v.requested for v in devices if v.id == name)
    path = f"/machine/peripheral/{name}"

    def command(value: int) -> Command:
        return Command("qom-set", {"path": path, "property": "requested-size", "value": value})

    return Step(command(size), f"the size of {name}", command(before))


def _no_room(change: int, devices: Sequence[VirtioMem]) -> str:
    have = ", ".join(f"{v.id} {_mib(v.requested)} of {_mib(v.max_size)}" for v in devices)
    word = "grow" if change > 0 else "shrink"
    return (
        f"the virtio-mem devices cannot {word} by {_mib(abs(change))} ({have}); nothing was touched"
    )


def _mib(size: int) -> str:
    return f"{size >> 20} MiB" if not size % (1 << 20) else f"{size} bytes"
