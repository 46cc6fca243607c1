"""/dev/kvm and a VM of our own: slots, dirty logs, vCPUs.  Threads are in `machine`.

Dirty logs are bitmaps of slots, or rings of vCPUs with the pages in the order they were written
(KVM_CAP_DIRTY_LOG_RING, Documentation/virt/kvm/api.rst 8.29).  An entry of a ring names a slot by
its id and a page in it; what that was when the page was written is not in it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import MissingPrerequisite, OperationFailed
from ..memslots import Slot
from . import abi, system, x86
from .abi import Cap
from .memory import PAGE
from .system import Closing

__all__ = [
    "DEVICE",
    "DirtyRings",
    "FetchedLog",
    "Kvm",
    "LabVm",
    "Log",
    "RingLog",
    "SlotRefused",
    "Vcpu",
    "flavour",
    "most_slots",
    "ring_capability",
    "ring_log",
]


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
        return system.ioctl(self._fd, request, argument)

    def capability(self, cap: Cap) -> int:
        """What KVM_CHECK_EXTENSION returns; 0 for a capability that it does not have."""
        return self.ioctl(abi.CHECK_EXTENSION, int(cap))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def most_slots(kvm: Kvm) -> int:
    """Memslots that a VM may have; 509, as on x86 before Linux 5.12, where KVM does not say."""
    return kvm.capability(Cap.NR_MEMSLOTS) or 509


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


_REGION = struct.Struct("=IIQQQ")  # abi.MemoryRegion


_REMEDIES = {
    errno.EINVAL: "no such id, an unaligned range, a change that no live slot allows, or flags "
    "that this KVM does not know",
    errno.EEXIST: "another slot lies there",
    errno.ENOENT: "there is no such slot, or it is not logged",
    errno.ENOSPC: "use fewer slots",
    errno.ENOMEM: "use less RAM or fewer slots, or free memory on the host",
}


class SlotRefused(OperationFailed):
    """KVM refused a slot operation; `errno` says why."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"KVM refused {what}: {os.strerror(number)}", remedy=_REMEDIES.get(number))
        self.errno = number


class LabVm(Closing):
    """A VM on /dev/kvm without devices or interrupts.

    KVM does not report which slots it has: the caller keeps a table.  Raises OperationFailed
    when KVM makes no VM.
    """

    def __init__(self, kvm: Kvm, vm_type: int = 0) -> None:
        self.kvm = kvm
        self._fd = -1
        self.vcpus: list[Vcpu] = []
        try:
            self._fd = kvm.ioctl(abi.CREATE_VM, vm_type)
            x86.set_up_vm(self.ioctl)
        except OSError as exc:
            self.close()
            raise OperationFailed(
                f"KVM makes no VM: {exc.strerror}",
                remedy="end other virtual machines, or free memory on the host"
                if exc.errno in (errno.ENOMEM, errno.EBUSY)
                else None,
            ) from exc

    def ioctl(self, request: int, argument: ctypes.Structure | int = 0, /) -> int:
        """An ioctl of the VM.  Raises OSError."""
        return system.ioctl(self._fd, request, argument)

    def capability(self, cap: Cap) -> int:
        """KVM_CHECK_EXTENSION for this VM."""
        return self.ioctl(abi.CHECK_EXTENSION, int(cap))

    def region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> int:
        """KVM_SET_USER_MEMORY_REGION; 0 or -errno.  Size 0 deletes (api.rst 4.35)."""
        try:
            # quicker than a structure, and lets vCPU threads run as well
            fcntl.ioctl(
                self._fd, abi.SET_USER_MEMORY_REGION, _REGION.pack(slot, flags, gpa, size, hva)
            )
        except OSError as exc:
            return -(exc.errno or errno.EIO)
        return 0

    def set_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """The same; raises SlotRefused."""
        result = self.region(slot, gpa, size, hva, flags)
        if result:
            verb = "to set" if size else "to delete"
            raise SlotRefused(f"{verb} slot {slot} at {gpa:#x}+{size:#x}", -result)

    def set_private(self, gpa: int, size: int, private: bool) -> None:
        """Make pages private or shared, KVM_SET_MEMORY_ATTRIBUTES.  Raises OSError."""
        attributes = abi.MEMORY_ATTRIBUTE_PRIVATE if private else 0
        self.ioctl(abi.SET_MEMORY_ATTRIBUTES, abi.MemoryAttributes(gpa, size, attributes))

    def dirty_log(self, slot: int, size: int) -> bytes:
        """The dirty bitmap of a slot of `size` bytes, a bit a page; cleared by that.

        Raises SlotRefused: ENOENT for a slot that is not logged.
        """
        words = (size // 4096 + 63) // 64
        bitmap = (ctypes.c_uint64 * words)()
        log = abi.GetDirtyLog(slot, 0, ctypes.addressof(bitmap))
        if system.raw_ioctl(self._fd, abi.GET_DIRTY_LOG, ctypes.addressof(log)) < 0:
            raise SlotRefused(f"the dirty log of slot {slot}", ctypes.get_errno())
        return bytes(bitmap)

    def enable(self, cap: Cap, value: int) -> None:
        """KVM_ENABLE_CAP with one argument.  Raises OSError."""
        enable = abi.EnableCap(int(cap))
        enable.args[0] = value
        self.ioctl(abi.ENABLE_CAP, enable)

    def add_vcpu(self) -> Vcpu:
        """Raises OperationFailed."""
        index = len(self.vcpus)
        try:
            vcpu = Vcpu(self, self.ioctl(abi.CREATE_VCPU, index), index)
        except OSError as exc:
            raise OperationFailed(
                f"KVM makes no vCPU {index}: {exc.strerror}", remedy="use fewer vCPUs"
            ) from exc
        self.vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Vcpu:
    """A vCPU: its file descriptor and its `kvm_run`.  Only one thread may call `ioctl(RUN)`."""

    def __init__(self, vm: LabVm, fd: int, index: int) -> None:
        self.fd = fd
        self.index = index
        self._size = vm.kvm.ioctl(abi.GET_VCPU_MMAP_SIZE)
        self._address = 0
        try:
            self._address = system.mmap(
                self._size, system.PROT_READ | system.PROT_WRITE, system.MAP_SHARED, fd
            )
            x86.set_up_vcpu(vm.kvm.ioctl, self.ioctl)
        except OSError:
            self.close()
            raise
        self.run = abi.Run.from_address(self._address)

    def ioctl(self, request: int, argument: ctypes.Structure | int = 0, /) -> int:
        """An ioctl of the vCPU.  Raises OSError."""
        return system.ioctl(self.fd, request, argument)

    def start(self, rip: int, cr3: int, registers: dict[str, int]) -> None:
        """The next KVM_RUN begins there.  Raises OperationFailed."""
        try:
            x86.start(self.ioctl, rip, cr3, registers)
        except OSError as exc:
            raise OperationFailed(
                f"KVM does not take the state of vCPU {self.index}: {exc.strerror}"
            ) from exc

    def set_signal_mask(self, blocked: int) -> None:
        """Signals that are blocked while it runs, a bit a signal from 1 on (api.rst 4.21)."""
        mask = abi.SignalMask(8)
        mask.sigset[:] = blocked.to_bytes(8, "little")
        self.ioctl(abi.SET_SIGNAL_MASK, mask)

    def close(self) -> None:
        if self._address:
            system.munmap(self._address, self._size)
            self._address = 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


# -- dirty logs --------------------------------------------------------------------------------


ENTRIES = 1 << 14
"""Of each ring: 256 KiB, which every kernel that has rings takes."""

Page = tuple[int, int]
"""KVM's id of a slot, with the address space in it, and the number of a page in it."""


def ring_capability(vm: LabVm) -> Cap | None:
    """The capability to enable, None where this KVM has no rings that are large enough."""
    for cap in (Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING):
        if vm.capability(cap) >= ENTRIES * abi.DIRTY_GFN_BYTES:
            return cap
    return None


class DirtyRings:
    """The rings of a VM.  Made before its first vCPU; any thread may call `drain`."""

    def __init__(self, vm: LabVm, cap: Cap) -> None:
        """From now on the VM has no dirty bitmaps.  Raises OSError."""
        self._vm = vm
        self._rings: list[tuple[int, abi.GfnArray]] = []
        self._next: list[int] = []
        self._lock = threading.Lock()
        self._found: list[Page] = []
        vm.enable(cap, ENTRIES * abi.DIRTY_GFN_BYTES)

    def add(self, vcpu: Vcpu) -> None:
        """Map the ring of a new vCPU.  Raises OSError."""
        size = ENTRIES * abi.DIRTY_GFN_BYTES
        both = system.PROT_READ | system.PROT_WRITE
        offset = abi.DIRTY_LOG_PAGE_OFFSET * PAGE
        address = system.mmap(size, both, system.MAP_SHARED, vcpu.fd, offset)
        self._rings.append((address, (abi.DirtyGfn * ENTRIES).from_address(address)))
        self._next.append(0)

    def drain(self) -> None:
        """Collect all entries and give their places back.  Raises OSError."""
        with self._lock:
            for i, (_, ring) in enumerate(self._rings):
                at = self._next[i]
                while ring[at % ENTRIES].flags & abi.DIRTY_GFN_DIRTY:
                    entry = ring[at % ENTRIES]
                    self._found.append((entry.slot, entry.offset))
                    entry.flags = abi.DIRTY_GFN_RESET
                    at += 1
                self._next[i] = at
            self._vm.ioctl(abi.RESET_DIRTY_RINGS)

    def take(self) -> list[Page]:
        """What was collected, drained once more; nothing is kept.  Raises OSError."""
        self.drain()
        with self._lock:
            found, self._found = self._found, []
            return found

    def close(self) -> None:
        """No vCPU may run any more."""
        while self._rings:
            address, _ = self._rings.pop()
            system.munmap(address, ENTRIES * abi.DIRTY_GFN_BYTES)


@dataclass(frozen=True, slots=True)
class FetchedLog:
    """A dirty bitmap as KVM gave it: a bit a page from `gpa` on."""

    gpa: int
    size: int
    bitmap: bytes

    def dirty(self, gpa: int) -> bool:
        """The page that holds `gpa` is in it and marked."""
        page = (gpa - self.gpa) >> 12
        return 0 <= page < self.size >> 12 and bool(self.bitmap[page >> 3] >> (page & 7) & 1)


@dataclass(frozen=True, slots=True)
class RingLog:
    """Pages that dirty rings reported."""

    pages: frozenset[int]

    def dirty(self, gpa: int) -> bool:
        return gpa & ~0xFFF in self.pages


Log = FetchedLog | RingLog


def ring_log(rings: DirtyRings, slots: Iterable[Slot]) -> RingLog:
    """What is in the rings, of slots that are there now; whatever else is lost.  Raises OSError."""
    start = {slot.kvm_slot: slot.gpa for slot in slots}
    return RingLog(
        frozenset(start[slot] + (page << 12) for slot, page in rings.take() if slot in start)
    )
