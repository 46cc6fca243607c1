"""What a target stands for: the addresses that can be connected to, and the guest that is meant."""

from __future__ import annotations

from collections import Counter

from ..errors import InputError, TargetUnreachable, WrongGuest
from ..host.bounded import in_thread
from ..text import quoted
from .dial import busy, stopped
from .discovery import Guest, find_guest, find_guests
from .identity import GuestIdentity
from .libvirt_session import INSTALL, is_installed
from .owners import Manager
from .sockets import MonitorState
from .targets import Address, LibvirtTarget, NameTarget, PidTarget, Target

__all__ = ["domain_target", "resolve", "targets_of"]

_LIST = "`qmp-memlistener list` shows those on this host"


async def resolve(
    target: Target, meant: GuestIdentity | None = None
) -> tuple[tuple[Address, ...], GuestIdentity | None]:
    """The addresses that `target` stands for, and the guest that is meant by it.

    For `pid:N` and `name:GUEST` these are the free QMP monitors of that QEMU, else the way through
    libvirt where libvirt has it, and that QEMU; for an address `meant`, None when whoever answers
    is.  Raises TargetUnreachable, MonitorBusy, InputError for a name that several guests have, and
    WrongGuest when a process is no longer the one that is `meant`.
    """
    if isinstance(target, NameTarget):
        guest = await _named(target)
    elif isinstance(target, PidTarget):
        guest = await _with_id(target)
    else:
        return (target,), meant
    found = GuestIdentity.of(guest.process)
    if meant is not None and found != meant:
        raise WrongGuest(f"{target} is {found} now, and not the one that was meant: it has ended")
    free = guest.free_targets()
    if free:
        return free, found
    domain = domain_target(guest)
    if domain is not None and is_installed():
        return (domain,), found
    through = f"; {domain} reaches it, and for that: {INSTALL}" if domain is not None else ""
    if any(m.state is MonitorState.BUSY for m in guest.qmp_monitors):
        error = await in_thread(stopped, target, [guest.pid]) or busy(target)
        error.remedy = f"{error.remedy}{through}"
        raise error
    reasons = [f"{m.label}: {m.why}" for m in guest.qmp_monitors if m.why]
    if not guest.visible:
        raise TargetUnreachable(
            f"{target} belongs to user id {guest.process.uid}, and "
            + ("; ".join(reasons) or "we have no permission to see its monitors"),
            remedy="use the user that runs QEMU, or root; or name the monitor's socket" + through,
        )
    why = "no QMP monitor" if not guest.qmp_monitors else "no QMP monitor that can be reached"
    hints = "; ".join([*reasons, *guest.notes])
    raise TargetUnreachable(
        f"{target} has {why}" + (f" ({hints})" if hints else ""),
        remedy="start QEMU with -qmp unix:PATH,server=on,wait=off" + through,
    )


async def _with_id(target: PidTarget) -> Guest:
    guest = await in_thread(find_guest, target.pid)
    if guest is None:
        raise TargetUnreachable(f"{target} is no running QEMU", remedy=_LIST)
    return guest


async def _named(target: NameTarget) -> Guest:
    found = [g for g in await in_thread(find_guests) if g.name == target.name]
    if not found:
        raise TargetUnreachable(f"no guest here has the name {quoted(target.name)}", remedy=_LIST)
    if len(found) > 1:
        these = ", ".join(f"pid:{g.pid}" for g in found)
        raise InputError(
            f"{len(found)} guests have the name {quoted(target.name)}: {these}",
            remedy="name one of these",
        )
    return found[0]


def domain_target(guest: Guest) -> LibvirtTarget | None:
    """How libvirt is asked for this guest; None when it is not libvirt's, or that of a container,
    whose libvirt is in there."""
    owner, *others = guest.owners or (None,)
    if owner is None or others or owner.manager is not Manager.LIBVIRT or not owner.name:
        return None
    return LibvirtTarget(owner.name, owner.uri)


def targets_of(guest: Guest, names: Counter[str]) -> list[str]:
    """What a user may write for this guest, the shortest first; `names` counts those of all."""
    found: list[Target] = []
    domain = domain_target(guest)
    free = guest.free_targets()
    if free or domain is not None:
        if guest.name and names[guest.name] == 1:
            found.append(NameTarget(guest.name))
        found.append(PidTarget(guest.pid))
    if domain is not None:
        found.append(domain)
    return [str(t) for t in (*found, *free)]
