"""Mirror: a MemoryListener that keeps memslots of your own in step with a guest, under a strategy.

    mirror = Mirror(backend, strategy=Strategy.HOLE)
    agent.register(mirror)

or, with a guard for pauses and a check at the end,

    async with mirroring(agent, backend, strategy=Strategy.PAUSE) as mirror: ...

What is done for a transition is the plan that the verb `plan` prints (`memslots.plan`), carried out
operation by operation on a `SlotBackend`.  A mirror sees a transition when QEMU has made it,
so it is behind the guest by `MirrorRecord.lag`, whatever the strategy.  It follows the address
space `memory`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from ..errors import GuestMigrating, MemListenerError, OperationFailed
from ..listener import MemoryListener
from ..memslots import (
    DEFAULT_MAX_HOLES,
    LogChange,
    Op,
    OpKind,
    Plan,
    PlanStrategy,
    Rules,
    SlotTable,
    plan,
)
from ..records import LabMirror, MirrorDifference, MirrorRecord, MirrorTimes, SlotOp
from ..text import count_text
from ..topology import FlatRange, FlatView, MemoryMap, Transition
from ..tracking.live_slots import UNKNOWN_BLOCK
from ..updates.model import Strategy
from ..updates.pause import Pause
from .backend import MEMORY, SlotBackend, SlotWriter, map_differences

__all__ = ["Mirror", "Pauser"]

log = logging.getLogger(__name__)

Pauser = Callable[[Pause], AbstractAsyncContextManager[Pause]]
"""Makes a block inside which no vCPU of the guest runs (`pause.paused_guest`)."""

_PLANS = {
    Strategy.DIRECT: PlanStrategy.QEMU,
    Strategy.PAUSE: PlanStrategy.PAUSE,
    Strategy.HOLE: PlanStrategy.HOLE,
}
_NO_MAP = "no map was received yet"
_NOTES = 100
_EMPTY = FlatView(())


class Mirror(MemoryListener):
    """Keeps `backend` in step with the maps that come, under `strategy`.

    DIRECT: QEMU's own order, slots are deleted and added again.  PAUSE: the same while `pause`
    holds the guest (`mirroring` makes one); while the guest is migrating updates are made without,
    and that is remarked.  HOLE: slots follow RAM blocks, keep their ids and
    dirty bitmaps, and get holes (at most `max_holes` each; None: no limit).

    `rules` say how this QEMU makes slots of ranges (`Agent.rules`).  An `async` call of the
    backend may take `deadline` seconds.  A call that fails ends following: OperationFailed is
    raised to the dispatcher, which reports it, `in_step` is False, and `resync` starts anew.
    """

    def __init__(
        self,
        backend: SlotBackend,
        strategy: Strategy = Strategy.DIRECT,
        *,
        pause: Pauser | None = None,
        rules: Rules | None = None,
        max_holes: int | None = DEFAULT_MAX_HOLES,
        deadline: float = 5.0,
    ) -> None:
        if strategy is Strategy.PAUSE and pause is None:
            raise ValueError("strategy pause needs a pauser: give one, or use mirroring()")
        self.strategy = strategy
        self._backend = backend
        self._writer = SlotWriter(backend, deadline)
        self._pause = pause
        self._rules = rules or Rules()
        self._max_holes = max_holes
        self._lock = asyncio.Lock()
        self._view = _EMPTY  # the map it shows
        self._latest: FlatView | None = None  # the last one that came
        self._why_not: str | None = _NO_MAP
        self._stuck = False  # what the backend holds is not known
        self._suspended = False  # pauses are, while a migration has the guest
        self._open = False  # inside a transition
        self._since_ns: int | None = None
        self._starts: set[str] = set()
        self._stops: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._updates, self._pauses, self._lag = MirrorTimes(), MirrorTimes(), MirrorTimes()
        self._differences: tuple[MirrorDifference, ...] = ()
        self._notes: deque[str] = deque(maxlen=_NOTES)

    @property
    def in_step(self) -> bool:
        """The backend shows the last map that came."""
        return self._why_not is None

    @property
    def received(self) -> int:
        """How many maps came so far, the present one perhaps not yet shown."""
        return self._counts["transitions"]

    def report(self, backend: str = "", lab: LabMirror | None = None) -> MirrorRecord:
        """What was done so far; `backend` and `lab` are what a recording has of the backend."""
        counts = {name: self._counts[name] for name in _COUNTED}
        calls = self._writer.calls
        return MirrorRecord(
            t_ns=time.monotonic_ns(),
            backend=backend,
            strategy=str(self.strategy),
            in_step=self.in_step,
            why_not=self._why_not,
            compared=counts["checks"] > 0,
            updates=self._updates,
            pauses=self._pauses,
            lag=self._lag,
            differences=list(self._differences),
            notes=list(self._notes),
            operations=self._writer.operations,
            slots_added=calls["add_slot"],
            slots_deleted=calls["delete_slot"],
            flags_changed=calls["set_flags"],
            holes_marked=calls["set_hole"],
            holes_unmarked=calls["clear_hole"],
            lab=lab,
            **counts,
        )

    # -- what the agent calls ------------------------------------------------------------------

    def begin(self) -> None:
        self._open = True
        self._since_ns = None

    def slot_changed(self, op: SlotOp) -> None:
        if self._open and self._since_ns is None:
            self._since_ns = op.t_ns

    async def log_start(self, section: FlatRange) -> None:
        self._starts.add(section.name)
        self._stops.discard(section.name)
        if not self._open:
            await self._log_changed()

    async def log_stop(self, section: FlatRange) -> None:
        self._stops.add(section.name)
        self._starts.discard(section.name)
        if not self._open:
            await self._log_changed()

    async def commit(self, transition: Transition) -> None:
        """Bring the backend to the map after `transition`.  Raises OperationFailed."""
        self._counts["transitions"] += 1
        try:
            async with self._lock:
                self._latest = _known(transition.after)
                if not self._stuck:
                    await self._guarded(self._latest)
        finally:
            self._open = False
            self._since_ns = None

    def lost(self, changes: int) -> None:
        """Changes were dropped: out of step until the next transition brings the whole map."""
        self._counts["dropped"] += changes
        dropped = f"{count_text(changes, 'change')} dropped"
        if not self._stuck:
            self._why_not = f"{dropped}, the mirror was too slow"
        self.remark(f"{dropped}: waiting for the next whole map")

    # -- on request ----------------------------------------------------------------------------

    async def check(self, source: MemoryMap | FlatView) -> tuple[MirrorDifference, ...]:
        """Compare what the backend holds with a map; empty when it shows just that.

        A mirror that differs is out of step until `resync`.  Raises InputError when the slots of
        the backend overlap.
        """
        async with self._lock:
            found = map_differences(_known(_view(source)), self._backend.slots(), self._rules)
            self._counts["checks"] += 1
            self._differences = found
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                self._fall(f"{found[0]}{more}")
            return found

    async def resync(self, source: MemoryMap | FlatView | None = None) -> None:
        """Empty the backend and fill it from `source`, by default the last map that came.

        Ids and dirty bitmaps begin anew.  Raises OperationFailed when the backend fails again, or
        when there is no map.
        """
        async with self._lock:
            view = _known(_view(source)) if source is not None else self._latest
            if view is None:
                raise OperationFailed(_NO_MAP, remedy="register the mirror, or give a map")
            self._stuck = True
            await self._guarded(view)

    # -- carrying out --------------------------------------------------------------------------

    async def _log_changed(self) -> None:
        async with self._lock:
            if self.in_step:
                await self._guarded(self._view)

    async def _guarded(self, view: FlatView) -> None:
        """Bring the backend to `view`, or be out of step."""
        change = LogChange(frozenset(self._starts), frozenset(self._stops))
        self._starts.clear()
        self._stops.clear()
        start = time.monotonic_ns()
        before = self._writer.operations
        was = self._why_not
        try:
            if self._stuck:
                await self._rebuild(view)
            elif view != self._view or change.start or change.stop:
                await self._follow(view, change)
        except asyncio.CancelledError:
            self._fall("an update was cancelled on its way")
            raise
        except Exception as exc:
            self._fall(str(exc))
            raise OperationFailed(
                f"the mirror is no longer in step with the guest: {exc}",
                remedy="call resync() when the backend works again",
            ) from exc
        self._view = view
        self._why_not = None
        self._stuck = False
        if was is not None and was is not _NO_MAP:
            self.remark("in step again")
        if self._writer.operations != before:
            now = time.monotonic_ns()
            self._updates = self._updates.plus(now - start)
            if self._since_ns is not None:
                self._lag = self._lag.plus(now - self._since_ns)

    async def _follow(self, view: FlatView, change: LogChange) -> None:
        done = self._plan(self._view, view, self._writer.table, change)
        if done.before != self._writer.table:
            # too many holes before, and now all blocks have one slot again: not one plan's work
            await self._rebuild(view)
            return
        for step in done.steps:
            ops = done.ops[step.first : step.first + step.count]
            if ops[0].op is OpKind.PARK:
                await self._paused(ops, done.after)
            elif ops[0].op is OpKind.BATCH_BEGIN:
                await self._writer.together(ops, done.after)
            else:
                for op in ops:
                    await self._writer.run(op, done.after)
        self._writer.table = done.after
        self._counts["exposed"] += bool(done.missing)
        self._counts["bitmaps_dropped"] += done.dirty.dropped
        touched = {(op.as_id, op.slot) for op in done.ops if op.slot >= 0}
        self._counts["slots_touched"] += len(touched)

    async def _rebuild(self, view: FlatView) -> None:
        """Empty the backend of what it says it holds, and fill it, as one change."""
        held = SlotTable(self._backend.slots())
        done = self._plan(_EMPTY, view, SlotTable(), None)
        gone = [
            Op(OpKind.DELETE, s.as_id, s.slot, s.gpa, s.size, s.flags) for s in held.slots(MEMORY)
        ]
        self._writer.table = held
        ops = (*gone, *done.ops)
        if self.strategy is Strategy.PAUSE:
            await self._paused(ops, done.after)
        else:
            await self._writer.together(ops, done.after)
        self._writer.table = done.after
        self._counts["rebuilt"] += 1

    def _plan(
        self, before: FlatView, after: FlatView, table: SlotTable, change: LogChange | None
    ) -> Plan:
        return plan(
            before,
            after,
            _PLANS[self.strategy],
            table=table,
            rules=self._rules,
            log=change,
            max_holes=self._max_holes,
        )

    async def _paused(self, ops: Sequence[Op], after: SlotTable) -> None:
        """`ops` while the guest does not run; without a pause when it cannot be had.

        A guest that is migrating may not be paused: pauses are suspended until that is over.
        """
        assert self._pause is not None, "only a mirror that pauses has plans with pauses"
        pause = Pause()
        entered = done = ran = False
        try:
            async with self._pause(pause):
                entered = True
                if self._suspended:
                    self._suspended = False
                    self.remark("the migration is over: the guest is paused for updates again")
                await self._writer.together(ops, after)
                done, ran = True, pause.is_over
        except GuestMigrating as exc:
            self._suspended = True
            self.remark(f"{exc.message}; updates continue without pauses")
        except MemListenerError as exc:
            if entered and not done:
                raise
            self.remark(f"{'after' if done else 'before'} an update of the mirror: {exc.message}")
        finally:
            if pause.note:
                self.remark(pause.note)
            if entered:
                self._count_pause(pause)
        if not done:
            await self._writer.together(ops, after)
        self._counts["unpaused"] += ran or not entered

    def _count_pause(self, pause: Pause) -> None:
        if pause.paused_before:
            self._counts["already_paused"] += 1
        else:
            self._pauses = self._pauses.plus(pause.end_ns - pause.start_ns)

    def _fall(self, why: str) -> None:
        self._why_not = why
        self._stuck = True
        self.remark(f"out of step: {why}")

    def remark(self, text: str) -> None:
        """Keep `text` for the report, and log it; not again while it is the last one."""
        if not self._notes or self._notes[-1] != text:
            log.warning("mirror: %s", text)
            self._notes.append(text)


_COUNTED = (
    "transitions",
    "slots_touched",
    "exposed",
    "bitmaps_dropped",
    "already_paused",
    "unpaused",
    "rebuilt",
    "dropped",
    "checks",
)


def _view(source: MemoryMap | FlatView) -> FlatView:
    return source if isinstance(source, FlatView) else source.view


def _known(view: FlatView) -> FlatView:
    """Without RAM whose block is not known before the next snapshot."""
    if not any(r.name.startswith(UNKNOWN_BLOCK) for r in view):
        return view
    return FlatView([r for r in view if not r.name.startswith(UNKNOWN_BLOCK)], view.address_space)
