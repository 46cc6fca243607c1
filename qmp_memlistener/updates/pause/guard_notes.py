"""Notes of the resume guard: that a guest may be paused by us, and what the guard did alone.

One note (`host.notes`) for each guard, KEY.guard-TOKEN, KEY as in `freeze.freeze_key`.  The guard's
process holds and rewrites it (`guard_process`), so that a pause costs two small writes, before
`stop` and after `cont`.  When it is stale and the agent is dead as well, it says what they left:

- `armed`, `stopped`: both were killed while the guest was paused, or about to be;
- `over`: the guard resumed the guest, or could not, when no agent was there.  Such a note is
  read once, by the next verb for that guest.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import msgspec

from ...errors import MissingPrerequisite
from ...host import notes
from ...host.directory import HeldFile
from ...host.processes import Process
from ...qmp.freeze import FreezeKey
from ...text import valid_text

__all__ = ["GuardNote", "NoteForm", "all_notes", "new_note", "take_notes", "unfinished"]

_WHAT = "guard"


class GuardNote(notes.DiskNote, frozen=True, kw_only=True):
    """What a guard promised, and what it did without its agent.

    `guest` is for people; `agent` and `agent_start` are the process that started it.  `t_ns`
    (CLOCK_MONOTONIC) is when it came to this `state` (idle, armed, stopped, over), `why` what made
    the guard act.
    Unless `resumed` the guest was left paused, and `obstacle` says why.  `vcpus` is how often
    each thread of a vCPU had been put on a CPU when the guest was stopped (/proc/PID/task/TID/
    schedstat).
    """

    guest: str
    agent: int
    agent_start: int
    state: str = "idle"
    t_ns: int = 0
    why: str = ""
    resumed: bool = False
    obstacle: str = ""
    vcpus: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def ago(self) -> str:
        return f"{max(0, time.monotonic_ns() - self.t_ns) // 1_000_000_000} s ago"

    @property
    def text(self) -> str:
        """What the guard did, for people."""
        if self.resumed:
            return f"{self.ago} the resume guard resumed {self.guest} in an update: {self.why}"
        return (
            f"{self.ago} the resume guard could not resume {self.guest} in an update: "
            f"{self.why}, but {self.obstacle}"
        )

    @property
    def remedy(self) -> str | None:
        if self.resumed:
            return None
        return "if the guest is still paused, send it `cont` (a failed guest needs a reset)"


@dataclass(frozen=True, slots=True)
class NoteForm:
    """The note of a guard that starts: the file (None: there is none) and what it says already."""

    held: HeldFile | None
    content: dict[str, object]

    @property
    def path(self) -> str:
        return self.held.path if self.held is not None else ""


def new_note(key: FreezeKey) -> NoteForm:
    """For a guard that starts.

    Without a directory that is ours alone there will be no note: the guest is guarded all the same.
    """
    agent = Process.read(os.getpid())
    started = agent.start_ticks if agent is not None else 0
    note = GuardNote.about(
        key.process, guest=valid_text(key.who), agent=os.getpid(), agent_start=started
    )
    content = {name: getattr(note, name) for name in note.__struct_fields__}
    try:
        held = notes.hold(notes.new_name(key.name, _WHAT))
    except (MissingPrerequisite, OSError):
        held = None
    return NoteForm(held, content)


def take_notes(key: FreezeKey) -> list[GuardNote]:
    """What guards did alone to this guest, oldest first; reported once."""
    found = _left("over", key=key.name)
    for left in found:
        left.remove()
    return [left.note for left in found]


def all_notes() -> list[GuardNote]:
    """The same of all guests of this user; they stay."""
    return [left.note for left in _left("over")]


def unfinished(key: FreezeKey | None = None) -> list[notes.Stale[GuardNote]]:
    """Pauses (of this guest) whose agent and guard are dead, oldest first."""
    return _left("armed", "stopped", key=key.name if key is not None else None)


def _left(*states: str, key: str | None = None) -> list[notes.Stale[GuardNote]]:
    found = []
    for left in notes.stale(_WHAT, GuardNote, key=key):
        agent = Process.read(left.note.agent)
        if left.note.state == "idle":
            left.remove()  # nothing was promised when the guard was killed
        elif left.note.state not in states:
            continue
        elif (
            left.note.state == "over" or agent is None or agent.start_ticks != left.note.agent_start
        ):
            found.append(left)
    return sorted(found, key=lambda left: left.note.t_ns)
