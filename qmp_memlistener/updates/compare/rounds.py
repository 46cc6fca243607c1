"""Comparing strategies on one guest: the same intent again and again, in random order.

Each round carries the intent out under one strategy and looks at the guest for a fixed time, then
the guest is put back (`compare_guest`); rounds of the `control` only look.  What was seen within
that time counts, whatever made it: what a guest stalls anyway shows in the control.  A kind of
stall that was not measured all that time has no value in that round.  Statistics are in
`compare_stats`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

import msgspec

from ...errors import InputError, MemListenerError, OperationFailed
from ...host.bounded import in_thread
from ...records import ProbeState, Record, SlotOp, StallRecord, TransitionRecord
from ..model import Intent, Result, Strategy, UpdateRefused
from ..operation import Host, Measured
from ..settings import UpdateOptions
from .guest import Changed, ComparedGuest, HostGuest, NotPutBack
from .stats import Difference, Round, Summary, differences, summaries

__all__ = [
    "CONTROL",
    "INTERRUPTED",
    "ORDER",
    "CompareOptions",
    "Comparison",
    "Skipped",
    "compare",
    "compare_rounds",
]

S = TypeVar("S", bound=StrEnum)
CONTROL = "control"
ORDER = ("direct", "pause", "inhibit", "hole", CONTROL)
"""In which strategies are shown."""
INTERRUPTED = "interrupted"
"""Why a comparison ended early that was cancelled; the guest was put back."""
_LOOK_S = 2.0
PROBES_S = 30.0
"""How long probes may take to be at work; what only those measure that do not is missing."""


class Skipped(msgspec.Struct, frozen=True):
    """A strategy that this guest does not allow, or that failed in its warm-up round."""

    strategy: str
    reason: str
    remedy: str | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON document of `compare`.

    `ended_early`: why there are fewer rounds than wanted; the verb's exit code is then `exit_code`.
    `window_ns` is 0 when a round lasted as long as its change (`Round.took_ns`).
    """

    schema: int = 1
    seed: int
    window_ns: int
    rounds: list[Round]
    summary: list[Summary]
    differences: list[Difference]
    skipped: list[Skipped]
    ended_early: str | None
    remedy: str | None
    exit_code: int = 0
    probes: list[ProbeState] = []


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """`repeat` rounds of each strategy and of the control, each looked at for `window_s` seconds;
    before them one of each strategy that does not count.  `seed` makes the order.  Without
    `window_s` a round is looked at until its change is over."""

    repeat: int = 10
    window_s: float | None = 1.0
    seed: int = 0
    update: UpdateOptions = field(default_factory=UpdateOptions)


async def compare(
    host: Host,
    intent: Intent,
    strategies: Sequence[Strategy],
    options: CompareOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Carry it all out.  Cancelled or failing, it puts the guest back and returns what there is.

    Before there is a round that counts, it raises instead: UpdateRefused when no strategy is
    possible, InputError and TargetError as `perform`, CancelledError.
    """
    guest = HostGuest(host, intent, options.update)
    return await compare_rounds(host, guest, strategies, options, progress)


async def compare_rounds(
    host: Measured,
    guest: ComparedGuest[S],
    strategies: Sequence[S],
    options: CompareOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """The same for a guest of any kind, `host` records what happens in it."""
    return await _Comparing(host, guest, options, progress).run(strategies)


class _Interrupted(OperationFailed):
    exit_code = 130


class _Comparing(Generic[S]):
    def __init__(
        self,
        host: Measured,
        guest: ComparedGuest[S],
        options: CompareOptions,
        progress: Callable[[str], None],
    ) -> None:
        self._host = host
        self._guest = guest
        self._options = options
        self._window_ns = round((options.window_s or 0) * 1e9)
        self._end_ns = 0  # of the last round
        self._looked_ns = 0
        self._progress = progress
        self._rounds: list[Round] = []
        self._skipped: list[Skipped] = []
        self._seen: list[Record] = []
        self._probes: list[ProbeState] = []

    async def run(self, strategies: Sequence[S]) -> Comparison:
        await self._guest.begin()
        stop = self._host.subscribe(self._take)
        ended: MemListenerError | None = None
        try:
            await self._probes_ready()
            await self._carry_out(await self._warm_up(strategies))
        except asyncio.CancelledError:
            if not self._rounds:
                self._progress("interrupted: the guest is as it was")
                raise
            ended = _Interrupted(INTERRUPTED)
        except NotPutBack as exc:
            ended = exc
        except InputError:
            raise
        except MemListenerError as exc:
            if not self._rounds:
                raise
            ended = exc
        finally:
            self._probes = self._host.probes()
            stop()
        task = asyncio.current_task()
        while ended is not None and task is not None and task.cancelling():
            task.uncancel()
        # a second or two for many rounds, in which the agent has better things to do
        return await in_thread(self._result, ended)

    async def _probes_ready(self) -> None:
        """Rounds begin when all that can be measured is."""
        async with self._host.burst():
            late = await self._host.probes_ready(0)
            if late:
                self._progress(f"waiting for {', '.join(late)} to start")
                late = await self._host.probes_ready(PROBES_S)
        if late:
            self._progress(
                f"{', '.join(late)} not started after {PROBES_S:g} s: what no other probe "
                "measures is missing"
            )

    async def _carry_out(self, possible: Sequence[S]) -> None:
        chance = random.Random(self._options.seed)
        for number in range(self._options.repeat):
            names: list[S | None] = [*possible, None]
            chance.shuffle(names)
            for strategy in names:
                await self._round(strategy)
            self._progress(f"round {number + 1} of {self._options.repeat}")

    async def _warm_up(self, strategies: Sequence[S]) -> list[S]:
        """A round of each that does not count; it shows which are possible."""
        possible = []
        for strategy in strategies:
            outcome = await self._round(strategy, counts=False)
            assert outcome is not None, "a strategy has an outcome"
            if outcome.outcome in (Result.DONE, Result.PARTIAL):
                possible.append(strategy)
                continue
            why = Skipped(str(strategy), outcome.reason or str(outcome.outcome), outcome.remedy)
            self._skipped.append(why)
            self._progress(f"{strategy} is not possible: {why.reason}")
        if not possible:
            first = self._skipped[0]
            raise UpdateRefused(first.reason, remedy=first.remedy)
        return possible

    async def _round(self, strategy: S | None, *, counts: bool = True) -> Changed | None:
        """One round, of the control when `strategy` is None, and what the intent came to.  The
        guest is put back whatever happens."""
        self._late_stalls()
        self._seen.clear()
        found: Changed | None = None
        try:
            # one burst from before its beginning to its end: some probes measure in bursts only
            async with self._host.burst():
                if strategy is None:
                    start = time.monotonic_ns()
                    await self._guest.look()
                    self._looked_ns = time.monotonic_ns() - start
                    await self._until(start + self._window_ns)
                else:
                    found = await self._guest.change(strategy)
                    start = found.phases[0].start_ns if found.phases else time.monotonic_ns()
                    if found.outcome in (Result.DONE, Result.PARTIAL):
                        await self._until(start + self._window_ns)
                made = self._made(strategy, start, found)
            if counts:
                self._rounds.append(made)
        finally:
            if strategy is not None:
                await _to_the_end(self._guest)
        return found

    async def _until(self, end: int) -> None:
        await asyncio.sleep(max(0.0, end / 1e9 - time.monotonic()))
        await self._host.settle()

    def _take(self, record: Record) -> None:
        if isinstance(record, StallRecord | SlotOp | TransitionRecord):
            self._seen.append(record)

    def _made(self, strategy: S | None, start: int, outcome: Changed | None) -> Round:
        # `settled` is mostly our waiting for nothing
        busy = [p.end_ns for p in outcome.phases if p.name != "settled"] if outcome else []
        took = max((end - start for end in busy), default=0)
        if not self._window_ns and outcome is None:
            took = self._looked_ns
        window = self._end_ns = start + (self._window_ns or max(took, 1))
        end = max(window, start + took)
        seen = self._seen
        ops = [r for r in seen if isinstance(r, SlotOp) and start <= r.t_ns < end]
        changes = [r for r in seen if isinstance(r, TransitionRecord) and start <= r.t_ns < end]
        stalls = _within(seen, start, window)
        return Round(
            CONTROL if strategy is None else str(strategy),
            len(self._rounds),
            outcome.outcome if outcome is not None else Result.DONE,
            outcome.reason if outcome is not None else None,
            start,
            stalls,
            len(ops),
            len({(op.as_id, op.slot) for op in ops}),
            sum(t.merged for t in changes),
            took,
            sorted(self._host.measured(start, window)),
        )

    def _late_stalls(self) -> None:
        """A stall is reported when it is over: the last round may have ended in it."""
        if self._rounds:
            last = self._rounds[-1]
            known = set(map(id, last.stalls))
            seen = _within(self._seen, last.start_ns, self._end_ns)
            late = [s for s in seen if id(s) not in known]
            if late:
                self._rounds[-1] = msgspec.structs.replace(last, stalls=[*last.stalls, *late])

    def _result(self, ended: MemListenerError | None) -> Comparison:
        self._late_stalls()
        counted: dict[str, list[Round]] = {}
        for each in self._rounds:
            if each.outcome is Result.DONE:
                counted.setdefault(each.strategy, []).append(each)
        order = {name: i for i, name in enumerate(ORDER)}
        ordered = dict(sorted(counted.items(), key=lambda item: order[item[0]]))
        return Comparison(
            seed=self._options.seed,
            window_ns=self._window_ns,
            rounds=self._rounds,
            summary=summaries(ordered),
            differences=differences(ordered, self._options.seed),
            skipped=self._skipped,
            ended_early=ended.message if ended is not None else None,
            remedy=ended.remedy if ended is not None else None,
            exit_code=ended.exit_code if ended is not None else 0,
            probes=self._probes,
        )


def _within(seen: Sequence[Record], start: int, end: int) -> list[StallRecord]:
    """Stalls that touch it; brackets of pings begin before what they bracket."""
    return [r for r in seen if isinstance(r, StallRecord) and r.start_ns < end and r.end_ns > start]


async def _to_the_end(guest: ComparedGuest[S]) -> None:
    """Put the guest back.  Cancelled meanwhile, finish all the same; cancelled twice, the
    cancellation counted that brought us here, say what that leaves."""
    here = asyncio.current_task()
    assert here is not None, "a coroutine runs in a task"
    before = here.cancelling() > 0
    task = asyncio.ensure_future(guest.put_back())
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            if not (before or cancelled):
                cancelled = True
                continue
            cancelled = True
            task.cancel()
            await asyncio.wait((task,))
    if task.cancelled():
        try:
            async with asyncio.timeout(_LOOK_S):
                left = await guest.left()
        except (TimeoutError, MemListenerError):
            left = "what is left over is unknown"
        raise NotPutBack(
            f"interrupted again while the guest was being put back: {left or 'it is as it was'}",
            remedy="`show` lists what is left over in the guest; undo it by hand",
        )
    task.result()
    if cancelled:
        raise asyncio.CancelledError
