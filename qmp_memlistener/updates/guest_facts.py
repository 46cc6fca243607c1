"""What a certain update must know of a guest: ids in use, backends and their sizes, device types.

The state that concerns every update is in `guest_view`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

from ..errors import CommandFailed
from ..qmp import Monitor, hmp
from .guest_view import ask
from .model import Addition, Intent, Plug, Role
from .pci_buses import read_buses
from .steps import Facts

__all__ = ["backends_of", "read_devices", "read_facts", "read_ids"]


class _Child(msgspec.Struct):
    """An entry of qom-list (qapi/qom.json, ObjectPropertyInfo)."""

    name: str
    type: str


class _Property(msgspec.Struct):
    name: str
    type: str


class _Node(msgspec.Struct):
    name: str = msgspec.field(name="node-name", default="")


class _Memdev(msgspec.Struct):
    size: int
    id: str = ""


async def read_facts(monitor: Monitor, intent: Intent) -> Facts:
    """Raises TargetError."""
    memdevs = await ask(monitor, "query-memdev", list[_Memdev], [])
    roles = {b.role for b in intent.backends} if isinstance(intent, Plug) else set()
    used = await read_ids(monitor, roles)
    backends = {m.id: m.size for m in memdevs if m.id}
    if not isinstance(intent, Plug):
        return Facts(backends, used=used)
    # qom-list-types would know, and load all of QEMU's modules
    known = await ask(
        monitor, "device-list-properties", list[_Property], typename=intent.device.type
    )
    types = {p.name: p.type for p in known}
    pci = "multifunction" in types  # every PCI device has it (hw/pci/pci.c)
    # of a PCI device `addr` is its place on the bus
    dimm = not pci and "memdev" in types and types.get("addr") == "uint64"
    return Facts(
        backends,
        pci,
        used,
        memory=dimm or "memaddr" in types,
        slot=dimm and "slot" in types,
        buses=await read_buses(monitor) if pci else (),
    )


async def read_ids(monitor: Monitor, roles: Collection[Role]) -> dict[Role, frozenset[str]]:
    """The ids that are in use, of devices and objects and what else is among `roles`."""
    used = {
        Role.DEVICE: await read_devices(monitor),
        Role.OBJECT: await _children(monitor, "/objects"),
    }
    if Role.NETDEV in roles:
        used[Role.NETDEV] = await _netdevs(monitor)
    if Role.BLOCKDEV in roles:
        used[Role.BLOCKDEV] = await _nodes(monitor)
    return used


async def read_devices(monitor: Monitor) -> frozenset[str]:
    """The ids of all devices that have one.  Raises TargetError."""
    return await _children(monitor, "/machine/peripheral")


async def _netdevs(monitor: Monitor) -> frozenset[str]:
    """The names of all network clients; no QMP command tells them."""
    try:
        text = await hmp(monitor, "info network")
    except CommandFailed:
        return frozenset()
    return frozenset(name for line in text.splitlines() for name in _net_names(line))


def _net_names(line: str) -> Iterator[str]:
    """Of `net1: index=0,type=user,…`, ` \\ net1: index=…` for a peer, and for the port of a hub
    ` \\ net1` or ` \\ net1: peer: index=…` (hmp_info_network of net/net.c, net_hub_info of
    net/hub.c; 7.2 to 11.1)."""
    if not line.startswith("hub "):
        for part in line.removeprefix(" \\ ").split(": "):
            if not part or part.startswith("index="):
                return
            yield part


async def _nodes(monitor: Monitor) -> frozenset[str]:
    found = await ask(monitor, "query-named-block-nodes", list[_Node], [], flat=True)
    return frozenset(n.name for n in found)


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
