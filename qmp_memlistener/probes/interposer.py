"""The `interposer` probe: what KVM was given, and when vCPUs were kept out of it, exactly.

The interposer that `steer` or `run` has brought into a QEMU stamps each operation in a ring that we
read (`steer.channel`).  Under `inhibit` and `hole` KVM is given operations later than QEMU asks for
them, and others: QEMU's log and uprobes then show what was asked for, and this what was done.

`Fold` makes windows of the entries and is pure.  Whatever a QEMU writes there, it is one entry
after the other: what cannot be is left out and counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import MemListenerError, MissingPrerequisite, OperationFailed, TargetLost
from ..host.bounded import in_thread
from ..memslots import OpKind
from ..qmp.guest import read_vcpus
from ..records import Mode, SlotOp, SteeringRecord
from ..steer import OBJECT, Channel, Event, EventKind, Refusal, open_channel, state_of
from ..steer.channel import mode_of
from .model import (
    Context,
    Observation,
    ProbeInfo,
    ProbeUnavailable,
    Sink,
    StallKind,
    Verdict,
)
from .uprobes.observing import ThreadNames

__all__ = ["Carried", "Fold", "InterposerProbe", "host_verdict"]

_NAME = "interposer"
_PERIOD_S = 0.05
_TURN = 1000
"""Entries that are taken before others have their turn."""
_WAITING = 8192
"""Entries of transactions that have not ended: more than any has."""
_END_OF_MEMORY = 1 << 64
_ASK_DEADLINE = 2.0
_NOT_IN_TIME = "entries of the ring that were not read in time"
_MOST_LOST = (1 << 63) - 1  # what a record can say


@dataclass(slots=True)
class Carried:
    """What one transaction made: `asked` are QEMU's operations, `windows` what came of them."""

    asked: list[Observation] = field(default_factory=list)
    windows: list[Observation] = field(default_factory=list)


class Fold:
    """Entries of the ring to windows.  Pure.

    `name_of` gives the name of a thread.  What began before `since_ns` is left out.
    """

    def __init__(self, name_of: Callable[[int], str], since_ns: int) -> None:
        self._name_of = name_of
        self._since_ns = since_ns
        self._waiting: dict[int, list[Event]] = {}  # by thread, until their transaction ends
        self._count = 0
        self._lost = False
        self.modes: list[tuple[int, Mode, Refusal]] = []
        """Modes that were taken, and when and why; the caller empties it."""
        self.nonsense = 0
        """Entries that cannot be."""

    @property
    def open_ns(self) -> int | None:
        """When the first entry that waits began."""
        return min((e.begin_ns for found in self._waiting.values() for e in found), default=None)

    def lose(self) -> None:
        """Entries before the next one are missing: what has begun is not known as a whole."""
        self._forget()
        self._lost = True

    def take(self, events: Iterable[Event], now_ns: int) -> Iterator[Carried]:
        """Fold entries that were read by `now_ns`."""
        for event in events:
            if not _can_be(event, now_ns):
                self.nonsense += 1
                continue
            if self._lost:
                self._lost = False
                self._since_ns = max(self._since_ns, event.end_ns)
            yield from self._take(event)

    def _take(self, event: Event) -> Iterator[Carried]:
        match event.kind:
            case EventKind.MODE:
                yield from self._end(event.tid, None)
                if event.end_ns >= self._since_ns:
                    self.modes.append((event.end_ns, mode_of(event.rc), Refusal(event.extra)))
            case EventKind.TRANSACTION:
                if event.begin_ns < self._since_ns:
                    self._drop(event.tid)  # its beginning was not seen
                else:
                    yield from self._end(event.tid, mode_of(event.extra))
            case EventKind.SAVED:
                pass
            case _ if event.begin_ns >= self._since_ns:
                self._waiting.setdefault(event.tid, []).append(event)
                self._count += 1
                if event.kind is EventKind.QEMU and not event.extra:  # no part of a transaction
                    yield from self._end(event.tid, None)
                elif self._count > _WAITING:
                    self.nonsense += self._count
                    self._forget()

    def _end(self, tid: int, mode: Mode | None) -> Iterator[Carried]:
        events = self._drop(tid)
        carried = Carried()
        for event in events:
            if event.kind is EventKind.QEMU:
                carried.asked.append(self._operation(event))
            elif event.kind is EventKind.KVM:
                carried.windows.append(self._operation(event))
            else:
                carried.windows.append(_park(event, mode))
        if events:
            yield carried

    def _drop(self, tid: int) -> list[Event]:
        events = self._waiting.pop(tid, [])
        self._count -= len(events)
        return events

    def _forget(self) -> None:
        self._waiting.clear()
        self._count = 0

    def _operation(self, event: Event) -> Observation:
        delete = not event.size
        update = SlotOp(
            t_ns=event.end_ns,
            as_id=event.slot >> 16,
            slot=event.slot & 0xFFFF,
            op=OpKind.DELETE if delete else OpKind.ADD,
            gpa=event.gpa,
            size=event.extra << 12 if delete and event.kind is EventKind.KVM else event.size,
            flags=event.flags,
            ret=event.rc,
            hva=event.hva,
        )
        length = event.end_ns - event.begin_ns
        return Observation(
            StallKind.SLOT_UPDATE,
            event.begin_ns,
            event.end_ns,
            length,
            length,
            _NAME,
            thread=self._name_of(event.tid),
            tid=event.tid,
            site=str(update),
            update=update,
        )


def _park(event: Event, mode: Mode | None) -> Observation:
    length = event.end_ns - event.begin_ns
    return Observation(
        StallKind.VCPU_INHIBIT,
        event.begin_ns,
        event.end_ns,
        length,
        length,
        _NAME,
        site=None if mode is None else f"strategy {mode}",
    )


def _can_be(event: Event, now_ns: int) -> bool:
    """An entry of the interposer's; everything else is somebody else's."""
    if not event.begin_ns <= event.end_ns <= now_ns:
        return False
    try:
        if event.kind is EventKind.MODE:
            return mode_of(event.rc) is not None and Refusal(event.extra) is not None
        if event.kind is EventKind.TRANSACTION:
            return mode_of(event.extra) is not None
    except ValueError:
        return False
    return max(event.gpa + event.size, event.gpa + (event.extra << 12)) <= _END_OF_MEMORY


def host_verdict() -> Verdict:
    """Whether a QEMU of this host can be steered at all."""
    if not OBJECT.exists():
        return Verdict.no(
            "the interposer was not built", "install a C compiler and install this again"
        )
    return Verdict(True)


class InterposerProbe:
    """Slot operations as KVM was given them, and when vCPUs were kept out, of a steered guest."""

    info = ProbeInfo(
        name=_NAME,
        measures=(StallKind.SLOT_UPDATE, StallKind.MISSING, StallKind.VCPU_INHIBIT),
        needs="a guest to which `steer` or `run` applies a strategy; its user, or root",
        resolution_ns=1_000,
        cost="two readings of the clock for each slot operation; nothing when idle",
        share=0.0,
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._begun_ns = time.monotonic_ns()
        self._names = ThreadNames(context.pid or 0)
        self._fold = Fold(self._names.__getitem__, 0)
        self._channel: Channel | None = None
        self._reading: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._mode = Mode.OFF
        self._lost = 0

    async def check(self) -> Verdict:
        """Looks for the interposer in QEMU."""
        guest = self._context.guest
        if guest is None:
            return Verdict.no(
                "QEMU's process is not visible from here",
                "run on QEMU's host, in its process-id namespace or one above",
            )
        try:
            state = await in_thread(state_of, guest.process)
        except (MissingPrerequisite, OperationFailed, TargetLost) as error:
            return Verdict.no(error.message, error.remedy)
        if state is None or not state.hooked:
            return Verdict.no(
                "no strategy is applied to this guest",
                "qmp-memlistener steer TARGET --strategy observe",
            )
        return Verdict(True)

    async def start(self, sink: Sink) -> None:
        """Read the ring from now on; of what is in it already only when modes changed."""
        guest = self._context.guest
        try:
            channel = None if guest is None else await in_thread(open_channel, guest.process)
        except OSError as error:
            raise ProbeUnavailable(f"the ring cannot be opened: {error.strerror}") from error
        if channel is None:
            raise ProbeUnavailable("no strategy is applied to this guest")
        self._channel = channel
        self._sink = sink
        try:
            now = time.monotonic_ns()
            state = channel.state()
            self._names = ThreadNames(self._context.pid or 0)
            self._fold = Fold(self._names.__getitem__, now)
            self._fold_modes(channel, now)
            vcpus = await read_vcpus(self._context.monitor, deadline=_ASK_DEADLINE)
            if vcpus is not None:
                self._names.learn_vcpus(vcpus)
            self._set_mode(state.mode if state.hooked else Mode.OFF)
        except BaseException:
            self._close()
            raise
        self._reading = asyncio.create_task(self._keep_reading(), name="interposer ring")

    async def burst(self, on: bool) -> None:
        """Nothing to do: no entry is ever missed."""

    async def flush(self) -> None:
        """Read what is there."""
        if self._channel is not None:
            await self._read()

    async def stop(self) -> None:
        """Read the rest, and let go of the ring; the interposer goes on."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.wait((reading,))
        if self._channel is not None:
            await self._read()
        self._close()

    def _close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    # -- reading -------------------------------------------------------------------------------

    async def _keep_reading(self) -> None:
        while self._channel is not None:
            await asyncio.sleep(_PERIOD_S)
            await self._read()

    async def _read(self) -> None:
        """Deliver all that has ended by now, some at a time."""
        async with self._turn:
            try:
                more = True
                while more and self._channel is not None:
                    more = self._read_some(self._channel)
                    await asyncio.sleep(0)
            except MemListenerError as error:  # whoever owns QEMU has cut it short
                self._close()
                self._sink.failed(_NAME, error)

    def _read_some(self, channel: Channel) -> bool:
        """True when there is more."""
        before = time.monotonic_ns()
        events = channel.read_events(_TURN)
        if channel.lost > self._lost:
            self._fold.lose()
            lost, self._lost = channel.lost - self._lost, channel.lost
            self._sink.lost(_NAME, _NOT_IN_TIME, min(lost, _MOST_LOST))
            self._say_mode(channel)
        for carried in self._fold.take(events, time.monotonic_ns()):
            self._sink.carried_out(carried.asked, carried.windows)
        nonsense, self._fold.nonsense = self._fold.nonsense, 0
        if nonsense:
            self._fold.lose()
            self._sink.lost(_NAME, "entries of the ring that cannot be", nonsense)
        self._tell_modes(channel)
        if len(events) == _TURN:
            return True
        if not channel.is_behind():
            open_ns = self._fold.open_ns
            self._sink.advance(_NAME, before if open_ns is None else min(before, open_ns))
        return False

    # -- modes ---------------------------------------------------------------------------------

    def _fold_modes(self, channel: Channel, now_ns: int) -> None:
        """When a mode was taken since this attachment began, before we read here."""
        past = Fold(self._names.__getitem__, self._begun_ns)
        while events := channel.read_events():
            for _ in past.take((e for e in events if e.kind is EventKind.MODE), now_ns):
                pass
        self._lost = channel.lost  # of before
        self._fold.modes = past.modes
        self._tell_modes(channel)

    def _tell_modes(self, channel: Channel) -> None:
        modes, self._fold.modes = self._fold.modes, []
        for t_ns, mode, why in modes:
            self._sink.steered(
                SteeringRecord(
                    t_ns=t_ns,
                    strategy=mode,
                    strict=mode is Mode.HOLE and channel.state().strict,
                    reason=why.words if why else None,
                )
            )
            self._set_mode(mode)

    def _say_mode(self, channel: Channel) -> None:
        """The mode of now, when it may have changed unseen."""
        state = channel.state()
        mode = state.mode if state.hooked else Mode.OFF
        if mode is not self._mode:
            now = time.monotonic_ns()
            self._fold.modes.append((now, mode, state.refusal))

    def _set_mode(self, mode: Mode) -> None:
        """Without the interposer nothing is measured."""
        self._mode = mode
        self._sink.measures(_NAME, () if mode is Mode.OFF else self.info.measures)
