"""userfaultfd for holes: pages whose mapping is gone, and whose next use is reported.

Minor faults of shared memory (Linux 5.14, Documentation/admin-guide/mm/userfaultfd.rst): the page
stays in the memfd, its mapping is taken away, and an access to it waits until it is put back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from ctypes import c_int64, c_uint64

from . import system

__all__ = [
    "FEATURE_MINOR_SHMEM",
    "MODE_MINOR",
    "UFFDIO_API",
    "UFFDIO_CONTINUE",
    "UFFDIO_REGISTER",
    "UFFDIO_UNREGISTER",
    "UFFDIO_WAKE",
    "Userfault",
    "why_not",
]

_SYS_USERFAULTFD = 323  # x86-64
_API = 0xAA
FEATURE_MINOR_SHMEM = 1 << 10
MODE_MINOR = 1 << 2
_EVENT_PAGEFAULT = 0x12
_MESSAGE = struct.Struct("=BBHIQQQ")  # struct uffd_msg: event, reserved, then flags, address

_libc = ctypes.CDLL(None, use_errno=True)


class _Api(ctypes.Structure):
    _fields_ = (("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64))


class _Range(ctypes.Structure):
    _fields_ = (("start", c_uint64), ("len", c_uint64))


class _Register(ctypes.Structure):
    _fields_ = (("range", _Range), ("mode", c_uint64), ("ioctls", c_uint64))


class _Continue(ctypes.Structure):
    _fields_ = (("range", _Range), ("mode", c_uint64), ("mapped", c_int64))


def _number(direction: int, number: int, struct_type: type[ctypes.Structure]) -> int:
    return direction << 30 | ctypes.sizeof(struct_type) << 16 | _API << 8 | number


UFFDIO_API = _number(3, 0x3F, _Api)
UFFDIO_REGISTER = _number(3, 0x00, _Register)
UFFDIO_UNREGISTER = _number(2, 0x01, _Range)
UFFDIO_WAKE = _number(2, 0x02, _Range)
UFFDIO_CONTINUE = _number(3, 0x07, _Continue)


class Userfault:
    """A userfaultfd.  Raises OSError from everything."""

    def __init__(self) -> None:
        fd = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "userfaultfd")
        self.fd = fd
        try:
            system.ioctl(fd, UFFDIO_API, _Api(_API, FEATURE_MINOR_SHMEM))
        except OSError:
            self.close()
            raise

    def punch(self, address: int, size: int) -> None:
        """From now on an access to `[address, address + size)` waits."""
        # a page that was never there would be made without a report
        system.madvise(address, size, system.MADV_POPULATE_READ)
        register = _Register(_Range(address, size), MODE_MINOR)
        system.ioctl(self.fd, UFFDIO_REGISTER, register)
        system.madvise(address, size, system.MADV_DONTNEED)

    def fill(self, address: int, size: int) -> None:
        """Put the pages back and wake what waits."""
        whole = True
        try:
            system.ioctl(self.fd, UFFDIO_CONTINUE, _Continue(_Range(address, size)))
        except OSError as exc:
            # a page is mapped already, the first or one behind it (or its table just goes): the
            # pages that were not reached are mapped when they are used
            if exc.errno not in (errno.EEXIST, errno.EAGAIN):
                raise
            whole = False
        system.ioctl(self.fd, UFFDIO_UNREGISTER, _Range(address, size))
        if not whole:
            system.ioctl(self.fd, UFFDIO_WAKE, _Range(address, size))

    def addresses(self) -> list[int]:
        """Host addresses at which an access waits, or waited, not reported before."""
        found: list[int] = []
        while True:
            try:
                data = os.read(self.fd, 64 * _MESSAGE.size)
            except BlockingIOError:
                return found
            for event, _, _, _, _, address, _ in _MESSAGE.iter_unpack(data):
                if event == _EVENT_PAGEFAULT:
                    found.append(address)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def why_not() -> str | None:
    """Why this process cannot use it, None when it can."""
    try:
        Userfault().close()
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES):
            return "userfaultfd needs root, or vm.unprivileged_userfaultfd = 1"
        return f"this kernel has no userfaultfd with minor faults of shared memory: {exc.strerror}"
    return None
