"""What a source of knowledge about a guest looks like to the agent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from ..errors import DeadlineExceeded
from ..records import Note, Record
from ..topology import MemoryMap
from ..tracking import Tracker
from .mapping import BusMasters

__all__ = ["MakeTracker", "OwnCommand", "Patience", "Publish", "Source", "snapshot_deadline"]

Publish = Callable[[Iterable[Record]], None]
"""Takes the records that do not come from the tracker; called, also without any, on news."""

MakeTracker = Callable[[dict[int, MemoryMap], int], Tracker]
"""Makes the tracker from the first snapshot and its time."""

OwnCommand = Callable[[str, int, int], None]
"""Told a command of ours that QEMU carried out: its name, when it began and when it was over."""

SNAPSHOT_DEADLINE_S = 10.0


def snapshot_deadline() -> float:
    """Seconds after which a snapshot is given up for this time."""
    return SNAPSHOT_DEADLINE_S


class Source(Protocol):
    """`snapshot` must be awaited once; then `keep_snapshots` runs as a task."""

    name: str
    tracker: Tracker | None
    masters: BusMasters
    snapshots: int
    snapshot_ns: int

    async def snapshot(self) -> int:
        """Take a snapshot and fold it in; returns its round trip in ns."""

    async def keep_snapshots(self) -> None:
        """Take snapshots when they are needed, for ever."""

    async def settle(self) -> None:
        """Return when everything that has happened so far is reported."""

    def poke(self) -> None:
        """A QMP event came: something may have changed."""

    def reported_to(self) -> int | None:
        """Every change up to this time is reported; None when that cannot be said."""

    async def finish(self) -> None:
        """The guest is gone: take in what it left."""


class Patience:
    """What to do when a snapshot takes too long: a stalled guest is what users look for.

    It is said once, and again when the guest answers; the agent goes on trying.
    """

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._since_ns: int | None = None

    def stalled(self, error: DeadlineExceeded) -> None:
        """A snapshot did not come in time."""
        if self._since_ns is None:
            self._since_ns = time.monotonic_ns()
            self._publish([Note(t_ns=self._since_ns, text=f"no snapshot: {error.message}")])

    def answered(self) -> None:
        """A snapshot came."""
        if self._since_ns is not None:
            now = time.monotonic_ns()
            late_s = (now - self._since_ns) / 1e9
            self._since_ns = None
            self._publish([Note(t_ns=now, text=f"snapshots again, {late_s:.1f} s later")])
