"""Notes about what a probe has switched on in a guest, so that it is switched off for good.

One note (`host.notes`) for each thing and QEMU process, PID-START.WHAT, held by the probe that
switched it on.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..host import notes
from ..host.directory import HeldFile
from ..host.processes import process_of
from ..qmp import Monitor, hmp

__all__ = ["LeftoverNote", "WHAT", "find", "note", "restore", "stale"]

WHAT = {"sync-profile": ("the lock profiler is on", "sync-profile off")}
"""What may be noted: in words for people, and the human-monitor command that undoes it."""


class _Document(notes.Note, frozen=True, kw_only=True):
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
    key = f"{pid}-{start_ticks}"
    held = notes.hold(f"{key}.{what}")
    if held is None:
        return None
    try:
        held.write(msgspec.json.encode(_Document.about(process_of(key), what=what)))
    except OSError:
        held.close()
        raise
    return held


def find() -> list[LeftoverNote]:
    """What dead owners of this user left switched on in QEMUs that still run."""
    return [left for what in WHAT for left in _stale(what)]


def stale(pid: int, start_ticks: int, what: str) -> LeftoverNote | None:
    """The note of a dead owner about this process, if there is one."""
    return next(iter(_stale(what, f"{pid}-{start_ticks}")), None)


def _stale(what: str, key: str | None = None) -> list[LeftoverNote]:
    return [
        LeftoverNote(left.note.pid, left.note.start_ticks or 0, what, left.path)
        for left in notes.stale(what, _Document, key=key)
        if left.note.pid is not None
    ]


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
