"""What a certain update must know of a guest: ids in use, backends and their sizes, device types.

The state that concerns every update is in `guest_view`.
"""

from __future__ import annotations

import msgspec

from ..monitor import Monitor
from .guest_view import ask
from .model import Addition, Intent, Plug, Resize, Role
from .plans import Facts

__all__ = ["backends_of", "read_facts"]


class _Child(msgspec.Struct):
    """An entry of qom-list (qapi/qom.json, ObjectPropertyInfo)."""

    name: str
    type: str


class _Property(msgspec.Struct):
    name: str


class _Memdev(msgspec.Struct):
    size: int
    id: str = ""


async def read_facts(monitor: Monitor, intent: Intent) -> Facts:
    """Raises TargetError."""
    devices = await _children(monitor, "/machine/peripheral")
    objects = await _children(monitor, "/objects")
    memdevs = await ask(monitor, "query-memdev", list[_Memdev], [])
    pci = False
    if isinstance(intent, Plug):
        # every PCI device has it (hw/pci/pci.c); qom-list-types would load all of QEMU's modules
        known = await ask(
            monitor, "device-list-properties", list[_Property], [], typename=intent.device.type
        )
        pci = "multifunction" in {p.name for p in known}
    taken = devices | objects if isinstance(intent, Plug | Resize) else frozenset()
    return Facts({m.id: m.size for m in memdevs if m.id}, pci, taken, devices)


async def _children(monitor: Monitor, path: str) -> frozenset[str]:
    found = await ask(monitor, "qom-list", list[_Child], [], path=path)
    return frozenset(c.name for c in found if c.type.startswith("child<"))


async def backends_of(monitor: Monitor, device: str) -> tuple[Addition, ...]:
    """What the device `device` stands on and what can be removed after it: memory, network, block.

    A backend that is part of QEMU's own command line is among them; QEMU removes it like others.
    """
    path = f"/machine/peripheral/{device}"
    found = []
    for name, role in (
        ("memdev", Role.OBJECT),
        ("netdev", Role.NETDEV),
        ("drive", Role.BLOCKDEV),
    ):
        value = await ask(monitor, "qom-get", str, "", path=path, property=name)
        backend = value.rpartition("/")[2] if role is Role.OBJECT else value
        if backend:
            found.append(Addition(role, backend, {role.id_key: backend}, typed=True))
    return tuple(found)
