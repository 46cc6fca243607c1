"""A guest that is no guest, for the rounds of a comparison, and records as probes make them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from qmp_memlistener.memslots import OpKind
from qmp_memlistener.probes import StallKind
from qmp_memlistener.records import (
    Cause,
    CauseType,
    Detail,
    ProbeState,
    Record,
    SlotOp,
    StallRecord,
    TransitionRecord,
)
from qmp_memlistener.updates.compare.guest import NotPutBack
from qmp_memlistener.updates.model import GuestStates, Outcome, Phase, PhaseName, Result, Strategy

__all__ = ["FakeGuest", "outcome", "slot_op", "stall", "transition"]

US = 1000


def stall(kind: str, start: int, length: int, at_least: int | None = None) -> StallRecord:
    return StallRecord(
        kind=StallKind(kind),
        start_ns=start,
        end_ns=start + length,
        at_least_ns=length if at_least is None else at_least,
        at_most_ns=length,
        probe="ping",
        witnesses=["ping"],
        thread=None,
        site=None,
        cause=None,
        incident=1,
    )


def slot_op(t_ns: int, slot: int) -> SlotOp:
    return SlotOp(
        t_ns=t_ns, as_id=0, slot=slot, op=OpKind.ADD, gpa=0, size=4096, flags=0,
    )  # fmt: skip


def transition(t_ns: int, merged: int = 1) -> TransitionRecord:
    return TransitionRecord(
        seq=1, t_ns=t_ns, cause=Cause(CauseType.UNKNOWN), removed=[], added=[], holes_punched=[],
        holes_filled=[], detail=Detail.NET, merged=merged,
    )  # fmt: skip


def outcome(
    what: str, start: int, end: int, *, strategy: str = "direct", reason: str | None = None
) -> Outcome:
    """`accepted` within the interval; nothing was touched when it is empty."""
    return Outcome(
        outcome=Result(what),
        reason=reason,
        strategy=Strategy(strategy),
        phases=[Phase(PhaseName.ACCEPTED, start, end)] if end > start else [],
        stalls=[],
        slot_ops=[],
        guest_state=GuestStates("running", "running"),
    )


class FakeGuest:
    """Changed or not; notes what is done to it in `log`, and checks that it is done in order.

    `costs` is the stall of a change by strategy.  `answers` are outcomes other than `done`, by
    strategy and number of the change.  `hangs_at` is the number of the change that never ends.
    Nothing is measured in the rounds `unmeasured_at`, warm-ups included; `late` are the probes that
    are not ready, each time somebody asks.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.is_changed = False
        self.costs: dict[Strategy, int] = {}
        self.answers: dict[tuple[Strategy, int], str] = {}
        self.hangs_at: int | None = None
        self.stuck_at: int | None = None
        self.slow_put_back = False
        self.reached = asyncio.Event()
        self.late: list[tuple[str, ...]] = []
        self.kinds = frozenset({StallKind.COMMIT})
        self.unmeasured_at: set[int] = set()
        self.asked = 0
        self.changes = 0
        self._callbacks: list[Callable[[Record], None]] = []

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    @property
    def subscribers(self) -> int:
        return len(self._callbacks)

    def emit(self, record: Record) -> None:
        for callback in self._callbacks:
            callback(record)

    @asynccontextmanager
    async def burst(self) -> AsyncIterator[None]:
        yield

    async def settle(self) -> None:
        return None

    def probes(self) -> list[ProbeState]:
        return [ProbeState("uprobes", [StallKind.COMMIT], True, None, None, 0, "nothing")]

    def measured(self, start_ns: int, end_ns: int) -> frozenset[StallKind]:
        assert start_ns < end_ns
        number, self.asked = self.asked, self.asked + 1
        return frozenset() if number in self.unmeasured_at else self.kinds

    async def probes_ready(self, timeout_s: float) -> tuple[str, ...]:
        self.log += [f"waited {timeout_s:g} s"] if timeout_s else []
        return self.late.pop(0) if self.late else ()

    async def begin(self) -> None:
        self.log.append("begin")

    async def change(self, strategy: Strategy) -> Outcome:
        assert not self.is_changed, "the round before was not put back"
        self.log.append(strategy)
        number, self.changes = self.changes, self.changes + 1
        self.is_changed = True
        if number == self.hangs_at:
            self.reached.set()
            await asyncio.Event().wait()
        start = time.monotonic_ns()
        answer = self.answers.get((strategy, number), self.answers.get((strategy, -1), "done"))
        if answer in ("refused", "failed"):
            self.is_changed = False
            end = start if answer == "refused" else start + 1
            return outcome(answer, start, end, strategy=strategy, reason=f"{answer} here")
        self.emit(stall("commit", start - 5000 * US, 100 * US))  # over before the round began
        self.emit(stall("commit", start - US, self.costs.get(strategy, 10) * US + US))
        self.emit(slot_op(start, 3))
        self.emit(slot_op(start + 1, 3))
        self.emit(slot_op(start + 2, 4))
        self.emit(transition(start, 2))
        return outcome(answer, start, start + US, strategy=strategy, reason=None)

    async def look(self) -> None:
        assert not self.is_changed
        self.log.append("control")
        self.emit(transition(time.monotonic_ns()))

    async def left(self) -> str:
        return "device d0 is there" if self.is_changed else ""

    async def put_back(self) -> None:
        self.log.append("back")
        if self.stuck_at == self.changes - 1:
            raise NotPutBack("it stays", remedy="take it out by hand")
        if self.slow_put_back:
            self.reached.set()
            await asyncio.sleep(0.05)
        self.is_changed = False
