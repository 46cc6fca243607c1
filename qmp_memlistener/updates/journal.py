"""What an update has made so far, in memory and in a note, and the way back.

`Journal`: steps that QEMU has answered are known to be made; one that was sent and not answered may
be.  What is taken back is struck out, so that what is left can be named at any moment, a second
interruption included.

`noted` keeps a note (`host.notes`) of the backends that are being made for a device that is about
to be plugged, one for each update, KEY.made-TOKEN: written before the first backend is made,
removed when the device is in or what was made has been removed.  A stale one says what an agent
that was killed has left in QEMU, perhaps gigabytes of memory.

`remove` and `wait_freed`: how a backend is removed without harm.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager

import msgspec

from ..errors import (
    CommandFailed,
    DeadlineExceeded,
    MemListenerError,
    MissingPrerequisite,
    TargetUnreachable,
)
from ..host import notes
from ..host.directory import HeldFile
from ..host.processes import Process
from ..qmp import Command, Monitor
from ..qmp.guest import count_ram_blocks, read_backends, read_migration
from ..qmp.guest_devices import PERIPHERAL, read_children
from ..qmp.identity import GuestIdentity
from ..text import json_bytes
from .guest_view import backends_of, read_ids
from .model import Addition, Role, UpdatePlan, UpdateStep, Value
from .pause.guard import WAIT
from .settings import Waiting

__all__ = [
    "Journal",
    "MadeNote",
    "count_memory_backends",
    "left_made",
    "noted",
    "remove",
    "still_there",
    "wait_freed",
]


_SETUP_S = 10.0
_SETUP_POLL_S = 0.005
_FREED_S = 2.0
_FREED_POLL_S = 0.01


async def remove(monitor: Monitor, command: Command, *, deadline: float = 10.0) -> None:
    """Send a command that removes a backend; a memory backend not while a migration is set up.

    Under TCG that stops QEMU for good: the thread of the migration has the lock of the list of RAM
    blocks and gives the BQL away meanwhile, and the main loop, with the BQL, waits for that lock
    (ram_init_bitmaps in migration/ram.c; do_run_on_cpu; qemu_ram_free and qemu_ram_alloc, 7.2).
    What begins between the question and the command cannot be excluded.  Raises DeadlineExceeded
    after a while, and as `Monitor.execute`.
    """
    if command.name == Role.OBJECT.remove_command:
        await _await_set_up(monitor)
    await monitor.execute(command.name, command.arguments, deadline=deadline)


async def _await_set_up(monitor: Monitor) -> None:
    until = time.monotonic() + _SETUP_S
    while await read_migration(monitor) == "setup":
        if time.monotonic() > until:
            raise DeadlineExceeded(
                f"a migration has been set up for {_SETUP_S:g} s: no object was removed meanwhile",
                remedy=WAIT,
            )
        await asyncio.sleep(_SETUP_POLL_S)


async def count_memory_backends(monitor: Monitor, removals: Iterable[Command]) -> int:
    """How many of these commands remove a memory backend.  Raises TargetError."""
    ids = {
        command.arguments.get("id")
        for command in removals
        if command.name == Role.OBJECT.remove_command and command.arguments is not None
    }
    return len((await read_backends(monitor)).keys() & ids) if ids else 0


async def wait_freed(monitor: Monitor, most: int) -> bool:
    """Wait until there are `most` RAM blocks; False when it takes longer than two seconds.

    `object-del` returns before: the block goes with the last FlatView that shows it, by RCU.
    Whoever plugs the same device again in between makes QEMU 7.2 abort ('RAMBlock "…" already
    registered', qemu_ram_set_idstr of softmmu/physmem.c; seen with ivshmem-plain).
    """
    end = time.monotonic() + _FREED_S
    while True:
        count = await count_ram_blocks(monitor)
        if count is None or count <= most:
            return True
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(_FREED_POLL_S)


UNDO_DEADLINE = 10.0
_WHAT = "made"


class Journal:
    """`made` and `asked`, the oldest first; `notes` say what came of taking back.

    `stands`: a device was changed, so that nothing is taken back.  `waiting` is given what QEMU is
    asked for, and when it has answered.
    """

    def __init__(self, notes: list[str], waiting: Waiting) -> None:
        self.notes = notes
        self._waiting = waiting
        self.made: list[UpdateStep] = []
        self.asked: tuple[UpdateStep, ...] = ()
        self.stands = False
        self._removed: list[str] = []

    def ask(self, *steps: UpdateStep) -> None:
        """They are sent now."""
        self.asked = steps
        self._waiting.ask(" and ".join(step.command.name for step in steps))

    def answered(self, steps: Iterable[UpdateStep]) -> None:
        """Of those that were sent QEMU has carried out these, and no others."""
        self.asked = ()
        self.made += steps
        self._waiting.answered()

    @property
    def left(self) -> list[str]:
        """What is there now, in words."""
        return [step.state for step in self.made] + [
            f"whether {step.state} is unknown" for step in self.asked
        ]

    @property
    def removed(self) -> str:
        """What was taken back, in words."""
        if not self._removed:
            return "nothing had been made"
        return f"what had been made was removed: {', '.join(self._removed)}"

    async def take_back(self, ops: Monitor) -> None:
        """In reverse; what cannot be taken back is noted.  Bounded, also when cancelled again."""
        await _bounded(self._take_back(ops))

    async def _take_back(self, ops: Monitor) -> None:
        known = False
        try:
            if not ops.is_connected:
                await ops.reconnect()
            known = await self._was_made(ops)
        except TargetUnreachable:
            self.made, self.asked = [], ()
            return  # QEMU has gone, and all that was made with it
        except MemListenerError as exc:
            self.notes.append(f"what was changed may not be as it was before: {exc.message}")
        self.notes += [
            f"{step.what}: whether QEMU took the command is unknown"
            for step in self.asked
            if step.undo is None and step.addition is None
        ]
        if known:
            return
        for step in reversed((*self.made, *self.asked)):
            if step.undo is None:
                continue
            sure = step in self.made
            try:
                await remove(ops, step.undo, deadline=UNDO_DEADLINE)
            except CommandFailed as exc:
                if sure:
                    self.notes.append(f"{step.what} is still there: {exc.message}")
                    continue
                # one that was never made cannot be removed
            except MemListenerError as exc:
                self.notes.append(f"{step.what} may still be there: {exc.message}")
                return
            self._strike(step)

    def _strike(self, step: UpdateStep) -> None:
        if step in self.made:
            self.made.remove(step)
            self._removed.insert(0, step.what)
        self.asked = tuple(s for s in self.asked if s is not step)

    async def _was_made(self, ops: Monitor) -> bool:
        """Whether a device has come or gone although the answer to its device_add or device_del has
        not come.  One that is still there may have been asked for: the guest lets it go, or not.
        """
        commands = (Role.DEVICE.add_command, Role.DEVICE.remove_command)
        changed = [step for step in self.asked if step.command.name in commands]
        if not changed:
            return False
        there = await read_children(ops, PERIPHERAL)
        for step in changed:
            is_there = (step.command.arguments or {}).get("id") in there
            if step.addition is None and is_there:
                continue
            self._strike(step)
            if step.addition is None or is_there:
                self.made.append(step)
                how = "there all the same, with its backends" if is_there else "gone"
                self.notes.append(f"{step.what} is {how}")
                self.stands = True
        return self.stands


async def _bounded(work: Coroutine[object, object, None]) -> None:
    """Also when cancelled meanwhile, it gets its time; cancelled again, it ends."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=UNDO_DEADLINE)
    finally:
        task.cancel()


# -- notes -----------------------------------------------------------------------------------


class Made(msgspec.Struct, frozen=True):
    """Something that is made: what it is called, and its type."""

    role: Role
    id: str
    type: str

    @property
    def addition(self) -> Addition:
        names: dict[str, Value] = {self.role.id_key: self.id, self.role.type_key: self.type}
        return Addition(self.role, self.id, names, typed=True)

    def __str__(self) -> str:
        return f"{self.role} {self.id} ({self.type})"


class MadeNote(notes.DiskNote, frozen=True, kw_only=True):
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

    What could not be removed again stays noted.  Without a QEMU that can be identified, or a
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
        return []  # which use it
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
    things = [Made(a.role, a.id, a.type) for a in made]
    now = time.monotonic_ns()
    note = MadeNote.about(process, devices=list(plan.devices), things=things, t_ns=now)
    try:
        held = notes.hold(notes.new_name(process.key, _WHAT))
        if held is not None:
            held.write(json_bytes(note))
    except (MissingPrerequisite, OSError):
        return None
    return held


async def _is_left(monitor: Monitor, held: HeldFile) -> bool:
    """What was made has not all been removed, as far as QEMU answers; nothing outlives it."""
    note = msgspec.json.decode(held.read(), type=MadeNote)
    try:
        return bool(await still_there(monitor, note))
    except MemListenerError:
        process = Process.read(note.pid) if note.pid is not None else None
        if process is None or process.start_ticks != note.start_ticks:
            return False
        return not await process.has_ended()
