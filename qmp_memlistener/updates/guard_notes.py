"""Notes of the resume guard: a guest was resumed, or could not be, and nobody was there to tell.

One file for each, KEY.resumed-TOKEN in our directory (`host.state`), written by `guard_process`.
KEY is the guest (`freeze.freeze_key`: pid and start time, or its address).  A note is read once,
by the next verb for that guest, and goes with its QEMU.  The guard removes it itself when its
agent turns out to be alive and tells its user.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from ..errors import MissingPrerequisite
from ..host.processes import Process, boot_id
from ..host.state import StateDirectory, decoded, directories, own_directory
from ..monitor.freeze import FreezeKey
from ..text import valid_text

__all__ = ["GuardNote", "NoteForm", "all_notes", "new_note", "take_notes"]

_MARK = ".resumed-"
_SCHEMA = 1


class GuardNote(msgspec.Struct, frozen=True):
    """What a guard did without its agent.

    `guest` is for people; `pid` and `start_ticks` are QEMU's, None where its process is not
    visible.  `t_ns` (CLOCK_MONOTONIC) is when, `why` what made it act.  Unless `resumed` the guest
    was left paused, and `obstacle` says why.
    """

    schema: int
    boot: str
    guest: str
    pid: int | None
    start_ticks: int | None
    t_ns: int
    why: str
    resumed: bool
    obstacle: str

    @property
    def text(self) -> str:
        """For people."""
        ago = max(0, time.monotonic_ns() - self.t_ns) // 1_000_000_000
        if self.resumed:
            return f"{ago} s ago the resume guard resumed {self.guest} in an update: {self.why}"
        return (
            f"{ago} s ago the resume guard could not resume {self.guest} in an update: "
            f"{self.why}, but {self.obstacle}"
        )

    @property
    def remedy(self) -> str | None:
        if self.resumed:
            return None
        return "if the guest still stands, send `cont` to a monitor (a failed guest needs a reset)"


@dataclass(frozen=True, slots=True)
class NoteForm:
    """Where a guard's note goes (empty: nowhere), and what it says already."""

    path: str
    content: dict[str, object]


def new_note(key: FreezeKey) -> NoteForm:
    """For a guard that starts; nothing is written yet, but the directory is made.

    Without a directory that is ours alone there will be no note: the guest is guarded all the same.
    """
    process = key.process
    content: dict[str, object] = {
        "schema": _SCHEMA,
        "boot": boot_id(),
        "guest": valid_text(key.who),
        "pid": None if process is None else process.pid,
        "start_ticks": None if process is None else process.start_ticks,
    }
    try:
        path = f"{own_directory().path}/{key.name}{_MARK}{secrets.token_hex(8)}"
    except MissingPrerequisite:
        path = ""
    return NoteForm(path, content)


def take_notes(key: FreezeKey) -> list[GuardNote]:
    """The notes about this guest, oldest first; they are gone afterwards."""
    found = []
    for directory, name, note in _notes():
        if name.startswith(f"{key.name}{_MARK}"):
            found.append(note)
            directory.remove(name)
    return found


def all_notes() -> list[GuardNote]:
    """Every note of this user, oldest first; they stay."""
    return [note for _, _, note in _notes()]


def _notes() -> Iterator[tuple[StateDirectory, str, GuardNote]]:
    """Notes about guests that still run.  Others, and what is no note, are removed on the way."""
    found = []
    for directory in directories():
        for name in directory.names():
            if _MARK not in name or name.endswith(".new"):
                continue
            try:
                note = _read(directory, name)
            except OSError:
                continue
            if note is None:
                directory.remove(name)
            else:
                found.append((directory, name, note))
    yield from sorted(found, key=lambda item: item[2].t_ns)


def _read(directory: StateDirectory, name: str) -> GuardNote | None:
    note = decoded(directory.read(name), GuardNote)
    if note is None or note.schema != _SCHEMA or note.boot != boot_id():
        return None
    if note.pid is not None:
        process = Process.read(note.pid)
        if process is None or process.start_ticks != note.start_ticks:
            return None
    return note
