"""The connections of one attachment, the observer's and those that the user named, and what is
known of the QEMU at the other end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from ..errors import CommandFailed, InputError, TraceUnavailable
from ..host.bounded import in_thread
from ..host.files import find_text, open_foreign
from ..memslots import Rules
from ..probes import Context, StallKind
from ..qmp import (
    CONNECT_DEADLINE,
    Address,
    Companions,
    Guest,
    GuestFacts,
    Monitor,
    SocketTarget,
    Target,
    TcpTarget,
    UnixTarget,
    allowed,
    companions_of,
    find_owner,
    parse_target,
)
from ..qmp.freeze import FreezeKey, check_not_frozen, freeze_key, hold_freeze
from ..qmp.identity import GuestIdentity
from ..qmp.resolving import resolve
from ..updates.left_behind import REMEDY, confirmed, left_behind
from ..updates.pause.guard_notes import take_notes

__all__ = [
    "Admission",
    "Monitors",
    "as_target",
    "connect_monitors",
    "context_of",
    "left_remarks",
    "refuse_if_frozen",
    "rules_of",
]

_INHIBIT_SYMBOL = b"\0accel_ioctl_inhibit_begin\0"


@dataclass(frozen=True, slots=True)
class Monitors:
    """`operations` is the observer's own connection when none was named.

    `remarks` are for the user.
    """

    observer: Monitor
    operations: Monitor
    companions: Companions
    owner: Guest | None
    remarks: tuple[str, ...]

    @property
    def pid(self) -> int | None:
        """QEMU's process, where that is known."""
        return self.owner.pid if self.owner is not None else None


def as_target(target: str | Target) -> Target:
    """A target from what users write.  Raises InputError."""
    return parse_target(target) if isinstance(target, str) else target


@dataclass(frozen=True, slots=True)
class Admission:
    """A target that may be talked to, and the guest that is meant by it where that is known before
    anybody answers."""

    target: Target
    meant: GuestIdentity | None
    key: FreezeKey


async def refuse_if_frozen(target: str | Target) -> Admission:
    """The monitor behind a target.  Raises GuestFrozen before anything is sent to it."""
    named = as_target(target)
    (first, *_), meant = await resolve(named)
    owner = await in_thread(find_owner, first, meant)
    key = freeze_key(first, owner)
    await in_thread(check_not_frozen, key)
    return Admission(named, meant, key)


async def connect_monitors(
    stack: AsyncExitStack,
    target: str | Target,
    *,
    freeze: str | None = None,
    ping: str | Target | None = None,
    operations: str | Target | None = None,
    ping_first: bool,
    guarded: bool = False,
    deadline: float = CONNECT_DEADLINE,
) -> Monitors:
    """Connect the observer and the monitors that were named; `stack` closes them.

    With `freeze` (a reason) the guest is frozen as long as `stack` lasts.  A monitor for pinging
    is only tried: the probe connects on its own, from its own thread.  Raises GuestFrozen,
    InputError for a monitor that is named twice, WrongGuest for one of another guest, and as
    `Monitor.connect` does.
    """
    admission = await refuse_if_frozen(target)
    remarks: list[str] = []
    observer = await stack.enter_async_context(
        await Monitor.connect(admission.target, meant=admission.meant, deadline=deadline)
    )
    owner = await in_thread(find_owner, observer.target, observer.identity)
    key = freeze_key(observer.target, owner)
    if freeze is not None:
        remarks += (await stack.enter_async_context(hold_freeze(key, freeze))).remarks
    else:
        await in_thread(check_not_frozen, key)
    used = [observer.target]
    operator = None
    if operations is not None:
        operator = await _connect_named(stack, operations, observer, used, deadline)
        used.append(operator.target)
    pinged = None
    if ping is not None:
        async with AsyncExitStack() as only_now:
            pinged = _socket_of(await _connect_named(only_now, ping, observer, used, deadline))
    companions = companions_of(
        owner,
        used,
        ping=pinged,
        operations=operator.target if operator is not None else None,
        ping_first=ping_first,
        guarded=guarded,
    )
    remarks += companions.without
    if observer.identity.remark is not None:
        remarks.append(observer.identity.remark)
    if observer.abilities.remark:
        remarks.append(observer.abilities.remark)
    untried = allowed.untried(observer.version.release)
    if untried is not None:
        remarks.append(untried)
    remarks[:0] = await left_remarks(observer, key)  # last: what a guard did is told only once
    return Monitors(observer, operator or observer, companions, owner, tuple(remarks))


async def left_remarks(monitor: Monitor, key: FreezeKey) -> list[str]:
    """What an agent of ours that was killed has left in the guest by an update, if it is so still,
    and what a resume guard did alone, which is told once: so call it when the guest has answered.

    Raises TargetError.
    """
    found = []
    for left in await in_thread(left_behind, key):
        try:
            text = await confirmed(monitor, left)
        except CommandFailed as exc:
            text = f"{left.text} (whether this holds is unknown: {exc.message})"
        if text is not None:
            found += [text, f"to put that right: {REMEDY}"]
    notes = await in_thread(take_notes, key)
    return [t for n in notes for t in (n.text, n.remedy) if t is not None] + found


def rules_of(version: str, pid: int | None) -> Rules:
    """The order of slot operations: by what the binary has, else by its version.

    Distributors backport the atomic update (QEMU 8.0, commit f39b7d2b96), so the symbol counts.
    """
    page_size = os.sysconf("SC_PAGE_SIZE")
    rules = Rules.parse(version, page_size)
    if pid is None or rules.queued:
        return rules
    try:
        handle = open_foreign(f"/proc/{pid}/exe")
    except OSError:
        return rules  # another user's process: the version is all there is
    try:
        backported = find_text(handle, _INHIBIT_SYMBOL) is not None
    except OSError:
        return rules
    finally:
        os.close(handle)
    return Rules.parse("8.0", page_size) if backported else rules


def context_of(
    monitors: Monitors,
    facts: GuestFacts,
    untraced: TraceUnavailable | None,
    *,
    named: bool = False,
    max_share: float | None = None,
    must_see: Mapping[StallKind, int] | None = None,
) -> Context:
    """What probes may use of an attachment; `untraced` says why it has no trace lines."""
    return Context(
        guest=monitors.companions.guest,
        pid=monitors.pid,
        facts=facts,
        monitor=monitors.observer,
        companions=monitors.companions,
        untraced=untraced,
        named=named,
        max_share=max_share,
        must_see=must_see or {},
    )


def _socket_of(monitor: Monitor) -> SocketTarget:
    """Where a probe connects on its own.  Raises InputError."""
    if isinstance(monitor.target, UnixTarget | TcpTarget):
        return monitor.target
    raise InputError(
        f"{monitor.target} is no socket, and only round trips over a socket of QEMU's own measure "
        "its main loop",
        remedy="name the socket of a QMP monitor that is free",
    )


async def _connect_named(
    stack: AsyncExitStack,
    name: str | Target,
    observer: Monitor,
    used: Sequence[Address],
    deadline: float,
) -> Monitor:
    target = as_target(name)
    if target in used:
        raise InputError(
            f"{name} is in use by this agent already",
            remedy="name another monitor of the same QEMU; each serves one client",
        )
    monitor = await Monitor.connect(target, meant=observer.identity, deadline=deadline)
    return await stack.enter_async_context(monitor)
