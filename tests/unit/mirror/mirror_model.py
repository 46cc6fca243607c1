"""Backends and pausers that watch what a mirror does, and the agent's side of a mirror."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from qmp_memlistener.errors import MemListenerError, OperationFailed
from qmp_memlistener.memslots import Slot
from qmp_memlistener.mirror.backend import ModelBackend
from qmp_memlistener.mirror.mirror import Mirror
from qmp_memlistener.topology import FlatView, diff
from qmp_memlistener.updates.model import Strategy
from qmp_memlistener.updates.pause import Pause
from tests.unit.memslots.memslots_model import PAGE, PAGES, Content

EMPTY = FlatView(())


class Pausing:
    """Stands for the guest: `paused` while the block lasts; can refuse or fail.

    `cancelled_with`: the pause is cancelled before its block, and this is what came of it.
    """

    def __init__(self) -> None:
        self.paused = False
        self.pauses = 0
        self.refuse: MemListenerError | None = None
        self.fail_to_resume: MemListenerError | None = None
        self.cancelled_with: str | None = None

    @asynccontextmanager
    async def __call__(self, pause: Pause) -> AsyncIterator[Pause]:
        if self.refuse is not None:
            raise self.refuse
        if self.cancelled_with is not None:
            pause.note = self.cancelled_with
            raise asyncio.CancelledError
        self.paused = True
        self.pauses += 1
        pause.start_ns = 1
        try:
            yield pause
        finally:
            self.paused = False
            pause.end_ns = 11
        if self.fail_to_resume is not None:
            raise self.fail_to_resume


class WatchedBackend(ModelBackend):
    """Writes down each call and what its users can see after it; fails when it is told to."""

    def __init__(self, pausing: Pausing) -> None:
        super().__init__()
        self.pausing = pausing
        self.calls: list[str] = []
        self.unpaused: list[str] = []
        self.deleted: list[Slot] = []
        self.seen: list[dict[int, Content]] = []
        self.fail_in: int | None = None

    def content(self) -> dict[int, Content]:
        """What is found in each page."""
        found = {page: self.backing(page * PAGE) for page in range(PAGES)}
        return {page: (b[0], b[2]) for page, b in found.items() if b is not None}

    def add_slot(self, slot: Slot) -> None:
        self._note("add_slot")
        super().add_slot(slot)
        self.seen.append(self.content())

    def delete_slot(self, slot: Slot) -> None:
        self._note("delete_slot")
        super().delete_slot(slot)
        self.deleted.append(slot)
        self.seen.append(self.content())

    def set_flags(self, slot: Slot) -> None:
        self._note("set_flags")
        super().set_flags(slot)

    def set_hole(self, slot: Slot, start: int, end: int) -> None:
        self._note("set_hole")
        super().set_hole(slot, start, end)
        self.seen.append(self.content())

    def clear_hole(self, slot: Slot, start: int, end: int) -> None:
        self._note("clear_hole")
        super().clear_hole(slot, start, end)
        self.seen.append(self.content())

    def end(self) -> None:
        super().end()
        self.seen.append(self.content())

    def _note(self, name: str) -> None:
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                raise OSError(22, "a call of the test")
        self.calls.append(name)
        if not self.pausing.paused:
            self.unpaused.append(name)


class Told:
    """Tells a mirror one map after the other, as the dispatcher does."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.view = EMPTY

    async def __call__(self, view: FlatView) -> None:
        before, self.view = self.view, view
        self.mirror.begin()
        await self.mirror.commit(diff(before, view))


def mirror_of(
    strategy: Strategy, *, max_holes: int | None = 64
) -> tuple[Mirror, WatchedBackend, Told]:
    """A mirror with a backend and a guest to watch."""
    pausing = Pausing()
    backend = WatchedBackend(pausing)
    mirror = Mirror(backend, strategy, pause=pausing, max_holes=max_holes)
    return mirror, backend, Told(mirror)


async def tell_all(told: Told, views: Sequence[FlatView]) -> None:
    """One map after the other, whether the backend fails or not."""
    for view in views:
        try:
            await told(view)
        except OperationFailed:
            assert not told.mirror.in_step
