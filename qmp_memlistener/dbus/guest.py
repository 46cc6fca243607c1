"""One guest on the bus: properties, signals, and the agent that watches it while a client wants it.

A guest that nobody watches is left alone: its monitor stays free and no trace event is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum

from dbus_fast import Variant

from ..agent import Agent, attach
from ..errors import MemListenerError, OperationFailed, TargetLost
from ..host.processes import Process
from ..qmp import Guest, PidTarget
from ..records import GuestState, Lost, Record, Section, StallRecord, TransitionRecord
from ..topology import MemoryMap
from .interface import PROPERTY_TYPES, ROOT
from .values import MOST, dictionaries, dictionary, text

__all__ = ["Emit", "ServedGuest", "Settings", "Watching"]

Emit = Callable[[str, Sequence[object]], None]
"""Sends a signal of a guest: its name and the values of its arguments."""

_GONE = "the guest has ended, or is not served any more"
_SETTLE_S = 0.25
"""So long changes of properties that a guest makes by the thousand are collected."""


class Watching(StrEnum):
    """Whether a guest is watched.

    IDLE: nobody wants it.  FAILED: watching ended or could not begin, `Reason` says why.
    """

    IDLE = "idle"
    ATTACHING = "attaching"
    WATCHING = "watching"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Settings:
    """How guests are watched: as `attach` has it."""

    probes: tuple[str, ...] | None = None
    trace: bool = True


class ServedGuest:
    """A guest's object.  `emit` sends its signals, `announce` tells which properties changed."""

    def __init__(
        self,
        guest: Guest,
        settings: Settings,
        emit: Emit,
        announce: Callable[[Sequence[str]], None],
    ) -> None:
        self.guest = guest
        self.path = f"{ROOT}/guest/{guest.pid}_{guest.process.start_ticks}"
        self.watchers: set[str] = set()
        """Unique names of those who want it watched."""
        self.state = Watching.IDLE
        self.reason = ""
        self._settings = settings
        self._emit = emit
        self._announce = announce
        self._agent: Agent | None = None
        self._run_state: str | None = None
        self._following: asyncio.Task[None] | None = None
        self._attached: asyncio.Future[None] | None = None
        self._leave = asyncio.Event()
        self._using = asyncio.Lock()
        """Held while an agent comes or goes: one at a time takes a monitor."""
        self._changed: set[str] = set()
        self._telling: asyncio.TimerHandle | None = None
        self._taking: asyncio.Task[dict[str, Variant]] | None = None
        self._next: asyncio.Task[dict[str, Variant]] | None = None

    # -- properties --------------------------------------------------------------------------

    def properties(self) -> dict[str, Variant]:
        """All that are known now."""
        found = {name: self.value(name) for name in PROPERTY_TYPES}
        return {name: value for name, value in found.items() if value is not None}

    def value(self, name: str) -> Variant | None:
        """A property; None while it is not known.  Raises KeyError when there is none."""
        signature = PROPERTY_TYPES[name]
        value = self._value(name)
        return None if value is None else Variant(signature, value)

    def _value(self, name: str) -> object:
        guest, agent = self.guest, self._agent
        match name:
            case "Name":
                return None if guest.name is None else text(guest.name)
            case "Pid":
                return guest.pid
            case "Version":
                return guest.version
            case "Machine":
                return None if guest.machine is None else text(guest.machine)
            case "Monitors":
                return [text(m.label) for m in guest.qmp_monitors]
            case "State":
                return str(self.state)
            case "Reason":
                return text(self.reason)
            case "RunState":
                return self._run_state if agent is not None else None
        if agent is None:
            return None
        match name:
            case "Source":
                return agent.source
            case "Transitions":
                return agent.transitions
            case "Map":
                return dictionaries(Section.list_of(agent.map.view))
            case "Holes":
                return _holes(agent.map)
        return _slots(agent)

    def _touch(self, *names: str, now: bool = False) -> None:
        self._changed.update(names)
        loop = asyncio.get_running_loop()
        if now and self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if self._telling is None:
            self._telling = loop.call_later(0 if now else _SETTLE_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        names, self._changed = sorted(self._changed), set()
        self._announce(names)

    # -- watching ----------------------------------------------------------------------------

    async def watch(self, who: str) -> None:
        """Watch it as long as `who` is there.  Raises MemListenerError when that cannot be."""
        self.watchers.add(who)
        if self._attached is None:
            previous = self._following
            self._leave = asyncio.Event()
            self._attached = asyncio.get_running_loop().create_future()
            self._following = asyncio.create_task(
                self._follow(self._attached, self._leave, previous)
            )
        try:
            await asyncio.shield(self._attached)
        except BaseException:
            self.watchers.discard(who)
            raise

    def unwatch(self, who: str) -> bool:
        """`who` wants no more; false when it did not want it.  The last one ends the watching."""
        if who not in self.watchers:
            return False
        self.watchers.discard(who)
        if not self.watchers:
            self._end(OperationFailed("nobody watches this guest any more"))
        return True

    def _end(self, why: MemListenerError) -> None:
        self._leave.set()
        if self._attached is not None and not self._attached.done():
            self._attached.set_exception(why)
            self._attached.exception()  # whoever waited is gone
        self._attached = None

    async def close(self) -> None:
        """Put the guest back as it was, and say no more of it."""
        self.watchers.clear()
        self._end(TargetLost(_GONE))
        for task in (self._taking, self._next):
            if task is not None:
                task.cancel()
        if self._following is not None:
            await asyncio.wait([self._following])
        if self._telling is not None:
            self._telling.cancel()

    async def _follow(
        self,
        attached: asyncio.Future[None],
        leave: asyncio.Event,
        previous: asyncio.Task[None] | None,
    ) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        error: MemListenerError | None = None
        if not leave.is_set():
            self._become(Watching.ATTACHING)
            try:
                error = await self._attach(attached, leave)
            except MemListenerError as exc:
                error = exc
            except Exception as exc:  # of one guest: the others are served on
                error = OperationFailed(f"watching failed: {type(exc).__name__}: {exc}")
        self._agent = None
        self._run_state = None
        if error is not None:
            if not attached.done():
                attached.set_exception(error)
                attached.exception()
            if self._attached is attached:
                self._attached = None
                self.watchers.clear()
        if error is not None and not leave.is_set():
            self._become(Watching.FAILED, error.message)
        else:
            self._become(Watching.IDLE)

    async def _attach(
        self, attached: asyncio.Future[None], leave: asyncio.Event
    ) -> MemListenerError | None:
        """Watch until `leave`; the reason when it ends before that."""
        settings = self._settings
        async with AsyncExitStack() as stack:
            async with self._using:
                if leave.is_set():
                    return None
                agent = await stack.enter_async_context(
                    attach(
                        PidTarget(self.guest.pid),
                        trace=settings.trace,
                        probes=settings.probes,
                        on_record=self._record,
                    )
                )
                self._check_same()
                self._agent = agent
            self._run_state = self._run_state or agent.facts.status
            self._become(Watching.WATCHING)
            if not attached.done():
                attached.set_result(None)
            left = asyncio.create_task(leave.wait())
            lost = asyncio.create_task(agent.wait_lost())
            try:
                await asyncio.wait({left, lost}, return_when=asyncio.FIRST_COMPLETED)
                return lost.result() if lost.done() else None
            finally:
                left.cancel()
                lost.cancel()
                async with self._using:
                    self._agent = None
                    await stack.aclose()

    def _check_same(self) -> None:
        """Raises TargetLost when the process id has another owner by now."""
        process = Process.read(self.guest.pid)
        if process is None or process.start_ticks != self.guest.process.start_ticks:
            raise TargetLost(f"QEMU (pid {self.guest.pid}) has ended")

    def _become(self, state: Watching, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._touch(*(name for name in PROPERTY_TYPES if name in _LIVE), now=True)

    # -- snapshots ---------------------------------------------------------------------------

    async def snapshot(self) -> dict[str, Variant]:
        """Map, holes and slots of one moment after this call; those who ask at once share one.

        A guest that nobody watches is polled once, as by `show`.  Raises MemListenerError.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._take_after(self._taking))
        taking = self._next
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            if taking.cancelled():
                raise TargetLost(_GONE) from None
            raise

    async def _take_after(
        self, before: asyncio.Task[dict[str, Variant]] | None
    ) -> dict[str, Variant]:
        if before is not None:
            await asyncio.wait([before])
        async with self._using:
            self._taking, self._next = self._next, None
            if self._agent is not None:
                await self._agent.settle()
                return _snapshot(self._agent)
            async with attach(PidTarget(self.guest.pid), trace=False, probes=()) as agent:
                self._check_same()
                return _snapshot(agent)

    # -- records -----------------------------------------------------------------------------

    def _record(self, record: Record) -> None:
        if isinstance(record, TransitionRecord):
            self._transition(record)
        elif isinstance(record, StallRecord):
            details = dictionary(record, leave_out=_OF_STALLS, most=MOST)
            lengths = (record.at_least_ns, record.at_most_ns)
            self._emit("StallSeen", [str(record.kind), record.start_ns, *lengths, details])
        elif isinstance(record, GuestState):
            self._run_state = record.status
            self._touch("RunState", now=True)
        elif isinstance(record, Lost):
            self._emit("Missed", [text(record.what), record.count or 0])

    def _transition(self, record: TransitionRecord) -> None:
        details = dictionary(record, leave_out=_OF_TRANSITIONS, most=MOST)
        self._emit("TransitionSeen", [record.seq, record.t_ns, details])
        for signal, holes in (
            ("HoleFilled", record.holes_filled),
            ("HolePunched", record.holes_punched),
        ):
            for hole in holes[:MOST]:
                where = [text(hole.block), hole.start, hole.size]
                self._emit(signal, [*where, text(hole.covered_by or ""), record.seq])
        self._touch("Map", "Holes", "Slots", "Transitions")


_LIVE = {"State", "Reason", "RunState", "Source", "Transitions", "Map", "Holes", "Slots"}
_OF_TRANSITIONS = frozenset({"type", "schema", "seq", "t_ns"})
_OF_STALLS = frozenset({"type", "schema", "kind", "start_ns", "at_least_ns", "at_most_ns"})


def _holes(shown: MemoryMap) -> list[dict[str, Variant]]:
    return dictionaries(hole for block in shown.ram_blocks for hole in block.holes)


def _slots(agent: Agent) -> list[dict[str, Variant]]:
    return [
        dictionary(
            {
                "as_id": slot.as_id,
                "slot": slot.slot,
                "gpa": slot.gpa,
                "size": slot.size,
                "flags": slot.flags,
                "block": slot.block,
            }
        )
        for slot in agent.slots
    ]


def _snapshot(agent: Agent) -> dict[str, Variant]:
    return {
        "transitions": Variant("t", agent.transitions),
        "source": Variant("s", agent.source),
        "map": Variant("aa{sv}", dictionaries(Section.list_of(agent.map.view))),
        "holes": Variant("aa{sv}", _holes(agent.map)),
        "slots": Variant("aa{sv}", _slots(agent)),
    }
