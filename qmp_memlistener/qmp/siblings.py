"""The QEMU behind a connected monitor, and its other monitors that are free.

A QMP monitor serves one client, and one connection runs one in-band command at a time: a stall
probe that pings and an operation that takes long need connections of their own.  This module
finds them and says what must be done without when there are none; it does not connect.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from .discovery import Guest, find_guest, find_guests
from .identity import GuestIdentity, owner_of
from .sockets import listening_pids
from .targets import SocketTarget, TcpTarget, UnixTarget

__all__ = ["Companions", "companions_of", "find_owner"]


@dataclass(frozen=True, slots=True)
class Companions:
    """`ping`, `operations` and `guard` (kept free for a resume guard, when that was asked for):
    targets for a connection of their own, None when there is none; `without` says, in words for
    the user, what then does not work."""

    guest: Guest | None
    ping: SocketTarget | None
    operations: SocketTarget | None
    without: tuple[str, ...]
    guard: SocketTarget | None = None


def find_owner(target: SocketTarget, identity: GuestIdentity | None) -> Guest | None:
    """The QEMU on this host behind a connection that has this identity; None when not visible.

    Without an identity, before anything is connected, the one that holds the listening socket, or,
    where that cannot be seen, on whose command line `target` is: who answers may be another.
    """
    if identity is not None:
        return owner_of(identity)
    holders = listening_pids(target)
    found = map(find_guest, holders) if holders else iter(find_guests())
    for guest in found:
        if guest is not None and any(
            m.target is not None and same_socket(m.target, target) for m in guest.monitors
        ):
            return guest
    return None


def companions_of(
    guest: Guest | None,
    used: Sequence[SocketTarget],
    *,
    ping: SocketTarget | None = None,
    operations: SocketTarget | None = None,
    ping_first: bool = False,
    guarded: bool = False,
) -> Companions:
    """Choose the monitors for pinging and for operations, and with `guarded` first of all one that
    stays free for a resume guard.

    `used` are those that we hold already; `ping` and `operations` are the user's choice, which
    is taken unseen.  Operations take the first that is free, pings the last.  If only one is,
    operations come first, they are what a user waits for; or `ping_first`, when stalls are
    measured: those cannot share a connection.
    """
    taken = [t for t in (*used, ping, operations) if t is not None]
    free = [
        t
        for t in (guest.free_targets() if guest is not None else ())
        if not any(same_socket(t, other) for other in taken)
    ]
    guard = free.pop(0) if guarded and free else None
    if ping is None and ping_first and free:
        ping = free.pop()
    if operations is None and free:
        operations = free.pop(0)
    if ping is None and free:
        ping = free.pop()
    without = []
    if operations is None:
        without.append(
            "no monitor of its own for operations: they share the observer's, so snapshots wait "
            "until a hotplug command has returned"
        )
    if ping is None:
        without.append(
            "no monitor of its own for pinging: main-loop stalls are seen only where a command "
            "of ours happens to wait"
        )
    if without and guest is None:
        without.append(
            "QEMU's process is not visible here, so its other monitors are not known: name them "
            "with --ping-monitor and --ops-monitor"
        )
    return Companions(guest, ping, operations, tuple(without), guard)


def same_socket(one: SocketTarget, other: SocketTarget) -> bool:
    """Both names lead to the same listener."""
    if one == other:
        return True
    if isinstance(one, UnixTarget) and isinstance(other, UnixTarget):
        if one.is_abstract or other.is_abstract:
            return False
        try:
            return os.path.samefile(one.path, other.path)
        except OSError:
            return False
    if isinstance(one, TcpTarget) and isinstance(other, TcpTarget) and one.port == other.port:
        return bool(_local_addresses(one.host) & _local_addresses(other.host))
    return False


def _local_addresses(host: str) -> set[str]:
    """Addresses of a name, only where no name service has to be asked."""
    if host == "localhost":
        return {"127.0.0.1", "::1"}
    try:
        infos = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except OSError:
        return {host}
    return {str(info[4][0]) for info in infos}
