"""On which bus a PCI device goes that is plugged into a running guest, and in which slot.  Pure.

A bus or slot that was named is kept, or refused; without one QEMU takes the machine's own bus
(qbus_find_recursive of system/qdev-monitor.c), and where that takes no device a free place behind
a bridge is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..qmp.guest_devices import PciBus, slot_text
from .model import Addition, Strategy, UpdateRefused, mib

__all__ = ["on_a_bus"]

_ADDR = re.compile(r"([0-9a-fA-F]+)(?:\.([0-7]))?")
_ADD_A_PORT = "start the guest with -device pcie-root-port,id=rp0,chassis=1, one a device"


def on_a_bus(
    device: Addition, strategy: Strategy, buses: Sequence[PciBus], memory: int | None
) -> Addition:
    """The device with `bus` and `addr` as far as QEMU needs them.  Raises UpdateRefused.

    `memory` is the size of the memory behind it, None where there is none.
    """
    need = _window_needed(memory)
    place = _place(device)
    name = device.arguments.get("bus")
    bus = next((b for b in buses if b.name == name), None)
    if name is None:
        bus = _chosen(buses, place, need)
        if bus is None:
            return device  # QEMU chooses its own bus
    if bus is None:
        return device
    _check(bus, place)
    if strategy is Strategy.HOLE and bus.bridge is not None and bus.room < need:
        raise UpdateRefused(
            f"the windows of {bus.bridge} hold {mib(bus.room)}, the device needs "
            f"{mib(need)}: bridge windows would have to move; nothing was touched",
            remedy="start the guest with the port's pref64-reserve= large enough, "
            f"such as -device pcie-root-port,id={bus.bridge},pref64-reserve={need >> 20}M",
        )
    more = {} if bus.bridge is None else {"bus": bus.name}
    if place is None and bus.shpc and bus.free is not None:
        more["addr"] = slot_text((bus.free, 0))
    return replace(device, arguments={**device.arguments, **more})


def _chosen(buses: Sequence[PciBus], place: tuple[int, int] | None, need: int) -> PciBus | None:
    """The machine's own bus if it has room, then ports, then bridges; None if nothing is known."""
    own = next((b for b in buses if b.bridge is None), None)
    if own is None or (own.refusal is None and _fits(own, place)):
        return own
    behind = [b for b in buses if b.bridge is not None and b.refusal is None and _fits(b, place)]
    if not behind:
        raise _no_place(own, buses, place)
    # ports first, for whatever a bridge has it can give to others as well
    behind.sort(key=lambda b: (b.room < need, not b.express))
    return behind[0]


def _fits(bus: PciBus, place: tuple[int, int] | None) -> bool:
    return _why_not(bus, place) is None


def _why_not(bus: PciBus, place: tuple[int, int] | None) -> str | None:
    """Why there is no room for a device, or not at this place."""
    if place is None:
        if bus.free is not None:
            return None
        if bus.bridge is None or not bus.express:
            return f"all {len(bus.slots)} slots of {bus.name} are taken"
        return f"the root port {bus.name} has a device already"
    if place[0] not in bus.slots:
        if len(bus.slots) == 1:
            return f"{bus.name} has slot 0 only, not {slot_text(place)}"
        return f"{bus.name} has no slot {place[0]:x}, its hotplug controller counts from 1"
    if place in bus.taken:
        return f"slot {slot_text(place)} of {bus.name} is taken by {_id(bus.taken[place])}"
    return None


def _id(path: str) -> str:
    return path.removeprefix("/machine/peripheral/")


def _check(bus: PciBus, place: tuple[int, int] | None) -> None:
    if bus.refusal is not None:
        whose = f"the root bus {bus.name} takes" if bus.bridge is None else "it takes"
        why = "" if bus.bridge is None else f"{bus.refusal}: "
        raise UpdateRefused(
            f"{why}{whose} no device while the guest runs; nothing was touched",
            remedy="name a free root port with bus=, or none to have one chosen",
        )
    why_not = _why_not(bus, place)
    if why_not is not None:
        raise UpdateRefused(
            f"{why_not}; nothing was touched",
            remedy="name a free one with bus= and addr=, or none to have one chosen",
        )


def _no_place(own: PciBus, buses: Sequence[PciBus], place: tuple[int, int] | None) -> UpdateRefused:
    if own.refusal is None:
        what, remedy = f"there is no free slot on {own.name} or behind a bridge", "choose another"
        remedy = "unplug something, or start the guest with a further bridge"
    else:
        what = (
            f"the guest has no free PCIe root port, and its root bus {own.name} takes no device "
            "while it runs"
        )
        remedy = _ADD_A_PORT
    behind = [b for b in buses if b.bridge is not None]
    reasons = [b.refusal or _why_not(b, place) or "" for b in behind]
    have = f" ({'; '.join(reasons)})" if reasons else ""
    return UpdateRefused(f"{what}{have}; nothing was touched", remedy=remedy)


def _place(device: Addition) -> tuple[int, int] | None:
    """Slot and function of `addr`: a devfn as a number, or `slot.function` in hexadecimal
    (set_pci_devfn of hw/core/qdev-properties-system.c); None when it is for QEMU to judge."""
    addr = device.arguments.get("addr")
    if isinstance(addr, int) and not isinstance(addr, bool):
        return (addr >> 3, addr & 7) if addr >= 0 else None
    found = _ADDR.fullmatch(addr) if isinstance(addr, str) else None
    return (int(found[1], 16), int(found[2] or 0)) if found is not None else None


def _window_needed(memory: int | None) -> int:
    """A BAR is as large as the memory behind it, rounded up to a power of 2; registers take less
    than a MiB, which is what a window has at least (PCI-to-PCI bridge specification 1.2, 3.2.5.6).
    """
    return max(1 << 20, 1 << (memory - 1).bit_length() if memory else 0)
