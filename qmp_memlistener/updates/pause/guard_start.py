"""Starting a resume guard: which monitors it may take, its connection to one, its process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import (
    DeadlineExceeded,
    MonitorBusy,
    OperationFailed,
    ProtocolViolation,
    TargetError,
    TargetLost,
    WrongGuest,
)
from ...host.bounded import in_thread
from ...qmp import (
    Address,
    Companions,
    SocketTarget,
    TcpTarget,
    UnixTarget,
    find_guest,
    parse_target,
)
from ...qmp.allowed import names
from ...qmp.dial import answered
from ...qmp.identity import ASKED, GuestIdentity
from ...qmp.resolving import resolve
from ..model import UpdateRefused
from .guard_notes import NoteForm

__all__ = ["greeted", "guard_targets", "no_monitor", "spawned"]

_COMMANDS = ("qmp_capabilities", "query-cpus-fast", "query-migrate", "query-status", "stop", "cont")
_REMEDY = "start QEMU with another -qmp unix:PATH,server=on,wait=off; the guard needs it for itself"


async def guard_targets(
    companions: Companions, used: Address, named: str | None
) -> list[SocketTarget]:
    """The one that was named, else those that are free now, best first.

    Raises UpdateRefused when there is none: without a guard nothing is paused.
    """
    if named is not None:
        addresses, _ = await resolve(parse_target(named))
        sockets = [a for a in addresses if isinstance(a, UnixTarget | TcpTarget)]
        if not sockets:
            raise UpdateRefused(
                f"{named} is no socket of QEMU's own, which the guard needs; nothing was touched",
                remedy=_REMEDY,
            )
        return sockets
    known = companions.guest
    guest = await in_thread(find_guest, known.process.pid) if known is not None else None
    free = [t for t in guest.free_targets() if t != used] if guest is not None else []
    if companions.guard is not None:
        free = [companions.guard, *(t for t in free if t != companions.guard)]
    if not free:
        where = (
            "QEMU's process is not visible here"
            if guest is None
            else "all of the guest's monitors are in use"
        )
        raise UpdateRefused(
            f"there is no monitor for the guard that resumes the guest if we cannot ({where}); "
            "nothing was touched",
            remedy="start QEMU with another -qmp unix:PATH,server=on,wait=off, or name one with "
            "--guard-monitor",
        )
    return free


def spawned(
    control: socket.socket,
    monitor: socket.socket,
    identity: GuestIdentity,
    note: NoteForm,
    max_pause_s: float,
) -> subprocess.Popen[bytes]:
    """The guard's process; `control` and `monitor` are its own from now on.

    Raises OperationFailed when it cannot be started.
    """
    settings = {
        "control": control.fileno(),
        "monitor": monitor.fileno(),
        "agent": os.getpid(),
        "commands": names(*_COMMANDS, *ASKED),
        "questions": [*(identity.answers or ())],
        "max_pause_ns": int(max_pause_s * 1e9),
        "note_path": note.path,
        "note_file": -1 if note.held is None else note.held.fileno(),
        "note": note.content,
    }
    handed = [settings["control"], settings["monitor"], settings["note_file"]]
    script = Path(__file__).with_name("guard_process.py")
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            pass_fds=[int(str(number)) for number in handed if number != -1],
            # Ctrl-C and the end of our terminal are not for it.
            start_new_session=True,
        )
    except OSError as error:
        raise OperationFailed(
            f"the resume guard cannot be started: {error}; nothing was touched",
            remedy="it needs a Python interpreter: is sys.executable one, may we start a process?",
        ) from error


async def greeted(
    target: SocketTarget, meant: GuestIdentity | None, deadline: float
) -> tuple[socket.socket, GuestIdentity]:
    """A connected socket whose QEMU has sent its greeting, and who it is.  Raises as
    `Monitor.connect` does."""
    loop = asyncio.get_running_loop()
    until = loop.time() + deadline
    found = await answered(target, meant, deadline)
    greeting = b""
    try:
        async with asyncio.timeout_at(until):
            while b"\n" not in greeting and len(greeting) < 1 << 16:
                data = await loop.sock_recv(found.sock, 4096)
                if not data:
                    raise TargetLost(f"{target} hung up before it greeted")
                greeting += data
        if not greeting.startswith(b'{"QMP"'):
            raise ProtocolViolation(
                f"{target} does not speak QMP",
                remedy="is this a QMP monitor (-qmp, or -mon mode=control)?",
            )
    except TimeoutError:
        found.sock.close()
        raise DeadlineExceeded(
            f"{target} did not greet within {deadline:g} s", remedy="QEMU hangs; try again"
        ) from None
    except OSError as cause:
        found.sock.close()
        raise TargetLost(f"the connection to {target} broke: {cause}") from cause
    except BaseException:
        found.sock.close()
        raise
    return found.sock, found.identity


def no_monitor(failures: Sequence[TargetError]) -> UpdateRefused | TargetError:
    """What to raise when none of the monitors could be taken, and why each could not."""
    for failure in failures:
        if isinstance(failure, WrongGuest):  # whatever is wrong with that guest's other monitors
            return failure
    if failures and not any(isinstance(e, MonitorBusy | DeadlineExceeded) for e in failures):
        return failures[0]
    why = "; ".join(e.message for e in failures) or "no other monitor of this QEMU is known"
    return UpdateRefused(
        "the guest cannot be paused safely: there is no free monitor for the resume guard "
        f"({why}); nothing was touched",
        remedy=_REMEDY,
    )
