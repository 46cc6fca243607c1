"""The steps of `trace_control`: event states, proving where the log goes, redirecting, undoing.

Each step leaves things so that `undo` with the note on disk puts them back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import msgspec

from ..errors import CommandFailed, TraceReason, TraceUnavailable
from ..host.bounded import in_thread
from ..host.files import open_foreign, pieces
from ..host.limited_file import give_back
from ..host.processes import Process
from .connection import Command, Monitor
from .discovery import Guest
from .hmp import hmp
from .trace_lending import open_to_qemu
from .trace_lines import new_marker
from .trace_log import LogFile, check_writers, find_log_files, restore_target
from .trace_notes import Place, Redirection, TraceNote

__all__ = [
    "MARKER_EVENT",
    "Restored",
    "arrange_log",
    "event_states",
    "is_logged",
    "refuse_other_writers",
    "send_marker",
    "set_events",
    "undo",
]

P = ParamSpec("P")
T = TypeVar("T")

MARKER_EVENT = "handle_hmp_command"

_LOOK_DEADLINE = 3.0
_SEARCHED = 16 * 1024 * 1024
"""How much of a log is looked through for a marker."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put back: the events that were disabled, where the log goes now (None when it
    was not touched), and `remarks` on what could not be put back.  `undone` says that nothing
    was, and why."""

    events: tuple[str, ...] = ()
    log: str | None = None
    remarks: tuple[str, ...] = ()
    undone: str | None = None


async def _looked(
    process: Process, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """The function's result, from a thread.  Raises TraceUnavailable when a file system on which
    this QEMU has files does not answer."""
    try:
        async with asyncio.timeout(_LOOK_DEADLINE):
            return await in_thread(function, *args, **kwargs)
    except TimeoutError:
        raise TraceUnavailable(
            TraceReason.LOG_UNREADABLE,
            f"a file system that QEMU (pid {process.pid}) uses does not answer: where its log goes "
            "cannot be seen",
        ) from None


async def event_states(monitor: Monitor, names: Sequence[str]) -> dict[str, bool]:
    """Whether each event is enabled; those this QEMU does not have, or not in use, are absent."""
    replies = await monitor.pipeline(
        [Command("trace-event-get-state", {"name": name}) for name in names]
    )
    states = {}
    for reply in replies:
        if isinstance(reply, CommandFailed) or not isinstance(reply.value, list):
            continue
        for entry in reply.value:
            # "unavailable": built without it (qapi/trace.json, TraceEventState).
            if isinstance(entry, Mapping) and entry.get("state") in ("enabled", "disabled"):
                states[str(entry.get("name"))] = entry["state"] == "enabled"
    return states


async def set_events(monitor: Monitor, names: Sequence[str], enable: bool) -> list[str]:
    """Enable or disable events; returns those that QEMU refused."""
    if not names:
        return []
    replies = await monitor.pipeline(
        [Command("trace-event-set-state", {"name": n, "enable": enable}) for n in names]
    )
    return [n for n, r in zip(names, replies, strict=True) if isinstance(r, CommandFailed)]


async def send_marker(monitor: Monitor) -> int:
    """Have QEMU log a line with a number of ours.  It is in the log when this returns: the line
    is written before the command runs (handle_hmp_command, monitor/hmp.c)."""
    number = new_marker()
    await hmp(monitor, "print", number)
    return number


def is_logged(path: str, start: int, number: int) -> bool:
    """The marker's line is in the file behind `start`."""
    wanted = b"cmdline: print %#x\n" % number
    try:
        handle = open_foreign(path, follow=True)
    except OSError:
        return False
    try:
        return wanted in b"".join(pieces(handle, _SEARCHED, start))
    except OSError:
        return False
    finally:
        os.close(handle)


async def arrange_log(monitor: Monitor, guest: Guest, place: Place, note: TraceNote) -> TraceNote:
    """Find or make the file that QEMU logs to; the note that is on disk by then.

    Raises TraceUnavailable; the caller undoes what was done.
    """
    if guest.command_line.log_per_thread:
        raise TraceUnavailable(
            TraceReason.LOG_PER_THREAD, f"QEMU (pid {guest.pid}) keeps one log per thread"
        )
    candidates = await _looked(guest.process, find_log_files, guest.process, guest.command_line)
    if candidates:
        await set_events(monitor, [MARKER_EVENT], True)
        log = await _prove(monitor, guest, candidates)
        if log is not None:
            remark = await refuse_other_writers(monitor, guest, log.path)
            note = msgspec.structs.replace(
                note, in_place=log.path, in_place_name=log.name, in_place_remark=remark
            )
            place.write_note(note)
            return note
        if not note.events[MARKER_EVENT]:
            await set_events(monitor, [MARKER_EVENT], False)
    target = await _looked(guest.process, restore_target, guest.process, guest.command_line)
    if not target.kept:
        await _refuse_if_log_in_use(monitor, guest, note, target)
    return await _redirect(monitor, guest, place, note, target)


async def refuse_other_writers(monitor: Monitor, guest: Guest, path: str) -> str:
    """A remark for the user, or "".  Raises TraceUnavailable when not only QEMU itself writes to
    its log at `path`."""
    status = await _looked(guest.process, os.stat, path)
    return await _looked(
        guest.process,
        check_writers,
        status.st_dev,
        status.st_ino,
        guest.process,
        guest.command_line,
        await _chardevs(monitor),
    )


async def _chardevs(monitor: Monitor) -> list[str]:
    try:
        found = await monitor.execute("query-chardev")
    except CommandFailed:
        return []
    entries = found if isinstance(found, list) else []
    return [str(e.get("filename")) for e in entries if isinstance(e, Mapping)]


async def _prove(monitor: Monitor, guest: Guest, candidates: Sequence[LogFile]) -> LogFile | None:
    starts = []
    for log in candidates:
        with contextlib.suppress(OSError):
            starts.append((log, await _looked(guest.process, log.size)))
    number = await send_marker(monitor)
    for log, start in starts:
        if await _looked(guest.process, is_logged, log.path, start, number):
            return log
    for log, start in starts:
        before = max(0, start - _SEARCHED)
        if await _looked(guest.process, is_logged, log.path, before, number):
            # another writer made the file longer than QEMU's offset: what QEMU logs lies within it
            await refuse_other_writers(monitor, guest, log.path)
            raise TraceUnavailable(
                TraceReason.LOG_SHARED,
                f"QEMU (pid {guest.pid}) does not write at the end of its log: others have",
            )
    return None


async def _refuse_if_log_in_use(
    monitor: Monitor, guest: Guest, note: TraceNote, target: Redirection
) -> None:
    """A log that cannot be put back may be taken only while nothing is logged."""
    enabled = [name for name, on in (await event_states(monitor, ["*"])).items() if on]
    others = [n for n in enabled if n != MARKER_EVENT or note.events.get(MARKER_EVENT)]
    if guest.command_line.uses_log or others:
        in_use = f"trace event {others[0]}" if others else "-d or -trace on its command line"
        raise TraceUnavailable(
            TraceReason.LOG_NOT_RESTORABLE,
            f"the log of QEMU (pid {guest.pid}) is in use ({in_use}) and could not be put back: "
            f"{target.why}",
        )


async def _redirect(
    monitor: Monitor, guest: Guest, place: Place, note: TraceNote, target: Redirection
) -> TraceNote:
    process = guest.process
    try:
        # a limited file is handed over, and found again, by QEMU's descriptors
        visible = await _looked(process, process.file_descriptors) is not None
        handle, limit = await in_thread(place.create_log, limited=visible)
    except OSError as error:
        raise TraceUnavailable(
            TraceReason.NO_PLACE, f"no log file can be made in {place.path}: {error.strerror}"
        ) from error
    try:
        change = msgspec.structs.replace(target, proven=False)
        if limit:
            status = os.fstat(handle)
            change = msgspec.structs.replace(
                change, device=status.st_dev, inode=status.st_ino, limit=limit
            )
        else:
            change = msgspec.structs.replace(change, path=place.log_path)
        place.write_note(msgspec.structs.replace(note, log=change))
        async with open_to_qemu(monitor, process, change.path, handle) as theirs:
            await hmp(monitor, "logfile", theirs, quiet=True)
        # Only now: its line about `logfile` would have gone to the log as it was.
        await set_events(monitor, [MARKER_EVENT], True)
        if not is_logged(f"/proc/self/fd/{handle}", 0, await send_marker(monitor)):
            raise TraceUnavailable(
                TraceReason.NOT_LOGGED,
                f"trace events of QEMU {monitor.version} (pid {guest.pid}) do not reach its log",
            )
    except CommandFailed as error:
        raise TraceUnavailable(
            TraceReason.LOG_REFUSED, f"QEMU (pid {guest.pid}) cannot open a log: {error.desc}"
        ) from error
    finally:
        os.close(handle)
    note = msgspec.structs.replace(note, log=change)
    proven = msgspec.structs.replace(change, path=await _called(process, note), proven=True)
    note = msgspec.structs.replace(note, log=proven)
    place.write_note(note)
    return note


async def _called(process: Process, note: TraceNote) -> str:
    """What our log is called."""
    try:
        handle, path = await _looked(process, note.open_log, process)
    except OSError as error:
        raise TraceUnavailable(
            TraceReason.NO_PLACE, f"QEMU's log cannot be opened: {error.strerror}"
        ) from error
    os.close(handle)
    return path


async def undo(monitor: Monitor, place: Place, guest: Guest, note: TraceNote) -> Restored:
    """Put back as `note` has it what is still as we left it, and remove the note.

    A log that somebody has redirected since, and an event that somebody has switched off, are left
    alone.  Raises as `Monitor.timed` does; the note then stays for the next attach.
    """
    ours = [name for name, was_on in note.events.items() if not was_on]
    states = await event_states(monitor, ours)
    log = note.log
    redirect = log is not None and await _still_logs_here(
        monitor, guest.process, note, marked=states.get(MARKER_EVENT, True)
    )
    disabled = [name for name in ours if states.get(name)]
    refused = await set_events(monitor, disabled, False)
    remarks = [f"trace event {name} could not be disabled" for name in refused]
    where: str | None = None
    if log is not None:
        if redirect:
            where = await _restore_log(monitor, guest, log, remarks)
        else:
            remarks.append("another client has redirected QEMU's log since: it is left as it is")
    place.clear()
    return Restored(tuple(n for n in disabled if n not in refused), where, tuple(remarks))


async def _still_logs_here(
    monitor: Monitor, process: Process, note: TraceNote, *, marked: bool
) -> bool:
    """QEMU's log still goes to our file.

    A marker shows it where `marked` (its event is on); else whether QEMU has the file open, which
    it does a moment longer than it writes there.  What QEMU has not been seen to log is unknown: it
    may have lost its log by our doing, and is given it back.
    """
    log = note.log
    if log is None or not log.proven:
        return True
    try:
        handle, _ = await _looked(process, note.open_log, process)
    except FileNotFoundError:
        return False
    except (OSError, TraceUnavailable):
        return True
    try:
        if not marked:
            return True
        end = os.fstat(handle).st_size
        if log.limit:
            give_back(handle, 0, end)  # a full file takes no marker
        return is_logged(f"/proc/self/fd/{handle}", end, await send_marker(monitor))
    finally:
        os.close(handle)


async def _restore_log(
    monitor: Monitor, guest: Guest, log: Redirection, remarks: list[str]
) -> str | None:
    path, why = log.restore_path, log.why
    if path == "/dev/stderr":
        # Looked at again: opening a FIFO that has lost its reader would hang QEMU.
        try:
            now = await _looked(guest.process, restore_target, guest.process, guest.command_line)
            path, why = now.restore_path, now.why
        except TraceUnavailable as error:
            path, why = "/dev/null", error.message
    try:
        await hmp(monitor, "logfile", path, quiet=True)
    except CommandFailed as error:
        why = error.desc
        path = "/dev/null"
        with contextlib.suppress(CommandFailed):
            await hmp(monitor, "logfile", path, quiet=True)
    if why:
        remarks.append(f"QEMU's log goes to {path} now: {why}")
    return path
