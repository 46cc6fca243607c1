"""From a probe's thread into the event loop: calls in order, one wake-up for a whole backlog.

`loop.call_soon_threadsafe` writes a byte for each call into a socket that is soon full when the
loop is busy; then wake-ups of others are lost.  And what is queued there has no bound.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import ParamSpec

__all__ = ["LIMIT", "Inbox"]

LIMIT = 20_000
"""What may be in an inbox, in the caller's measure."""
_TURN = 500  # of that, handed on before others have their turn

P = ParamSpec("P")


class Inbox:
    """Calls for one event loop; `post` is for other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, limit: int = LIMIT) -> None:
        self._loop = loop
        self._limit = limit
        self._lock = threading.Lock()
        self._calls: deque[tuple[int, Callable[[], None]]] = deque()
        self._weight = 0
        self._woken = False

    @property
    def full(self) -> bool:
        """The loop has not taken what it was given."""
        return self._weight >= self._limit

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
