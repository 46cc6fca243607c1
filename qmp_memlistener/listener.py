"""MemoryListener: QEMU's listener interface, for a guest in another process.

The callbacks have the names and the order of QEMU's `MemoryListener` (include/system/memory.h;
7.2: include/exec/memory.h): for one transition `begin`, then `region_del` in ascending address
order, then `region_add` and `region_nop` in ascending order, `log_start` and `log_stop` where
dirty logging changed, and `commit`.  A listener that registers first gets the present map, as
QEMU does in `listener_add_address_space`.  On top come `hole_punched`, `hole_filled` and
`slot_changed`.

Each listener has a queue and a task of its own: a slow one delays no other, one that raises is
reported and continues with the next transition.  No sockets here; the agent feeds it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterable

from .memslots import LOG_DIRTY_PAGES, OpKind
from .records import SlotOp
from .topology import FlatRange, FlatView, Hole, Transition, diff
from .tracking import Change

__all__ = ["Dispatcher", "MemoryListener"]

log = logging.getLogger(__name__)

QUEUE_LIMIT = 100_000  # changes; a listener that is further behind loses some, and `lost` is called
_CANCEL_DEADLINE = 0.5


class MemoryListener:
    """Subclass and override what you need; every method may be a plain or an `async` one.

    Sections are `FlatRange` values of the `memory` address space.
    """

    def begin(self) -> object:
        """A transition begins."""

    def region_del(self, section: FlatRange) -> object:
        """`section` is no longer there as it was."""

    def region_add(self, section: FlatRange) -> object:
        """`section` is new or changed."""

    def region_nop(self, section: FlatRange) -> object:
        """`section` was there before and still is, unchanged."""

    def log_start(self, section: FlatRange) -> object:
        """Dirty logging of the slot behind `section` was switched on."""

    def log_stop(self, section: FlatRange) -> object:
        """Dirty logging of the slot behind `section` was switched off."""

    def hole_punched(self, hole: Hole) -> object:
        """The guest can no longer reach this part of a RAM block as RAM."""

    def hole_filled(self, hole: Hole) -> object:
        """The guest can reach this part of a RAM block again."""

    def slot_changed(self, op: SlotOp) -> object:
        """One KVM_SET_USER_MEMORY_REGION (under TCG a predicted one)."""

    def commit(self, transition: Transition) -> object:
        """The transition is complete; `transition` has all of it."""

    def lost(self, changes: int) -> object:
        """This listener was too slow: `changes` changes were dropped before the next callback."""


Failure = Callable[[MemoryListener, str, BaseException], None]


class _Gap:
    """Stands in a queue where changes were dropped."""

    def __init__(self) -> None:
        self.dropped = 0


class _Runner:
    """One listener's queue and the task that empties it."""

    def __init__(self, listener: MemoryListener, on_failure: Failure) -> None:
        self.listener = listener
        self._on_failure = on_failure
        self._queue: asyncio.Queue[Change | _Gap | None] = asyncio.Queue()
        self._gap: _Gap | None = None  # the last thing in the queue, if that is one
        self._ended = False
        self.task = asyncio.create_task(self._run(), name=f"listener {type(listener).__name__}")

    def put(self, change: Change) -> None:
        if self._gap is None and self._queue.qsize() < QUEUE_LIMIT:
            self._queue.put_nowait(change)
            return
        if self._gap is None:
            self._gap = _Gap()
            self._queue.put_nowait(self._gap)
        self._gap.dropped += 1

    async def close(self, deadline_s: float) -> None:
        """Let the queue run empty, but not longer than `deadline_s` seconds.

        Called from one of the listener's own callbacks it ends behind the present change.
        """
        if asyncio.current_task() is self.task:
            self._ended = True
            return
        self._queue.put_nowait(None)
        _, late = await asyncio.wait([self.task], timeout=deadline_s)
        for task in late:
            task.cancel()
            _, stubborn = await asyncio.wait([task], timeout=_CANCEL_DEADLINE)
            if stubborn:
                log.warning("listener %s does not end", type(self.listener).__name__)

    async def idle(self) -> None:
        await self._queue.join()

    async def _run(self) -> None:
        while not self._ended:
            change = await self._queue.get()
            try:
                if change is None:
                    return
                if isinstance(change, _Gap):
                    self._gap = None
                    await self._call("lost", change.dropped)
                else:
                    await self._deliver(change)
            finally:
                self._queue.task_done()
        while not self._queue.empty():  # nobody may wait for what will not be delivered
            self._queue.get_nowait()
            self._queue.task_done()

    async def _deliver(self, change: Change) -> None:
        t = change.transition
        if t is not None:
            await self._call("begin")
            for section in t.removed:
                await self._call("region_del", section)
            new = set(t.added)
            for section in t.after:
                await self._call("region_add" if section in new else "region_nop", section)
        for op in change.slot_ops:
            await self._call("slot_changed", op)
            if op.op is OpKind.FLAGS:
                logged = change.view.lookup(op.gpa)
                if logged is not None:
                    on = op.flags & LOG_DIRTY_PAGES
                    await self._call("log_start" if on else "log_stop", logged)
        if t is not None:
            for hole in t.holes_filled:
                await self._call("hole_filled", hole)
            for hole in t.holes_punched:
                await self._call("hole_punched", hole)
            for moved in (*t.holes_moved, *t.holes_resized):
                await self._call("hole_filled", moved.before)
                await self._call("hole_punched", moved.after)
            await self._call("commit", t)

    async def _call(self, name: str, *args: object) -> None:
        try:
            result = getattr(self.listener, name)(*args)
            if inspect.isawaitable(result):
                await result
        except asyncio.CancelledError as exc:
            if self.task.cancelling():
                raise
            self._report(name, exc)  # of something the listener itself had cancelled
        except Exception as exc:  # a listener's own error must not reach the others
            self._report(name, exc)

    def _report(self, name: str, exc: BaseException) -> None:
        log.warning("listener %s failed in %s: %r", type(self.listener).__name__, name, exc)
        try:
            self._on_failure(self.listener, name, exc)
        except Exception:
            log.exception("the failure of a listener could not be reported")


class Dispatcher:
    """Hands changes to every registered listener; needs a running event loop."""

    def __init__(self, on_failure: Failure) -> None:
        self._on_failure = on_failure
        self._runners: list[_Runner] = []

    def register(self, listener: MemoryListener, view: FlatView | None) -> None:
        """Add a listener and send it the present map; ValueError when it is there already."""
        if any(r.listener is listener for r in self._runners):
            raise ValueError("this listener is registered already")
        runner = _Runner(listener, self._on_failure)
        self._runners.append(runner)
        if view is not None:
            empty = FlatView((), view.address_space)
            runner.put(Change(view, diff(empty, view, (), ())))

    async def unregister(self, listener: MemoryListener, *, deadline_s: float = 2.0) -> None:
        """Remove a listener when its queue is empty, at most `deadline_s` later."""
        for runner in list(self._runners):
            if runner.listener is listener:
                self._runners.remove(runner)
                await runner.close(deadline_s)
                return
        raise ValueError("this listener is not registered")

    def dispatch(self, changes: Iterable[Change]) -> None:
        """Queue `changes` for every listener; returns at once."""
        for change in changes:
            for runner in self._runners:
                runner.put(change)

    async def idle(self) -> None:
        """Wait until every listener has got everything queued so far."""
        for runner in list(self._runners):
            await runner.idle()

    async def close(self, *, deadline_s: float = 2.0) -> None:
        """Let all listeners finish, at most `deadline_s` seconds, then end them."""
        runners, self._runners = self._runners, []
        await asyncio.gather(*(r.close(deadline_s) for r in runners))
