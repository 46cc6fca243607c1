"""From an intent and a strategy to the commands for it, or to the reason why not.  Pure.

`plan_update` looks at a `GuestView` and at the sizes of memory backends, and refuses what a
strategy cannot do for this guest before anything is touched.  Values are typed already
(`property_types`).  More or less memory is DIMMs for `direct` and `pause`, virtio-mem for `hole`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, count

from ..qmp import Command, MemoryDevice
from .guest_view import Facts, GuestView
from .model import (
    Addition,
    Awaited,
    Intent,
    Plug,
    Resize,
    Role,
    Strategy,
    Unplug,
    UpdatePlan,
    UpdateRefused,
    UpdateStep,
    adding,
    mib,
    removal,
)
from .pci_plans import on_a_bus

__all__ = ["DIMM_BLOCK", "plan_update"]

DIMM_BLOCK = 128 << 20
"""Linux adds whole blocks of memory, of 128 MiB at least on x86 and Arm (drivers/base/memory.c)."""
_VIRTIO_MEM_REMEDY = (
    "start the guest with a virtio-mem device (-object memory-backend-ram,id=vm0-ram,size=8G "
    "-device virtio-mem-pci,id=vm0,memdev=vm0-ram,requested-size=0, and -m …,maxmem= with room)"
)
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
_A = {
    Role.OBJECT: "an object",
    Role.NETDEV: "a network backend",
    Role.BLOCKDEV: "a block node",
    Role.DEVICE: "a device",
}


def _check_state(view: GuestView, strategy: Strategy) -> None:
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
            f"a block job is running ({', '.join(view.jobs)}), which stopping the guest would "
            "disturb; nothing was touched",
            remedy="wait for the job, or use --strategy direct",
        )


def plan_update(intent: Intent, strategy: Strategy, view: GuestView, facts: Facts) -> UpdatePlan:
    """The commands.  Raises UpdateRefused with what to add to the guest's configuration."""
    _check_state(view, strategy)
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
        if addition.id in facts.ids(addition.role):
            raise UpdateRefused(
                f"the guest has {_A[addition.role]} called {addition.id} already; nothing was "
                "touched",
                remedy="choose another id",
            )
    sizes = {**facts.backends, **_sizes(intent.backends)}
    size = sizes.get(str(device.arguments.get("memdev")))
    if facts.slot and strategy is Strategy.HOLE:
        raise UpdateRefused(
            f"a {device.type} is a memslot of its own, it cannot fill a hole; nothing was touched",
            remedy=_VIRTIO_MEM_REMEDY + ", and `resize` it",
        )
    if device.type == "nvdimm" and not view.nvdimm:
        raise UpdateRefused(
            "this machine takes no NVDIMM; nothing was touched",
            remedy="start the guest with -machine …,nvdimm=on",
        )
    if facts.memory and "memdev" in device.arguments:
        _check_room(view, int(facts.slot), size)
    wanted = _check_requested(device, size)
    if facts.pci:
        device = on_a_bus(device, strategy, facts.buses, None if facts.memory else size)
    return UpdatePlan(
        prepare=tuple(adding(b) for b in intent.backends),
        update=(adding(device),),
        awaited=Awaited.REACTION if wanted is None else Awaited.SIZE,
        devices=(device.id,),
        sizes={} if wanted is None else {device.id: wanted},
    )


def _sizes(backends: Sequence[Addition]) -> dict[str, int]:
    return {
        b.id: size
        for b in backends
        if b.role is Role.OBJECT and isinstance(size := b.arguments.get("size"), int)
    }


# -- unplug ----------------------------------------------------------------------------------


def _unplug(intent: Unplug, strategy: Strategy, view: GuestView, facts: Facts) -> UpdatePlan:
    devices = facts.ids(Role.DEVICE)
    if intent.id not in devices:
        have = ", ".join(sorted(devices)) or "none"
        raise UpdateRefused(
            f"the guest has no device {intent.id}; those with an id: {have}",
            remedy="a device can be named if it was given an id",
        )
    dimm = next((d for d in view.dimms if d.id == intent.id), None)
    if dimm is not None and strategy is Strategy.HOLE:
        raise UpdateRefused(
            f"{intent.id} is a DIMM: unplugging it deletes its memslot, there is no hole to make; "
            "nothing was touched",
            remedy="use --strategy direct or pause",
        )
    if dimm is not None and not dimm.hotpluggable:
        raise UpdateRefused(
            f"{intent.id} cannot be unplugged: it is not hotpluggable; nothing was touched",
            remedy="shut the guest down, and start it without",
        )
    return UpdatePlan(
        update=(UpdateStep(Command("device_del", {"id": intent.id}), f"device {intent.id}"),),
        finish=tuple(
            UpdateStep(removal(backend), f"{backend.role} {backend.id}") for backend in intent.also
        ),
        awaited=Awaited.GONE,
        devices=(intent.id,),
    )


# -- room for memory -------------------------------------------------------------------------


def _check_room(view: GuestView, slots: int, size: int | None) -> None:
    """As pc-dimm and memory-device check it (hw/mem/memory-device.c), but beforehand.

    `size` is None where it is not known; QEMU judges then.
    """
    if view.free_dimm_slots < slots:
        have = f"all {view.dimm_slots} memory slots are taken" if view.dimm_slots else "no slots"
        raise UpdateRefused(
            f"the guest has no free slot for memory ({have}); nothing was touched",
            remedy="start the guest with -m size,slots=N,maxmem=SIZE, or unplug a DIMM",
        )
    room = view.free_device_memory
    if room is None and view.max_memory is not None and view.max_memory > view.base_memory:
        raise UpdateRefused(
            f"the machine {view.machine} has no device memory, whatever maxmem= is: it takes "
            "neither DIMMs nor virtio-mem; nothing was touched",
            remedy="use a machine that has it, such as q35, pc or virt",
        )
    if room is None:
        raise UpdateRefused(
            "the guest has no device memory, so it takes neither DIMMs nor virtio-mem; nothing "
            "was touched",
            remedy="start it with -m size,slots=N,maxmem=SIZE on a machine that has device memory, "
            "such as q35, pc or virt",
        )
    if size is not None and size > room:
        most = "" if view.max_memory is None else f" than {mib(view.max_memory)}"
        raise UpdateRefused(
            f"the guest has room for {mib(room)} of more memory, not for {mib(size)}; nothing was "
            "touched",
            remedy=f"start the guest with a larger maxmem{most}",
        )


def _check_requested(device: Addition, size: int | None) -> int | None:
    """The size that a new virtio-mem device shall have at once, None when it is no such device or
    shall have nothing.  Raises UpdateRefused for what it never can have."""
    wanted = device.arguments.get("requested-size")
    if not isinstance(wanted, int) or not wanted:
        return None
    if size is not None and wanted > size:
        raise UpdateRefused(
            f"requested-size is {mib(wanted)}, and the memory behind {device.id} has {mib(size)}; "
            "nothing was touched",
            remedy=f"request {mib(size)} at most, or give it a larger backend",
        )
    block = device.arguments.get("block-size")
    if isinstance(block, int) and block and wanted % block:
        raise UpdateRefused(
            f"requested-size is {mib(wanted)}, no multiple of the block size, {mib(block)}; "
            "nothing was touched",
            remedy=f"request a multiple of {mib(block)}",
        )
    return wanted


# -- resize ----------------------------------------------------------------------------------


def _resize(intent: Resize, strategy: Strategy, view: GuestView, facts: Facts) -> UpdatePlan:
    change = intent.size - view.memory if intent.sign == "=" else intent.size
    if intent.sign == "-":
        change = -change
    if not change:
        late = {str(v.id): v.requested for v in view.virtio_mems if v.size != v.requested}
        note = "that much was requested already" if late else "the guest has that much already"
        return UpdatePlan(awaited=Awaited.SIZE, devices=tuple(late), sizes=late, notes=(note,))
    if strategy is Strategy.HOLE:
        return _resize_virtio_mem(change, view)
    return _grow(change, view, facts) if change > 0 else _shrink(-change, view)


def _grow(size: int, view: GuestView, facts: Facts) -> UpdatePlan:
    if size % DIMM_BLOCK:
        raise UpdateRefused(
            f"a DIMM of {mib(size)} is not a multiple of {mib(DIMM_BLOCK)}, guests cannot use "
            "it; nothing was touched",
            remedy="choose a multiple, or --strategy hole",
        )
    _check_room(view, 1, size)
    taken = facts.ids(Role.DEVICE) | facts.ids(Role.OBJECT)
    number = next(n for n in count() if not {f"qml-dimm{n}", f"qml-mem{n}"} & taken)
    memory, name = f"qml-mem{number}", f"qml-dimm{number}"
    backend = Addition(
        Role.OBJECT, memory, {"qom-type": "memory-backend-ram", "id": memory, "size": size}, True
    )
    device = Addition(Role.DEVICE, name, {"driver": "pc-dimm", "id": name, "memdev": memory}, True)
    return UpdatePlan(
        prepare=(adding(backend),),
        update=(adding(device),),
        awaited=Awaited.TAKEN,
        devices=(name,),
        notes=(f"{name} is the new DIMM, {memory} the memory behind it",),
    )


def _shrink(size: int, view: GuestView) -> UpdatePlan:
    """DIMMs go as a whole: the fewest that make up exactly that much, the newest first."""
    movable = [d for d in reversed(view.dimms) if d.id and d.hotpluggable and d.kind == "dimm"]
    chosen = _summing_up(movable, size)
    if not chosen:
        have = ", ".join(f"{d.id} {mib(d.size or 0)}" for d in movable) or "none"
        raise UpdateRefused(
            f"no DIMMs that can be unplugged make up {mib(size)} (there are: {have}); "
            "nothing was touched",
            remedy="choose the size of a DIMM, or --strategy hole with a virtio-mem device",
        )
    ids = [str(d.id) for d in chosen]
    backends = [d.memdev.rpartition("/")[2] for d in chosen]
    return UpdatePlan(
        update=tuple(
            UpdateStep(Command("device_del", {"id": name}), f"device {name}") for name in ids
        ),
        finish=tuple(
            UpdateStep(Command("object-del", {"id": name}), f"object {name}") for name in backends
        ),
        awaited=Awaited.GONE,
        devices=tuple(ids),
    )


def _summing_up(dimms: Sequence[MemoryDevice], size: int) -> tuple[MemoryDevice, ...]:
    """At most 4 of 32 at a time: more cannot be meant."""
    for n in range(1, 5):
        for some in combinations(dimms[:32], n):
            if sum(d.size or 0 for d in some) == size:
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
            f"{mib(abs(change))} is not a multiple of the virtio-mem block size, {mib(block)}; "
            "nothing was touched",
            remedy=f"choose a multiple of {mib(block)}",
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
        update=tuple(_request(name, size, devices) for name, size in wanted.items()),
        awaited=Awaited.SIZE,
        devices=tuple(wanted),
        sizes=wanted,
    )


def _request(name: str, size: int, devices: Sequence[MemoryDevice]) -> UpdateStep:
    before = next(v.requested for v in devices if v.id == name)
    path = f"/machine/peripheral/{name}"

    def command(value: int) -> Command:
        return Command("qom-set", {"path": path, "property": "requested-size", "value": value})

    return UpdateStep(command(size), f"the size of {name}", command(before))


def _no_room(change: int, devices: Sequence[MemoryDevice]) -> str:
    have = ", ".join(f"{v.id} {mib(v.requested)} of {mib(v.max_size)}" for v in devices)
    word = "grow" if change > 0 else "shrink"
    return (
        f"the virtio-mem devices cannot {word} by {mib(abs(change))} ({have}); nothing was touched"
    )
