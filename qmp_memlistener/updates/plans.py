"""From an intent and a strategy to the commands for it, or to the reason why not.  Pure.

`plan` looks at a `GuestView` and at the sizes of memory backends, and says everything that a
strategy cannot do for this guest before anything is touched.  Values are typed already (`typing`);
resizing is in `memory_plans`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..monitor import Command
from .guest_view import Bridge, GuestView
from .memory_plans import VIRTIO_MEM_REMEDY, check_room, plan_resize
from .model import Addition, Intent, Plug, Resize, Role, Strategy, Unplug, UpdateRefused
from .steps import Awaited, Facts, Step, UpdatePlan, adding, mib, removal

__all__ = ["check_state", "plan_update"]

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
    if device.type in MEMORY_DRIVERS:
        if strategy is Strategy.HOLE:
            raise UpdateRefused(
                f"a {device.type} is a memslot of its own, it cannot fill a hole; nothing was "
                "touched",
                remedy=VIRTIO_MEM_REMEDY + ", and `resize` it",
            )
        _check_dimm(device, view, sizes)
    if device.type.startswith(("virtio-mem", "virtio-pmem")):
        check_room(view, 0, sizes.get(str(device.arguments.get("memdev")), 0))
    if facts.pci:
        device = _on_a_bus(device, strategy, view, sizes)
    return UpdatePlan(
        prepare=tuple(adding(b) for b in intent.backends),
        update=(adding(device),),
        finish=(),
        awaited=Awaited.REACTION,
        devices=(device.id,),
        sizes={},
    )


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
    check_room(view, 1, sizes.get(str(device.arguments.get("memdev")), 0))


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
                f"the windows of {port.id} hold {mib(_room(port))}, the device needs "
                f"{mib(need)}: bridge windows would have to move; nothing was touched",
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
