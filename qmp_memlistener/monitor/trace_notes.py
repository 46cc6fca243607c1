"""What agents leave on disk about a guest they trace, so that nothing stays changed for good.

One *place* per user and QEMU process, in the user's private directory (`private_dir`):

    /dev/shm/qmp-memlistener-UID/
        PID-START.lock                   held while an agent starts or ends tracing
        PID-START.live                   held (shared) by every agent that traces this QEMU
        PID-START/                       0700, plus QEMU's user where that is another one
            note.json                    how things were before the first change
            agent-N.json, agent-N.pos    one lease per agent: its events; how far it has read
            trace.log                    where QEMU's log goes meanwhile

The note is written and flushed before anything is changed.  A lease that can be locked belongs to
a dead agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import struct
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import msgspec

from ..errors import DeadlineExceeded, MissingPrerequisite
from ..host.processes import Process, boot_id
from .private_dir import HeldFile, private_directory, shm_directory, try_lock
from .trace_errors import TraceReason, TraceUnavailable

__all__ = ["Lease", "LogChange", "Note", "Place", "sweep"]

_LOCK_POLL = 0.02
_SCHEMA = 1


class LogChange(msgspec.Struct, frozen=True):
    """How the log was redirected: `path` for us, `restore_path` for `logfile`.

    `kept` False means that the log cannot be put back where it was (`why`).
    """

    path: str
    restore_path: str
    kept: bool
    why: str = ""


class Note(msgspec.Struct, frozen=True):
    """How a guest was before.  `events` holds the state of each event that we may change;
    `in_place` is the file that QEMU logs to anyway (`in_place_name` for people), `log` the
    redirection otherwise."""

    schema: int
    boot: str
    pid: int
    start_ticks: int
    events: dict[str, bool]
    log: LogChange | None = None
    in_place: str | None = None
    in_place_name: str = ""
    in_place_remark: str = ""

    @property
    def path(self) -> str:
        """The file that QEMU logs to while it is traced."""
        if self.in_place is not None:
            return self.in_place
        return self.log.path if self.log is not None else ""


class _LeaseDocument(msgspec.Struct, frozen=True):
    pid: int
    events: list[str]


class Lease:
    """One agent's claim on a place; alive while `handle` is open."""

    def __init__(self, path: str, handle: int, live: int) -> None:
        self.path = path
        self._handle = handle
        self._live = live

    def set_position(self, offset: int) -> None:
        """How far this agent has read the log: bytes before it are no longer needed."""
        with open(_position_path(self.path), "wb") as f:
            f.write(struct.pack("<Q", offset))

    def release(self) -> None:
        """Idempotent."""
        for path in (self.path, _position_path(self.path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for handle in (self._handle, self._live):
            if handle >= 0:
                os.close(handle)
        self._handle = self._live = -1


class Place:
    """The files about one QEMU process, as seen by this user."""

    def __init__(self, process: Process) -> None:
        """Raises TraceUnavailable when there is no safe directory, or when another user's agent
        is at work on this QEMU."""
        self.process = process
        self.key = f"{process.pid}-{process.start_ticks}"
        self._check_others()
        self.base = _base()
        self.directory = os.path.join(self.base, self.key)

    @property
    def log_path(self) -> str:
        return os.path.join(self.directory, "trace.log")

    @asynccontextmanager
    async def locked(self, deadline: float) -> AsyncIterator[None]:
        """Alone in this place.  Raises DeadlineExceeded."""
        path = os.path.join(self.base, f"{self.key}.lock")
        until = time.monotonic() + deadline
        while (held := HeldFile.hold(path)) is None:
            if time.monotonic() > until:
                raise DeadlineExceeded(
                    f"another agent has been busy with pid {self.process.pid} for {deadline:g} s"
                )
            await asyncio.sleep(_LOCK_POLL)
        with held:
            try:
                yield
            finally:
                self._drop_lock_file(held)

    def _drop_lock_file(self, held: HeldFile) -> None:
        if not os.path.isdir(self.directory):
            held.remove()

    def read_note(self) -> Note | None:
        """The note about this very process, or None.  An unreadable one is no note: it is
        written with an atomic rename, so it was not ours.  Raises TraceUnavailable for a note
        of a later version."""
        try:
            with open(os.path.join(self.directory, "note.json"), "rb") as f:
                note = msgspec.json.decode(f.read(), type=Note)
        except (OSError, msgspec.DecodeError):
            return None
        if note.schema != _SCHEMA:
            raise TraceUnavailable(
                TraceReason.OTHER_AGENT,
                f"a newer version of this program left a note about pid {self.process.pid}",
            )
        return note if note.boot == boot_id() else None

    def write_note(self, note: Note) -> None:
        """Flushed to the file system when it returns."""
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        path = os.path.join(self.directory, "note.json")
        handle = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, msgspec.json.format(msgspec.json.encode(note), indent=1))
            os.fsync(handle)
        finally:
            os.close(handle)
        os.rename(f"{path}.new", path)
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def new_note(self, events: dict[str, bool]) -> Note:
        return Note(_SCHEMA, boot_id(), self.process.pid, self.process.start_ticks, events)

    def claim(self, events: Iterable[str], offset: int) -> Lease:
        """A lease of our own.  Call with the place locked."""
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        number = 1 + max((_lease_number(p) for p in self._lease_paths()), default=0)
        path = os.path.join(self.directory, f"agent-{number}.json")
        handle = os.open(f"{path}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        live = os.open(
            os.path.join(self.base, f"{self.key}.live"),
            os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o644,
        )
        try_lock(handle)
        try_lock(live, fcntl.LOCK_SH)
        os.write(handle, msgspec.json.encode(_LeaseDocument(os.getpid(), sorted(events))))
        lease = Lease(path, handle, live)
        lease.set_position(offset)
        # Locked before it can be seen: whoever finds it unlocked may take it for a dead one's.
        os.rename(f"{path}.new", path)
        return lease

    def live_events(self, but: Lease | None = None) -> list[set[str]]:
        """The events of each agent that is alive, `but` left out.  Dead leases are removed."""
        found = []
        for path in self._lease_paths():
            if but is not None and path == but.path:
                continue
            document = _read_live(path)
            if document is None:
                for dead in (path, _position_path(path)):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(dead)
            else:
                found.append(set(document.events))
        return found

    def lowest_position(self, own: int) -> int:
        """Up to where every agent has read the log."""
        lowest = own
        for path in self._lease_paths():
            with contextlib.suppress(OSError, struct.error), open(_position_path(path), "rb") as f:
                lowest = min(lowest, struct.unpack("<Q", f.read())[0])
        return lowest

    def clear(self) -> None:
        """Nothing is left to restore: remove note, log and directory.  Call it locked."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.base, f"{self.key}.live"))

    def _lease_paths(self) -> list[str]:
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return []
        return [
            os.path.join(self.directory, n)
            for n in names
            if n.startswith("agent-") and n.endswith(".json")
        ]

    def _check_others(self) -> None:
        """Root's agent and that of QEMU's user cannot share notes with ours: one at a time."""
        for uid in {0, self.process.uid} - {os.geteuid()}:
            base = shm_directory(uid)
            try:
                if os.lstat(base).st_uid != uid:
                    continue
                handle = os.open(
                    f"{base}/{self.key}.live", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                )
            except OSError:
                continue
            try:
                alive = not try_lock(handle)
            finally:
                os.close(handle)
            if alive:
                raise TraceUnavailable(
                    TraceReason.OTHER_AGENT,
                    f"an agent of user id {uid} already traces QEMU (pid {self.process.pid})",
                )


def sweep() -> int:
    """Remove what was left about QEMU processes that are gone; returns how many."""
    try:
        base = _base(create=False)
        names = os.listdir(base)
    except (OSError, TraceUnavailable):
        return 0
    removed = 0
    for key in {n.partition(".")[0] for n in names}:
        pid, _, start = key.partition("-")
        if not (pid.isdigit() and start.isdigit()):
            continue
        process = Process.read(int(pid))
        if process is not None and process.start_ticks == int(start):
            continue
        shutil.rmtree(os.path.join(base, key), ignore_errors=True)
        for suffix in ("lock", "live"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(base, f"{key}.{suffix}"))
        removed += 1
    return removed


def _base(*, create: bool = True) -> str:
    try:
        return private_directory(create=create)
    except MissingPrerequisite as exc:
        raise TraceUnavailable(TraceReason.NO_PLACE, exc.message) from exc


def _position_path(lease: str) -> str:
    return lease.removesuffix(".json") + ".pos"


def _lease_number(path: str) -> int:
    digits = os.path.basename(path).removeprefix("agent-").removesuffix(".json")
    return int(digits) if digits.isdigit() else 0


def _read_live(path: str) -> _LeaseDocument | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if try_lock(handle):
            return None
        return msgspec.json.decode(os.read(handle, 1 << 20), type=_LeaseDocument)
    except msgspec.DecodeError:
        return None
    finally:
        os.close(handle)
