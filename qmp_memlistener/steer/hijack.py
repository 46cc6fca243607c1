"""The main thread of a running QEMU made to call a function of its own process, by ptrace.

The thread is taken only while it waits in `ppoll` in its main loop: there it holds no lock, and not
the BQL.  All other threads run on.  The call returns into `rt_sigreturn`, with a frame that holds
every register of before, and the `ppoll` begins anew.  So QEMU goes on by itself when this process
ends in the middle of a call, and a call that takes long ends without us.

ptrace is refused to a process that is QEMU's parent and waits for it, so this runs in a process of
its own (see `injector`).  x86-64 and glibc only.

Sources: Linux ptrace(2), sigreturn(2), arch/x86/kernel/signal_64.c (rt_sigreturn; `ss_flags` that
are invalid leave the alternate stack as it is); glibc's __restore_rt.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["GLIBC", "HijackRefused", "MappedRange", "call", "find_restorer", "mappings"]

GLIBC = "/libc.so.6"
"""How the path of the C library ends that has what is called here."""

_SEIZE, _INTERRUPT, _DETACH, _CONT, _SYSCALL = 0x4206, 0x4207, 17, 7, 24
_GETREGSET, _SETREGSET, _GETSIGMASK = 0x4204, 0x4205, 0x420A
_O_TRACESYSGOOD = 1
_NT_PRSTATUS = 1
_EVENT_STOP = 128
_WALL = 0x40000000
_PPOLL, _RT_SIGRETURN = 271, 15
_SYSCALL_BYTES = b"\x0f\x05"
_RESTORE_RT = b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05"  # mov $15, %rax; syscall
_CATCH_S = 1.0
"""For the main thread to be in ppoll."""
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


def call(pid: int, function: int, *arguments: int | bytes, restorer: int) -> int:
    """Call a function at an address.  Strings are put on the stack.  Its result is not known.

    Returns how long the main thread did not do its own work, in ns.  Raises HijackRefused when
    it could not be caught in ppoll, OSError as ptrace does.
    """
    _ptrace(_SEIZE, pid, 0, _O_TRACESYSGOOD)
    try:
        began, regs = _catch(pid)
        _enter(pid, regs, function, arguments, restorer)
        _run_to_sigreturn(pid)
        return time.monotonic_ns() - began
    finally:
        _let_go(pid)


def _catch(pid: int) -> tuple[int, _Regs]:
    until = time.monotonic() + _CATCH_S
    while True:
        began = time.monotonic_ns()
        _ptrace(_INTERRUPT, pid)
        _wait_stop(pid)
        regs = _registers(pid)
        # no signal mask of its own: none has to be put back when the call returns
        if regs.orig_rax == _PPOLL and regs.r10 == 0:
            return began, regs
        if time.monotonic() > until:
            raise HijackRefused(
                f"its main thread was not in ppoll within {_CATCH_S:g} s: it is busy or hangs"
            )
        _ptrace(_CONT, pid)
        time.sleep(_STEP_S)


def _enter(
    pid: int, regs: _Regs, function: int, arguments: tuple[int | bytes, ...], restorer: int
) -> None:
    mask = ctypes.c_uint64()
    _ptrace(_GETSIGMASK, pid, ctypes.sizeof(mask), ctypes.addressof(mask))
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        fd = memory.fileno()
        if os.pread(fd, 2, regs.rip - 2) != _SYSCALL_BYTES:
            raise HijackRefused("its main thread waits in no system call that could begin anew")
        top = regs.rsp - _RED_ZONE
        values = []
        for argument in arguments:
            if isinstance(argument, bytes):
                top -= len(argument) + 1
                os.pwrite(fd, argument + b"\0", top)
                argument = top
            values.append(argument)
        frame = _frame(regs, mask.value, restorer)
        at = ((top - len(frame)) & ~15) - 8  # as at the entry of a function
        os.pwrite(fd, frame, at)
    entered = _Regs.from_buffer_copy(regs)
    for name, value in zip(("rdi", "rsi", "rdx", "rcx"), values, strict=False):
        setattr(entered, name, value)
    entered.rip, entered.rsp, entered.rax = function, at, 0
    entered.orig_rax = 2**64 - 1  # no system call that the kernel would begin anew
    _set_registers(pid, entered)


def _frame(regs: _Regs, mask: int, restorer: int) -> bytes:
    """`struct rt_sigframe`: the return address, and what rt_sigreturn puts back."""
    order = (
        *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx"),
        *("rax", "rcx", "rsp", "rip", "eflags"),
    )
    values = {name: getattr(regs, name) for name in order}
    values["rip"] -= len(_SYSCALL_BYTES)
    values["rax"] = _PPOLL
    flags = 0x6  # UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
    untouched = 0x77  # ss_flags that sigaltstack(2) refuses
    context = struct.pack("<QQQIIQ", flags, 0, 0, untouched, 0, 0)
    context += struct.pack("<18Q", *(values[name] for name in order))
    context += struct.pack("<4H", regs.cs, 0, 0, regs.ss)
    context += struct.pack("<4Q", 0, 0, 0, 0)  # err, trapno, oldmask, cr2
    context += struct.pack("<9Q", *([0] * 9))  # no floating-point state: a system call keeps none
    context += struct.pack("<Q", mask)
    return struct.pack("<Q", restorer) + context + bytes(128)  # siginfo


def _run_to_sigreturn(pid: int) -> None:
    """Until the frame is about to be put back, or it takes too long."""
    until = time.monotonic() + _CALL_S
    signal_to_pass = 0
    while True:
        _ptrace(_SYSCALL, pid, 0, signal_to_pass)
        status = _wait(pid, until)
        if status is None:
            _ptrace(_INTERRUPT, pid)
            _wait_stop(pid)
            return  # it ends without us
        number = os.WSTOPSIG(status)
        signal_to_pass = 0
        if number == signal.SIGTRAP | 0x80:
            if _registers(pid).orig_rax == _RT_SIGRETURN:
                return
        elif status >> 16 != _EVENT_STOP and number != signal.SIGTRAP:
            signal_to_pass = number


def _let_go(pid: int) -> None:
    try:
        _ptrace(_DETACH, pid)
    except OSError:  # it runs: ptrace(2) wants it stopped
        _ptrace(_INTERRUPT, pid)
        _wait_stop(pid)
        _ptrace(_DETACH, pid)


def _wait_stop(pid: int) -> None:
    while True:
        _, status = os.waitpid(pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise HijackRefused(f"QEMU (pid {pid}) has ended")
        if status >> 16 == _EVENT_STOP:
            return
        _ptrace(_CONT, pid, 0, os.WSTOPSIG(status))  # a signal of somebody else's: pass it on


def _wait(pid: int, until: float) -> int | None:
    while time.monotonic() < until:
        found, status = os.waitpid(pid, _WALL | os.WNOHANG)
        if found:
            if not os.WIFSTOPPED(status):
                raise HijackRefused(f"QEMU (pid {pid}) has ended")
            return status
        time.sleep(0.0001)
    return None


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
