"""What a source of knowledge about a guest looks like to the agent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from ..recording import Record
from ..topology import MemoryMap
from ..tracking import Tracker

__all__ = ["MakeTracker", "Publish", "Source"]

Publish = Callable[[Iterable[Record]], None]
"""Takes the records that do not come from the tracker; called, also without any, on news."""

MakeTracker = Callable[[dict[int, MemoryMap], int], Tracker]
"""Makes the tracker from the first snapshot and its time."""


class Source(Protocol):
    """`snapshot` must be awaited once; then `keep_snapshots` runs as a task."""

    name: str
    tracker: Tracker | None
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

    async def finish(self) -> None:
        """The guest is gone: take in what it left."""
