"""Running QEMUs on this host, their monitors, and which of these are free.

Everything comes from /proc and from the binary's own text: no monitor is connected to, no
guest's binary is executed, nothing is disturbed.  A QEMU that runs as another user is seen by
its command line; what only its owner or root may read is then None.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

from ..host.processes import (
    Process,
    path_seen_by,
    process_ids,
    socket_inodes,
)
from .cmdline import (
    CommandLine,
    MonitorMode,
    MonitorSpec,
    parse_command_line,
)
from .sockets import MonitorState, listener_state, unix_path_of_inode
from .targets import SocketTarget, TcpTarget, UnixTarget

__all__ = [
    "Guest",
    "GuestDocument",
    "GuestMonitor",
    "ListDocument",
    "MonitorDocument",
    "find_guest",
    "find_guests",
    "list_document",
]

# version() in softmmu/vl.c and system/vl.c prints this, joined by the compiler into one literal.
_VERSION_TEXT = b"QEMU emulator version "
_VERSION = re.compile(rb"QEMU emulator version (\d+\.\d+\.\d+)")
_LOADER_OR_QEMU = re.compile(r"qemu.*|kvm|ld[-.\w]*")


class MonitorDocument(TypedDict):
    """One monitor in `list --json`."""

    target: str
    state: str


class GuestDocument(TypedDict):
    """One guest in `list --json`."""

    pid: int
    name: str | None
    version: str | None
    machine: str | None
    accel: str | None
    monitors: list[MonitorDocument]


class ListDocument(TypedDict):
    """`list --json`, schema 1."""

    schema: int
    guests: list[GuestDocument]


@dataclass(frozen=True, slots=True)
class GuestMonitor:
    """One monitor of a guest.

    `target` is how *we* reach it; None when nobody can connect.  `text` is QEMU's own name for
    it, for people.
    """

    mode: MonitorMode
    text: str
    target: SocketTarget | None
    state: MonitorState

    @property
    def label(self) -> str:
        return self.text if self.target is None else str(self.target)


@dataclass(frozen=True, slots=True)
class Guest:
    """A running QEMU system emulator."""

    process: Process
    command_line: CommandLine
    name: str | None
    version: str | None
    machine: str | None
    accel: str | None
    monitors: tuple[GuestMonitor, ...]
    notes: tuple[str, ...]

    @property
    def pid(self) -> int:
        return self.process.pid

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
    """Every QEMU system emulator that runs on this host, by pid."""
    return [g for g in (find_guest(pid) for pid in process_ids()) if g is not None]


def find_guest(pid: int) -> Guest | None:
    """The QEMU with this process id; None when there is no such process or it is no QEMU."""
    process = Process.read(pid)
    if process is None:
        return None
    command_line = _qemu_command_line(process)
    if command_line is None:
        return None
    inodes = socket_inodes(process)
    monitors = tuple(_monitor(spec, process, inodes) for spec in command_line.monitors)
    return Guest(
        process=process,
        command_line=command_line,
        name=command_line.name,
        version=_version(process, command_line),
        machine=command_line.machine,
        accel=_accel(process, command_line),
        monitors=monitors,
        notes=command_line.notes,
    )


def list_document(guests: Sequence[Guest]) -> ListDocument:
    """The document of `list --json`."""
    return {
        "schema": 1,
        "guests": [
            {
                "pid": guest.pid,
                "name": guest.name,
                "version": guest.version,
                "machine": guest.machine,
                "accel": guest.accel,
                "monitors": [
                    {"target": m.label, "state": str(m.state)} for m in guest.qmp_monitors
                ],
            }
            for guest in guests
        ],
    }


def _qemu_command_line(process: Process) -> CommandLine | None:
    """The parsed command line, when this process really is a QEMU.

    A process may call itself what it likes in argv[0], and a QEMU may be called otherwise there
    (`exec -a`): when the executable can be read it decides, or its name stands in.
    """
    argv = process.argv
    command_line = parse_command_line(argv)
    if process.exe is None:
        return command_line
    exe = os.path.basename(process.exe)
    if command_line is not None:
        return command_line if _LOADER_OR_QEMU.fullmatch(exe) else None
    return parse_command_line((process.exe, *argv[1:]))


def _monitor(spec: MonitorSpec, process: Process, inodes: dict[int, int] | None) -> GuestMonitor:
    bound = spec.address
    if spec.fd is not None and inodes is not None and spec.fd in inodes:
        path = unix_path_of_inode(inodes[spec.fd], process.pid)
        bound = UnixTarget(path) if path is not None else None
    if bound is None:
        return GuestMonitor(spec.mode, spec.text, None, MonitorState.UNREACHABLE)
    target = _reachable(bound, process)
    owned = None if inodes is None else frozenset(inodes.values())
    state = listener_state(bound, pid=process.pid, inodes=owned)
    if target is None:
        return GuestMonitor(spec.mode, spec.text, None, MonitorState.UNREACHABLE)
    if isinstance(target, UnixTarget) and not _may_connect(target):
        return GuestMonitor(spec.mode, spec.text, target, MonitorState.UNREACHABLE)
    # Without the kernel's table a socket that is there counts as free: connecting to find out
    # would take its place.
    known = MonitorState.FREE if state is None else state.monitor_state
    return GuestMonitor(spec.mode, spec.text, target, known)


def _reachable(bound: SocketTarget, process: Process) -> SocketTarget | None:
    if isinstance(bound, TcpTarget) or bound.is_abstract:
        return bound if process.shares_network() else None
    path = path_seen_by(process, bound.path)
    return UnixTarget(path) if path is not None else None


def _may_connect(target: UnixTarget) -> bool:
    # connect(2) on a path needs write permission on the socket file (unix(7)).
    return target.is_abstract or os.access(target.path, os.W_OK)


def _accel(process: Process, command_line: CommandLine) -> str | None:
    """The accelerator in use: an open KVM VM file descriptor proves it, else the command line."""
    descriptors = process.file_descriptors() if command_line.accel is None else None
    if descriptors is not None:
        if any(f.link == "anon_inode:kvm-vm" for f in descriptors):
            return "kvm"
        # Preference lists such as kvm:tcg: the first did not come up.
        others = [a for a in command_line.accels if a != "kvm"]
        return others[0] if others else "tcg"
    return command_line.accel


def _version(process: Process, command_line: CommandLine) -> str | None:
    """Version of the binary, read from its text (running it would be running a stranger's file)."""
    exe = f"/proc/{process.pid}/exe"
    through_loader = process.exe is not None and os.path.basename(process.exe).startswith("ld")
    paths = [] if through_loader else [exe]
    binary = path_seen_by(process, command_line.binary) if "/" in command_line.binary else None
    if binary is not None:
        paths.append(binary)
    elif "/" not in command_line.binary:
        paths += [f"{d}/{command_line.binary}" for d in ("/usr/bin", "/usr/local/bin")]
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue
        version = _version_of_file(path, status.st_dev, status.st_ino, status.st_mtime_ns)
        if version is not None:
            return version
    return None


@lru_cache(maxsize=64)
def _version_of_file(path: str, device: int, inode: int, mtime_ns: int) -> str | None:
    """Cached by identity of the file: `device`, `inode` and `mtime_ns` are only keys."""
    del device, inode, mtime_ns
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
            at = text.find(_VERSION_TEXT)
            match = _VERSION.match(text, at) if at >= 0 else None
            return match[1].decode() if match is not None else None
    except (OSError, ValueError):
        return None
