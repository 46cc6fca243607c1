"""Which strategy `steer` has applied to the guest: at the beginning, and each change of it.

The interposer's own probe says exactly when the strategy changed.  Here is what holds without it:
a look every `LOOK_S`, which also starts the probe when a guest is steered only later.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import msgspec

from ..errors import MissingPrerequisite, OperationFailed, TargetLost
from ..host.bounded import in_thread
from ..host.processes import Process
from ..records import Mode, Record, SteeringRecord
from ..steer import State, state_of
from .probe_runner import Measuring

__all__ = ["LOOK_S", "SteeringWatch", "strategy_text"]

LOOK_S = 2.0
_SOON_S = 1.0
_PROBE = "interposer"


def strategy_text(state: State | None) -> str | None:
    """`hole, strict`, and why when it is not what was wanted; None when no strategy is applied."""
    if state is None or not state.hooked:
        return None
    strict = ", strict" if state.mode is Mode.HOLE and state.strict else ""
    why = f" ({state.refusal.words})" if state.refusal else ""
    return f"{state.mode}{strict}{why}"


class SteeringWatch:
    """`strategy` is the one that was last seen, None where it is not known."""

    def __init__(self, process: Process | None) -> None:
        self._process = process
        self._looked_ns = 0
        self._differs = False
        self._news = asyncio.Event()
        self._change: SteeringRecord | None = None
        self.strategy: Mode | None = None

    async def begin(self) -> list[str]:
        """Look for the first time; returns what the user should know."""
        try:
            state = await self._look()
        except OperationFailed as error:  # of another version, or not as ours is
            return [error.message]
        text = strategy_text(state)
        if text is None:
            return []
        how = "`qmp-memlistener steer TARGET --strategy off` takes it out"
        return [f"the strategy {text} is applied to what this guest changes in its map; {how}"]

    def first(self) -> list[SteeringRecord]:
        """The first record, where the strategy is known."""
        return [self._change] if self._change is not None else []

    def take(self, change: Record) -> None:
        """A change, whoever saw it."""
        if isinstance(change, SteeringRecord):
            self.strategy = change.strategy
            self._news.set()

    async def reach(
        self, strategy: Mode, measuring: Measuring, publish: Callable[[Iterable[Record]], None]
    ) -> None:
        """It is applied by now: return when that is recorded.  The probe reads of it soon."""
        await self.look(measuring, publish)
        try:
            async with asyncio.timeout(_SOON_S):
                while self.strategy is not strategy:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            await self.look(measuring, publish)

    async def keep_looking(
        self, measuring: Measuring, publish: Callable[[Iterable[Record]], None]
    ) -> None:
        """For as long as it can be known."""
        while self.strategy is not None:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look(measuring, publish)
            except OperationFailed:
                return  # the probe says so, where it reads there

    async def look(self, measuring: Measuring, publish: Callable[[Iterable[Record]], None]) -> None:
        """Start the probe if it can work by now; tell a change that it does not tell."""
        before, was = self.strategy, self._looked_ns
        await measuring.look_again(_PROBE)
        await self._look()
        change = self._change
        if change is None or change.strategy is self.strategy:
            self._differs = False
        elif _PROBE in measuring.names and not self._differs:
            self._differs = True  # it is about to say when that was
        else:
            self._differs = False
            publish([_late(change, was)])
        if before is not None and change is None:
            self.strategy = None

    async def _look(self) -> State | None:
        self._change = None
        if self._process is None:
            return None
        now = time.monotonic_ns()
        try:
            state = await in_thread(state_of, self._process)
        except (MissingPrerequisite, TargetLost):
            return None
        hooked = state is not None and state.hooked
        self._looked_ns = now
        self._change = SteeringRecord(
            t_ns=time.monotonic_ns(),
            strategy=state.mode if state is not None and hooked else Mode.OFF,
            strict=state is not None and state.mode is Mode.HOLE and state.strict,
            reason=state.refusal.words if state is not None and state.refusal else None,
        )
        return state


def _late(change: SteeringRecord, before_ns: int) -> SteeringRecord:
    return msgspec.structs.replace(change, late_ns=max(0, change.t_ns - before_ns))
