"""Running QEMUs on this host, their monitors, and which of these are free.

Everything comes from /proc, from the binary's own text and from the files that -readconfig names:
no monitor is connected to, no guest's binary is executed, nothing is disturbed.  A QEMU that runs
as another user is seen by its command line; what only its owner or root may read is then None.

Where a monitor's socket is for *us* is found by the socket, not by its name: the name was bound in
a directory, a root (-chroot) and a mount namespace that QEMU may have left since, and another
process may have bound it again.  A path counts when it leads to the inode that QEMU listens on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

from ..host import bounded
from ..host.files import may_write, open_foreign, pieces, stat_foreign
from ..host.processes import (
    Process,
    Sketch,
    paths_seen_by,
    process_ids,
    socket_inodes,
)
from ..waits import waiting
from .cmdline import (
    CommandLine,
    MonitorMode,
    MonitorSpec,
    is_qemu_name,
    parse_arguments,
)
from .emulator import emulator_of
from .owners import Owner, owners_of
from .sockets import (
    MonitorState,
    UnixSocket,
    address_of_inode,
    listener_state,
    listening_at,
    unix_sockets,
)
from .targets import SocketTarget, TcpTarget, UnixTarget

__all__ = ["Guest", "GuestMonitor", "find_guest", "find_guests"]

_CONFIG_LONGEST = 1 << 20
_CLOCK_SLACK_S = 2.0
_SOFT_S, _HARD_S = 0.1, 3.0
"""How long a process may take before the others go on without waiting, and in all."""
_ASKED_FOR_S = 10.0
_NO_PERMISSION = "no permission"


@dataclass(frozen=True, slots=True)
class GuestMonitor:
    """One monitor of a guest.

    `target` is how *we* reach it; None when it cannot be connected to.  `text` is QEMU's own name
    for it, for people; `why` says what keeps us from it, "" when that is its nature or nothing
    does.
    """

    mode: MonitorMode
    text: str
    target: SocketTarget | None
    state: MonitorState
    why: str = ""

    @property
    def label(self) -> str:
        return self.text if self.target is None else str(self.target)


@dataclass(frozen=True, slots=True)
class Guest:
    """A running QEMU system emulator.

    `accel` None: not known.  `visible`: we may look into the process, so that what is not found
    there is not there.  `trouble` says why next to nothing is known.  `owners`: who manages the
    guest, the nearest first; empty when nobody is seen to.
    """

    process: Process
    command_line: CommandLine
    name: str | None
    version: str | None
    machine: str | None
    accel: str | None
    monitors: tuple[GuestMonitor, ...]
    visible: bool = True
    trouble: str = ""
    owners: tuple[Owner, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """For people: what may be missing here, and why."""
        if self.trouble:
            return (self.trouble,)
        hidden = "no permission to examine the process: monitors may be missing here"
        return (*self.command_line.notes, *(() if self.visible else (hidden,)))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def uuid(self) -> str | None:
        """The UUID on its command line."""
        return next((v for o, v in pairwise(self.process.argv) if o in ("-uuid", "--uuid")), None)

    @property
    def qmp_monitors(self) -> tuple[GuestMonitor, ...]:
        """Those that speak QMP; human monitors are left out."""
        return tuple(m for m in self.monitors if m.mode is MonitorMode.CONTROL)

    def free_targets(self) -> tuple[SocketTarget, ...]:
        """QMP monitors that would serve us now."""
        return tuple(
            m.target
            for m in self.qmp_monitors
            if m.target is not None and m.state is MonitorState.FREE
        )


def find_guests() -> list[Guest]:
    """Every QEMU system emulator that runs on this host, by pid.

    A process that cannot be looked into in time costs the others nothing: if its name is a QEMU's
    it is there with what is known, and says so.
    """
    with waiting("for processes of this host to be examined"):
        diag = unix_sockets()
        looked = bounded.each(
            lambda pid: _find(pid, diag, asked_for=False), process_ids(), soft=_SOFT_S, hard=_HARD_S
        )
    found = ((_sketched(pid, got) if isinstance(got, Exception) else got) for pid, got in looked)
    return [g for g in found if g is not None]


def find_guest(pid: int) -> Guest | None:
    """The QEMU with this process id; None when there is no such process or it is no QEMU."""
    try:
        return bounded.call(lambda: _find(pid, unix_sockets(), asked_for=True), _ASKED_FOR_S)
    except Exception as error:
        return _sketched(pid, error)


def _sketched(pid: int, error: Exception) -> Guest | None:
    """What is known of a process that could not be read; None when it does not look like a QEMU.

    It may be hostile: whatever went wrong there is no reason to give up on the others.
    """
    sketch = Sketch.read(pid)
    if sketch is None or not is_qemu_name(sketch.name):
        return None
    why = "in time" if isinstance(error, TimeoutError) else f"({type(error).__name__}: {error})"
    return Guest(
        process=Process(
            pid, sketch.start_ticks, (sketch.name,), None, sketch.uid, sketch.gid, frozenset()
        ),
        command_line=parse_arguments(sketch.name, (), lambda _: None),
        name=None,
        version=None,
        machine=None,
        accel=None,
        monitors=(),
        visible=False,
        trouble=f"the process could not be examined {why}: nothing more is known",
    )


def _find(pid: int, diag: dict[int, UnixSocket] | None, *, asked_for: bool) -> Guest | None:
    process = Process.read(pid)
    found = emulator_of(process, asked_for=asked_for) if process is not None else None
    if process is None or found is None:
        return None
    at, version = found
    argv = process.argv
    command_line = parse_arguments(
        argv[at], argv[at + 1 :], lambda path: _config_text(process, path)
    )
    inodes = socket_inodes(pid)
    sockets = _Sockets(process, inodes, diag or {})
    return Guest(
        process=process,
        command_line=command_line,
        name=command_line.name,
        version=version,
        machine=command_line.machine,
        accel=_accel(process, command_line),
        monitors=tuple(_monitor(spec, sockets) for spec in command_line.monitors),
        visible=inodes is not None,
        owners=owners_of(process),
    )


@dataclass(frozen=True, slots=True)
class _Sockets:
    """The sockets of one process: by descriptor (None when we may not look), and what the kernel
    tells of each inode."""

    process: Process
    by_fd: dict[int, int] | None
    diag: dict[int, UnixSocket]

    @property
    def owned(self) -> frozenset[int] | None:
        return None if self.by_fd is None else frozenset(self.by_fd.values())


def _monitor(spec: MonitorSpec, sockets: _Sockets) -> GuestMonitor:
    process = sockets.process
    bound = spec.address
    if spec.fd is not None:
        if sockets.by_fd is None:
            return _unreachable(spec, _NO_PERMISSION)
        inode = sockets.by_fd.get(spec.fd)
        bound = address_of_inode(inode, process.pid) if inode is not None else None
    if bound is None:
        return _unreachable(spec, "")
    if isinstance(bound, TcpTarget) or bound.is_abstract:
        if not process.shares_network():
            return _unreachable(spec, "it listens in another network namespace")
        target: SocketTarget = bound
    else:
        path, why = _socket_path(bound, sockets)
        if path is None:
            return _unreachable(spec, why)
        target = UnixTarget(path)
        # connect(2) on a path needs write permission on the socket file (unix(7)).
        if not may_write(path, follow=True):
            return GuestMonitor(
                spec.mode,
                spec.text,
                target,
                MonitorState.UNREACHABLE,
                _trouble(path) or _NO_PERMISSION,
            )
    state = listener_state(bound, pid=process.pid, inodes=sockets.owned)
    # Without the kernel's table a socket that is there counts as free: connecting to find out
    # would take its place.
    known = MonitorState.FREE if state is None else state.monitor_state
    why = "no process listens there" if known is MonitorState.UNREACHABLE else ""
    return GuestMonitor(spec.mode, spec.text, target, known, why)


def _unreachable(spec: MonitorSpec, why: str) -> GuestMonitor:
    return GuestMonitor(spec.mode, spec.text, None, MonitorState.UNREACHABLE, why)


def _socket_path(bound: UnixTarget, sockets: _Sockets) -> tuple[str | None, str]:
    """How we reach what the process bound, and why we do not."""
    process = sockets.process
    paths = paths_seen_by(process, bound.path)
    listeners = listening_at(bound, process.pid, sockets.owned) if sockets.owned else []
    known = [sockets.diag[inode] for inode in listeners if inode in sockets.diag]
    for listener in known:
        path = listener.choose(paths)
        if path is not None:
            return path, ""
    there = [p for p in paths if not _trouble(p)]
    if any(_trouble(p) == _NO_PERMISSION for p in paths):
        return None, _NO_PERMISSION
    if known:
        return None, "the path leads to another socket now, or to none"
    # Not in our network namespace: the name has to do.
    return ((there or paths)[0], "") if paths else (None, _NO_PERMISSION)


def _trouble(path: str) -> str:
    """What keeps us from seeing what is at this path, "" when nothing does."""
    try:
        stat_foreign(path, follow=True)
    except PermissionError:
        return _NO_PERMISSION
    except (OSError, ValueError):
        return "no such socket"
    return ""


def _accel(process: Process, command_line: CommandLine) -> str | None:
    """The accelerator in use: an open KVM VM file descriptor proves it, else the command line."""
    if command_line.accel is not None:
        return command_line.accel
    descriptors = process.file_descriptors()
    if descriptors is None:
        return None
    if any(f.link == "anon_inode:kvm-vm" for f in descriptors):
        return "kvm"
    if command_line.unread:
        return None
    # Preference lists such as kvm:tcg: the first did not come up.  Without one, and without KVM,
    # it is tcg on Linux (configure_accelerators).
    others = [a for a in command_line.accels if a != "kvm"] or ["tcg"]
    return others[0] if len(others) == 1 else None


def _config_text(process: Process, path: str) -> str | None:
    """A file for -readconfig, found as the process found it; None when it cannot be read or was
    changed after the process began, and of one that is stuck, maybe in that file."""
    if process.is_stuck():
        return None
    for seen in paths_seen_by(process, path):
        try:
            handle = open_foreign(seen, follow=True)
        except (OSError, ValueError):
            continue
        try:
            status = os.fstat(handle)
            old = status.st_mtime <= process.started_at() + _CLOCK_SLACK_S
            if old and status.st_size <= _CONFIG_LONGEST:
                text = b"".join(pieces(handle, _CONFIG_LONGEST))
                return text.decode(errors="surrogateescape")
        except OSError:
            pass
        finally:
            os.close(handle)
    return None
