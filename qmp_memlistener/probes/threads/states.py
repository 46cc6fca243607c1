"""What /proc/PID/task/TID/{syscall,wchan,stat,schedstat} say of a thread.  Pure.

`syscall` (proc(5)) is `running` for a thread that has a CPU or waits for one; else the number of
the system call that it sleeps in, six arguments, the stack pointer and the program counter, or -1
for one that sleeps outside of a call.  Numbers belong to the machine that the program is made for.

`wchan` is the function of the kernel in which it sleeps, `0` when it does not.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = [
    "CALLS",
    "Activity",
    "Calls",
    "LoopClassifier",
    "Schedule",
    "Sleep",
    "activity_by_wchan",
    "parse_schedstat",
    "parse_syscall",
    "vcpu_activity",
]


class Activity(enum.Enum):
    """What a thread is doing.  AWAKE: it has a CPU or waits for one.  RESTS: the main loop waits
    for events, a vCPU is halted or paused.  LOCK: it waits for a lock.  BLOCKED: it sleeps in
    another call.  HELD: stopped by a signal or a debugger, or frozen."""

    AWAKE = "awake"
    RESTS = "rests"
    LOCK = "waits for a lock"
    BLOCKED = "sleeps in a call"
    HELD = "stopped or frozen by the host"


@dataclass(frozen=True, slots=True)
class Calls:
    """Numbers of system calls: those in which a main loop waits for events, and others."""

    poll: frozenset[int]
    futex: int
    ioctl: int
    names: dict[int, str]


_X86_64 = Calls(
    frozenset({7, 271}),  # poll, ppoll: qemu_poll_ns, util/qemu-timer.c
    202,
    16,
    {0: "read", 1: "write", 7: "poll", 16: "ioctl", 17: "pread64", 18: "pwrite64", 20: "writev",
     46: "sendmsg", 47: "recvmsg", 74: "fsync", 75: "fdatasync", 202: "futex", 232: "epoll_wait",
     271: "ppoll", 281: "epoll_pwait", 295: "preadv", 296: "pwritev", 426: "io_uring_enter"},
)  # fmt: skip
# include/uapi/asm-generic/unistd.h: aarch64 and riscv64 use this table as it is
_GENERIC = Calls(
    frozenset({73}),
    98,
    29,
    {22: "epoll_pwait", 29: "ioctl", 63: "read", 64: "write", 66: "writev", 67: "pread64",
     68: "pwrite64", 69: "preadv", 70: "pwritev", 73: "ppoll", 82: "fsync", 83: "fdatasync",
     98: "futex", 211: "sendmsg", 212: "recvmsg", 426: "io_uring_enter"},
)  # fmt: skip
CALLS = {62: _X86_64, 183: _GENERIC, 243: _GENERIC}
"""By e_machine of the program's ELF header: EM_X86_64, EM_AARCH64, EM_RISCV."""

_KVM_RUN = 0xAE80  # _IO(KVMIO, 0x80), include/uapi/linux/kvm.h
_FUTEX_WAIT = 0
_FUTEX_COMMAND = 0x7F  # without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME
_LOCKED_WITH_WAITERS = 2  # glibc's low-level lock, sysdeps/nptl/lowlevellock.h
_POLLS = ("poll_schedule_timeout", "do_sys_poll", "do_poll")
_STOPPED = ("do_signal_stop", "ptrace_stop", "do_freezer_trap", "__refrigerator")
_HALTED_VCPU = ("kvm_vcpu_block", "kvm_vcpu_halt", "kvm_vcpu_check_block")


@dataclass(frozen=True, slots=True)
class Sleep:
    """The call that a thread sleeps in.  `number` is -1 outside of any."""

    number: int
    args: tuple[int, ...]
    stack: int

    def is_lock(self, calls: Calls) -> bool:
        """It waits for a mutex: FUTEX_WAIT until the lock is no longer held with waiters.

        A condition variable waits with FUTEX_WAIT_BITSET, a QemuEvent for another value.
        """
        if self.number != calls.futex or len(self.args) < 3:
            return False
        command = self.args[1] & _FUTEX_COMMAND
        return command == _FUTEX_WAIT and self.args[2] & 0xFFFFFFFF == _LOCKED_WITH_WAITERS

    def is_kvm_run(self, calls: Calls) -> bool:
        """It runs a vCPU, which is halted."""
        return self.number == calls.ioctl and len(self.args) > 1 and self.args[1] == _KVM_RUN

    def name(self, calls: Calls) -> str:
        """For people."""
        return calls.names.get(self.number, f"system call {self.number}")


def parse_syscall(line: bytes) -> Sleep | None:
    """None: it does not sleep.  ValueError for a line that is none of these."""
    words = line.split()
    if words[:1] == [b"running"]:
        return None
    if len(words) == 3:  # -1 SP PC
        return Sleep(int(words[0]), (), int(words[1], 16))
    if len(words) != 9:
        raise ValueError(f"not as /proc/PID/syscall is: {line[:80]!r}")
    return Sleep(int(words[0]), tuple(int(w, 16) for w in words[1:7]), int(words[7], 16))


class LoopClassifier:
    """What the main thread is doing, by its `syscall`.

    The main loop waits in ppoll at one depth of its stack (os_host_main_loop_wait,
    util/main-loop.c).  Whoever runs a nested event loop, as aio_poll does while a drive is drained
    (block/io.c), polls deeper than that, and then the main loop does not serve.  So what
    counts is the shallowest depth at which it was seen to poll; stacks grow downwards.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._depth = 0

    def __call__(self, sleep: Sleep | None) -> Activity:
        if sleep is None:
            return Activity.AWAKE
        if sleep.number in self._calls.poll:
            self._depth = max(self._depth, sleep.stack)
            return Activity.RESTS if sleep.stack == self._depth else Activity.BLOCKED
        return Activity.LOCK if sleep.is_lock(self._calls) else Activity.BLOCKED

    def deep(self, sleep: Sleep | None) -> bool:
        """It sleeps within some task, and not where the main loop itself waits for the BQL."""
        return sleep is not None and abs(self._depth - sleep.stack) > _FRAMES


_FRAMES = 512
"""The loop's own wait for the BQL is within 112 bytes of its ppoll; a task takes 848 or more
(seen on QEMU 7.2, 10.0 and 11.1)."""


def vcpu_activity(sleep: Sleep | None, calls: Calls) -> Activity:
    """What a vCPU's thread is doing.  Under KVM `AWAKE` is in the guest or in QEMU: unknown."""
    if sleep is None:
        return Activity.AWAKE
    if sleep.is_lock(calls):
        return Activity.LOCK
    # a halted or paused vCPU sleeps in KVM_RUN or on its condition variable (qemu_wait_io_event)
    if sleep.is_kvm_run(calls) or sleep.number == calls.futex:
        return Activity.RESTS
    return Activity.BLOCKED


def activity_by_wchan(wchan: bytes, *, vcpu: bool) -> Activity:
    """The same by `wchan`.  The main loop's ppoll looks like a nested one, a vCPU's wait for a
    lock like its condition variable."""
    function = wchan.decode("ascii", "replace").partition(".")[0]
    if function in ("", "0"):
        return Activity.AWAKE
    if function.startswith(_STOPPED):
        return Activity.HELD
    if function.startswith("futex_"):
        return Activity.RESTS if vcpu else Activity.LOCK
    if vcpu:
        return Activity.RESTS if function.startswith(_HALTED_VCPU) else Activity.BLOCKED
    return Activity.RESTS if function.startswith(_POLLS) else Activity.BLOCKED


def is_held_by_host(wchan: bytes) -> bool:
    """A signal, a debugger or a freezer holds it; `syscall` still shows the call it was in."""
    return activity_by_wchan(wchan, vcpu=False) is Activity.HELD


@dataclass(frozen=True, slots=True)
class Schedule:
    """`schedstat` (Documentation/scheduler/sched-stats.rst): ns on a CPU, ns ready to run without
    one, and how often it was given one.  While a thread runs the first is late by up to a tick."""

    cpu_ns: int
    waited_ns: int
    times: int


def parse_schedstat(line: bytes) -> Schedule:
    """ValueError for a line that is none."""
    words = line.split()
    if len(words) != 3:
        raise ValueError(f"not as /proc/PID/schedstat is: {line[:80]!r}")
    return Schedule(int(words[0]), int(words[1]), int(words[2]))
