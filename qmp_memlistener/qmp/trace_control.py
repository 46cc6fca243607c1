"""Tracing a running guest through its log, and leaving it as it was.

`start_tracing` notes how things are, writes the note to disk, and only then enables trace events
and, where it must, redirects QEMU's log to a file on tmpfs.  `TraceSession.stop` puts everything
back; after a crash the next `start_tracing` or `restore_stale` does.

- QEMU already logs to a regular file (-D, a stderr that is a file): it is read in place and
  never redirected, because `logfile` truncates what it opens (see `trace_log`).  The trace lines
  stay in that file.
- Several agents of one user on one guest share the log; each disables, when it leaves, the
  events that no other wants, and the last one restores the log.  Another user's agent is refused
  (`trace_notes`).
- Whether lines really reach the file is proved with a marker: the event `handle_hmp_command`
  writes the text of each human-monitor command to the log, so `print 0x71…` shows up there.  The
  same marker later shows that everything logged before it has been read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Self

import msgspec

from ..errors import TargetError, TraceReason, TraceUnavailable
from ..host.bounded import in_thread
from .connection import Monitor
from .discovery import Guest, find_guest
from .identity import GuestIdentity, find_owner
from .targets import PidTarget
from .trace_notes import Lease, Place, TraceNote, sweep
from .trace_setup import (
    MARKER_EVENT,
    Restored,
    arrange_log,
    event_states,
    is_logged,
    refuse_other_writers,
    send_marker,
    set_events,
    undo,
)
from .trace_tail import TraceTail

__all__ = ["TRACE_EVENTS", "Restored", "TraceSession", "restore_stale", "start_tracing"]

TRACE_EVENTS = (
    "kvm_set_user_memory",
    "flatview_new",
    "pci_update_mappings_add",
    "pci_update_mappings_del",
    "memory_device_pre_plug",
    "memory_device_plug",
    "memory_device_unplug",
    "virtio_mem_plug_request",
    "virtio_mem_unplug_request",
    "virtio_mem_unplugged_all",
    "virtio_mem_unplug_all_request",
    "virtio_mem_resized_usable_region",
    "runstate_set",
)

_LOCK_DEADLINE = 5.0
_RESTORE_DEADLINE = 5.0


class TraceSession:
    """Tracing that is switched on.  Made by `start_tracing`; an async context manager that stops.

    `path` is what the log is called and `start` the offset behind which our lines stand; `events`
    are those that are on, `missing` those that this QEMU does not have; `in_place` says that the
    file is QEMU's own log, `shared` that other agents read it too; `remarks` are for the user.
    """

    def __init__(
        self,
        monitor: Monitor,
        guest: Guest,
        place: Place,
        note: TraceNote,
        lease: Lease,
        log: int,
    ) -> None:
        self.monitor = monitor
        self.in_place = note.in_place is not None
        self.path = note.path
        self.start = 0
        self.events: frozenset[str] = frozenset()
        self.missing: tuple[str, ...] = ()
        self.shared = False
        self.timestamps = guest.command_line.timestamps
        self._guest = guest
        self._place = place
        self._note = note
        self._lease = lease
        self._log = log  # the open file that QEMU logs to
        self._stopped = False

    @property
    def unlimited(self) -> str | None:
        """Why the log is not a file that cannot grow beyond `LOG_LIMIT`; None when it is one."""
        until = "should this process be killed, it grows until the next attach or `doctor --clean`"
        if self.in_place:
            return f"a log of QEMU's own has no limit: {until}"
        log = self._note.log
        if log is not None and not log.limit:
            return f"this user may make no file with a limit: {until}"
        return None

    @property
    def remarks(self) -> tuple[str, ...]:
        found = []
        note = self._note
        log = note.log
        if self.in_place:
            found.append(
                f"trace lines go to QEMU's own log and stay there: {note.in_place_name}; "
                f"{self.unlimited}"
            )
            found += [note.in_place_remark] if note.in_place_remark else []
        elif self._guest.command_line.uses_log:
            found.append("QEMU's other log lines go to the trace log too until we leave")
        elif self.unlimited is not None:
            found.append(f"QEMU's log is {note.path}; {self.unlimited}")
        if log is not None and not log.kept:
            found.append(f"QEMU's log will go to {log.restore_path} afterwards: {log.why}")
        if self.missing:
            found.append(f"this QEMU does not have the events {', '.join(self.missing)}")
        return tuple(found)

    def tail(self) -> TraceTail:
        """A reader of the log from where this session began."""
        # The file that was opened at the start: QEMU may log elsewhere by now.
        path = f"/proc/self/fd/{self._log}"
        log = self._note.log
        if log is None:
            return TraceTail(path, start=self.start)
        return TraceTail(path, start=self.start, release=self._release, limit=log.limit)

    async def marker(self) -> int:
        """Write a marker to the log and return its number.

        When the tail brings the HmpCommand with this `marker`, everything that QEMU logged
        before the call has been read.  Raises as `Monitor.timed` does.
        """
        return await send_marker(self.monitor)

    async def stop(self) -> Restored:
        """Put trace states and log back.  Idempotent.

        Uses another free monitor when ours is lost but QEMU lives.  When QEMU cannot be asked,
        the note stays and the next attach restores; that is in the result, not an exception.
        """
        if self._stopped:
            return Restored()
        self._stopped = True
        try:
            async with asyncio.timeout(_RESTORE_DEADLINE):
                async with self._place.locked(_LOCK_DEADLINE):
                    self._lease.release()
                    return await self._restore()
        except (TargetError, TimeoutError, OSError) as error:
            return Restored(undone=str(error) or "QEMU did not answer in time")
        finally:
            self._lease.release()
            os.close(self._log)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def _restore(self) -> Restored:
        place, guest = self._place, self._guest
        note = place.read_note()
        if note is None or not guest.process.is_alive():
            place.clear()
            return Restored()
        others = place.live_events()
        if self.monitor.is_connected:
            return await _leave(self.monitor, place, guest, note, others)
        again = await in_thread(find_guest, guest.pid)
        free = again.free_targets() if again is not None else ()
        if not free and await guest.process.has_ended():
            place.clear()
            return Restored()
        meant = GuestIdentity.of(guest.process)
        target = self.monitor.target if self.monitor.abilities.manager else PidTarget(guest.pid)
        async with await Monitor.connect(target, meant=meant) as monitor:
            return await _leave(monitor, place, guest, note, others)

    def _release(self, offset: int) -> int:
        """For the tail: up to where every agent has read."""
        self._lease.set_position(offset)
        return self._place.lowest_position(offset)


async def start_tracing(
    monitor: Monitor, events: Sequence[str] = TRACE_EVENTS, *, guest: Guest | None = None
) -> TraceSession:
    """Enable `events` in the guest behind `monitor` and have them written where we can read.

    `guest` saves the search for it.  What a crashed agent left is restored first.  On failure and
    on cancellation everything is put back.  Raises TraceUnavailable (with a TraceReason) and as
    `Monitor.timed` does.
    """
    guest = guest or await in_thread(find_owner, monitor.target, monitor.identity)
    if guest is None:
        raise TraceUnavailable(
            TraceReason.NO_PROCESS, f"the QEMU behind {monitor.target} is not visible on this host"
        )
    states = await event_states(monitor, (*events, MARKER_EVENT))
    wanted = [e for e in events if e in states]
    if not wanted or MARKER_EVENT not in states:
        raise TraceUnavailable(
            TraceReason.NO_EVENTS, f"QEMU {monitor.version} (pid {guest.pid}) has no trace events"
        )
    await in_thread(sweep)
    place = await in_thread(Place, guest.process)
    async with place.locked(_LOCK_DEADLINE):
        others = place.live_events()
        note = place.read_note()
        if note is not None and not others:
            await undo(monitor, place, guest, note)
            states = await event_states(monitor, (*events, MARKER_EVENT))
            note = None
        missing = [e for e in events if e not in states]
        before = {e: states[e] for e in (*wanted, MARKER_EVENT)}
        lease = place.claim(before, 0)
        log = -1
        try:
            note = await _settle(monitor, guest, place, note, before)
            log, _ = _open(guest, note)
            session = TraceSession(monitor, guest, place, note, lease, log)
            session.missing = tuple(missing)
            session.shared = bool(others)
            session.start = os.fstat(log).st_size
            lease.set_position(session.start)
            refused = await set_events(monitor, wanted, True)
            session.events = frozenset(wanted) - frozenset(refused)
        except BaseException:
            if log >= 0:
                os.close(log)
            lease.release()
            await _back_out(monitor, place, guest)
            raise
    return session


async def restore_stale(monitor: Monitor, *, guest: Guest | None = None) -> Restored | None:
    """Restore what a crashed agent of this user left in this guest; None when there is nothing.

    Raises as `Monitor.timed` does, and TraceUnavailable when another user's agent is at work.
    """
    guest = guest or await in_thread(find_owner, monitor.target, monitor.identity)
    if guest is None:
        return None
    place = await in_thread(Place, guest.process)
    if place.read_note() is None:
        return None
    async with place.locked(_LOCK_DEADLINE):
        note = place.read_note()
        if note is None or place.live_events():
            return None
        return await undo(monitor, place, guest, note)


async def _settle(
    monitor: Monitor, guest: Guest, place: Place, note: TraceNote | None, before: dict[str, bool]
) -> TraceNote:
    """The note on disk, and a log file that the marker has been seen in."""
    if note is None:
        note = place.new_note(before)
        place.write_note(note)
        return await arrange_log(monitor, guest, place, note)
    if note.in_place is not None:
        await refuse_other_writers(monitor, guest, note.in_place)
    # Beside another agent: what it noted is older, and so true; events new to it are added.
    note = msgspec.structs.replace(note, events=before | note.events)
    place.write_note(note)
    log, path = _open(guest, note)
    try:
        start = os.fstat(log).st_size
        await set_events(monitor, [MARKER_EVENT], True)
        if not is_logged(path, start, await send_marker(monitor)):
            raise _elsewhere(guest)
    finally:
        os.close(log)
    return note


async def _leave(
    monitor: Monitor, place: Place, guest: Guest, note: TraceNote, others: Sequence[set[str]]
) -> Restored:
    """The last agent restores everything; another disables what only it wanted."""
    if not others:
        return await undo(monitor, place, guest, note)
    wanted = set().union(*others)
    mine = [e for e, was_on in note.events.items() if not was_on and e not in wanted]
    states = await event_states(monitor, mine)
    mine = [e for e in mine if states.get(e)]
    await set_events(monitor, mine, False)
    return Restored(events=tuple(mine), remarks=("other agents still trace this guest",))


async def _back_out(monitor: Monitor, place: Place, guest: Guest) -> None:
    """After a failed or cancelled start, our lease released; the place is still locked."""
    try:
        async with asyncio.timeout(_RESTORE_DEADLINE):
            note = place.read_note()
            if note is not None:
                await _leave(monitor, place, guest, note, place.live_events())
    except (TargetError, TimeoutError):
        return


def _open(guest: Guest, note: TraceNote) -> tuple[int, str]:
    """As `TraceNote.open_log` does.  Raises TraceUnavailable."""
    try:
        return note.open_log(guest.process)
    except FileNotFoundError:
        raise _elsewhere(guest) from None
    except OSError as error:
        raise TraceUnavailable(
            TraceReason.LOG_UNREADABLE,
            f"the log of QEMU (pid {guest.pid}) cannot be opened: {error.strerror}",
        ) from error


def _elsewhere(guest: Guest) -> TraceUnavailable:
    return TraceUnavailable(
        TraceReason.NOT_LOGGED,
        f"another agent's log of QEMU (pid {guest.pid}) is no longer written to",
    )
