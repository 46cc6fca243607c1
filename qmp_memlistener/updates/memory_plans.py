"""Plans for more or less memory: DIMMs for `direct` and `pause`, virtio-mem for `hole`.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, count

from ..qmp import Command
from .guest_view import Dimm, GuestView, VirtioMem
from .model import Addition, Resize, Role, Strategy, UpdateRefused
from .steps import Awaited, Facts, Step, UpdatePlan, adding, mib

__all__ = ["DIMM_BLOCK", "VIRTIO_MEM_REMEDY", "check_requested", "check_room", "plan_resize"]

DIMM_BLOCK = 128 << 20
"""Linux adds whole blocks of memory, of 128 MiB at least on x86 and Arm (drivers/base/memory.c)."""
VIRTIO_MEM_REMEDY = (
    "start the guest with a virtio-mem device (-object memory-backend-ram,id=vm0-ram,size=8G "
    "-device virtio-mem-pci,id=vm0,memdev=vm0-ram,requested-size=0, and -m …,maxmem= with room)"
)


def check_room(view: GuestView, slots: int, size: int | None) -> None:
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


def check_requested(device: Addition, size: int | None) -> int | None:
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


def plan_resize(intent: Resize, strategy: Strategy, view: GuestView, facts: Facts) -> UpdatePlan:
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
    if size % DIMM_BLOCK:
        raise UpdateRefused(
            f"a DIMM of {mib(size)} is not a multiple of {mib(DIMM_BLOCK)}, guests cannot use "
            "it; nothing was touched",
            remedy="choose a multiple, or --strategy hole",
        )
    check_room(view, 1, size)
    taken = facts.ids(Role.DEVICE) | facts.ids(Role.OBJECT)
    number = next(n for n in count() if not {f"qml-dimm{n}", f"qml-mem{n}"} & taken)
    memory, name = f"qml-mem{number}", f"qml-dimm{number}"
    backend = Addition(
        Role.OBJECT, memory, {"qom-type": "memory-backend-ram", "id": memory, "size": size}, True
    )
    device = Addition(Role.DEVICE, name, {"driver": "pc-dimm", "id": name, "memdev": memory}, True)
    return UpdatePlan(
        (adding(backend),),
        (adding(device),),
        (),
        Awaited.TAKEN,
        (name,),
        {},
        (f"{name} is the new DIMM, {memory} the memory behind it",),
    )


def _shrink(size: int, view: GuestView) -> UpdatePlan:
    """DIMMs go as a whole: the fewest that make up exactly that much, the newest first."""
    movable = [d for d in reversed(view.dimms) if d.id and d.hotpluggable and d.kind == "pc-dimm"]
    chosen = _summing_up(movable, size)
    if not chosen:
        have = ", ".join(f"{d.id} {mib(d.size)}" for d in movable) or "none"
        raise UpdateRefused(
            f"no DIMMs that can be unplugged make up {mib(size)} (there are: {have}); "
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
            remedy=VIRTIO_MEM_REMEDY,
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
        raise UpdateRefused(_no_room(change, devices), remedy=VIRTIO_MEM_REMEDY)
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
    have = ", ".join(f"{v.id} {mib(v.requested)} of {mib(v.max_size)}" for v in devices)
    word = "grow" if change > 0 else "shrink"
    return (
        f"the virtio-mem devices cannot {word} by {mib(abs(change))} ({have}); nothing was touched"
    )
