"""perf_event_open(2) as far as uprobes need it: events on one thread, and the ring they fill.

Kernel interface only: include/uapi/linux/perf_event.h.  What a record means is `decode`'s business.

Rings are polled.  A wake-up for each record costs the probed thread 11 of 12 us a hit (measured),
so events are opened with a wake-up mark that is never reached.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import resource
import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Ring",
    "architecture",
    "lost_of",
    "open_dummy",
    "open_uprobe",
    "set_enabled",
    "set_output",
    "uprobe_pmu",
]

_PMU = Path("/sys/bus/event_source/devices/uprobe/type")
_TYPE_SOFTWARE = 1
_SW_DUMMY = 9
_RETURN_PROBE = 1  # config bit 0, format/retprobe of the PMU
_SAMPLE = 1 << 16 | 1 << 1 | 1 << 2 | 1 << 12  # IDENTIFIER, TID, TIME, REGS_USER
_SAMPLE_STACK_USER = 1 << 13
_FORMAT_LOST = 1 << 4  # Linux 6.0
_DISABLED, _EXCLUDE_KERNEL, _TASK, _WATERMARK, _USE_CLOCKID = 1, 1 << 5, 1 << 13, 1 << 14, 1 << 25
_CLOCK_MONOTONIC = 1
_NEVER = 1 << 30  # bytes: more than any ring has
_FD_CLOEXEC = 8
_IOC_ENABLE, _IOC_DISABLE, _IOC_SET_OUTPUT, _IOC_ID = 0x2400, 0x2401, 0x2405, 0x80082407
_HEAD, _TAIL = 1024, 1032  # of struct perf_event_mmap_page
_WORD = struct.Struct("@Q")  # native, hence read and written in one piece
_ATTR = struct.Struct("<IIQQQQQIIQQQQIiQIHHII8x")
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between host architectures.

    `registers` are the user registers to sample, as bit numbers of perf's register mask in
    ascending order (arch/*/include/uapi/asm/perf_regs.h), which is how a record has them.
    `arguments`, `sp` and `result` are places in that order.  `popped` is by how much a return moves
    the stack pointer.
    """

    machine: str
    elf_machine: str
    syscall: int
    registers: tuple[int, ...]
    arguments: tuple[int, int, int, int, int]
    sp: int
    result: int
    popped: int

    @property
    def mask(self) -> int:
        return sum(1 << bit for bit in self.registers)


ARCHITECTURES = {
    # AX CX DX SI DI SP R8: arguments in rdi, rsi, rdx, rcx, r8, the result in rax
    "x86_64": Architecture(
        *("x86_64", "EM_X86_64", 298, (0, 2, 3, 4, 5, 7, 16), (4, 3, 2, 1, 6), 5, 0, 8)
    ),
}


def architecture() -> Architecture | None:
    """That of this machine; None when it was never tried there."""
    return ARCHITECTURES.get(platform.machine())


def uprobe_pmu() -> int | None:
    """The type number of the uprobe PMU; None when this kernel has none (4.17 brought it)."""
    try:
        return int(_PMU.read_text())
    except (OSError, ValueError):
        return None


def open_uprobe(
    arch: Architecture,
    pmu: int,
    path: bytes,
    offset: int,
    tid: int,
    *,
    is_return: bool = False,
    stack: int = 0,
) -> tuple[int, int]:
    """A uprobe at `offset` of the file `path` that records hits of one thread; it starts disabled.

    Returns its file descriptor and the id that its records carry.  The breakpoint is in that
    thread's process only, and goes with the descriptor.  Raises OSError.
    """
    name = ctypes.create_string_buffer(path)
    sample = _SAMPLE | (_SAMPLE_STACK_USER if stack else 0)
    config = _RETURN_PROBE if is_return else 0
    attr = (pmu, config, sample, 0, ctypes.addressof(name), offset, arch.mask, stack)
    return _open(arch, attr, tid)


def open_dummy(arch: Architecture, tid: int) -> tuple[int, int]:
    """An event that never happens: it owns a thread's ring, and tells of forks and of its end."""
    return _open(arch, (_TYPE_SOFTWARE, _SW_DUMMY, _SAMPLE, _TASK, 0, 0, arch.mask, 0), tid)


def _open(
    arch: Architecture, what: tuple[int, int, int, int, int, int, int, int], tid: int
) -> tuple[int, int]:
    type_, config, sample, flags, config1, config2, registers, stack = what
    flags |= _DISABLED | _EXCLUDE_KERNEL | _WATERMARK | _USE_CLOCKID
    read_format = _FORMAT_LOST
    # A period of one record each, not a frequency: software events are then never throttled.
    while True:
        packed = _ATTR.pack(
            *(type_, _ATTR.size, config, 1, sample, read_format, flags, _NEVER, 0),
            *(config1, config2, 0, registers, stack, _CLOCK_MONOTONIC, 0, 0, 0, 0, 0, 0),
        )
        attr = ctypes.create_string_buffer(packed, _ATTR.size)
        fd = _LIBC.syscall(arch.syscall, attr, tid, -1, -1, _FD_CLOEXEC)
        if fd >= 0:
            break
        error = ctypes.get_errno()
        if error != errno.EINVAL or not read_format:
            raise OSError(error, os.strerror(error))
        read_format = 0
    ident = ctypes.c_uint64()
    if _LIBC.ioctl(fd, _IOC_ID, ctypes.byref(ident)) < 0:
        error = ctypes.get_errno()
        os.close(fd)
        raise OSError(error, os.strerror(error))
    return fd, ident.value


def set_enabled(fd: int, on: bool) -> None:
    """Start or stop recording.  That the thread is gone is no error."""
    _LIBC.ioctl(fd, _IOC_ENABLE if on else _IOC_DISABLE, 0)


def set_output(fd: int, ring_fd: int) -> None:
    """Send the records of an event to the ring of another one of the same thread."""
    if _LIBC.ioctl(fd, _IOC_SET_OUTPUT, ring_fd) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def lost_of(fd: int) -> int:
    """How many records of this event found no room so far; 0 where the kernel cannot tell."""
    try:
        values = os.read(fd, 16)
    except OSError:
        return 0
    return int.from_bytes(values[8:16], "little")


class Ring:
    """The buffer that the kernel fills for one thread; we are its only reader.

    `size` is a power of two of pages as asked for, or smaller when the kernel does not lock so
    much memory for us (perf_event_mlock_kb).  Raises OSError when not even a page is to be had.
    """

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        while True:
            try:
                self._map = mmap.mmap(fd, page + size)  # noqa: TID251 - a ring of our own
                break
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOMEM) or size <= page:
                    raise
                size //= 2
        self._page = page
        self.size = size
        self.peak = 0
        """The most bytes that were ever found waiting."""

    def read(self) -> bytes:
        """All records that are there, in their order; they leave the ring.

        Loads and stores are in the right order on x86-64 by themselves; an architecture with a
        weaker order needs a barrier here.
        """
        (head,) = _WORD.unpack_from(self._map, _HEAD)
        (tail,) = _WORD.unpack_from(self._map, _TAIL)
        if head == tail:
            return b""
        used = head - tail
        self.peak = max(self.peak, used)
        start, end = tail % self.size, head % self.size
        page = self._page
        if start < end:
            data = self._map[page + start : page + end]
        else:
            data = self._map[page + start : page + self.size] + self._map[page : page + end]
        _WORD.pack_into(self._map, _TAIL, head)
        return data

    def close(self) -> None:
        self._map.close()


def allow_descriptors(count: int) -> None:
    """Let this process have `count` more files open, as far as its hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
