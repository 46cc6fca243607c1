"""Dirty logs: bitmaps of slots, and rings of vCPUs with the pages in the order they were written.

KVM_CAP_DIRTY_LOG_RING (Documentation/virt/kvm/api.rst 8.29): a ring for each vCPU instead of a
bitmap for each slot.  An entry names a slot by its id and a page in it; what that was when the page
was written is not in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from ..memslots import Slot
from . import abi, system
from .abi import Cap
from .memory import PAGE
from .vm import LabVm, Vcpu

__all__ = ["DirtyRings", "FetchedLog", "Log", "RingLog", "ring_capability", "ring_log"]

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
