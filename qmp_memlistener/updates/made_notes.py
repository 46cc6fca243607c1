"""Notes of backends that are being made for a device that is about to be plugged.

One note (`host.notes`) for each update, KEY.made-TOKEN: written before the first backend is made,
removed when the device is in or what was made has been removed.  A stale one tells what an agent
that was killed has left in QEMU, perhaps gigabytes of memory.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from ..errors import MemListenerError, MissingPrerequisite
from ..host import notes
from ..host.directory import HeldFile
from ..host.processes import Process
from ..qmp import Monitor
from ..qmp.guest_devices import PERIPHERAL, read_children
from ..qmp.identity import GuestIdentity
from .guest_view import backends_of, read_ids
from .model import Addition, Role
from .steps import UpdatePlan

__all__ = ["MadeNote", "left_made", "noted", "still_there"]

_WHAT = "made"


class Made(msgspec.Struct, frozen=True):
    """Something that is made: what it is called, and its type."""

    role: str
    id: str
    type: str

    @property
    def addition(self) -> Addition:
        role = Role(self.role)
        return Addition(role, self.id, {role.id_key: self.id, role.type_key: self.type}, typed=True)

    def __str__(self) -> str:
        return f"{self.role} {self.id} ({self.type})"


class MadeNote(notes.Note, frozen=True, kw_only=True):
    """`things` are made, in this order, from `t_ns` (CLOCK_MONOTONIC) on, for these `devices`."""

    devices: list[str]
    things: list[Made]
    t_ns: int

    @property
    def text(self) -> str:
        """For people."""
        ago = max(0, time.monotonic_ns() - self.t_ns) // 1_000_000_000
        things = ", ".join(map(str, self.things))
        return (
            f"an agent of ours that was killed {ago} s ago or later was making {things} in QEMU "
            f"(pid {self.pid}) for {', '.join(self.devices)}"
        )


@asynccontextmanager
async def noted(monitor: Monitor, plan: UpdatePlan) -> AsyncIterator[None]:
    """Note what is prepared inside the block, and at its end that nothing of it is left over.

    What could not be removed again stays noted.  Without a QEMU that can be told apart, or a
    directory that is ours alone, there is no note.
    """
    held = _write(monitor.identity, plan) if plan.prepare else None
    if held is None:
        yield
        return
    with held:
        try:
            yield
        except BaseException:
            if not await _is_left(monitor, held):
                held.remove()
            raise
        held.remove()


def left_made(key: str | None = None) -> list[notes.Stale[MadeNote]]:
    """What agents that were killed may have left (in the QEMU `key`)."""
    return notes.stale(_WHAT, MadeNote, key=key)


async def still_there(monitor: Monitor, note: MadeNote) -> list[Addition]:
    """What of it exists and is used by no device, in the order in which it can be removed."""
    devices = await read_children(monitor, PERIPHERAL)
    if not devices.keys().isdisjoint(note.devices):
        return []  # and they stand on it
    there = [made.addition for made in note.things]
    ids = await read_ids(monitor, {a.role for a in there})
    kinds = await read_children(monitor, "/objects")
    used = {(b.role, b.id) for name in devices for b in await backends_of(monitor, name)}
    return [
        a
        for a in reversed(there)
        if a.id in ids.get(a.role, ())
        and (a.role, a.id) not in used
        and (a.role is not Role.OBJECT or kinds.get(a.id) == a.type)
    ]


def _write(guest: GuestIdentity, plan: UpdatePlan) -> HeldFile | None:
    process = Process.read(guest.pid) if guest.pid is not None else None
    if process is None or guest != GuestIdentity.of(process):
        return None
    made = [step.addition for step in plan.prepare if step.addition is not None]
    things = [Made(str(a.role), a.id, a.type) for a in made]
    now = time.monotonic_ns()
    note = MadeNote.about(process, devices=list(plan.devices), things=things, t_ns=now)
    try:
        held = notes.hold(notes.new_name(process.key, _WHAT))
        if held is not None:
            held.write(msgspec.json.encode(note))
    except (MissingPrerequisite, OSError):
        return None
    return held


async def _is_left(monitor: Monitor, held: HeldFile) -> bool:
    """What was made has not all been removed, as far as QEMU tells; nothing outlives it."""
    note = msgspec.json.decode(held.read(), type=MadeNote)
    try:
        return bool(await still_there(monitor, note))
    except MemListenerError:
        process = Process.read(note.pid) if note.pid is not None else None
        if process is None or process.start_ticks != note.start_ticks:
            return False
        return not await process.has_ended()
