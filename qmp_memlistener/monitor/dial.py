"""The first step of a connection: find the socket, connect it, and explain why nobody answers.

Ends where QMP begins.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..errors import DeadlineExceeded, MonitorBusy, TargetError, TargetUnreachable
from .discovery import find_guest
from .sockets import MonitorState, listener_state
from .targets import (
    PidTarget,
    SocketTarget,
    Target,
    TcpTarget,
    UnixTarget,
)

__all__ = ["dial", "explain_silence", "no_answer", "peer_pid", "resolve"]

# How long a monitor may take to greet before the kernel is asked whether it serves another.
_PATIENCE = 0.4


async def resolve(target: Target) -> SocketTarget:
    """The socket that `target` stands for; for `pid:N` a free QMP monitor of that QEMU.

    Raises TargetUnreachable or MonitorBusy.
    """
    if not isinstance(target, PidTarget):
        return target
    guest = await asyncio.to_thread(find_guest, target.pid)
    if guest is None:
        raise TargetUnreachable(
            f"{target} is no running QEMU", remedy="`qmp-memlistener list` shows those on this host"
        )
    free = guest.free_targets()
    if free:
        return free[0]
    states = {m.state for m in guest.qmp_monitors}
    if MonitorState.BUSY in states:
        raise _busy(target)
    why = "no QMP monitor" if not states else "no QMP monitor that can be reached"
    raise TargetUnreachable(
        f"{target} has {why}", remedy="start QEMU with -qmp unix:PATH,server=on,wait=off"
    )


async def dial(target: SocketTarget) -> socket.socket:
    """A connected, non-blocking socket.  Raises TargetUnreachable or MonitorBusy.

    Waits as long as the network does: give it a deadline.
    """
    if isinstance(target, TcpTarget):
        return await _dial_tcp(target)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        _connect_unix(sock, target)
    except BlockingIOError:
        # unix(7): a full backlog.  Waiting for writability, as asyncio would, reports success.
        sock.close()
        raise _busy(target) from None
    except OSError as error:
        sock.close()
        raise _unreachable(target, error) from error
    return sock


def _connect_unix(sock: socket.socket, target: UnixTarget) -> None:
    if target.is_abstract:
        sock.connect("\0" + target.path[1:])
        return
    if len(os.fsencode(target.path)) < 108:
        sock.connect(target.path)
        return
    # sun_path holds 107 bytes; a longer path is reached through its directory.
    directory, name = os.path.split(target.path)
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{handle}/{name}")
    finally:
        os.close(handle)


async def _dial_tcp(target: TcpTarget) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _unreachable(target, error) from error
    last: OSError = OSError(errno.EADDRNOTAVAIL, "no address")
    for family, kind, protocol, _, address in infos:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    raise _unreachable(target, last) from last


def peer_pid(sock: socket.socket) -> int | None:
    """The process that listens at the other end (SO_PEERCRED), None for TCP or when it is not
    visible here.  With a socket that libvirt opened for QEMU this is libvirt's id."""
    if sock.family != socket.AF_UNIX:
        return None
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    return pid if pid > 0 else None


@asynccontextmanager
async def explain_silence(target: SocketTarget, deadline: float) -> AsyncIterator[None]:
    """Turn "no greeting yet" into MonitorBusy as soon as the kernel shows the reason.

    Our own connection waits in the backlog while QEMU serves another client.
    """
    task = asyncio.current_task()
    assert task is not None
    busy = False

    def look() -> None:
        nonlocal busy
        state = listener_state(target)
        if state is not None and state.listening and state.accepted and state.waiting:
            busy = True
            task.cancel()

    timer = asyncio.get_running_loop().call_later(min(_PATIENCE, deadline / 2), look)
    try:
        yield
    except asyncio.CancelledError:
        if busy and not task.uncancel():
            raise _busy(target) from None
        raise
    finally:
        timer.cancel()


def no_answer(target: SocketTarget, deadline: float, *, connected: bool) -> TargetError:
    """What to say when the deadline passed before the peer greeted.

    The kernel shows whether another client is served; for a peer on another host it does not,
    and being busy is by far the likeliest reason.
    """
    if not connected:
        return TargetUnreachable(
            f"{target} did not accept a connection within {deadline:g} s",
            remedy="is the host up, and does a firewall let you through?",
        )
    state = listener_state(target)
    if state is not None and state.listening and not state.accepted:
        return DeadlineExceeded(
            f"{target} listens but did not greet within {deadline:g} s",
            remedy="QEMU hangs or is stopped; look at the process",
        )
    if state is not None and state.listening and not state.waiting:
        return DeadlineExceeded(
            f"{target} accepted the connection but did not greet within {deadline:g} s",
            remedy="QEMU hangs, or this is no QMP monitor",
        )
    return MonitorBusy(
        f"{target} did not greet within {deadline:g} s: it serves another client, or hangs",
        remedy="disconnect the other client, or give QEMU another -qmp monitor and name that",
    )


def _busy(target: Target) -> MonitorBusy:
    return MonitorBusy(
        f"{target} serves another client; a QMP monitor serves one at a time",
        remedy="disconnect the other client, or give QEMU another -qmp monitor and name that",
    )


def _unreachable(target: SocketTarget, error: OSError) -> TargetUnreachable:
    remedies = {
        errno.ENOENT: "no such socket; `qmp-memlistener list` shows the monitors on this host",
        errno.ECONNREFUSED: "nobody listens there any more; is QEMU still running?",
        errno.EACCES: "your user may not connect; use the user that runs QEMU, or root",
        errno.EPERM: "your user may not connect; use the user that runs QEMU, or root",
    }
    return TargetUnreachable(
        f"cannot connect to {target}: {error.strerror or error}",
        remedy=remedies.get(error.errno or 0),
    )
