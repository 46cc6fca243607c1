"""Which of QEMU's functions show what, in which version, and how each is probed.

Only entries of exported functions are ever probed, and returns of those few that cannot switch
coroutines: a return probe replaces the return address on the stack, and QEMU's coroutines switch
stacks, so a function that may yield (`qmp_marshal_*`, `qmp_dispatch`) must never have one.

Sources are the QEMU trees of 7.2, 10.0 and 11.1, as named at each role.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from ..model import StallKind

__all__ = [
    "ROLES",
    "SYMBOLS",
    "Group",
    "Point",
    "Func",
    "RoleInfo",
    "kinds_of",
    "missing_kinds",
    "points_of",
    "resolve_roles",
]


class Func(StrEnum):
    """A function of QEMU, by what it is to us.

    COMMIT: memory_region_transaction_commit (memory.c).  SLOT_IOCTL: kvm_vm_ioctl (kvm-all.c), type
    in its second argument and the slot in its third.  INHIBIT_BEGIN, INHIBIT_END: accel-blocker.c
    of 8.0 and later (bd688fc931).  PAUSE, RESUME: pause_all_vcpus and resume_all_vcpus (cpus.c).
    CLOCK: qemu_clock_enable (qemu-timer.c): resume_all_vcpus calls it unless it returns at once
    because the guest is not to run.  COMMAND: qmp_command_available (qdev-monitor.c), which
    qmp_dispatch asks about each command just before it.  CURRENT_MONITOR: monitor_set_cur
    (monitor.c), which encloses the execution of each command, QMP and HMP.  The rest is about
    locks: the BQL has a lock and an unlock function of its own, and is released and retaken by
    waits on a condition variable (qemu-thread-posix.c).  MUTEX_LOCK and LEARN_LOCK (the lock
    function once more) serve to learn the BQL's address and are there only as long as that takes.
    """

    COMMIT = "commit"
    SLOT_IOCTL = "slot_ioctl"
    INHIBIT_BEGIN = "inhibit_begin"
    INHIBIT_END = "inhibit_end"
    PAUSE = "pause"
    RESUME = "resume"
    CLOCK = "clock"
    COMMAND = "command"
    CURRENT_MONITOR = "current_monitor"
    BQL_LOCK = "bql_lock"
    BQL_UNLOCK = "bql_unlock"
    COND_WAIT = "cond_wait"
    COND_TIMEDWAIT = "cond_timedwait"
    MUTEX_LOCK = "mutex_lock"
    LEARN_LOCK = "learn_lock"


class Group(StrEnum):
    """What is switched on and off together.

    ALWAYS: on every thread for as long as the probe runs.  MAIN: the same, on the main thread only.
    BQL: on every thread while a closer look is wanted.  LEARN: on the main thread, for a moment.
    """

    ALWAYS = "always"
    MAIN = "main"
    BQL = "bql"
    LEARN = "learn"


@dataclass(frozen=True, slots=True)
class RoleInfo:
    """How a role is probed.

    `symbols` are the names of its function, newest first.  `returns`: its return is probed too.
    `stack` is how many bytes of the caller's stack are taken at its entry.
    """

    symbols: tuple[str, ...]
    group: Group
    returns: bool = False
    stack: int = 0


# kvm_set_user_memory_region builds the structure for the ioctl in its own frame, which lies right
# above that of kvm_vm_ioctl; 512 bytes reach past the 160 of struct kvm_userspace_memory_region2.
_SLOT_STACK = 512

_LOCK = ("bql_lock_impl", "qemu_mutex_lock_iothread_impl")  # so named since 9.0, and before
_UNLOCK = ("bql_unlock", "qemu_mutex_unlock_iothread")

ROLES: Mapping[Func, RoleInfo] = MappingProxyType(
    {
        Func.COMMIT: RoleInfo(("memory_region_transaction_commit",), Group.ALWAYS, True),
        Func.SLOT_IOCTL: RoleInfo(("kvm_vm_ioctl",), Group.ALWAYS, True, _SLOT_STACK),
        Func.INHIBIT_BEGIN: RoleInfo(("accel_ioctl_inhibit_begin",), Group.ALWAYS, True),
        Func.INHIBIT_END: RoleInfo(("accel_ioctl_inhibit_end",), Group.ALWAYS),
        Func.PAUSE: RoleInfo(("pause_all_vcpus",), Group.MAIN, True),
        Func.RESUME: RoleInfo(("resume_all_vcpus",), Group.MAIN, True),
        Func.CLOCK: RoleInfo(("qemu_clock_enable",), Group.MAIN),
        Func.COMMAND: RoleInfo(("qmp_command_available",), Group.MAIN),
        Func.CURRENT_MONITOR: RoleInfo(("monitor_set_cur",), Group.MAIN),
        Func.BQL_LOCK: RoleInfo(_LOCK, Group.BQL, True),
        Func.BQL_UNLOCK: RoleInfo(_UNLOCK, Group.BQL),
        Func.COND_WAIT: RoleInfo(("qemu_cond_wait_impl",), Group.BQL, True),
        Func.COND_TIMEDWAIT: RoleInfo(("qemu_cond_timedwait_impl",), Group.BQL, True),
        # in this order: a mutex is then never seen without all those before it
        Func.MUTEX_LOCK: RoleInfo(("qemu_mutex_lock_impl",), Group.LEARN),
        Func.LEARN_LOCK: RoleInfo(_LOCK, Group.LEARN),
    }
)

SYMBOLS = tuple(dict.fromkeys(s for info in ROLES.values() for s in info.symbols))
"""Every name that any version has for them."""

# Without one of these roles the kind cannot be reported.  A hold is known only if every release is
# seen, so the waits belong to it; the mutex tells which waits concern the BQL.
_BQL = (Func.BQL_LOCK, Func.BQL_UNLOCK, Func.COND_WAIT, Func.COND_TIMEDWAIT, Func.MUTEX_LOCK)
_NEEDED: Mapping[StallKind, tuple[Func, ...]] = MappingProxyType(
    {
        StallKind.COMMIT: (Func.COMMIT,),
        StallKind.SLOT_UPDATE: (Func.SLOT_IOCTL,),
        StallKind.VCPU_INHIBIT: (Func.INHIBIT_BEGIN, Func.INHIBIT_END),
        StallKind.VCPU_PAUSE: (Func.PAUSE, Func.RESUME, Func.CLOCK),
        StallKind.BQL_WAIT: (Func.BQL_LOCK,),
        StallKind.BQL_HOLD: _BQL,
    }
)


@dataclass(frozen=True, slots=True)
class Point:
    """One place to probe: the entry or the return of a function."""

    role: Func
    group: Group
    offset: int
    is_return: bool = False

    @property
    def stack(self) -> int:
        """How many bytes of the stack to take."""
        return 0 if self.is_return else ROLES[self.role].stack


def resolve_roles(offsets: Mapping[str, int]) -> dict[Func, tuple[str, int]]:
    """Name and file offset of the function that plays each role, as far as there is one."""
    return {
        role: (symbol, offsets[symbol])
        for role, info in ROLES.items()
        for symbol in reversed(info.symbols)  # of two the newer name stays
        if symbol in offsets
    }


def points_of(roles: Mapping[Func, tuple[str, int]], group: Group) -> tuple[Point, ...]:
    """The probes of a group, a function's return before its entry.

    Switched on in this order and off in the reverse, no entry is seen whose return is not.
    """
    found = []
    for role, (_, offset) in roles.items():
        info = ROLES[role]
        if info.group is group:
            if info.returns:
                found.append(Point(role, group, offset, True))
            found.append(Point(role, group, offset))
    return tuple(found)


def kinds_of(roles: Collection[Func]) -> tuple[StallKind, ...]:
    """The kinds of window that these roles suffice for."""
    return tuple(kind for kind, needed in _NEEDED.items() if set(needed) <= set(roles))


def missing_kinds(roles: Collection[Func]) -> dict[StallKind, str]:
    """For each other kind, the functions that this QEMU lacks."""
    return {
        kind: ", ".join(ROLES[role].symbols[0] for role in needed if role not in roles)
        for kind, needed in _NEEDED.items()
        if not set(needed) <= set(roles)
    }
