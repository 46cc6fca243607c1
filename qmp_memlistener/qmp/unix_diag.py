"""UNIX sockets as the kernel knows them by inode: what they are bound to, and who is connected.

sock_diag(7) tells what /proc/net/unix does not: the file-system inode that a listener is bound to
(so that a path can be checked to lead to that very listener), and the socket at the other end of a
connection.  Needs no privilege; knows the sockets of our own network namespace only.

Layout: include/uapi/linux/{netlink,sock_diag,unix_diag}.h.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..host.files import stat_foreign

__all__ = ["UnixSocket", "unix_sockets"]

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_AND_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_SHOW_VFS, _SHOW_PEER = 0x2, 0x4
_DIAG_VFS, _DIAG_PEER = 1, 2
_TCP_LISTEN = 10
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=BBBxI8x")
_ATTRIBUTE = struct.Struct("=HH")
_PAIR = struct.Struct("=II")
_WORD = struct.Struct("=I")


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
    wait to be accepted) left out.  None when the kernel does not tell."""
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
    """Add what one datagram tells; False after the last.  Raises OSError."""
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
