"""Comparing strategies on one guest: the same intent again and again, in random order.

Each round carries the intent out under one strategy and looks at the guest for a fixed time, then
the inverse puts the guest back; rounds of the `control` only look.  Stalls that began within that
time count, whatever made them: what a guest stalls anyway shows in the control.  Statistics are in
`compare_stats`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from ..errors import OperationFailed
from ..recording import Record, StallRecord
from .compare_stats import Difference, Summary, differences, summaries
from .guest_view import read_guest
from .model import Intent, Outcome, Plug, Resize, Strategy, Unplug, UpdateRefused
from .operation import Host, UpdateOptions, perform

__all__ = ["CONTROL", "Comparison", "CompareOptions", "Round", "Skipped", "compare", "inverse_of"]

CONTROL = "control"
PATIENCE_S = 30.0
"""How long a guest may take at least to give back what it got."""
_PUT_BACK_DEADLINE = 60.0


class Round(msgspec.Struct, frozen=True):
    """One round; `order` counts from 0 over all rounds that count.

    `stalls` began within the window, `outcome` is that of the intent (`done` for the control).  A
    round that is not `done` is no part of the statistics.
    """

    strategy: str
    order: int
    outcome: str
    reason: str | None
    start_ns: int
    stalls: list[StallRecord]
    slot_ops: int
    slots: int
    transitions: int


class Skipped(msgspec.Struct, frozen=True):
    """A strategy that this guest does not allow."""

    strategy: str
    reason: str
    remedy: str | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON document of `compare`.  `ended_early`: why there are fewer rounds than wanted."""

    schema: int = 1
    seed: int
    window_ns: int
    rounds: list[Round]
    summary: list[Summary]
    differences: list[Difference]
    skipped: list[Skipped]
    ended_early: str | None
    remedy: str | None


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """`repeat` rounds of each strategy and of the control, each `window_s` seconds long; before
    them one that does not count.  `seed` makes the order."""

    repeat: int = 10
    window_s: float = 1.0
    seed: int = 0
    update: UpdateOptions = field(default_factory=UpdateOptions)


async def inverse_of(host: Host, intent: Intent) -> Intent:
    """What puts the guest back.  Raises UpdateRefused for an intent that has none."""
    match intent:
        case Plug():
            return Unplug(intent.device.id, intent.backends[::-1])
        case Resize(sign="="):
            return Resize("=", (await read_guest(host.monitor)).memory)
        case Resize():
            return Resize("-" if intent.sign == "+" else "+", intent.size)
        case _:
            raise UpdateRefused(
                "what was unplugged cannot be put back without knowing how it was made",
                remedy="compare plugging it: the inverse is part of every round",
            )


async def compare(
    host: Host,
    intent: Intent,
    strategies: Sequence[Strategy],
    options: CompareOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Carry it all out.  Cancelled, it puts the guest back and returns what there is.

    Raises UpdateRefused when no strategy is possible, InputError and TargetError as `perform`.
    """
    return await _Comparing(host, intent, options, progress).run(strategies)


class _Comparing:
    def __init__(
        self,
        host: Host,
        intent: Intent,
        options: CompareOptions,
        progress: Callable[[str], None],
    ) -> None:
        self._host = host
        self._intent = intent
        self._options = options
        self._progress = progress
        self._rounds: list[Round] = []
        self._skipped: list[Skipped] = []
        self._stalls: list[StallRecord] = []

    async def run(self, strategies: Sequence[Strategy]) -> Comparison:
        inverse = await inverse_of(self._host, self._intent)
        stop = self._host.subscribe(self._take)
        ended, remedy = None, None
        try:
            possible = await self._warm_up(strategies, inverse)
            chance = random.Random(self._options.seed)
            for number in range(self._options.repeat):
                names: list[Strategy | None] = [*possible, None]
                chance.shuffle(names)
                for strategy in names:
                    done = await self._round(strategy, inverse, len(self._rounds))
                    self._rounds.append(done)
                self._progress(f"round {number + 1} of {self._options.repeat}")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not self._rounds:
                raise
            task.uncancel()
            ended = "interrupted"
        except _NotPutBack as exc:
            ended, remedy = exc.message, exc.remedy
        finally:
            stop()
        return self._result(ended, remedy)

    async def _warm_up(self, strategies: Sequence[Strategy], inverse: Intent) -> list[Strategy]:
        """A round of each that does not count; it shows which are possible."""
        possible = []
        for strategy in strategies:
            done = await self._round(strategy, inverse, -1)
            if done.outcome == "refused":
                self._progress(f"{strategy} is not possible: {done.reason}")
            else:
                possible.append(strategy)
        if not possible:
            first = self._skipped[0]
            raise UpdateRefused(first.reason, remedy=first.remedy)
        return possible

    async def _round(self, strategy: Strategy | None, inverse: Intent, order: int) -> Round:
        if strategy is None:
            start = time.monotonic_ns()
            async with self._host.burst():
                await self._look(start)
            return self._made(CONTROL, order, start, None)
        try:
            outcome = await perform(self._host, self._intent, strategy, self._options.update)
            start = outcome.phases[0].start_ns if outcome.phases else time.monotonic_ns()
            if outcome.outcome == "refused" and not outcome.phases:
                if order < 0:
                    self._skipped.append(
                        Skipped(str(strategy), outcome.reason or "", outcome.remedy)
                    )
                return self._made(str(strategy), order, start, outcome)
            async with self._host.burst():
                await self._look(start)
            made = self._made(str(strategy), order, start, outcome)
        except asyncio.CancelledError:
            await self._to_the_end(self._put_back(strategy, inverse, careful=True))
            raise
        if outcome.outcome != "failed":  # what failed was undone
            await self._to_the_end(self._put_back(strategy, inverse, careful=False))
        return made

    async def _look(self, start: int) -> None:
        """Until the window is over."""
        left = start / 1e9 + self._options.window_s - time.monotonic()
        await asyncio.sleep(max(0.0, left))
        await self._host.settle()

    async def _put_back(self, strategy: Strategy, inverse: Intent, *, careful: bool) -> None:
        """`careful`: the intent may not have got far enough for anything to be there."""
        how = strategy
        if isinstance(inverse, Unplug) or strategy is Strategy.PAUSE:
            how = Strategy.DIRECT
        patient = UpdateOptions(wait_s=max(self._options.update.wait_s, PATIENCE_S))
        outcome = await perform(self._host, inverse, how, patient)
        if outcome.outcome == "done" or (careful and outcome.outcome == "refused"):
            return
        raise _NotPutBack(
            f"the guest could not be put back as it was: {outcome.reason}",
            remedy=f"undo by hand what {_in_words(self._intent)} has done; {outcome.remedy or ''}",
        )

    async def _to_the_end(self, work: Awaitable[None]) -> None:
        """A guest is put back also when we are cancelled meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait((task,), timeout=_PUT_BACK_DEADLINE)
            raise

    def _take(self, record: Record) -> None:
        if isinstance(record, StallRecord):
            self._stalls.append(record)

    def _made(self, strategy: str, order: int, start: int, outcome: Outcome | None) -> Round:
        end = start + round(self._options.window_s * 1e9)
        stalls = [s for s in self._stalls if start <= s.start_ns < end]
        self._stalls = [s for s in self._stalls if s.start_ns >= end]
        ops = outcome.slot_ops if outcome is not None else []
        return Round(
            strategy,
            order,
            outcome.outcome if outcome is not None else "done",
            outcome.reason if outcome is not None else None,
            start,
            stalls,
            len(ops),
            len({(op.as_id, op.slot) for op in ops}),
            outcome.transitions if outcome is not None else 0,
        )

    def _result(self, ended: str | None, remedy: str | None) -> Comparison:
        counted: dict[str, list[list[StallRecord]]] = {}
        for each in self._rounds:
            if each.outcome == "done":
                counted.setdefault(each.strategy, []).append(each.stalls)
        order = {name: i for i, name in enumerate((*Strategy, CONTROL))}
        ordered = dict(sorted(counted.items(), key=lambda item: order.get(item[0], 99)))
        return Comparison(
            seed=self._options.seed,
            window_ns=round(self._options.window_s * 1e9),
            rounds=self._rounds,
            summary=summaries(ordered),
            differences=differences(ordered, self._options.seed),
            skipped=self._skipped,
            ended_early=ended,
            remedy=remedy,
        )


class _NotPutBack(OperationFailed):
    """The inverse failed; going on would compare different guests."""


def _in_words(intent: Intent) -> str:
    match intent:
        case Plug():
            return f"plugging {intent.device.id}"
        case Unplug():
            return f"unplugging {intent.id}"
        case Resize():
            return f"resizing by {intent.sign}{intent.size}"
