"""Updates of a guest that a manager owns: libvirt is asked for them, so that it knows of them.

`managed` turns a plan's commands into changes of the domain's devices, in libvirt's XML.  What
libvirt has no XML for is refused before anything is touched.  libvirt keeps ids of users only with
the prefix `ua-`: a device gets that alias, which is its id in QEMU, too.

Sources: libvirt's formatdomain (alias, memory, shmem, interface, rng), src/qemu/qemu_alias.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import count, islice
from xml.sax.saxutils import quoteattr

from ..qmp import Command, Companions, Monitor
from ..qmp.resolving import domain_target
from .model import Addition, Role, Strategy, UpdatePlan, UpdateRefused, UpdateStep, Value

__all__ = ["device_xml", "managed"]

_PREFIX = "ua-"  # VIR_DOMAIN_USER_ALIAS_PREFIX, src/conf/domain_conf.c
_SHARED = "/dev/shm/"
_BUS = re.compile(r"pci\.([0-9]{1,3})(?:\.0)?")
_SLOT = re.compile(r"(?:0x)?([0-9a-f]{1,2})(?:\.([0-7]))?")
ATTACH, DETACH, REQUEST = "attach-device", "detach-device", "update-memory-device"

Arguments = Mapping[str, Value]
Backends = Mapping[str, Addition]


def managed(
    plan: UpdatePlan,
    strategy: Strategy,
    monitor: Monitor,
    companions: Companions,
    taken: Collection[str],
) -> UpdatePlan:
    """The plan as it is for a guest without a manager, else as its manager carries it out.

    `taken` are the ids of the guest's devices.  Raises UpdateRefused.
    """
    if not monitor.abilities.manager:
        guest = companions.guest
        domain = domain_target(guest) if guest is not None else None
        if domain is not None:
            raise UpdateRefused(
                "libvirt manages this guest and would not know of the change; nothing was touched",
                remedy=f"name the guest as {domain}",
            )
        return plan
    if strategy is Strategy.PAUSE and not monitor.identity.certain:
        raise UpdateRefused(
            f"{monitor.abilities.manager} manages this guest, QEMU's process is not visible here, "
            "and then nothing could resume it for certain; nothing was touched",
            remedy="use --strategy direct, or run this on the guest's host",
        )
    return through_manager(plan, taken)


def through_manager(plan: UpdatePlan, taken: Collection[str] = ()) -> UpdatePlan:
    """The changes of devices that a plan comes to.  Pure.  Raises UpdateRefused."""
    backends = {s.addition.id: s.addition for s in plan.prepare if s.addition is not None}
    renamed: dict[str, str] = {}
    steps = []
    for step in plan.update:
        if step.addition is not None:
            alias = _free(user_alias(step.addition.id), {*taken, *renamed.values()})
            renamed[step.addition.id] = alias
        steps.append(_step(step, backends, renamed))
    notes = tuple(
        f"libvirt calls it {new}: ids of users begin with {_PREFIX} there"
        for old, new in renamed.items()
        if new != old
    )
    told = tuple(n for n in plan.notes if not any(name in n for name in backends))
    return replace(
        plan,
        prepare=(),
        update=tuple(steps),
        finish=(),  # libvirt removes what it made
        devices=tuple(renamed.get(name, name) for name in plan.devices),
        sizes={renamed.get(name, name): size for name, size in plan.sizes.items()},
        notes=(*told, *notes),
    )


def user_alias(name: str) -> str:
    """What libvirt calls a device that a user called so."""
    return name if name.startswith(_PREFIX) else _PREFIX + name


def _free(alias: str, taken: Collection[str]) -> str:
    """An alias like that which no device has."""
    numbered = (f"{alias}-{number}" for number in count(2))
    return next(name for name in (alias, *islice(numbered, len(taken))) if name not in taken)


def _step(step: UpdateStep, backends: Backends, renamed: Mapping[str, str]) -> UpdateStep:
    command = step.command
    arguments = command.arguments or {}
    if step.addition is not None and step.addition.role is Role.DEVICE:
        device = replace(step.addition, id=renamed[step.addition.id])
        return replace(
            step, command=Command(ATTACH, {"xml": device_xml(device, backends)}), undo=None
        )
    if command.name == Role.DEVICE.remove_command:
        return replace(step, command=Command(DETACH, {"alias": arguments["id"]}))
    if command.name == "qom-set" and arguments.get("property") == "requested-size":
        alias = str(arguments["path"]).rpartition("/")[2]
        size = arguments["value"]
        return replace(step, command=Command(REQUEST, {"alias": alias, "bytes": size}))
    raise _no_xml(command.name)


def device_xml(device: Addition, backends: Backends) -> str:
    """What libvirt is given for a device.  Raises UpdateRefused when it has nothing like that."""
    make = _DEVICES.get(device.type)
    if make is None:
        raise _no_xml(f"a {device.type}")
    known = {"driver", "id", "bus", "addr", "slot", "node", "memdev", "netdev", "rng", "mac"}
    odd = sorted(set(device.arguments) - known)
    if odd:
        raise _no_xml(f"the properties {', '.join(odd)} of a {device.type}")
    return make(device, backends)


def _memory(device: Addition, backends: Backends) -> str:
    given = device.arguments
    backend = _backend(device, backends, "memdev")
    if backend.type not in ("memory-backend-ram", "memory-backend-memfd"):
        raise _no_xml(f"a {device.type} on a {backend.type}")
    target = f"<size unit='B'>{backend.arguments.get('size')}</size>"
    target += f"<node>{given.get('node', 0)}</node>"
    address = ""
    if "slot" in given or "addr" in given:
        base = f" base={_quoted(hex(_number(given['addr'])))}" if "addr" in given else ""
        address = f"<address type='dimm' slot={_quoted(given.get('slot', 0))}{base}/>"
    return f"<memory model='dimm'><target>{target}</target>{_alias(device)}{address}</memory>"


def _shmem(device: Addition, backends: Backends) -> str:
    backend = _backend(device, backends, "memdev")
    path = str(backend.arguments.get("mem-path", ""))
    name = path.removeprefix(_SHARED)
    if backend.type != "memory-backend-file" or name == path or "/" in name or not name:
        raise _no_xml(
            f"an {device.type} on other memory than a file in {_SHARED}",
            "give it a memory-backend-file with share=on and mem-path=/dev/shm/NAME",
        )
    size = _number(backend.arguments.get("size", 0))
    return (
        f"<shmem name={_quoted(name)}><model type='ivshmem-plain'/>"
        f"<size unit='B'>{size}</size>{_alias(device)}{_pci(device)}</shmem>"
    )


def _network(device: Addition, backends: Backends) -> str:
    backend = _backend(device, backends, "netdev")
    if backend.type != "user" or set(backend.arguments) - {"type", "id"}:
        raise _no_xml(f"a network device on a {backend.type} with these settings")
    model = {"virtio-net-pci": "virtio"}.get(device.type, device.type)
    mac = device.arguments.get("mac")
    address = "" if mac is None else f"<mac address={_quoted(mac)}/>"
    return (
        f"<interface type='user'>{address}<model type={_quoted(model)}/>"
        f"{_alias(device)}{_pci(device)}</interface>"
    )


def _rng(device: Addition, backends: Backends) -> str:
    backend = _backend(device, backends, "rng")
    if backend.type != "rng-random":
        raise _no_xml(f"a {device.type} on a {backend.type}")
    path = backend.arguments.get("filename", "/dev/urandom")
    return (
        f"<rng model='virtio'><backend model='random'>{_escaped(path)}</backend>"
        f"{_alias(device)}{_pci(device)}</rng>"
    )


_DEVICES: Mapping[str, Callable[[Addition, Backends], str]] = {
    "pc-dimm": _memory,
    "ivshmem-plain": _shmem,
    "virtio-net-pci": _network,
    "e1000": _network,
    "rtl8139": _network,
    "virtio-rng-pci": _rng,
}


def _backend(device: Addition, backends: Backends, key: str) -> Addition:
    found = backends.get(str(device.arguments.get(key)))
    if found is None:
        raise _no_xml(
            f"a {device.type} whose {key} is not made with it",
            "give the backend to the same `hotplug`: libvirt makes and removes both together",
        )
    return found


def _alias(device: Addition) -> str:
    return f"<alias name={_quoted(user_alias(device.id))}/>"


def _pci(device: Addition) -> str:
    """Where it was asked to go; libvirt chooses what is left out."""
    given = device.arguments
    if "bus" not in given and "addr" not in given:
        return ""
    bus, slot = _BUS.fullmatch(str(given.get("bus", "pci.0"))), _SLOT.fullmatch(_address(given))
    if bus is None or slot is None:
        raise _no_xml(f"the place {given.get('bus')} {given.get('addr')}")
    return (
        f"<address type='pci' domain='0x0000' bus='{int(bus[1]):#04x}' "
        f"slot='0x{slot[1]:>02}' function='0x{slot[2] or 0}'/>"
    )


def _address(arguments: Arguments) -> str:
    """The slot in hexadecimal: a number in JSON is decimal, as text it is hexadecimal to QEMU.

    Without one it is the first: on a bus with one place, such as a root port's.
    """
    given = arguments.get("addr", 0)
    if isinstance(given, int):
        return f"{given >> 3:x}.{given & 7}"
    return str(given)


def _number(value: Value) -> int:
    return int(str(value), 0)


def _quoted(value: Value) -> str:
    return quoteattr(str(value))


def _escaped(value: Value) -> str:
    return quoteattr(str(value))[1:-1]


def _no_xml(what: str, remedy: str | None = None) -> UpdateRefused:
    return UpdateRefused(
        f"through libvirt this tool does not plug {what}; nothing was touched",
        remedy=remedy or "use `virsh attach-device` with XML of your own, and `watch` meanwhile",
    )
