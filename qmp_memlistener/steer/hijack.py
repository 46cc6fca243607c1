"""The main thread of a running QEMU made to call functions of its own process, by ptrace.

The thread is taken only while it waits in `ppoll` in its main loop: there it holds no lock but, in
a nested loop of the block layer, the BQL, which nothing that is called here takes.  All other
threads run on.  It is held only while its registers and its stack are written, which a timer of the
kernel bounds: who holds it for longer is killed, and with its tracer gone the thread runs on.  The
calls are made without a tracer.  Each returns into `rt_sigreturn`, with a frame that holds the
registers of the next one, and the last with those of before, so that the `ppoll` begins anew.  So
QEMU goes on by itself whenever this process ends.

Held for 0.1 ms, the thread would then wait for a processor like any other, on a busy host for
100 ms and more.  So where that is allowed it makes the calls before what else runs there
(SCHED_FIFO); the last of them puts that back, also when this process is no more.

ptrace is refused to a process that is QEMU's parent and waits for it, so this runs in a process of
its own (see `injector`).  x86-64 and glibc only.

Sources: Linux ptrace(2), sigreturn(2), timer_create(2), arch/x86/kernel/signal_64.c (rt_sigreturn;
`ss_flags` that are invalid leave the alternate stack as it is); glibc's __restore_rt.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

__all__ = [
    "GLIBC",
    "HijackedCall",
    "HijackRefused",
    "MappedRange",
    "call",
    "find_restorer",
    "mappings",
]

GLIBC = "/libc.so.6"
"""How the path of the C library ends that has what is called here."""

_SEIZE, _INTERRUPT, _DETACH, _CONT = 0x4206, 0x4207, 17, 7
_GETREGSET, _SETREGSET, _GETSIGMASK = 0x4204, 0x4205, 0x420A
_NT_PRSTATUS = 1
_EVENT_STOP = 128
_WALL = 0x40000000
_PPOLL = 271
_SYSCALL_BYTES = b"\x0f\x05"
_RESTORE_RT = b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05"  # mov $15, %rax; syscall
_CATCH_S = 5.0
"""For the main thread to be in ppoll; it runs meanwhile."""
_HOLD_S = 0.05
"""For what is written while it is held."""
_CALL_S = 1.0
_STEP_S = 0.001
_RED_ZONE = 128

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long

_NAMES = (
    *(
        "r15",
        "r14",
        "r13",
        "r12",
        "rbp",
        "rbx",
        "r11",
        "r10",
        "r9",
        "r8",
        "rax",
        "rcx",
        "rdx",
        "rsi",
    ),
    *("rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es"),
    *("fs", "gs"),
)


class HijackRefused(Exception):
    """Nothing was called; the thread runs as before."""


@dataclass(frozen=True, slots=True)
class HijackedCall:
    """A function at an address.  Strings are put on the stack."""

    function: int
    arguments: tuple[int | bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class MappedRange:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    perms: str
    offset: int
    path: str


def mappings(pid: int) -> Iterator[MappedRange]:
    """Those of a process.  Raises OSError."""
    with open(f"/proc/{pid}/maps", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=5)
            start, _, end = fields[0].partition("-")
            yield MappedRange(
                int(start, 16),
                int(end, 16),
                fields[1],
                int(fields[2], 16),
                fields[5] if len(fields) > 5 else "",
            )


def find_restorer(pid: int, libc: list[MappedRange]) -> int:
    """Where libc returns from a signal: `rt_sigreturn`.  Raises HijackRefused, OSError."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in libc:
            if "x" not in mapping.perms:
                continue
            code = os.pread(memory.fileno(), mapping.end - mapping.start, mapping.start)
            at = code.find(_RESTORE_RT)
            if at >= 0:
                return mapping.start + at
    raise HijackRefused("its C library has no __restore_rt (not glibc?)")


class _Regs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in _NAMES]


class _Iov(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


def call(
    pid: int,
    calls: Sequence[HijackedCall],
    *,
    restorer: int,
    ended: Callable[[], int | None],
    scheduler: int,
) -> int:
    """Make calls, one after the other.  `ended` says when they were over, None before.

    `scheduler`: the address of sched_setscheduler.  Returns how long the main thread did not do its
    own work, in ns; when it takes too long, how long it has not so far.  Raises HijackRefused when
    it could not be caught in ppoll, OSError as ptrace does.
    """
    hurried = _may_be_hurried(pid)
    if hurried:
        calls = (*calls, HijackedCall(scheduler, (0, os.SCHED_OTHER, bytes(4))))
    with _at_once():
        began = _begin(pid, calls, restorer, hurried)
        until, step = time.monotonic() + _CALL_S, _STEP_S / 4
        while (end := ended()) is None and time.monotonic() < until:
            time.sleep(step)
            step = min(step * 1.5, 5 * _STEP_S)
    now = time.monotonic_ns()
    return (end if end is not None and began < end < now else now) - began


def _may_be_hurried(pid: int) -> bool:
    """It is scheduled as most are, and no filter of its own could refuse to put that back."""
    with open(f"/proc/{pid}/status") as status:
        filtered = "Seccomp:\t0\n" not in status.readlines()
    return not filtered and os.sched_getscheduler(pid) == os.SCHED_OTHER


def _begin(pid: int, calls: Sequence[HijackedCall], restorer: int, hurried: bool) -> int:
    """When the thread was stopped."""
    until = time.monotonic() + _CATCH_S
    guard = _Guard()
    with (
        open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory,
        open(f"/proc/{pid}/syscall", "rb", buffering=0) as syscall,
    ):
        while True:
            # not stopped in vain: it may wait for the BQL
            if os.pread(syscall.fileno(), 4, 0) == b"%d " % _PPOLL:
                with _held(pid, guard, until) as regs:
                    began = time.monotonic_ns()
                    # no signal mask of its own: none has to be put back when the calls return
                    if regs.orig_rax == _PPOLL and regs.r10 == 0:
                        _enter(pid, memory.fileno(), regs, calls, restorer)
                        if hurried:  # not before: only the calls put it back
                            with suppress(OSError):
                                os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
                        return began
            if time.monotonic() > until:
                raise HijackRefused(
                    f"its main thread was not in ppoll within {_CATCH_S:g} s: it is busy or hangs"
                )
            time.sleep(_STEP_S)


@contextmanager
def _held(pid: int, guard: _Guard, until: float) -> Iterator[_Regs]:
    """The registers of the thread, which stands meanwhile."""
    _ptrace(_SEIZE, pid)
    try:
        _ptrace(_INTERRUPT, pid)
        _wait_stop(pid, guard, until)
        yield _registers(pid)
    finally:
        with suppress(OSError):  # one that is not stopped is let go when this process ends
            _ptrace(_DETACH, pid)
        guard.disarm()


class _Guard:
    """Ends this process when it is not disarmed in time, even if it is stopped or does not run."""

    class _Event(ctypes.Structure):
        _fields_ = [
            ("value", ctypes.c_uint64),
            ("signal", ctypes.c_int),
            ("notify", ctypes.c_int),  # 0: SIGEV_SIGNAL
            ("pad", ctypes.c_char * 48),
        ]

    def __init__(self) -> None:
        self._timer = ctypes.c_void_p()
        event = self._Event(signal=signal.SIGKILL)
        clock = time.CLOCK_MONOTONIC
        if _libc.timer_create(clock, ctypes.byref(event), ctypes.byref(self._timer)):
            raise HijackRefused("this host has no timer left for the helper")

    def arm(self) -> None:
        self._set(int(_HOLD_S * 1e9))

    def disarm(self) -> None:
        self._set(0)

    def _set(self, ns: int) -> None:
        when = (ctypes.c_long * 4)(0, 0, 0, ns)
        _libc.timer_settime(self._timer, 0, when, None)


@contextmanager
def _at_once() -> Iterator[None]:
    """Before what else runs on the host, where that is allowed."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def _enter(
    pid: int, memory: int, regs: _Regs, calls: Sequence[HijackedCall], restorer: int
) -> None:
    mask = ctypes.c_uint64()
    _ptrace(_GETSIGMASK, pid, ctypes.sizeof(mask), ctypes.addressof(mask))
    if os.pread(memory, 2, regs.rip - 2) != _SYSCALL_BYTES:
        raise HijackRefused("its main thread waits in no system call that could begin anew")
    after = _Regs.from_buffer_copy(regs)
    after.rip -= len(_SYSCALL_BYTES)
    after.rax = _PPOLL
    top = regs.rsp - _RED_ZONE
    for each in reversed(calls):  # a call's frame is above what the call itself has on the stack
        values = []
        for argument in each.arguments:
            if isinstance(argument, bytes):
                top -= len(argument) + 1
                os.pwrite(memory, argument + b"\0", top)
                argument = top
            values.append(argument)
        frame = _frame(after, mask.value, restorer)
        top = ((top - len(frame)) & ~15) - 8  # as at the entry of a function
        os.pwrite(memory, frame, top)
        after = _Regs.from_buffer_copy(regs)
        for name, value in zip(("rdi", "rsi", "rdx", "rcx"), values, strict=False):
            setattr(after, name, value)
        after.rip, after.rsp, after.rax = each.function, top, 0
    after.orig_rax = 2**64 - 1  # no system call that the kernel would begin anew
    _set_registers(pid, after)


def _frame(regs: _Regs, mask: int, restorer: int) -> bytes:
    """`struct rt_sigframe`: the return address, and what rt_sigreturn puts back."""
    order = (
        *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx"),
        *("rax", "rcx", "rsp", "rip", "eflags"),
    )
    flags = 0x6  # UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
    untouched = 0x77  # ss_flags that sigaltstack(2) refuses
    context = struct.pack("<QQQIIQ", flags, 0, 0, untouched, 0, 0)
    context += struct.pack("<18Q", *(getattr(regs, name) for name in order))
    context += struct.pack("<4H", regs.cs, 0, 0, regs.ss)
    context += struct.pack("<4Q", 0, 0, 0, 0)  # err, trapno, oldmask, cr2
    context += struct.pack("<9Q", *([0] * 9))  # no floating-point state: a system call keeps none
    context += struct.pack("<Q", mask)
    return struct.pack("<Q", restorer) + context + bytes(128)  # siginfo


def _wait_stop(pid: int, guard: _Guard, until: float) -> None:
    while time.monotonic() < until:
        guard.arm()  # from now on it may stand
        found, status = os.waitpid(pid, _WALL | os.WNOHANG)
        if not found:
            time.sleep(_STEP_S / 10)
        elif not os.WIFSTOPPED(status):
            raise HijackRefused(f"QEMU (pid {pid}) has ended")
        elif status >> 16 == _EVENT_STOP:
            return
        else:
            _ptrace(_CONT, pid, 0, os.WSTOPSIG(status))  # a signal of somebody else's: pass it on
    raise HijackRefused(f"its main thread did not stop within {_CATCH_S:g} s: it hangs")


def _registers(pid: int) -> _Regs:
    regs = _Regs()
    iov = _Iov(ctypes.addressof(regs), ctypes.sizeof(regs))
    _ptrace(_GETREGSET, pid, _NT_PRSTATUS, ctypes.addressof(iov))
    return regs


def _set_registers(pid: int, regs: _Regs) -> None:
    iov = _Iov(ctypes.addressof(regs), ctypes.sizeof(regs))
    _ptrace(_SETREGSET, pid, _NT_PRSTATUS, ctypes.addressof(iov))


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    ctypes.set_errno(0)
    result = _libc.ptrace(
        ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), ctypes.c_void_p(data)
    )
    if result == -1 and ctypes.get_errno():
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
