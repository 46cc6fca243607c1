"""What agents that died have left in guests, and taking it away.

The notes are `trace_notes`'; a note without a live agent means trace events that are still on and,
where it was redirected, a log that still goes to us.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import MonitorBusy, TraceUnavailable
from .connection import Monitor
from .discovery import Guest, find_guest
from .identity import GuestIdentity
from .targets import PidTarget
from .trace_control import Restored, restore_stale
from .trace_notes import Place, noted, sweep

__all__ = ["Leftover", "clean_leftovers", "find_leftovers"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something of ours in a running guest: `what` in words, `where` the note lies."""

    guest: Guest
    what: str
    where: str


def find_leftovers() -> list[Leftover]:
    """What crashed agents of this user left in guests that still run.

    Files about QEMUs that are gone are removed on the way: nobody needs them.
    """
    sweep()
    found = []
    for process in noted():
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
        found.append(Leftover(guest, what, place.path))
    return found


async def clean_leftovers(leftover: Leftover) -> Restored | None:
    """Put one guest back as it was before the agent that died.

    Raises MonitorBusy when none of its monitors is free, and as `Monitor.connect` does.
    """
    free = leftover.guest.free_targets()
    if not free:
        raise MonitorBusy(
            f"no monitor of QEMU (pid {leftover.guest.pid}) is free",
            remedy="disconnect the other client; the next attach restores it, too",
        )
    meant = GuestIdentity.of(leftover.guest.process)
    async with await Monitor.connect(PidTarget(leftover.guest.pid), meant=meant) as monitor:
        return await restore_stale(monitor, guest=leftover.guest)
