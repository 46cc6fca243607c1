"""Host memory behind slots: a memfd that is mapped twice, once for the guest and once for us.

The guest's mapping may be protected, unmapped and mapped over; ours is always there, so reading
what a guest wrote cannot fail.  `ANONYMOUS` reservations stand where nothing is to be found.
"""

from __future__ import annotations

import ctypes
import os

from ..errors import OperationFailed
from . import system
from .closing import Closing

__all__ = ["PAGE", "HostMemory", "Reservation"]

PAGE = 4096


class Reservation:
    """`size` bytes of address space in which memory can be placed at fixed addresses.

    Whoever else maps something cannot get in between.
    """

    def __init__(self, size: int) -> None:
        """Raises OperationFailed when there is no room for it."""
        self.size = size
        flags = system.MAP_PRIVATE | system.MAP_ANONYMOUS | system.MAP_NORESERVE
        try:
            self.hva = system.mmap(size, system.PROT_NONE, flags)
        except OSError as exc:
            raise _no_memory(size, exc) from exc
        self._open = True

    def place(self, offset: int, size: int, file: int, at: int, protection: int) -> None:
        """`[at, at + size)` of `file` appears at `offset`; what was there goes, in one step."""
        system.mmap(
            size,
            protection,
            system.MAP_SHARED | system.MAP_FIXED | system.MAP_NORESERVE,
            file,
            at,
            self.hva + offset,
        )

    def clear(self, offset: int, size: int) -> None:
        """Nothing can be reached at `[offset, offset + size)` any more."""
        flags = system.MAP_PRIVATE | system.MAP_ANONYMOUS | system.MAP_NORESERVE
        system.mmap(size, system.PROT_NONE, flags | system.MAP_FIXED, address=self.hva + offset)

    def close(self) -> None:
        if self._open:
            self._open = False
            system.munmap(self.hva, self.size)


class HostMemory(Closing):
    """`size` bytes of shared memory, in whole pages; pages come when they are touched."""

    def __init__(self, size: int, name: str = "lab") -> None:
        """Raises OperationFailed when the host has no room."""
        self.size = size
        self.fd = -1
        self._maps: list[int] = []
        both = system.PROT_READ | system.PROT_WRITE
        try:
            self.fd = os.memfd_create(f"qmp-memlistener-{name}", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
            for _ in range(2):
                flags = system.MAP_SHARED | system.MAP_NORESERVE
                self._maps.append(system.mmap(size, both, flags, self.fd))
        except OSError as exc:
            self.close()
            raise _no_memory(size, exc) from exc
        self.hva, self._own = self._maps
        self.bytes = memoryview((ctypes.c_ubyte * size).from_address(self._own)).cast("B")
        self.words = self.bytes.cast("Q") if size % 8 == 0 else memoryview(b"")

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data

    def populate(self) -> None:
        """Bring all pages in now, in both mappings.  Raises OperationFailed."""
        try:
            for address in self._maps:
                system.madvise(address, self.size, system.MADV_POPULATE_WRITE)
        except OSError as exc:
            raise _no_memory(self.size, exc) from exc

    def close(self) -> None:
        """The views must not be used afterwards."""
        maps, self._maps = self._maps, []
        for address in maps:
            system.munmap(address, self.size)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _no_memory(size: int, exc: OSError) -> OperationFailed:
    return OperationFailed(
        f"no room for {size} bytes of guest memory: {exc.strerror}",
        remedy="use less RAM, or free memory on the host",
    )
