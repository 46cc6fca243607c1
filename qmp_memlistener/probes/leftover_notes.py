"""Notes about what a probe has switched on in a guest, so that it is switched off for good.

One file for each thing and QEMU process, beside those of `monitor.trace_notes`:

    /dev/shm/qmp-memlistener-UID/PID-START.WHAT     held (flock) by the probe that switched it on

The note is written, locked and flushed before the guest is touched, and removed after it has been
put back.  The kernel drops the lock with its owner: a note that can be locked has a dead one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass

import msgspec

from ..monitor import Monitor, hmp
from ..monitor.procfs import Process, boot_id
from .model import ProbeUnavailable

__all__ = ["Claim", "LeftoverNote", "WHAT", "find", "note", "restore", "stale"]

WHAT = {"sync-profile": ("the lock profiler is on", "sync-profile off")}
"""What may be noted: in words for people, and the human-monitor command that undoes it."""

_SCHEMA = 1


class _Document(msgspec.Struct, frozen=True):
    schema: int
    boot: str
    pid: int
    start_ticks: int
    what: str


@dataclass(frozen=True, slots=True)
class LeftoverNote:
    """A note whose owner is dead, about a QEMU that still runs."""

    pid: int
    start_ticks: int
    what: str
    path: str

    @property
    def text(self) -> str:
        """For people."""
        return f"{WHAT[self.what][0]} in QEMU (pid {self.pid})"


class Claim:
    """A note of our own; alive while we are."""

    def __init__(self, path: str, handle: int) -> None:
        self.path = path
        self._handle = handle

    def clear(self) -> None:
        """It is put back: remove the note.  Idempotent."""
        if self._handle >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self.abandon()

    def abandon(self) -> None:
        """It could not be put back: leave the note for whoever comes next.  Idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def note(pid: int, start_ticks: int, what: str) -> Claim | None:
    """Write that `what` is about to be switched on in this process; `what` is a key of WHAT.

    A note that a dead owner left is taken over.  None when a live process of ours holds one.
    Raises ProbeUnavailable when there is no directory that is ours alone.
    """
    path = os.path.join(_directory(create=True), f"{pid}-{start_ticks}.{what}")
    document = _Document(_SCHEMA, boot_id(), pid, start_ticks, what)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not _lock(handle):
                os.close(handle)
                return None
            if not _is_at(handle, path):
                # its owner removed it between our opening and locking it
                os.close(handle)
                continue
            os.ftruncate(handle, 0)
            os.pwrite(handle, msgspec.json.encode(document), 0)
            os.fsync(handle)
        except OSError:
            os.close(handle)
            raise
        return Claim(path, handle)


def find() -> list[LeftoverNote]:
    """What dead owners of this user left switched on in QEMUs that still run.

    Notes about QEMUs that are gone are removed on the way.
    """
    try:
        base = _directory(create=False)
        names = sorted(os.listdir(base))
    except (OSError, ProbeUnavailable):
        return []
    found = []
    for name in names:
        key, _, what = name.partition(".")
        pid, _, start = key.partition("-")
        if what not in WHAT or not (pid.isdigit() and start.isdigit()):
            continue
        left = stale(int(pid), int(start), what)
        if left is not None:
            found.append(left)
    return found


def stale(pid: int, start_ticks: int, what: str) -> LeftoverNote | None:
    """The note of a dead owner about this process, if there is one."""
    try:
        path = os.path.join(_directory(create=False), f"{pid}-{start_ticks}.{what}")
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ProbeUnavailable):
        return None
    try:
        if not _lock(handle):
            return None
        process = Process.read(pid)
        if process is None or process.start_ticks != start_ticks or not _is_ours(handle):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return None
        return LeftoverNote(pid, start_ticks, what, path)
    finally:
        os.close(handle)


async def restore(monitor: Monitor, left: LeftoverNote) -> bool:
    """Undo it over any monitor of that QEMU and remove the note.

    False when it was no longer left over: somebody restored it, or has it in use.  Raises
    CommandFailed and as `Monitor.timed` does; then the note stays.
    """
    if stale(left.pid, left.start_ticks, left.what) is None:
        return False
    claim = note(left.pid, left.start_ticks, left.what)
    if claim is None:
        return False
    try:
        await hmp(monitor, WHAT[left.what][1], quiet=True)
        claim.clear()
    finally:
        claim.abandon()
    return True


def _directory(*, create: bool) -> str:
    """That of `trace_notes`: this user's, nobody else may write to it."""
    uid = os.geteuid()
    choices = [f"/dev/shm/qmp-memlistener-{uid}"]
    if "XDG_RUNTIME_DIR" in os.environ:
        choices.append(os.path.join(os.environ["XDG_RUNTIME_DIR"], "qmp-memlistener"))
    for path in choices:
        try:
            if create:
                os.makedirs(path, mode=0o755, exist_ok=True)
            status = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o022:
            return path
    raise ProbeUnavailable(
        f"no directory for notes: {' and '.join(choices)} are unusable",
        remedy="make one of them a directory that only this user may write to",
    )


def _is_ours(handle: int) -> bool:
    """A whole note of this boot.  One that was cut off was never acted upon."""
    try:
        document = msgspec.json.decode(os.pread(handle, 1 << 16, 0), type=_Document)
    except msgspec.DecodeError:
        return False
    return document.schema == _SCHEMA and document.boot == boot_id()


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: int, path: str) -> bool:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(handle)
    return (status.st_dev, status.st_ino) == (ours.st_dev, ours.st_ino)
