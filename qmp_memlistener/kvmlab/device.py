"""/dev/kvm: opening it, and saying clearly why that does not work here."""

from __future__ import annotations

import ctypes
import errno
import os
import platform

from ..errors import MissingPrerequisite
from . import abi
from .capabilities import CAPABILITIES, Cap, Capability
from .closing import Closing
from .system import ioctl

__all__ = ["DEVICE", "Kvm", "flavour"]

DEVICE = "/dev/kvm"
_MACHINES = ("x86_64", "amd64")
_FLAVOURS = {"kvm_intel": "vmx", "kvm_amd": "svm", "kvm_pvm": "software"}


class Kvm(Closing):
    """An open /dev/kvm.  Close it, or use it as a context manager."""

    def __init__(self, path: str = DEVICE) -> None:
        """Raises MissingPrerequisite: no device, no permission, another API, another machine."""
        machine = platform.machine().lower()
        if machine not in _MACHINES:
            raise MissingPrerequisite(
                f"the lab has guest programs for x86-64 only, this machine is {machine}",
                remedy="run it on an x86-64 host",
            )
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise _unusable(path, exc) from exc
        try:
            version = self.ioctl(abi.GET_API_VERSION)
        except OSError as exc:
            os.close(self._fd)
            raise MissingPrerequisite(
                f"{path} is not KVM: {exc.strerror}", remedy="name the KVM device"
            ) from exc
        if version != abi.API_VERSION:
            os.close(self._fd)
            raise MissingPrerequisite(
                f"{path} has API version {version}, every KVM since Linux 2.6.22 has "
                f"{abi.API_VERSION}",
                remedy="use a newer kernel",
            )

    def ioctl(self, request: int, argument: ctypes.Structure | int = 0, /) -> int:
        """A system ioctl (api.rst 4).  Raises OSError."""
        return ioctl(self._fd, request, argument)

    def capability(self, cap: Cap) -> int:
        """What KVM_CHECK_EXTENSION returns; 0 for a capability that it does not know."""
        return self.ioctl(abi.CHECK_EXTENSION, int(cap))

    def capabilities(self) -> tuple[Capability, ...]:
        """All that the lab cares about, present or not."""
        return tuple(
            Capability(cap, self.capability(cap), what) for cap, what in CAPABILITIES.items()
        )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def flavour() -> str:
    """`vmx`, `svm`, `software` (guests run without the CPU's help) or `unknown`."""
    for module, name in _FLAVOURS.items():
        if os.path.isdir(f"/sys/module/{module}"):
            return name
    return "unknown"


def _unusable(path: str, exc: OSError) -> MissingPrerequisite:
    what, remedy = f"{path} cannot be opened: {exc.strerror}", "check the host's KVM"
    if exc.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        what = f"there is no KVM here: {path}: {exc.strerror}"
        remedy = (
            "load kvm_intel or kvm_amd, or use a host (or nested guest) that has virtualisation"
        )
    elif exc.errno in (errno.EACCES, errno.EPERM):
        remedy = "run as root, or join the group that owns it (often `kvm`)"
    return MissingPrerequisite(what, remedy=remedy)
