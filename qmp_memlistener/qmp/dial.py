"""The first step of a connection: find the socket, connect it, and explain why there is no answer.

Ends where QMP begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..errors import DeadlineExceeded, MonitorBusy, TargetError, TargetUnreachable
from ..host.bounded import in_thread
from ..host.files import locate
from ..host.processes import Process
from .identity import GuestIdentity, identify_peer, peer_pid
from .sockets import listener_state, listening_pids, unix_sockets
from .targets import SocketTarget, Target, TcpTarget, UnixTarget

__all__ = ["Answered", "answered", "busy", "dial", "no_answer", "stopped"]

# How long a monitor may take to greet before the kernel is asked whether it serves another.
_PATIENCE = 0.4
# An answer that is longer than this, and not for us, is taken for no QMP.
_STALE_MAX = 1 << 20


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
        raise await in_thread(_why_backlog, target) from None
    except OSError as error:
        sock.close()
        raise _unreachable(target, error) from error
    return sock


def _connect_unix(sock: socket.socket, target: UnixTarget) -> None:
    if target.is_abstract:
        sock.connect("\0" + target.path[1:])
        return
    if len(os.fsencode(target.path)) < 108 and not target.path.startswith("/proc/"):
        sock.connect(target.path)
        return
    # sun_path holds 107 bytes; and a link in another root must not lead out of it.
    handle = locate(target.path, follow=True)
    try:
        sock.connect(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


async def _dial_tcp(target: TcpTarget) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        infos = await in_thread(
            socket.getaddrinfo, target.host, target.port, type=socket.SOCK_STREAM
        )
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


@dataclass(frozen=True, slots=True)
class Answered:
    """A connected socket on which the greeting has arrived, not yet read, and who sent it."""

    sock: socket.socket
    identity: GuestIdentity


async def answered(target: SocketTarget, meant: GuestIdentity | None, deadline: float) -> Answered:
    """Connect, wait for the greeting, see who sent it; nothing is sent.

    Answers to the client before us are dropped: QEMU sends the answer to a command that it was
    still executing when its client left to the next one (measured on 7.2, 10.0 and 11.1: in up to
    1 of 130 connections right after another, before the greeting or after it).

    Raises WrongGuest when that is not the guest `meant`, TargetUnreachable, MonitorBusy,
    DeadlineExceeded, TargetLost.
    """
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(deadline) as limit:
            sock = await dial(target)
            async with explain_silence(target, sock, limit):
                await _readable(sock)
                while _drop_stale_answer(sock):
                    await _readable(sock)
            return Answered(sock, await identify_peer(sock, target, meant))
    except TimeoutError:
        error = no_answer(target, deadline, connected=sock is not None)
        if sock is not None:
            sock.close()
        raise error from None
    except BaseException:
        if sock is not None:
            sock.close()
        raise


async def _readable(sock: socket.socket) -> None:
    """Until there is something to read, or the other end has hung up; nothing is taken."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def _drop_stale_answer(sock: socket.socket) -> bool:
    """Take one complete line from the socket if it is an answer to a command."""
    try:
        line, ended, _ = sock.recv(_STALE_MAX, socket.MSG_PEEK).partition(b"\n")
        if not ended or not line.startswith((b'{"return"', b'{"error"')):
            return False
        sock.recv(len(line) + 1)
    except OSError:
        return False  # the session says what is wrong
    return True


@asynccontextmanager
async def explain_silence(
    target: SocketTarget, sock: socket.socket, limit: asyncio.Timeout
) -> AsyncIterator[None]:
    """Turn "no greeting yet" into an error with the reason, as soon as the kernel shows it.

    Raises MonitorBusy when another client is served, our connection waiting behind it, and
    DeadlineExceeded when QEMU is stopped or, at the end of `limit`, when it hangs.
    """
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    assert task is not None
    deadline = (limit.when() or loop.time()) - loop.time()
    reason: TargetError | None = None
    in_the_end: TargetError | None = None

    def look() -> None:
        nonlocal reason, in_the_end
        reason, in_the_end = _reasons(target, sock, deadline)
        if reason is not None:
            task.cancel()

    timer = loop.call_later(min(_PATIENCE, deadline / 2), look)
    try:
        yield
    except asyncio.CancelledError:
        if reason is not None and not task.uncancel():
            raise reason from None
        if in_the_end is not None and limit.expired():
            raise in_the_end from None
        raise
    finally:
        timer.cancel()


def no_answer(target: SocketTarget, deadline: float, *, connected: bool) -> TargetError:
    """What to say when the deadline passed and the kernel shows no reason: of a peer on another
    host nothing is known, and being busy is by far the likeliest reason there.
    """
    if not connected:
        return TargetUnreachable(
            f"{target} did not accept a connection within {deadline:g} s",
            remedy="is the host up, and does a firewall let you through?",
        )
    return MonitorBusy(
        f"{target} did not greet within {deadline:g} s: it serves another client, or hangs",
        remedy="disconnect the other client, or give QEMU another -qmp monitor and name that",
    )


def _reasons(
    target: SocketTarget, sock: socket.socket, deadline: float
) -> tuple[TargetError | None, TargetError | None]:
    """Why there is no greeting, as far as the kernel shows it: what is so, and what is so if it
    does not change until the deadline, since QEMU may just be slow."""
    pid = peer_pid(sock)
    halted = stopped(target, listening_pids(target, pid))
    if halted is not None:
        return halted, None
    state = listener_state(target, pid=pid)
    if state is None or not state.listening:
        return None, None
    if _is_accepted(sock) or not state.waiting:
        return None, DeadlineExceeded(
            f"{target} accepted the connection but did not greet within {deadline:.2g} s",
            remedy="QEMU hangs, or this is no QMP monitor",
        )
    if state.accepted:
        return busy(target), None
    return None, _hangs(target)


def _why_backlog(target: UnixTarget) -> TargetError:
    """Why no more connections fit: another client is served, or none is any more."""
    halted = stopped(target, listening_pids(target))
    if halted is not None:
        return halted
    state = listener_state(target)
    return _hangs(target) if state is not None and not state.accepted else busy(target)


def stopped(target: Target, pids: Sequence[int]) -> DeadlineExceeded | None:
    """The error when one of these processes is stopped."""
    for pid in pids:
        process = Process.read(pid)
        if process is not None and process.is_stopped():
            return DeadlineExceeded(
                f"QEMU behind {target} (pid {pid}) hangs: the process is stopped, by a signal or a "
                "debugger, and no client is served",
                remedy=f"resume it: kill -CONT {pid}",
            )
    return None


def _is_accepted(sock: socket.socket) -> bool:
    """Our connection has left the backlog; False as well when the kernel does not show it."""
    known = (unix_sockets() or {}).get(os.fstat(sock.fileno()).st_ino)
    return known is not None and bool(known.peer)


def _hangs(target: Target) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"QEMU behind {target} hangs: it serves no client and accepts no connection",
        remedy="its main loop is blocked, or the process is stopped; examine the process",
    )


def busy(target: Target) -> MonitorBusy:
    """The error for a monitor that serves another client."""
    return MonitorBusy(
        f"{target} serves another client; a QMP monitor serves one at a time",
        remedy="disconnect the other client, or give QEMU another -qmp monitor and name that",
    )


def _unreachable(target: SocketTarget, error: OSError) -> TargetUnreachable:
    if isinstance(target, UnixTarget) and error.errno == errno.ECONNREFUSED:
        with contextlib.suppress(OSError):
            mode = os.stat(target.path).st_mode  # the connection has just walked this path
            if not stat.S_ISSOCK(mode):
                what = "a directory" if stat.S_ISDIR(mode) else "a file"
                return TargetUnreachable(
                    f"cannot connect to {target}: it is {what}, not a socket",
                    remedy="name a QMP socket; `qmp-memlistener list` shows those of this host",
                )
    number = error.errno or 0  # negative of getaddrinfo's own; asyncio's words hold a Python tuple
    remedies = {
        errno.ENOENT: "no such socket; `qmp-memlistener list` shows the monitors on this host",
        errno.ECONNREFUSED: "no process listens there any more; is QEMU still running?",
        errno.EACCES: "your user may not connect; use the user that runs QEMU, or root",
        errno.EPERM: "your user may not connect; use the user that runs QEMU, or root",
    }
    why = os.strerror(number) if number > 0 else error.strerror or error
    return TargetUnreachable(
        f"cannot connect to {target}: {why}",
        remedy=remedies.get(number),
    )
