"""Is a monitor's socket free or busy?  Read from the kernel's tables, without connecting.

A QMP monitor serves one client, and connecting takes the place; so looking must not connect.
/proc/PID/net/unix and /proc/PID/net/tcp (the tables of QEMU's own network namespace, readable
by everybody) list the listening socket and every connection that QEMU accepted on it:

- an accepted UNIX socket carries the address of its listener (`unix_stream_connect`,
  net/unix/af_unix.c) and an inode number; one that still waits in the backlog
  has no socket yet, and so inode 0;
- TCP connections are established entries with the listener's local port.

sock_diag(7) gives what /proc/net/unix does not: the file-system inode that a listener is bound to
(so that a path can be checked to lead to that very listener), and the socket at the other end of a
connection: a QEMU that hangs does not close the connection of a client that has gone.  It needs no
privilege and shows the sockets of our own network namespace only.  Layout:
include/uapi/linux/{netlink,sock_diag,unix_diag}.h.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..host.files import stat_foreign
from ..host.processes import process_ids, socket_inodes
from .targets import SocketTarget, TcpTarget, UnixTarget

__all__ = [
    "ListenerState",
    "MonitorState",
    "UnixSocket",
    "address_of_inode",
    "listener_state",
    "listening_at",
    "listening_pids",
    "tcp_peer_inode",
    "unix_sockets",
]

_UNIX_LINE = re.compile(
    r"[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) ([0-9A-F]{4}) ([0-9A-F]{2})"
    r"\s+(\d+)(?: (.*))?"
)
_ACCEPTS_CONNECTIONS = 0x10000  # __SO_ACCEPTCON, include/uapi/linux/net.h
_UNIX_CONNECTED = 0x03  # SS_CONNECTED
_TCP_ESTABLISHED = 0x01
_TCP_LISTEN = 0x0A

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_AND_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_SHOW_VFS, _SHOW_PEER = 0x2, 0x4
_DIAG_VFS, _DIAG_PEER = 1, 2
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=BBBxI8x")
_ATTRIBUTE = struct.Struct("=HH")
_PAIR = struct.Struct("=II")
_WORD = struct.Struct("=I")


class MonitorState(StrEnum):
    """`free`: would serve us; `busy`: serves somebody; `unreachable`: it cannot be connected to."""

    FREE = "free"
    BUSY = "busy"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class ListenerState:
    """How many clients QEMU accepted that are still there (`accepted`), and how many wait in the
    backlog."""

    listening: bool
    accepted: int
    waiting: int

    @property
    def monitor_state(self) -> MonitorState:
        if self.accepted:
            return MonitorState.BUSY
        return MonitorState.FREE if self.listening else MonitorState.UNREACHABLE


def listener_state(
    target: SocketTarget, *, pid: int | None = None, inodes: Collection[int] | None = None
) -> ListenerState | None:
    """What the kernel says about the listener `target`; None when its table cannot be read.

    `target` is as the owner bound it (a relative path stays relative).  `pid` picks the network
    namespace; `inodes`, the owner's sockets, tells apart listeners that were bound to the same
    text in different directories.
    """
    base = f"/proc/{'self' if pid is None else pid}/net"
    try:
        if isinstance(target, UnixTarget):
            return _unix_state(target, base, inodes)
        return _tcp_state(target, base, inodes)
    except OSError:
        return None


def _unix_rows(base: str) -> list[tuple[int, int, int, str]]:
    """(flags, state, inode, path) of each UNIX stream socket that has an address."""
    with open(f"{base}/unix", errors="surrogateescape") as f:
        lines = f.read().splitlines()[1:]
    rows = []
    for line in lines:
        match = _UNIX_LINE.fullmatch(line)
        if match is not None and match[5] and int(match[2], 16) == socket.SOCK_STREAM:
            rows.append((int(match[1], 16), int(match[3], 16), int(match[4]), match[5]))
    return rows


def _unix_state(target: UnixTarget, base: str, inodes: Collection[int] | None) -> ListenerState:
    listening = False
    waiting = 0
    accepted = []
    for flags, state, inode, path in _unix_rows(base):
        if path != target.path:
            continue
        if inode and inodes is not None and inode not in inodes:
            continue
        if flags & _ACCEPTS_CONNECTIONS:
            listening = True
        elif state == _UNIX_CONNECTED and inode:
            accepted.append(inode)
        elif not inode:
            waiting += 1
    known = (unix_sockets() or {}) if accepted else {}
    served = [i for i in accepted if i not in known or known[i].peer != 0]
    return ListenerState(listening, len(served), waiting)


def address_of_inode(inode: int, pid: int) -> SocketTarget | None:
    """The address that a listening socket of this process is bound to."""
    base = f"/proc/{pid}/net"
    try:
        for flags, _, number, path in _unix_rows(base):
            if number == inode and flags & _ACCEPTS_CONNECTIONS:
                return UnixTarget(path)
        for host, port, state, number in _tcp_rows(base):
            if number == inode and state == _TCP_LISTEN:
                wildcard = {"0.0.0.0": "127.0.0.1", "::": "::1"}
                return TcpTarget(wildcard.get(host, host), port)
    except OSError:
        pass
    return None


def listening_at(target: UnixTarget, pid: int, inodes: Collection[int] | None) -> list[int]:
    """The inodes of the sockets that listen at this address as the process bound it; only those
    among `inodes` where these are given."""
    try:
        rows = _unix_rows(f"/proc/{pid}/net")
    except OSError:
        return []
    return [
        inode
        for flags, _, inode, path in rows
        if flags & _ACCEPTS_CONNECTIONS
        and path == target.path
        and (inodes is None or inode in inodes)
    ]


def listening_pids(target: SocketTarget, likely: int | None = None) -> list[int]:
    """Processes that hold the listening socket `target` open, as far as we may look.

    Unless it is the `likely` one, the descriptors of all processes are listed for that; none of
    their files is opened.
    """
    try:
        if isinstance(target, UnixTarget):
            inodes = _listeners_of(target)
        else:
            rows = _tcp_rows("/proc/self/net")
            inodes = {
                i for _, port, state, i in rows if (port, state) == (target.port, _TCP_LISTEN)
            }
    except OSError:
        return []
    if not inodes:
        return []
    if likely is not None and _holds(likely, inodes):
        return [likely]
    return [pid for pid in process_ids() if _holds(pid, inodes)]


def _holds(pid: int, inodes: set[int]) -> bool:
    owned = socket_inodes(pid)
    return owned is not None and not inodes.isdisjoint(owned.values())


def _listeners_of(target: UnixTarget) -> set[int]:
    """By the path, or, when it is called otherwise there, by the file that it leads to."""
    rows = [r for r in _unix_rows("/proc/self/net") if r[0] & _ACCEPTS_CONNECTIONS]
    known = unix_sockets() or {}
    if target.is_abstract or not known:
        return {inode for _, _, inode, path in rows if path == target.path}
    return {i for _, _, i, _ in rows if i in known and known[i].choose([target.path]) is not None}


def _tcp_state(target: TcpTarget, base: str, inodes: Collection[int] | None) -> ListenerState:
    wanted = _addresses(target)
    listening = False
    accepted = waiting = 0
    for host, port, state, inode in _tcp_rows(base):
        if port != target.port or (inode and inodes is not None and inode not in inodes):
            continue
        if state == _TCP_LISTEN and (host in wanted or host in ("0.0.0.0", "::")):
            listening = True
        elif state == _TCP_ESTABLISHED and host in wanted:
            accepted += bool(inode)
            waiting += not inode
    return ListenerState(listening, accepted, waiting)


def tcp_peer_inode(sock: socket.socket) -> int | None:
    """The socket at the other end of a TCP connection, when that is in our network namespace."""
    try:
        ours, theirs = _end(sock.getsockname()), _end(sock.getpeername())
        for table in ("tcp", "tcp6"):
            with open(f"/proc/self/net/{table}") as f:
                for fields in (line.split() for line in f.read().splitlines()[1:]):
                    local, remote = (a.split(":") for a in fields[1:3])
                    ends = [_end((_kernel_address(a), int(p, 16))) for a, p in (local, remote)]
                    if ends == [theirs, ours] and int(fields[9]):
                        return int(fields[9])
    except OSError:
        return None
    return None


def _end(address: tuple[object, ...]) -> tuple[str, int]:
    """An IPv4 client of a dual-stack listener shows up as a mapped address."""
    host, port = str(address[0]), int(str(address[1]))
    return host.removeprefix("::ffff:") if "." in host else host, port


def _tcp_rows(base: str) -> Iterator[tuple[str, int, int, int]]:
    """(local address, local port, state, inode) of each TCP socket."""
    for table in ("tcp", "tcp6"):
        try:
            with open(f"{base}/{table}") as f:
                lines = f.read().splitlines()[1:]
        except FileNotFoundError:
            continue  # IPv6 is switched off
        for line in lines:
            fields = line.split()
            address, port = fields[1].split(":")
            yield _kernel_address(address), int(port, 16), int(fields[3], 16), int(fields[9])


def _addresses(target: TcpTarget) -> set[str]:
    try:
        infos = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    found = {str(info[4][0]).partition("%")[0] for info in infos}
    # An IPv4 client of a dual-stack listener shows up as a mapped address.
    return found | {f"::ffff:{a}" for a in found if "." in a}


def _kernel_address(text: str) -> str:
    """An address of /proc/net/tcp: 32-bit words in host byte order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


# -- sock_diag ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """`bound_to` is (device, inode) of the socket's file, the inode cut to 32 bits as the kernel
    gives it, None for an abstract name.  `peer` is the inode of the socket at the other end: 0
    when that has not been accepted yet or is closed, None when nothing was ever connected."""

    inode: int
    listening: bool
    bound_to: tuple[int, int] | None
    peer: int | None

    def choose(self, paths: Sequence[str]) -> str | None:
        """The first path that leads to this socket's file, None when none does."""
        alike = None
        for path in paths:
            try:
                status = stat_foreign(path, follow=True)
            except (OSError, ValueError):
                continue
            if self.bound_to is None or not stat.S_ISSOCK(status.st_mode):
                continue
            if self.bound_to == (status.st_dev, status.st_ino & 0xFFFFFFFF):
                return path
            # btrfs and overlayfs show stat(2) another device than their superblock's
            if alike is None and self.bound_to[1] == status.st_ino & 0xFFFFFFFF:
                alike = path
        return alike


def unix_sockets() -> dict[int, UnixSocket] | None:
    """Every UNIX stream socket of our network namespace by inode, those without an inode (they
    wait to be accepted) left out.  None when the kernel does not show them."""
    request = struct.pack(
        "=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_VFS | _SHOW_PEER, ~0 & 0xFFFFFFFF,
        ~0 & 0xFFFFFFFF,
    )  # fmt: skip
    header = _HEADER.pack(
        _HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_AND_DUMP, 1, 0
    )
    found: dict[int, UnixSocket] = {}
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(1)
            netlink.send(header + request)
            while _take(netlink.recv(1 << 17), found):
                pass
    except OSError:
        return None
    return found


def _take(data: bytes, found: dict[int, UnixSocket]) -> bool:
    """Add what is in one datagram; False after the last.  Raises OSError."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if kind == _NLMSG_DONE:
            return False
        if kind == _NLMSG_ERROR or length < _HEADER.size:
            raise OSError("sock_diag is not available for UNIX sockets")
        body = data[at + _HEADER.size : at + length]
        _, sock_type, state, inode = _MESSAGE.unpack_from(body)
        if sock_type == socket.SOCK_STREAM and inode:
            attributes = _attributes(body[_MESSAGE.size :])
            vfs, peer = attributes.get(_DIAG_VFS), attributes.get(_DIAG_PEER)
            found[inode] = UnixSocket(
                inode,
                listening=state == _TCP_LISTEN,
                bound_to=_file(vfs) if vfs is not None else None,
                peer=_WORD.unpack(peer[:4])[0] if peer is not None else None,
            )
        at += (length + 3) & ~3
    return True


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _file(vfs: bytes) -> tuple[int, int]:
    inode, device = _PAIR.unpack(vfs[: _PAIR.size])
    # the kernel's own dev_t: 12 bits of major, 20 of minor
    return os.makedev(device >> 20, device & 0xFFFFF), inode
