"""The source for guests that cannot be traced: QMP events and snapshots at a varying pace.

What comes and goes between two snapshots is not seen; the header of the records says so.
"""

from __future__ import annotations

import asyncio

from ..errors import DeadlineExceeded
from ..qmp import IdleRoundTrip, Monitor, take_snapshot
from ..tracking import Tracker
from .source import (
    BusMasters,
    MakeTracker,
    Patience,
    Publish,
    maps_of,
    snapshot_deadline,
)

__all__ = ["PollSource"]

SHORTEST_S = 0.02
LONGEST_S = 1.0
SLOWER = 1.5
SHARE = 50
"""A snapshot that took `t` is followed by `SHARE * t` without one: at most 2 % of the BQL."""


class PollSource:
    """A `Source` that takes snapshots: often after something happened, rarely otherwise."""

    name = "polling"

    def __init__(
        self,
        monitor: Monitor,
        idle: IdleRoundTrip,
        publish: Publish,
        make_tracker: MakeTracker,
    ) -> None:
        self._monitor = monitor
        self._idle = idle
        self._publish = publish
        self._make_tracker = make_tracker
        self.tracker: Tracker | None = None
        self.masters = BusMasters()
        self.snapshots = 0
        self.snapshot_ns = 0
        self._patience = Patience(publish)
        self._text = ""
        self._poked = asyncio.Event()
        self._lock = asyncio.Lock()

    def poke(self) -> None:
        """Something happened: look soon, and for a while often."""
        self._poked.set()

    async def keep_snapshots(self) -> None:
        """Look again and again, at a pace that follows the changes."""
        pause_s = SHORTEST_S
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    await self._poked.wait()
            except TimeoutError:
                pass
            poked = self._poked.is_set()
            self._poked.clear()
            before = self._text
            try:
                took_s = await self.snapshot() / 1e9
            except DeadlineExceeded as exc:
                self._patience.stalled(exc)
                took_s = LONGEST_S
            else:
                self._patience.answered()
            lively = poked or self._text is not before
            pause_s = SHORTEST_S if lively else min(pause_s * SLOWER, LONGEST_S)
            await asyncio.sleep(min(SHARE * took_s, LONGEST_S))

    async def snapshot(self) -> int:
        """Take one snapshot and fold it in; returns how long it took, in ns."""
        async with self._lock:
            shot = await take_snapshot(self._monitor, self._idle, deadline=snapshot_deadline())
            self.snapshots += 1
            self.snapshot_ns += shot.duration_ns
            self.masters.take(shot.text, shot.t_start_ns, shot.t_end_ns)
            if shot.text != self._text:
                self._text = shot.text
                maps = maps_of(shot.text)
                if self.tracker is None:
                    self.tracker = self._make_tracker(maps, shot.t_end_ns)
                else:
                    self.tracker.snapshot(maps, shot.t_end_ns)
                self._publish(())
            return shot.duration_ns

    async def settle(self) -> None:
        """Take a snapshot now."""
        await self.snapshot()

    def reported_to(self) -> int | None:
        """Nothing can be said of what happened between two snapshots."""
        return None

    async def finish(self) -> None:
        """Nothing is left to take in."""
