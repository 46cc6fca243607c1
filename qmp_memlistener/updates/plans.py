"""From an intent and a strategy to the commands for it, or to the reason why not.  Pure.

`plan` looks at a `GuestView` and at the sizes of memory backends, and says everything that a
strategy cannot do for this guest before anything is touched.  Values are typed already (`typing`);
resizing is in `memory_plans`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..qmp import Command
from .guest_view import GuestView
from .memory_plans import VIRTIO_MEM_REMEDY, check_requested, check_room, plan_resize
from .model import Addition, Intent, Plug, Resize, Role, Strategy, Unplug, UpdateRefused
from .pci_plans import on_a_bus
from .steps import Awaited, Facts, Step, UpdatePlan, adding, removal

__all__ = ["check_state", "plan_update"]

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
            return plan_resize(intent, strategy, view, facts)


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
            remedy=VIRTIO_MEM_REMEDY + ", and `resize` it",
        )
    if device.type == "nvdimm" and not view.nvdimm:
        raise UpdateRefused(
            "this machine takes no NVDIMM; nothing was touched",
            remedy="start the guest with -machine …,nvdimm=on",
        )
    if facts.memory and "memdev" in device.arguments:
        check_room(view, int(facts.slot), size)
    wanted = check_requested(device, size)
    if facts.pci:
        device = on_a_bus(device, strategy, facts.buses, None if facts.memory else size)
    return UpdatePlan(
        prepare=tuple(adding(b) for b in intent.backends),
        update=(adding(device),),
        finish=(),
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
            Step(removal(backend), f"{backend.role} {backend.id}") for backend in intent.also
        ),
        awaited=Awaited.GONE,
        devices=(intent.id,),
        sizes={},
    )
