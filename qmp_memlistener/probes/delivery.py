"""From a probe's thread into the event loop: calls in order, one wake-up for a whole backlog.

`loop.call_soon_threadsafe` writes a byte for each call into a socket that is soon full when the
loop is busy; then wake-ups of others are lost.  And what is queued there has no bound.

A probe that has nothing to deliver says now and then how far it is (`Progress`).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import ParamSpec

__all__ = ["LIMIT", "Inbox", "Progress"]

LIMIT = 20_000
"""What may be in an inbox, in the caller's measure."""
_TURN = 500  # of that, handed on before others have their turn
_PERIOD_S = 0.1

P = ParamSpec("P")


class Inbox:
    """Calls for one event loop; `post` is for other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._calls: deque[tuple[int, Callable[[], None]]] = deque()
        self._weight = 0
        self._woken = False

    @property
    def full(self) -> bool:
        """The loop has not taken what it was given."""
        return self._weight >= LIMIT

    def post(
        self, weight: int, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        """Have the loop call it; false when the loop is closed.

        What weighs nothing is always taken; whoever posts anything else asks whether it is `full`.
        """
        with self._lock:
            self._calls.append((weight, partial(function, *args, **kwargs)))
            self._weight += weight
            woken, self._woken = self._woken, True
        if woken:
            return not self._loop.is_closed()
        try:
            self._loop.call_soon_threadsafe(self._take)
        except RuntimeError:
            return False
        return True

    def _take(self) -> None:
        """In the loop: some of the calls; the rest after what else is ready."""
        turn = 0
        while turn < _TURN:
            with self._lock:
                if not self._calls:
                    self._woken = False
                    return
                weight, call = self._calls.popleft()
                self._weight -= weight
            turn += max(weight, 1)
            call()
        self._loop.call_soon(self._take)


class Progress:
    """Calls `tell` in the event loop every tenth of a second between `start` and `stop`.

    A call that comes late by more than half that is left out: the loop was busy, so what arrived
    meanwhile may not have been taken in yet.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin; needs a running loop."""
        self._timer = asyncio.get_running_loop().call_later(_PERIOD_S, self._tick)

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        assert self._timer is not None
        late = asyncio.get_running_loop().time() - self._timer.when()
        self.start()
        if late < _PERIOD_S / 2:
            self._tell()
