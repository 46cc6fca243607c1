"""Strategies compared on transitions that the guest makes, applied inside its own QEMU (`steer`).

The rounds are those of `rounds`.  Each makes, or waits for, the same transitions under a strategy.
In rounds of the control the pulse guest makes none, and what any other guest makes happens as it
did before the comparison.  QEMU's log tells what QEMU asked for, and not what KVM was given:
operations are taken from the interposer's ring, and what the log says of slots counts only where
the probe `interposer` measured it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from ...errors import (
    GuestMigrating,
    MemListenerError,
    MissingPrerequisite,
    OperationFailed,
    TargetLost,
)
from ...host.bounded import in_thread
from ...host.processes import Process
from ...memslots import OpKind
from ...probes import StallKind
from ...qmp import Monitor, read_facts
from ...records import ProbeState, Record, SlotOp, StallRecord
from ...steer import Channel, EventKind, Mode, judge, open_channel, release, state_of, steer
from ..model import Phase, PhaseName, Result
from ..operation import Host
from ..pause.guard import refuse_if_migrating
from ..steered import steered_process
from .guest import NotPutBack
from .rounds import CompareOptions, Comparison, compare_rounds

__all__ = ["Home", "SteeredStrategy", "Transitions", "admit", "compare_steered", "kept_as_it_was"]

_OF_THE_LOG = frozenset({StallKind.MISSING, StallKind.SLOT_UPDATE, StallKind.VCPU_INHIBIT})
_PROBE = "interposer"
_MOST = 1 << 15  # more than the ring has
_RELEASE_S = 5.0
_AGAIN_S = 0.1


class SteeredStrategy(StrEnum):
    """How QEMU's operations go to KVM; `direct` is QEMU's own way."""

    DIRECT = "direct"
    PAUSE = "pause"
    INHIBIT = "inhibit"
    HOLE = "hole"

    @property
    def mode(self) -> Mode:
        return Mode.OBSERVE if self is SteeredStrategy.DIRECT else Mode[self.name]


class Transitions(Protocol):
    """What makes the transitions of a round."""

    async def begin(self, channel: Channel) -> None:
        """Some that do not count: `hole` splits slots in the first ones after it was chosen."""

    async def make(self, channel: Channel) -> None:
        """Until they are made.  Raises MemListenerError when they are not."""

    async def leave_out(self, channel: Channel) -> None:
        """The same for a round of the control."""

    async def put_back(self) -> None:
        """What `make` has left half done."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SteeredChange:
    """What came of one round's transitions; as `Outcome`."""

    outcome: Result
    reason: str | None = None
    remedy: str | None = None
    phases: list[Phase] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Home:
    """How QEMU was steered before; OFF when it was not."""

    mode: Mode
    strict: bool

    @property
    def between(self) -> Mode:
        """How it is steered between rounds, and in those of the control."""
        return Mode.OBSERVE if self.mode is Mode.OFF else self.mode


async def admit(monitor: Monitor, strategies: Sequence[SteeredStrategy]) -> tuple[Process, str]:
    """The process that can be steered, and what its machine is called.

    Raises MissingPrerequisite when it can have none of the strategies, GuestMigrating.
    """
    process = await in_thread(steered_process, monitor)
    facts = await read_facts(monitor)
    for strategy in strategies:
        try:
            await in_thread(judge, process, monitor.version, kvm=facts.kvm, wanted=strategy.mode)
        except MissingPrerequisite:
            if strategy is strategies[-1]:
                raise
        else:
            break
    await refuse_if_migrating(monitor, "nothing was compared")
    return process, facts.machine or ""


@asynccontextmanager
async def kept_as_it_was(process: Process) -> AsyncIterator[Home]:
    """The interposer is in QEMU meanwhile; afterwards QEMU is steered as it was before, or not.

    Raises OperationFailed when it could not be brought in, NotPutBack when it could not be taken
    out again.  Cancelled while that is done, it is done all the same.
    """
    before = await in_thread(state_of, process)
    home = Home(Mode.OFF, strict=False)
    if before is not None and before.hooked:
        home = Home(before.mode, before.strict)
    try:
        if home.mode is Mode.OFF:
            await steer(process, Mode.OBSERVE)
        yield home
    finally:
        task = asyncio.ensure_future(_back(process, home.mode, home.strict))
        cancelled = False
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                cancelled = True
        task.result()
        if cancelled:
            raise asyncio.CancelledError


async def _back(process: Process, mode: Mode, strict: bool) -> None:
    until = time.monotonic() + _RELEASE_S
    while True:
        try:
            if mode is Mode.OFF:
                await release(process)
            else:
                await steer(process, mode, strict=strict)
        except TargetLost:
            return
        except OperationFailed as exc:  # a transition is under way
            if time.monotonic() > until:
                raise NotPutBack(
                    f"the guest could not be steered as before: {exc.message}",
                    remedy=f"steer pid:{process.pid} --strategy {mode.name.lower()}",
                ) from exc
            await asyncio.sleep(_AGAIN_S)
        else:
            return


async def compare_steered(
    host: Host,
    process: Process,
    home: Home,
    transitions: Transitions,
    strategies: Sequence[SteeredStrategy],
    options: CompareOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """The comparison; inside `kept_as_it_was`.  Raises as `compare`."""
    channel = await in_thread(open_channel, process)
    if channel is None:
        raise OperationFailed(f"the interposer is not in QEMU (pid {process.pid})")
    with channel:
        told = _ToldByTheRing(host, channel)
        guest = _SteeredGuest(host, process, home, told, channel, transitions)
        return await compare_rounds(told, guest, strategies, options, progress)


class _ToldByTheRing:
    """The host, with operations on slots as KVM was given them."""

    def __init__(self, host: Host, channel: Channel) -> None:
        self._host = host
        self._channel = channel
        self._callbacks: list[Callable[[Record], None]] = []
        channel.skip()

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]:
        exact = self._is_exact()

        def take(record: Record) -> None:
            if isinstance(record, SlotOp):
                return
            if exact or not isinstance(record, StallRecord) or record.kind not in _OF_THE_LOG:
                callback(record)

        stop = self._host.subscribe(take)
        self._callbacks.append(callback)

        def both() -> None:
            stop()
            self._callbacks.remove(callback)

        return both

    def _is_exact(self) -> bool:
        return any(p.name == _PROBE and p.active for p in self._host.probes())

    def burst(self) -> AbstractAsyncContextManager[None]:
        return self._host.burst()

    async def settle(self) -> None:
        await self._host.settle()
        self.drain()

    def drain(self) -> bool:
        """Tell what the ring holds; False when some of it was overwritten before."""
        lost = self._channel.lost
        for e in self._channel.read_events(_MOST):
            if e.kind is not EventKind.KVM:
                continue
            op = SlotOp(
                t_ns=e.end_ns, as_id=e.slot >> 16, slot=e.slot & 0xFFFF,
                op=OpKind.ADD if e.size else OpKind.DELETE, gpa=e.gpa, size=e.size,
                flags=e.flags, ret=e.rc, hva=e.hva,
            )  # fmt: skip
            for callback in self._callbacks:
                callback(op)
        return self._channel.lost == lost

    def probes(self) -> list[ProbeState]:
        return self._host.probes()

    def measured(self, start_ns: int, end_ns: int) -> frozenset[StallKind]:
        found = self._host.measured(start_ns, end_ns)
        return found if self._is_exact() else found - _OF_THE_LOG

    async def probes_ready(self, timeout_s: float) -> tuple[str, ...]:
        return await self._host.probes_ready(timeout_s)


class _SteeredGuest:
    """A `ComparedGuest`: between rounds QEMU is steered as it was before the comparison."""

    def __init__(
        self,
        host: Host,
        process: Process,
        home: Home,
        told: _ToldByTheRing,
        channel: Channel,
        transitions: Transitions,
    ) -> None:
        self._host = host
        self._told = told
        self._process = process
        self._home = home
        self._channel = channel
        self._transitions = transitions

    async def begin(self) -> None:
        await refuse_if_migrating(self._host.monitor, "nothing was compared")

    async def change(self, strategy: SteeredStrategy) -> SteeredChange:
        try:
            await in_thread(
                judge, self._process, self._host.monitor.version, kvm=True, wanted=strategy.mode
            )
            await refuse_if_migrating(self._host.monitor, "it was left as it was")
            applied = await steer(self._process, strategy.mode)
        except (MissingPrerequisite, GuestMigrating) as exc:
            return SteeredChange(Result.REFUSED, exc.message, exc.remedy)
        if applied.after is not strategy.mode:
            return SteeredChange(Result.REFUSED, applied.reason)
        start = time.monotonic_ns()
        try:
            await self._transitions.begin(self._channel)
            await self._told.settle()  # what the log says late is not this round's
            start = time.monotonic_ns()
            await self._transitions.make(self._channel)
        except OperationFailed as exc:
            return SteeredChange(Result.FAILED, exc.message, exc.remedy)
        phases = [Phase(PhaseName.GUEST_ACTS, start, time.monotonic_ns())]
        now = await in_thread(self._channel.state)
        if now.mode is not strategy.mode:
            return SteeredChange(Result.FAILED, now.refusal.words, phases=phases)
        if not self._told.drain():
            why = "more operations than the ring has room for: make fewer transitions a round"
            return SteeredChange(Result.FAILED, why, phases=phases)
        return SteeredChange(Result.DONE, phases=phases)

    async def look(self) -> None:
        await self._transitions.leave_out(self._channel)

    async def put_back(self) -> None:
        try:
            await self._transitions.put_back()
            await steer(self._process, self._home.between, strict=self._home.strict)
        except TargetLost:
            raise
        except MemListenerError as exc:
            raise NotPutBack(f"QEMU could not be steered as before: {exc.message}") from exc

    async def left(self) -> str:
        mode = (await in_thread(self._channel.state)).mode
        return "" if mode is self._home.between else f"it is under {mode.name.lower()}"
