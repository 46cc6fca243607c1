"""Notes about what a probe has switched on in a guest, so that it is switched off for good.

One file for each thing and QEMU process, PID-START.WHAT in our directory (`host.state`), held by
the probe that switched it on.  The note is written, locked and flushed before the guest is touched,
and removed after it has been put back.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..host.locks import HeldFile
from ..host.processes import boot_id, is_key, process_of
from ..host.state import StateDirectory, decoded, directories, directory_of, own_directory
from ..monitor import Monitor, hmp

__all__ = ["LeftoverNote", "WHAT", "find", "note", "restore", "stale"]

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


def note(pid: int, start_ticks: int, what: str) -> HeldFile | None:
    """Write that `what` is about to be switched on in this process; `what` is a key of WHAT.

    A note that a dead owner left is taken over.  Remove it when `what` is undone; close it when
    that failed.  None when a live process of ours holds one.  Raises MissingPrerequisite when
    there is no directory that is ours alone.
    """
    name = f"{pid}-{start_ticks}.{what}"
    held = (directory_of(name) or own_directory()).hold(name)
    if held is None:
        return None
    try:
        held.write(msgspec.json.encode(_Document(_SCHEMA, boot_id(), pid, start_ticks, what)))
    except OSError:
        held.close()
        raise
    return held


def find() -> list[LeftoverNote]:
    """What dead owners of this user left switched on in QEMUs that still run.

    Notes about QEMUs that are gone are removed on the way.
    """
    found = []
    for directory in directories():
        for name in directory.names():
            key, _, what = name.partition(".")
            if what not in WHAT or not is_key(key):
                continue
            left = _stale(directory, key, what)
            if left is not None:
                found.append(left)
    return found


def stale(pid: int, start_ticks: int, what: str) -> LeftoverNote | None:
    """The note of a dead owner about this process, if there is one."""
    key = f"{pid}-{start_ticks}"
    directory = directory_of(f"{key}.{what}")
    return None if directory is None else _stale(directory, key, what)


def _stale(directory: StateDirectory, key: str, what: str) -> LeftoverNote | None:
    try:
        held = directory.hold(f"{key}.{what}", create=False)
    except OSError:
        return None
    if held is None:
        return None
    with held:
        if process_of(key) is None or not _is_ours(held.read()):
            held.remove()
            return None
        pid, start_ticks = map(int, key.split("-"))
        return LeftoverNote(pid, start_ticks, what, held.path)


async def restore(monitor: Monitor, left: LeftoverNote) -> bool:
    """Undo it over any monitor of that QEMU and remove the note.

    False when it was no longer left over: somebody restored it, or has it in use.  Raises
    CommandFailed and as `Monitor.timed` does; then the note stays.
    """
    if stale(left.pid, left.start_ticks, left.what) is None:
        return False
    held = note(left.pid, left.start_ticks, left.what)
    if held is None:
        return False
    with held:
        await hmp(monitor, WHAT[left.what][1], quiet=True)
        held.remove()
    return True


def _is_ours(content: bytes) -> bool:
    """A whole note of this boot.  One that was cut off was never acted upon."""
    document = decoded(content, _Document)
    return document is not None and document.schema == _SCHEMA and document.boot == boot_id()
