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
import threading
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Ring",
    "USUAL_HIT_NS",
    "architecture",
    "lost_of",
    "measure_hit",
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


USUAL_HIT_NS = 5_000
"""Taken where it cannot be measured: more than any of ours was."""

_CALLS = 200
_ROUNDS = 7
_MARGIN = 2
"""A hit of a program with colder caches, other instructions and more threads costs more."""


_known: dict[int, int] = {}
"""What was measured, by PMU: once in the life of a process is enough."""


def measure_hit(arch: Architecture, pmu: int) -> tuple[int, list[int]]:
    """What one hit costs at most, in ns, and the descriptors that are to be released.

    The function is one of the Python interpreter's own, which only Python programs have mapped; the
    breakpoint is in this process only.  Takes 5 ms, the first time.
    """
    if pmu in _known:
        return _known[pmu], []
    cost, fds = _measure(arch, pmu)
    _known[pmu] = cost
    return cost, fds


def _measure(arch: Architecture, pmu: int) -> tuple[int, list[int]]:
    function = ctypes.pythonapi.Py_GetVersion
    function.restype = ctypes.c_void_p
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    where = _file_of(address)
    if where is None:
        return USUAL_HIT_NS, []
    tid = threading.get_native_id()
    fds: list[int] = []
    try:
        bare = _per_call(function)
        owner, _ = open_dummy(arch, tid)
        fds.append(owner)
        ring = Ring(owner, 1 << 18)
        try:
            for is_return in (True, False):
                fd, _ = open_uprobe(arch, pmu, *where, tid, is_return=is_return)
                fds.append(fd)
                set_output(fd, owner)
                set_enabled(fd, True)
            both = _per_call(function)
            for fd in fds:
                set_enabled(fd, False)
        finally:
            ring.close()
    except OSError:
        return USUAL_HIT_NS, fds
    return max(1, both - bare) // 2 * _MARGIN, fds


def _per_call(function: ctypes._NamedFuncPointer) -> int:
    """The median of some rounds, in ns."""
    found = []
    for _ in range(_ROUNDS):
        start = time.perf_counter_ns()
        for _ in range(_CALLS):
            function()
        found.append((time.perf_counter_ns() - start) // _CALLS)
    return sorted(found)[_ROUNDS // 2]


def _file_of(address: int) -> tuple[bytes, int] | None:
    """The file that is mapped at an address of ours, and the place in it."""
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            span, _, offset, _, _, *path = line.split(None, 5)
            start, end = (int(x, 16) for x in span.split(b"-"))
            if start <= address < end and path:
                return path[0].strip(), address - start + int(offset, 16)
    return None
