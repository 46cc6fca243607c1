"""What agents of ours that were killed left in guests that still run: found, and taken away.

Three kinds, each noted on disk before the guest was touched: trace events and a redirected log
(`qmp.trace_notes`), the lock profiler (`probes.lockprofile`), and updates that did not come to
their end (`updates.left_behind`).  An attach puts the first two back as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ..errors import (
    MemListenerError,
    MonitorBusy,
    OperationFailed,
    TargetError,
    TraceUnavailable,
)
from ..host.bounded import in_thread
from ..host.notes import Stale
from ..host.state import ending_authors
from ..probes.lockprofile import ProfilerNote, left_on, switch_off
from ..qmp import Guest, Monitor, PidTarget, find_guest, restore_stale
from ..qmp.freeze import check_not_frozen, process_key
from ..qmp.identity import GuestIdentity
from ..qmp.trace_notes import Place, noted_processes, sweep
from ..updates.left_behind import REMEDY, LeftBehind, confirmed, left_behind, take_away

__all__ = ["Leftover", "clean_leftovers", "find_leftovers", "switch_off_profiler"]

_ENDING_S = 10.0  # the kernel closes uprobes one by one: seconds
_ENDING_LOOK_S = 0.05
_ATTACH = f"{REMEDY}, or attach to that guest again"


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something of ours in a running guest: `what` in words, `where` the note about it lies.

    `guest` is None where QEMU's process is not visible.  `take_away` returns False when it was no
    longer there.
    """

    what: str
    where: str
    guest: Guest | None
    take_away: Callable[[], Awaitable[bool]]
    remedy: str = REMEDY


async def find_leftovers() -> list[Leftover]:
    """What is left over.  About updates the guests are asked whether it is so still.

    Notes about QEMUs that are gone are removed on the way.  An agent that was killed is waited for
    until it has ended, as a rule: before that its notes do not count as left over.
    """
    ending = await _after_ending()
    found = [_of_ending(pid) for pid in ending]
    found += await in_thread(lambda: [*_traced(), *_profiled()])
    for left in await in_thread(left_behind):
        update = await _update(left)
        if update is not None:
            found.append(update)
    return found


async def clean_leftovers(
    leftovers: list[Leftover],
) -> tuple[list[str], list[OperationFailed | TargetError]]:
    """Take away what can be; returns what was taken away, in words, and why the rest was not."""
    done: list[str] = []
    failed: list[OperationFailed | TargetError] = []
    for left in leftovers:
        try:
            if left.guest is not None:
                check_not_frozen(process_key(left.guest.process))
            if await left.take_away():
                done.append(left.what)
        except (OperationFailed, TargetError) as exc:
            failed.append(exc)
    return done, failed


async def switch_off_profiler(monitor: Monitor, owner: Guest) -> list[str]:
    """What a probe whose agent was killed left switched on in this guest, put back; in words."""
    return [
        f"put back what an agent that was killed had left: {left.note.text}"
        for left in left_on(owner.process)
        if await switch_off(monitor, left)
    ]


async def _after_ending() -> list[int]:
    """Wait for agents that were killed; returns those that have not ended within the time."""
    until = time.monotonic() + _ENDING_S
    while ending := await in_thread(ending_authors):
        if time.monotonic() > until:
            break
        await asyncio.sleep(_ENDING_LOOK_S)
    return ending


def _of_ending(pid: int) -> Leftover:
    async def not_yet() -> bool:
        raise OperationFailed(
            f"an agent that was killed (pid {pid}) has not ended yet",
            remedy="repeat this in some seconds",
        )

    what = f"what an agent that was killed (pid {pid}) left, unknown until it has ended"
    return Leftover(what, f"/proc/{pid}", None, not_yet, "repeat this in some seconds")


def _traced() -> Iterator[Leftover]:
    """Trace events that are on, logs that go to us."""
    sweep()
    for process in noted_processes():
        guest = find_guest(process.pid)
        if guest is None:
            continue
        try:
            place = Place(process)
            note = place.read_note()
        except TraceUnavailable:
            continue  # another user's agent is at work there: not left over
        if note is None or place.live_events():
            continue
        on = sorted(name for name, was_on in note.events.items() if not was_on)
        what = f"trace events {', '.join(on)} are on in QEMU (pid {guest.pid})"
        if note.in_place is None:
            what += f", and its log goes to {note.path}"
        yield Leftover(what, place.path, guest, partial(_restore, guest), _ATTACH)


async def _restore(guest: Guest) -> bool:
    """Raises MonitorBusy when none of its monitors is free, and as `Monitor.connect` does."""
    if not guest.free_targets():
        raise MonitorBusy(
            f"no monitor of QEMU (pid {guest.pid}) is free",
            remedy="disconnect the other client; the next attach restores it, too",
        )
    meant = GuestIdentity.of(guest.process)
    async with await Monitor.connect(PidTarget(guest.pid), meant=meant) as monitor:
        return await restore_stale(monitor, guest=guest) is not None


def _profiled() -> Iterator[Leftover]:
    for left in left_on():
        pid = left.note.pid
        assert pid is not None
        yield Leftover(
            left.note.text, left.path, find_guest(pid), partial(_switch_off, left, pid), _ATTACH
        )


async def _switch_off(left: Stale[ProfilerNote], pid: int) -> bool:
    meant = GuestIdentity(pid, left.note.start_ticks or 0, True)
    async with await Monitor.connect(PidTarget(pid), meant=meant) as monitor:
        return await switch_off(monitor, left)


async def _update(left: LeftBehind) -> Leftover | None:
    """None when the guest says that nothing is left."""
    pid = left.pid
    if pid is None:
        return Leftover(left.text, left.path, None, _not_visible)
    try:
        async with await Monitor.connect(PidTarget(pid), meant=left.guest) as monitor:
            text = await confirmed(monitor, left)
    except MemListenerError as exc:
        text = f"{left.text} (whether this still holds is unknown: {exc.message})"
    if text is None:
        return None
    return Leftover(text, left.path, find_guest(pid), partial(_end_update, left, pid))


async def _end_update(left: LeftBehind, pid: int) -> bool:
    async with await Monitor.connect(PidTarget(pid), meant=left.guest) as monitor:
        return await take_away(monitor, left)


async def _not_visible() -> bool:
    raise OperationFailed(
        "the QEMU that was paused is not visible here",
        remedy="send `cont` to one of its monitors if it is to run",
    )
