"""What agents of ours that were killed have left in a guest by an update: a pause, backends.

`left_behind` finds it, `confirmed` asks the guest whether it is still so, `take_away` ends it, if
that is right.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CommandFailed, OperationFailed
from ..host import notes
from ..qmp import Command, Monitor
from ..qmp.freeze import FreezeKey
from ..qmp.guest import LOOK, GuestLook, look
from ..qmp.identity import GuestIdentity
from .journal import MadeNote, left_made, remove, still_there
from .model import removal
from .pause.guard import has_guest
from .pause.guard_notes import GuardNote, unfinished

__all__ = ["REMEDY", "LeftBehind", "confirmed", "left_behind", "take_away"]

REMEDY = "`qmp-memlistener doctor --clean`"


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """A stale note, `pid` of its QEMU, None where that is not visible."""

    note: notes.Stale[GuardNote] | notes.Stale[MadeNote]

    @property
    def pid(self) -> int | None:
        return self.note.note.pid

    @property
    def guest(self) -> GuestIdentity:
        """That QEMU, and no other that has its process id by now."""
        return _meant(self.note.note)

    @property
    def path(self) -> str:
        return self.note.path

    @property
    def text(self) -> str:
        """For people; what is so now is in `confirmed`."""
        note = self.note.note
        if isinstance(note, MadeNote):
            return note.text
        was = "was paused" if note.state == "stopped" else "was about to be paused"
        return (
            f"{note.guest} {was} by an agent of ours (pid {note.agent}) that was killed, {note.ago}"
        )


def left_behind(key: FreezeKey | None = None) -> list[LeftBehind]:
    """What the notes say (about one guest); no guest is asked."""
    made = left_made(key.name if key is not None else None)
    return [*map(LeftBehind, unfinished(key)), *map(LeftBehind, made)]


async def confirmed(monitor: Monitor, left: LeftBehind) -> str | None:
    """What is so now, in words; None, and the note is gone, when nothing is left any more.

    Raises as `Monitor.pipeline` does.
    """
    note = left.note.note
    if isinstance(note, MadeNote):
        there = await still_there(monitor, note)
        if not there:
            left.note.remove()
            return None
        names = ", ".join(f"{a.role} {a.id} ({a.type})" for a in there)
        return f"{names} is left over in QEMU (pid {note.pid}) by an agent of ours that was killed"
    seen = await look(monitor)
    if seen.status == "running":
        left.note.remove()
        return None
    if seen.status == "paused":
        return (
            f"{note.guest} was paused by an agent of ours (pid {note.agent}) that was killed, "
            f"{note.ago}"
        )
    return f"{left.text}; it is {seen.status} now"


async def take_away(monitor: Monitor, left: LeftBehind) -> bool:
    """Resume the guest, or remove what was made for it and is not used.

    False when it was no longer left over.  Raises OperationFailed when that would not be right, or
    QEMU refuses, and says why.
    """
    held = left.note.take()
    if held is None:
        return False
    with held:
        if await confirmed(monitor, left) is None:
            return False
        note = left.note.note
        _check_process(monitor, note)
        if isinstance(note, MadeNote):
            await _remove(monitor, note)
        else:
            await _resume(monitor, note)
        held.remove()
    return True


def _meant(note: notes.DiskNote) -> GuestIdentity:
    return GuestIdentity(note.pid, note.start_ticks or 0, note.pid is not None)


def _check_process(monitor: Monitor, note: notes.DiskNote) -> None:
    """The monitor is of the very QEMU that the note is about."""
    if note.pid is None or monitor.identity != _meant(note):
        raise OperationFailed(
            f"{monitor.target} is not known to be a monitor of the QEMU (pid {note.pid or '?'}) "
            "that the note is about; nothing was touched",
            remedy="`show` lists what is left over in the guest; undo it by hand",
        )


async def _resume(monitor: Monitor, note: GuardNote) -> None:
    seen = await look(monitor)
    why = ""
    if has_guest(seen):
        why = f"a migration has it (migration {seen.migration}, state {seen.status})"
    elif seen.status != "paused":
        why = f"it is in the state {seen.status}"
    elif note.state != "stopped":
        why = "whether it was stopped by that agent or by another client is unknown"
    elif (ran := _have_run(note)) is None:
        why = "whether it has run since, and was then paused by another client, is unknown"
    elif ran:
        why = (
            "the threads of its vCPUs have run since: another client may have resumed it and "
            "paused it again"
        )
    if why:
        raise OperationFailed(
            f"{note.guest} was paused by an agent of ours, but is not resumed: {why}",
            remedy="if it is to run, send `cont` to one of its monitors",
        )
    cont, *looked = await monitor.pipeline([Command("cont"), *LOOK])
    if isinstance(cont, CommandFailed):
        raise cont
    if GuestLook.of(*looked).ran_twice(seen):
        await monitor.execute("stop")
        raise OperationFailed(
            f"{note.guest} was migrated at this moment; it was stopped again",
            remedy="send `cont` to a monitor of the QEMU that it was migrated to",
        )


async def _remove(monitor: Monitor, note: MadeNote) -> None:
    refused = []
    for thing in await still_there(monitor, note):
        try:
            await remove(monitor, removal(thing))
        except CommandFailed as exc:
            refused.append(f"{thing.role} {thing.id}: {exc.desc}")
    if refused:
        raise OperationFailed(
            f"QEMU (pid {note.pid}) did not remove {'; '.join(refused)}",
            remedy="is something else using it?",
        )


def _have_run(note: GuardNote) -> bool | None:
    """The threads of the vCPUs, which sleep in a guest that is stopped, have not slept since.

    None when that cannot be seen.
    """
    for thread, before in note.vcpus.items():
        try:
            with open(f"/proc/{note.pid}/task/{int(thread)}/schedstat") as f:
                if int(f.read().split()[2]) != before:
                    return True
        except (OSError, ValueError, IndexError):
            return None
    return False if note.vcpus else None
