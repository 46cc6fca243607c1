"""Is a monitor's socket free or busy?  Read from the kernel's tables, without connecting.

A QMP monitor serves one client, and connecting takes the place; so looking must not connect.
/proc/PID/net/unix and /proc/PID/net/tcp (the tables of QEMU's own network namespace, readable
by everybody) list the listening socket and every connection that QEMU accepted on it:

- an accepted UNIX socket carries the address of its listener (`unix_stream_connect`,
  net/unix/af_unix.c) and an inode number; one that still waits in the backlog
  has no socket yet, and so inode 0;
- TCP connections are established entries with the listener's local port.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from .targets import SocketTarget, TcpTarget, UnixTarget

__all__ = ["ListenerState", "MonitorState", "listener_state", "unix_path_of_inode"]

_UNIX_LINE = re.compile(
    r"[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) ([0-9A-F]{4}) ([0-9A-F]{2})"
    r"\s+(\d+)(?: (.*))?"
)
_ACCEPTS_CONNECTIONS = 0x10000  # __SO_ACCEPTCON, include/uapi/linux/net.h
_UNIX_CONNECTED = 0x03  # SS_CONNECTED
_TCP_ESTABLISHED = 0x01
_TCP_LISTEN = 0x0A


class MonitorState(StrEnum):
    """`free`: would serve us; `busy`: serves somebody; `unreachable`: nobody could connect."""

    FREE = "free"
    BUSY = "busy"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class ListenerState:
    """How many clients QEMU accepted (`accepted`) and how many wait in the backlog."""

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
    accepted = waiting = 0
    for flags, state, inode, path in _unix_rows(base):
        if path != target.path:
            continue
        if inode and inodes is not None and inode not in inodes:
            continue
        if flags & _ACCEPTS_CONNECTIONS:
            listening = True
        elif state == _UNIX_CONNECTED and inode:
            accepted += 1
        elif not inode:
            waiting += 1
    return ListenerState(listening, accepted, waiting)


def unix_path_of_inode(inode: int, pid: int) -> str | None:
    """The address a listening UNIX socket is bound to."""
    try:
        rows = _unix_rows(f"/proc/{pid}/net")
    except OSError:
        return None
    for flags, _, number, path in rows:
        if number == inode and flags & _ACCEPTS_CONNECTIONS:
            return path
    return None


def _tcp_state(target: TcpTarget, base: str, inodes: Collection[int] | None) -> ListenerState:
    wanted = _addresses(target)
    listening = False
    accepted = waiting = 0
    for table in ("tcp", "tcp6"):
        try:
            with open(f"{base}/{table}") as f:
                lines = f.read().splitlines()[1:]
        except FileNotFoundError:
            continue  # IPv6 is switched off
        for line in lines:
            fields = line.split()
            address, port = fields[1].split(":")
            if int(port, 16) != target.port:
                continue
            state, inode = int(fields[3], 16), int(fields[9])
            host = _kernel_address(address)
            if inode and inodes is not None and inode not in inodes:
                continue
            if state == _TCP_LISTEN and (host in wanted or host in ("0.0.0.0", "::")):
                listening = True
            elif state == _TCP_ESTABLISHED and host in wanted:
                accepted += bool(inode)
                waiting += not inode
    return ListenerState(listening, accepted, waiting)


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
