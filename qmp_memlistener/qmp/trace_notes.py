"""What agents leave on disk about a guest they trace, so that nothing stays changed for good.

One *place* per user and QEMU process, in the user's own directory (`host.state`):

    PID-START.lock                   held while an agent starts or ends tracing
    PID-START.live                   attended by every agent that traces this QEMU
    PID-START/                       0700
        note.json                    how things were before the first change
        agent-N.json, agent-N.pos    one lease per agent: its events; how far it has read
        trace.log                    where QEMU's log goes meanwhile, if it cannot be limited

As a rule the log is a limited file (`host.limited_file`), which nothing but QEMU's own descriptor
and ours lead to: it cannot grow beyond LOG_LIMIT, also when no agent lives that reads it.

The note is written and flushed before anything is changed.  A lease that can be locked belongs to
a dead agent.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import struct
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import msgspec

from ..errors import DeadlineExceeded, MissingPrerequisite, TraceReason, TraceUnavailable
from ..host import notes
from ..host.directory import StateDirectory, decoded, try_lock, write_all
from ..host.files import open_foreign
from ..host.limited_file import limited_file
from ..host.processes import Process, boot_id, is_key, process_of
from ..host.state import directories, directory_of, own_directory
from ..text import json_bytes

__all__ = [
    "LAG_LIMIT",
    "LOG_LIMIT",
    "Lease",
    "Place",
    "Redirection",
    "TraceNote",
    "noted_processes",
    "sweep",
]

LOG_LIMIT = 64 << 20
"""A log holds this much that no agent has read."""
LAG_LIMIT = LOG_LIMIT // 2
"""An agent that is this far behind another no longer keeps what it has not read."""

_LOCK_POLL = 0.02
_NOTE, _LOG = "note.json", "trace.log"
_LEASE = re.compile(r"agent-([0-9]{1,9})\.json")
_POSITION = struct.Struct("<Q")


class Redirection(msgspec.Struct, frozen=True, kw_only=True):
    """How the log is redirected, and put back with `logfile restore_path`.

    `kept` False means that it cannot be put back where it was (`why`).  `path` is what we call the
    file.  `device` and `inode` are those of a limited file, which has at most `limit` bytes: 0 for
    any other.  `proven`: QEMU was seen to write there.
    """

    restore_path: str
    kept: bool
    why: str = ""
    path: str = ""
    device: int = 0
    inode: int = 0
    limit: int = 0
    proven: bool = True


class TraceNote(notes.DiskNote, frozen=True, kw_only=True):
    """How a guest was before.  `events` holds the state of each event that we may change;
    `in_place` is the file that QEMU logs to anyway (`in_place_name` for people), `log` the
    redirection otherwise."""

    events: dict[str, bool]
    log: Redirection | None = None
    in_place: str | None = None
    in_place_name: str = ""
    in_place_remark: str = ""

    @property
    def path(self) -> str:
        """The file that QEMU logs to while it is traced."""
        if self.in_place is not None:
            return self.in_place
        return self.log.path if self.log is not None else ""

    def open_log(self, process: Process) -> tuple[int, str]:
        """That file, open, and what it is called: for reading only when it is QEMU's own.

        A limited file is found by what it is: QEMU may have another file under that number by now.
        Raises OSError; FileNotFoundError when QEMU no longer has it open.
        """
        if self.in_place is not None:
            return open_foreign(self.in_place, follow=True), self.in_place
        log = self.log
        if log is None or not log.inode:
            return open_foreign(self.path, os.O_RDWR, follow=True), self.path
        for f in process.file_descriptors() or ():
            if (f.device, f.inode) == (log.device, log.inode):
                path = f"/proc/{process.pid}/fd/{f.number}"
                handle = open_foreign(path, os.O_RDWR, follow=True)
                status = os.fstat(handle)
                if (status.st_dev, status.st_ino) == (log.device, log.inode):
                    return handle, path
                os.close(handle)
        raise FileNotFoundError(errno.ENOENT, "QEMU no longer logs to our file", self.path)


class _LeaseDocument(msgspec.Struct, frozen=True):
    pid: int
    events: list[str]


class Lease:
    """One agent's claim on a place; alive while its files are open."""

    def __init__(self, directory: StateDirectory, name: str, handles: tuple[int, ...]) -> None:
        self.name = name
        self._directory = directory
        self._position = handles[0]
        self._handles = handles

    def set_position(self, offset: int) -> None:
        """How far this agent has read the log: bytes before it are no longer needed."""
        if self._handles:
            os.pwrite(self._position, _POSITION.pack(offset), 0)

    def release(self) -> None:
        """Idempotent."""
        handles, self._handles = self._handles, ()
        if handles:
            _remove_lease(self._directory, self.name)
        for handle in handles:
            os.close(handle)


class Place:
    """The files about one QEMU process, as seen by this user."""

    def __init__(self, process: Process) -> None:
        """Raises TraceUnavailable when there is no safe directory, or when another user's agent
        is at work on this QEMU."""
        self.process = process
        self.key = process.key
        self._check_others()
        # where an earlier run was, as long as something of it is there
        there = directory_of(self.key) or directory_of(f"{self.key}.lock")
        self._base = _own_directory() if there is None else there

    @property
    def path(self) -> str:
        """The directory about this process, for people."""
        return f"{self._base.path}/{self.key}"

    @property
    def log_path(self) -> str:
        return f"{self.path}/{_LOG}"

    @asynccontextmanager
    async def locked(self, deadline: float) -> AsyncIterator[None]:
        """Alone in this place.  Raises DeadlineExceeded."""
        until = time.monotonic() + deadline
        while (held := self._base.hold(f"{self.key}.lock")) is None:
            if time.monotonic() > until:
                raise DeadlineExceeded(
                    f"another agent has been busy with pid {self.process.pid} for {deadline:g} s"
                )
            await asyncio.sleep(_LOCK_POLL)
        with held:
            try:
                yield
            finally:
                if not self._base.has(self.key):
                    held.remove()

    def read_note(self) -> TraceNote | None:
        """The note about this very process, or None.  An unreadable one is no note: it is
        written with an atomic rename, so it was not ours.  Raises TraceUnavailable for a note
        of a later version, and for one that cannot be read."""
        try:
            directory = self._base.subdirectory(self.key, create=False)
            note = None if directory is None else decoded(directory.read(_NOTE), TraceNote)
        except OSError as exc:
            raise TraceUnavailable(
                TraceReason.NO_PLACE, f"the note in {self.path} cannot be read: {exc.strerror}"
            ) from exc
        if note is None:
            return None
        if note.schema != notes.SCHEMA:
            raise TraceUnavailable(
                TraceReason.OTHER_AGENT,
                f"a newer version of this program left a note about pid {self.process.pid}",
            )
        return note if note.boot == boot_id() else None

    def write_note(self, note: TraceNote) -> None:
        """Flushed to the file system when it returns."""
        text = msgspec.json.format(json_bytes(note), indent=1)
        self._directory().write(_NOTE, text)

    def new_note(self, events: dict[str, bool]) -> TraceNote:
        return TraceNote.about(self.process, events=events)

    def claim(self, events: Iterable[str], offset: int) -> Lease:
        """A lease of our own.  Call with the place locked."""
        directory = self._directory()
        number = 1 + max((_lease_number(n) for n in _leases(directory)), default=0)
        name = f"agent-{number}.json"
        handle = directory.create(f"{name}.new")
        handles = [handle]
        try:
            handles.insert(0, directory.create(_position_of(name)))
            handles.append(self._base.attend(f"{self.key}.live"))
            # Locked before it can be seen: whoever finds it unlocked may take it for a dead one's.
            try_lock(handle)
            write_all(handle, json_bytes(_LeaseDocument(os.getpid(), sorted(events))))
            lease = Lease(directory, name, tuple(handles))
            lease.set_position(offset)
            directory.rename(f"{name}.new", name)
        except BaseException:
            for opened in handles:
                os.close(opened)
            raise
        return lease

    def create_log(self, *, limited: bool = True) -> tuple[int, int]:
        """An empty file for QEMU's log, open for reading and writing, and its limit: 0 for one that
        has none, in our directory, where this host lets us make no other.  Raises OSError."""
        if limited:
            try:
                return limited_file(LOG_LIMIT), LOG_LIMIT
            except OSError:
                pass
        return self._directory().create(_LOG), 0

    def live_events(self) -> list[set[str]]:
        """The events of each agent that is alive.  Dead leases are removed."""
        directory = self._base.subdirectory(self.key, create=False)
        if directory is None:
            return []
        found = []
        for name in _leases(directory):
            document = _read_live(directory, name)
            if document is None:
                _remove_lease(directory, name)
            else:
                found.append(set(document.events))
        return found

    def lowest_position(self, own: int) -> int:
        """Up to where every agent that lives has read the log, or at least LAG_LIMIT behind us: one
        that is stopped must not make the log grow; what it missed is reported."""
        directory = self._base.subdirectory(self.key, create=False)
        if directory is None:
            return own
        lowest = own
        for name in _leases(directory):
            position = directory.read(_position_of(name)) or b""
            if len(position) == _POSITION.size:
                theirs = _POSITION.unpack(position)[0]
                if theirs < lowest and _read_live(directory, name) is not None:
                    lowest = theirs
        return max(lowest, own - LAG_LIMIT)

    def clear(self) -> None:
        """Nothing is left to restore: remove note, log and directory.  Call it locked."""
        self._base.remove(self.key)
        self._base.remove(f"{self.key}.live")

    def _directory(self) -> StateDirectory:
        """Raises OSError."""
        directory = self._base.subdirectory(self.key)
        assert directory is not None
        return directory

    def _check_others(self) -> None:
        """Root's agent and that of QEMU's user cannot share notes with ours: one at a time."""
        for uid in {0, self.process.uid} - {os.geteuid()}:
            if any(d.is_attended(f"{self.key}.live") for d in directories(uid)):
                raise TraceUnavailable(
                    TraceReason.OTHER_AGENT,
                    f"an agent of user id {uid} already traces QEMU (pid {self.process.pid})",
                )


def noted_processes() -> list[Process]:
    """Processes that live and that something is noted about here, by pid."""
    keys = {n for d in directories() for n in d.names() if is_key(n)}
    found = [p for p in map(process_of, keys) if p is not None]
    return sorted(found, key=lambda process: process.pid)


def sweep() -> int:
    """Remove what was left about QEMU processes that are gone; returns of how many."""
    removed = set()
    for directory in directories():
        for name in directory.names():
            key, _, suffix = name.partition(".")
            if suffix in ("", "lock", "live") and is_key(key) and process_of(key) is None:
                directory.remove(name)
                removed.add(key)
    return len(removed)


def _own_directory() -> StateDirectory:
    try:
        return own_directory()
    except MissingPrerequisite as exc:
        raise TraceUnavailable(TraceReason.NO_PLACE, exc.message) from exc


def _leases(directory: StateDirectory) -> list[str]:
    return [n for n in directory.names() if _LEASE.fullmatch(n)]


def _lease_number(name: str) -> int:
    match = _LEASE.fullmatch(name)
    return int(match[1]) if match is not None else 0


def _position_of(lease: str) -> str:
    return lease.removesuffix(".json") + ".pos"


def _remove_lease(directory: StateDirectory, name: str) -> None:
    directory.remove(name)
    directory.remove(_position_of(name))


def _read_live(directory: StateDirectory, name: str) -> _LeaseDocument | None:
    """What a lease says; None for a dead agent's, and for what is none."""
    try:
        handle = directory.open(name)
    except OSError:
        return None
    try:
        if try_lock(handle):
            return None
        return decoded(directory.read(name), _LeaseDocument)
    finally:
        os.close(handle)
