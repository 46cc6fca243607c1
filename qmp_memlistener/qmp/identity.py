"""Which guest answers at the other end of a connection, whether it is the one that was meant, and
which other monitors of it are free.

A path says nothing about who answers there: a second QEMU may have bound it again, a symbolic link
may lead elsewhere, a process id may have another owner.  So the guest that is meant is fixed once
(`GuestIdentity`), and each connection is compared with it before anything is sent.

- The socket at the other end of ours is known by its inode (sock_diag; /proc/net/tcp for TCP within
  this network namespace), and the process that holds it open is who answers.  That is so as well
  where somebody else listened: libvirt opens the socket of its QEMU, and SO_PEERCRED shows libvirt.
- SO_PEERCRED tells who called listen().  It counts where we may not look into the process.  The
  number alone could be another's by now: SO_PEERPIDFD (Linux 6.5) shows that its process lives.
- A process is its id and its start time.
- Where no QEMU is to be seen (another host, another container, a forwarder) nothing is certain: the
  guest is asked for its UUID and name at each connection, and these must be the same.  One that has
  either may then be reached past the forwarder as well.

A QMP monitor serves one client, and one connection runs one in-band command at a time: a stall
probe that pings and an operation that takes long need connections of their own.  `companions_of`
finds monitors for them and says what must be done without when there are none.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import WrongGuest
from ..host.bounded import in_thread
from ..host.processes import Process, socket_inodes
from ..text import quoted
from .discovery import Guest, find_guest, find_guests
from .owners import Manager
from .sockets import listening_pids, tcp_peer_inode, unix_sockets
from .targets import Address, LibvirtTarget, PidTarget, SocketTarget, same_socket

__all__ = [
    "ASKED",
    "Companions",
    "GuestIdentity",
    "companions_of",
    "find_owner",
    "identify_peer",
    "is_domain",
    "peer_pid",
    "same_answers",
    "wrong_guest",
]

ASKED = ("query-uuid", "query-name")
"""What is asked of a guest whose process is not seen."""
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_SO_PEERPIDFD = 77  # include/uapi/asm-generic/socket.h
_REMEDY = "name monitors that only the guest you mean has; `qmp-memlistener list` shows them"
_NAMELESS = (
    "give the guest a name or a UUID (-name, -uuid), by which it is known behind a forwarder; or "
    "name QEMU's own monitors instead of the forwarder"
)


@dataclass(frozen=True, slots=True)
class GuestIdentity:
    """A guest that is meant, or that answers.

    `pid` and `start_ticks` are those of QEMU when `is_qemu`; otherwise of whoever listens in its
    place (a forwarder), or None.  `answers` are then those to `ASKED`.
    """

    pid: int | None = None
    start_ticks: int = 0
    is_qemu: bool = False
    answers: Mapping[str, object] | None = None

    @classmethod
    def of(cls, process: Process) -> GuestIdentity:
        """The guest that this QEMU process runs."""
        return cls(process.pid, process.start_ticks, True)

    @property
    def certain(self) -> bool:
        """Another guest would be noticed; otherwise only one of another UUID or name."""
        return self.is_qemu

    @property
    def is_named(self) -> bool:
        """It is no process that is seen, but has a UUID or a name: no guest without has these."""
        return not self.is_qemu and any(v not in ("", _NO_UUID) for v in self._values())

    def differs(self, other: GuestIdentity) -> bool:
        """They are two processes for certain."""
        return self.certain and other.certain and self != other

    @property
    def remark(self) -> str | None:
        """For the user, where it is not certain."""
        if self.certain:
            return None
        hidden = "QEMU's process is not visible behind this monitor"
        if self.answers is not None and not self.is_named:
            return (
                f"{hidden}, and the guest has neither a UUID nor a name: whether each connection "
                f"leads to the same guest is unknown; {_NAMELESS}"
            )
        return f"{hidden}: only UUID and name show that each connection leads to the same guest"

    def __str__(self) -> str:
        if self.pid is not None:
            return _named(self.pid, self.start_ticks)
        found = " ".join(map(str, self._values()))
        return f"the guest {found}" if found else "a guest that is not visible here"

    def _values(self) -> list[object]:
        answers = (a for a in (self.answers or {}).values() if isinstance(a, Mapping))
        return [value for answer in answers for value in answer.values()]


def peer_pid(sock: socket.socket) -> int | None:
    """The process that called listen() at the other end (SO_PEERCRED), None for TCP or when it is
    not visible here."""
    if sock.family != socket.AF_UNIX:
        return None
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    return pid if pid > 0 else None


async def identify_peer(
    sock: socket.socket, target: SocketTarget, meant: GuestIdentity | None
) -> GuestIdentity:
    """Who answers on a connected socket that has been greeted on: before that nobody has accepted
    it.  With `meant` the result is `meant`, and WrongGuest is raised when somebody else answers."""
    return await in_thread(_identify, sock, target, meant)


def _identify(
    sock: socket.socket, target: SocketTarget, meant: GuestIdentity | None
) -> GuestIdentity:
    far_end = _far_end(sock)
    listener = _listener(sock)
    if meant is None:
        return _who(listener, far_end)
    if meant.is_named:
        return meant  # by what it answers, which is compared next
    if meant.pid is None:
        who = _who(listener, far_end)
        if who.is_qemu:
            raise wrong_guest(target, meant, who)
        return meant
    held = None if far_end is None else _holds(meant.pid, meant.start_ticks, far_end)
    listens = listener == (meant.pid, meant.start_ticks)
    if held or (listens and (held is None or not meant.is_qemu)):
        return meant
    raise wrong_guest(target, meant, _who(listener, far_end))


def wrong_guest(target: Address, meant: GuestIdentity, who: GuestIdentity) -> WrongGuest:
    """The error that names both."""
    if not meant.certain and not meant.is_named and who.answers is None:
        one = str(meant) if meant.pid is None else f"the guest behind {meant}"
        return WrongGuest(
            f"{target} is answered by {who}, and {one} is meant: that it is the same cannot be "
            "known, since it has neither a UUID nor a name",
            remedy=_NAMELESS,
        )
    return WrongGuest(f"{target} is answered by {who}, and {meant} is meant", remedy=_REMEDY)


def same_answers(
    target: Address, identity: GuestIdentity, answers: Mapping[str, object]
) -> GuestIdentity:
    """The identity with these answers; WrongGuest when the guest gave others before."""
    if identity.answers is not None and dict(identity.answers) != dict(answers):
        raise wrong_guest(
            target, GuestIdentity(answers=identity.answers), GuestIdentity(answers=answers)
        )
    return replace(identity, answers=answers)


def _who(listener: tuple[int, int] | None, far_end: int | None) -> GuestIdentity:
    """The QEMU that holds the other end; else who listens there."""
    if listener is not None:
        guest = find_guest(listener[0])
        holds = None if far_end is None else _holds(*listener, far_end)
        if guest is not None and guest.process.start_ticks == listener[1] and holds is not False:
            return GuestIdentity.of(guest.process)
    if far_end is not None:
        for guest in find_guests():
            if _holds(guest.pid, guest.process.start_ticks, far_end):
                return GuestIdentity.of(guest.process)
    return GuestIdentity(*listener) if listener is not None else GuestIdentity()


def _listener(sock: socket.socket) -> tuple[int, int] | None:
    """Process id and start time of who called listen(), if it lives and is visible."""
    pid = peer_pid(sock)
    process = Process.read(pid) if pid is not None else None
    if process is None:
        return None
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError:
        # Without it the number alone is known, as before Linux 6.5; a process that is gone has
        # none either, and then its number may be another's.
        return None if _has_peerpidfd() else (process.pid, process.start_ticks)
    handle = struct.unpack("i", raw)[0]
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        # it lives now, after its start time was read: so that was its own
        return None if poll.poll(0) else (process.pid, process.start_ticks)
    finally:
        os.close(handle)


def _has_peerpidfd() -> bool:
    one, other = socket.socketpair()
    with one, other:
        try:
            os.close(struct.unpack("i", one.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0])
        except OSError:
            return False
    return True


def _far_end(sock: socket.socket) -> int | None:
    """The inode of the socket at the other end, where the kernel shows it."""
    if sock.family != socket.AF_UNIX:
        return tcp_peer_inode(sock)
    known = (unix_sockets() or {}).get(os.fstat(sock.fileno()).st_ino)
    return known.peer or None if known is not None else None


def _holds(pid: int, start_ticks: int, inode: int) -> bool | None:
    """The process holds this socket open; None when we may not look."""
    process = Process.read(pid)
    if process is None or process.start_ticks != start_ticks:
        return False
    inodes = socket_inodes(pid)
    if inodes is None:
        return None
    return inode in inodes.values() and process.is_alive()


def _named(pid: int, start_ticks: int) -> str:
    process = Process.read(pid)
    if process is None or process.start_ticks != start_ticks:
        return f"a process that has ended (pid {pid})"
    guest = find_guest(pid)
    if guest is None:
        name = os.path.basename(process.exe or (process.argv or ("a process",))[0])
        return f"{name} (pid {pid})"
    return f"QEMU {quoted(guest.name)} (pid {pid})" if guest.name else f"QEMU (pid {pid})"


# -- the guest's other monitors ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Companions:
    """`ping`, `operations` and `guard` (kept free for a resume guard, when that was asked for):
    targets for a connection of their own, None when there is none; `without` says, in words for
    the user, what then does not work."""

    guest: Guest | None
    ping: SocketTarget | None
    operations: Address | None
    without: tuple[str, ...]
    guard: SocketTarget | None = None


def find_owner(target: Address, identity: GuestIdentity | None) -> Guest | None:
    """The QEMU on this host behind a connection that has this identity; None when not visible.

    Without an identity, before anything is connected, the one that holds the listening socket, or,
    where that cannot be seen, on whose command line `target` is: who answers may be another.
    """
    if identity is not None:
        if identity.pid is None or not identity.is_qemu:
            return None
        guest = find_guest(identity.pid)
        same = guest is not None and guest.process.start_ticks == identity.start_ticks
        return guest if same else None
    if isinstance(target, PidTarget):
        return find_guest(target.pid)
    if isinstance(target, LibvirtTarget):
        domains = [g for g in find_guests() if is_domain(g, target)]
        return domains[0] if len(domains) == 1 else None
    holders = listening_pids(target)
    found = map(find_guest, holders) if holders else iter(find_guests())
    for guest in found:
        if guest is not None and any(
            m.target is not None and same_socket(m.target, target) for m in guest.monitors
        ):
            return guest
    return None


def is_domain(guest: Guest, target: LibvirtTarget) -> bool:
    """The guest looks like this domain, which is named by name or UUID."""
    named = target.domain in (guest.name, guest.uuid)
    return named and any(
        o.manager is Manager.LIBVIRT and (None in (target.uri, o.uri) or o.has_driver(target.uri))
        for o in guest.owners
    )


def companions_of(
    guest: Guest | None,
    used: Sequence[Address],
    *,
    ping: SocketTarget | None = None,
    operations: Address | None = None,
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
            "QEMU's process is not visible here, so its other monitors are unknown: name them "
            "with --ping-monitor and --ops-monitor"
        )
    return Companions(guest, ping, operations, tuple(without), guard)
