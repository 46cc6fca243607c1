"""The host's side of the lab: system calls with raw addresses, CPUs, and closing what was opened.

Python's own modules do not take addresses.  Each call releases the interpreter's lock and raises
OSError; interrupted ones (EINTR) are made again unless the caller asks to see that.
"""

from __future__ import annotations

import ctypes
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x1, 0x2, 0x10, 0x20
MAP_NORESERVE = 0x4000
MADV_DONTNEED, MADV_POPULATE_READ, MADV_POPULATE_WRITE = 4, 22, 23

_libc = ctypes.CDLL(None, use_errno=True)
raw_ioctl = _libc.ioctl
"""`ioctl(2)` itself, for loops in which every microsecond counts: -1 and `ctypes.get_errno()`."""
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
raw_ioctl.restype = ctypes.c_int
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_FAILED = ctypes.c_void_p(-1).value


def ioctl(fd: int, request: int, argument: ctypes.Structure | int = 0) -> int:
    """The result, not negative.  A structure is passed by address, an int as it is."""
    pointer = (
        ctypes.addressof(argument) if isinstance(argument, ctypes.Structure) else argument or None
    )
    while True:
        result: int = raw_ioctl(fd, request, pointer)
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), f"ioctl {request:#x}")


def mmap(
    size: int,
    protection: int = PROT_READ | PROT_WRITE,
    flags: int = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
    fd: int = -1,
    offset: int = 0,
    address: int | None = None,
) -> int:
    """The address of a new mapping; with MAP_FIXED at `address`, whatever was there."""
    result: int | None = _libc.mmap(address, size, protection, flags, fd, offset)
    if result is None or result == _FAILED:
        raise _error("mmap")
    return result


def munmap(address: int, size: int) -> None:
    if _libc.munmap(address, size):
        raise _error("munmap")


def mprotect(address: int, size: int, protection: int) -> None:
    if _libc.mprotect(address, size, protection):
        raise _error("mprotect")


def madvise(address: int, size: int, advice: int) -> None:
    if _libc.madvise(address, size, advice):
        raise _error("madvise")


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), call)


class Closing(ABC):
    """Gives a class with `close` the `with` statement."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; may be called at any time, and again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Cpus:
    """Which CPUs are for the thread that changes slots, and which for vCPUs; the same with one CPU.

    With enough CPUs that thread has one of its own.  Otherwise the scheduler tends to wake it where
    a vCPU runs, and an update of slots whose vCPUs do not run is a cheap one: there are no readers
    to wait for (SRCU), because KVM_RUN lets go of the slots before it lets others run.
    """

    own: frozenset[int]
    vcpus: frozenset[int]

    @classmethod
    def split(cls) -> Self:
        """The first CPU that the caller may use is its own."""
        allowed = frozenset(os.sched_getaffinity(0))
        if len(allowed) == 1:
            return cls(allowed, allowed)
        own = frozenset({min(allowed)})
        return cls(own, allowed - own)

    @classmethod
    def for_vcpus(cls, vcpus: int) -> Self:
        """The same where each of so many vCPUs then has a CPU; else all for all."""
        found = cls.split()
        if vcpus <= len(found.vcpus):
            return found
        every = found.own | found.vcpus
        return cls(every, every)

    @property
    def apart(self) -> bool:
        return self.own != self.vcpus

    @staticmethod
    @contextmanager
    def on(cpus: frozenset[int]) -> Iterator[None]:
        """The calling thread, and those that it begins, run on these; afterwards as before."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)
