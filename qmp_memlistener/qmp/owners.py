"""Who manages a guest: libvirt, Proxmox VE, KubeVirt, a container's runtime, or nobody.

Read from the command line that the manager gave QEMU, from its control groups and its namespaces;
no manager is asked.  A process says of itself what it likes, so this is a hint for people; where a
connection is made through a manager, that manager is asked which guest it has.

- libvirt names its monitor `charmonitor` (qemuDomainPrepareMonitorChr, src/qemu/qemu_domain.c) and
  keeps a file below its state directory (`domain-ID-NAME/master-key.aes`); that directory shows
  which of its drivers it is (qemu:///system, qemu:///session, qemu:///embed).
- Proxmox VE gives the VMID as -id, and a pid file /var/run/qemu-server/VMID.pid (PVE::QemuServer).
- Container runtimes name the control group by the container's id, Kubernetes the one above it by
  the pod's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from ..host.processes import Process

__all__ = ["Manager", "Owner", "containers_in", "manager_in", "owners_of"]

_MONITOR = re.compile(r"chardev=charmonitor(?:,|$)")
_KEY_FILE = re.compile(r'file"?[=:]"?(/[^",]*?)/domain-\d+-[^/",]*/master-key\.aes')
_SESSION = re.compile(r"(?:/[^/]+)+/\.?[^/]*/libvirt/qemu/lib")
_GUEST = re.compile(r"(?:^|,)guest=((?:[^,]|,,)*)")
_VMID = re.compile(r"[1-9]\d{2,8}")
_CONTAINER = re.compile(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:[/\n]|$)")
_LXC = re.compile(r"/lxc(?:\.payload\.|/)([A-Za-z0-9_.-]+)")
_POD = re.compile(r"[/-]pod([0-9a-f]{8}(?:[_-][0-9a-f]{4}){3}[_-][0-9a-f]{12}|[0-9a-f]{32})")
_LONGEST = 1 << 16
_OPTIONS = ("-mon", "-name", "-object", "-id", "-pidfile")
_LONGEST_VALUE = 4096


class Manager(StrEnum):
    """Kinds of manager."""

    LIBVIRT = "libvirt"
    PROXMOX = "proxmox"
    POD = "pod"
    CONTAINER = "container"


@dataclass(frozen=True, slots=True)
class Owner:
    """One manager of a guest and what it calls the guest, "" where that is not seen: libvirt's
    domain, Proxmox' VMID, the pod's or container's id.

    `uri` is how libvirt is connected to, None where it is not known.
    """

    manager: Manager
    name: str
    uri: str | None = None

    def has_driver(self, uri: str | None) -> bool:
        """That URI leads to the same driver, whatever it says of sockets and modes."""
        return _driver(uri or "") == _driver(self.uri or "")

    def __str__(self) -> str:
        named = " ".join(filter(None, (str(self.manager), self.name)))
        return f"{named} ({self.uri})" if self.uri is not None else named


def owners_of(process: Process) -> tuple[Owner, ...]:
    """The managers of this QEMU, the nearest to it first."""
    manager = manager_in(process.argv)
    containers = tuple(containers_in(_text(f"/proc/{process.pid}/cgroup")))
    if not containers and _has_own_processes(process):
        containers = (Owner(Manager.CONTAINER, ""),)
    return (*((manager,) if manager is not None else ()), *containers)


def manager_in(argv: Sequence[str]) -> Owner | None:
    """The manager that a command line shows.  Pure."""
    values: dict[str, list[str]] = {}
    for option, value in pairwise(argv):
        if option in _OPTIONS and len(value) <= _LONGEST_VALUE:
            values.setdefault(option, []).append(value)
    (*_, name), (*_, vmid), (*_, pid_file) = (
        ("", *values.get(option, ())) for option in ("-name", "-id", "-pidfile")
    )
    if any(map(_MONITOR.search, values.get("-mon", ()))):
        match = _GUEST.search(name)
        name = match[1].replace(",,", ",") if match is not None else ""
        found = filter(None, map(_KEY_FILE.search, values.get("-object", ())))
        return Owner(Manager.LIBVIRT, name, next((_uri(m[1]) for m in found), None))
    if _VMID.fullmatch(vmid) and pid_file.endswith(f"/qemu-server/{vmid}.pid"):
        return Owner(Manager.PROXMOX, vmid)
    return None


def _uri(directory: str) -> str | None:
    """The driver whose library directory this is (virQEMUDriverConfigNew, src/qemu/qemu_conf.c)."""
    if directory == "/var/lib/libvirt/qemu":
        return "qemu:///system"
    if _SESSION.fullmatch(directory):
        return "qemu:///session"
    root = directory.removesuffix("/lib/qemu")
    return f"qemu:///embed?root={root}" if root != directory else None


def containers_in(cgroups: str) -> Iterator[Owner]:
    """The container and the pod that /proc/PID/cgroup shows.  Pure."""
    for kind, pattern in (
        (Manager.CONTAINER, _CONTAINER),
        (Manager.CONTAINER, _LXC),
        (Manager.POD, _POD),
    ):
        match = pattern.search(cgroups)
        if match is not None:
            name = match[1].replace("_", "-") if kind is Manager.POD else match[1]
            yield Owner(kind, name)


def _driver(uri: str) -> str:
    driver, _, options = uri.partition("?")
    return uri if driver.endswith("/embed") and options else driver


def _has_own_processes(process: Process) -> bool:
    """It lives in another pid namespace than we do; False where we may not look."""
    try:
        theirs = os.readlink(f"/proc/{process.pid}/ns/pid")
        return theirs != os.readlink("/proc/self/ns/pid")
    except OSError:
        return False


def _text(path: str) -> str:
    try:
        with open(path, "rb") as f:
            return os.fsdecode(f.read(_LONGEST))
    except OSError:
        return ""
