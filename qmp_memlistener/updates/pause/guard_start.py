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
    TargetUnreachable,
    WrongGuest,
)
from ...host.bounded import in_thread
from ...host.processes import Process
from ...qmp import (
    Address,
    Companions,
    LibvirtTarget,
    PidTarget,
    TcpTarget,
    UnixTarget,
    find_guest,
    parse_target,
)
from ...qmp.allowed import names
from ...qmp.dial import Answered, answered
from ...qmp.identity import ASKED, GuestIdentity, is_domain
from ...qmp.libvirt_bridge import bridged
from ...qmp.resolving import resolve
from ..model import UpdateRefused
from .guard_notes import NoteForm

__all__ = ["greeted", "guard_targets", "no_monitor", "spawned"]

_BRIDGE_S = 10.0
"""A bridge is an interpreter that starts, and a connection to libvirt."""
_COMMANDS = ("qmp_capabilities", "query-cpus-fast", "query-migrate", "query-status", "stop", "cont")
_REMEDY = "start QEMU with another -qmp unix:PATH,server=on,wait=off; the guard needs it for itself"


async def guard_targets(
    companions: Companions, used: Address, named: str | None, *, managed: bool = False
) -> Sequence[Address]:
    """The one that was named, else those that are free now, best first; of a guest that is
    `managed`, the way that is `used`: its manager makes another connection.

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
    if managed:
        return [used]
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
    target: Address, meant: GuestIdentity | None, deadline: float
) -> tuple[socket.socket, GuestIdentity]:
    """A connected socket whose QEMU has sent its greeting, and who it is.  Raises as
    `Monitor.connect` does."""
    loop = asyncio.get_running_loop()
    if isinstance(target, LibvirtTarget):
        deadline = max(deadline, _BRIDGE_S)
    until = loop.time() + deadline
    if isinstance(target, LibvirtTarget):
        found = await _bridge(target, meant)
    elif isinstance(target, PidTarget):
        raise TargetUnreachable(f"{target} has no monitor for a guard")
    else:
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
        if isinstance(target, LibvirtTarget):
            await in_thread(check_domain, target, found.identity, greeting)
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


async def _bridge(target: LibvirtTarget, meant: GuestIdentity | None) -> Answered:
    """What answers is compared when it has greeted."""
    process = Process.read(meant.pid) if meant is not None and meant.pid is not None else None
    if meant is None or process is None or GuestIdentity.of(process) != meant:
        raise TargetUnreachable(f"{target} is no QEMU that is visible here")
    sock = bridged(target, process)
    sock.setblocking(False)
    return Answered(sock, meant)


def check_domain(target: LibvirtTarget, meant: GuestIdentity, greeting: bytes) -> None:
    """Behind a bridge that has greeted is the guest that is meant.  Raises WrongGuest."""
    domain = json.loads(greeting.partition(b"\n")[0])["domain"]
    guest = find_guest(meant.pid or 0)
    named = LibvirtTarget(str(domain["uuid"]), str(domain["uri"]))
    if guest is None or GuestIdentity.of(guest.process) != meant or not is_domain(guest, named):
        raise WrongGuest(f"{target} is domain {named.domain} now, and {meant} is meant")


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
