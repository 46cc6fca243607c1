"""Telling the sink now and then how far a probe is that has nothing to deliver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Progress"]

_PERIOD_S = 0.1


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
