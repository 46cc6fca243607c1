"""An experiment: pausing the guest at each transition that it makes itself.

Pausing around a hotplug covers only what QEMU's main thread does; the guest programs BARs after it
was resumed, in vCPU threads.  This pauses it whenever such a transition is seen, which is after the
fact, and reports how many of them happened while it was paused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from ..errors import MemListenerError
from ..qmp import Monitor
from ..records import Record, TransitionRecord
from .guard import ResumeGuard
from .pause import run_paused

__all__ = ["ThroughGuest"]

_DEADLINE = 5.0


class ThroughGuest:
    """Pauses as long as its block lasts; `result()` tells afterwards in words what that gave."""

    def __init__(
        self,
        monitor: Monitor,
        guard: ResumeGuard,
        subscribe: Callable[[Callable[[Record], None]], Callable[[], None]],
    ) -> None:
        self._monitor = monitor
        self._guard = guard
        self._subscribe = subscribe
        self._seen: list[int] = []
        self._pauses: list[tuple[int, int]] = []
        self._news = asyncio.Event()
        self._failed: MemListenerError | None = None

    async def __aenter__(self) -> Self:
        self._stop = self._subscribe(self._take)
        self._task = asyncio.create_task(self._run(), name="pausing through the guest's part")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def result(self) -> str:
        """How many transitions a pause covered."""
        inside = sum(any(a <= t < b for a, b in self._pauses) for t in self._seen)
        paused = sum(b - a for a, b in self._pauses)
        text = (
            f"paused {len(self._pauses)} times ({paused / 1e6:.1f} ms) for {len(self._seen)} "
            f"transitions of the guest's own, {inside} of which fell into a pause"
        )
        return text if self._failed is None else f"{text}; it ended early: {self._failed.message}"

    def _take(self, record: Record) -> None:
        if isinstance(record, TransitionRecord):
            self._seen.append(record.t_ns)
            self._news.set()

    async def _run(self) -> None:
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                run = await run_paused(self._monitor, self._guard, (), deadline=_DEADLINE)
                if not run.paused_before:
                    self._pauses.append((run.start_ns, run.end_ns))
        except MemListenerError as exc:
            self._failed = exc
