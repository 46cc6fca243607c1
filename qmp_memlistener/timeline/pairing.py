"""What several probes saw: which of it is one.  Pure.

Traced slot operations and the ioctls that a probe saw are paired by content and, among those with
the same content, in QEMU's order: QEMU prints the line of an operation when its ioctl is done, and
does one at a time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TypeVar

import msgspec

from ..memslots import OpKind
from ..probes import Observation, StallKind
from ..records import SlotOp
from .evidence import KEEP_NS, TRACE, Evidence, Spans, Stall, overlap, together, witness
from .windows import missing_window

__all__ = ["INTERPOSER", "LIMIT", "SLACK_NS", "Issued", "Pairing", "TracedOp", "Updates", "merge"]

LIMIT = 16384
"""So many of either side wait for the other at most: it may be absent altogether."""

INTERPOSER = "interposer"

SLACK_NS = 1_000_000_000
"""A line and its ioctl are delivered within this time of each other."""

T = TypeVar("T")
_Key = tuple[int, int, int, bool]


class TracedOp(msgspec.Struct, eq=False, gc=False):
    """An operation that was traced, and its ioctl once it is known."""

    op: SlotOp
    ioctl: Stall | None = None


class Pairing:
    """Pairs what has come since the last time.  An ioctl that is paired gets the facts of its line.

    When too many wait, all of them are forgotten: after a gap the order pairs no more.
    """

    def __init__(self) -> None:
        self._new_ioctls: list[Stall] = []
        self._new_ops: list[TracedOp] = []
        self._ioctls: dict[_Key, deque[Stall]] = {}
        self._ops: dict[_Key, deque[TracedOp]] = {}
        self._passed: list[TracedOp] = []
        self._waiting = 0
        self._latest_ns = 0
        self._whole_ns = 0

    def ioctl(self, stall: Stall) -> None:
        """A probe saw one."""
        self._make_room()
        self._latest_ns = max(self._latest_ns, stall.seen.end_ns)
        self._new_ioctls.append(stall)

    def traced(self, traced: TracedOp) -> None:
        """A line shows one."""
        self._make_room()
        self._latest_ns = max(self._latest_ns, traced.op.t_ns)
        self._new_ops.append(traced)

    def pair(self) -> None:
        """Bring together what belongs together; the rest waits."""
        ioctls, self._new_ioctls = self._new_ioctls, []
        ops, self._new_ops = self._new_ops, []
        for stall in sorted(ioctls, key=_start):
            self._add_ioctl(stall)
        for traced in ops:
            self._add_op(traced)

    def _add_ioctl(self, stall: Stall) -> None:
        key = _key(stall)
        if key is None:
            return
        ops = self._ops.get(key)
        while ops:
            traced = ops.popleft()
            self._taken(self._ops, key)
            # an earlier line is of an ioctl that was not seen
            if stall.seen.start_ns <= traced.op.t_ns:
                self._waiting -= 1
                _pair(stall, traced)
                return
            self._passed.append(traced)
        self._ioctls.setdefault(key, deque()).append(stall)

    def _add_op(self, traced: TracedOp) -> None:
        op = traced.op
        key = (op.as_id, op.slot, op.gpa, op.op is OpKind.DELETE)
        ioctls = self._ioctls.get(key)
        while ioctls and ioctls[0].seen.start_ns <= op.t_ns:
            stall = ioctls.popleft()
            self._taken(self._ioctls, key)
            if stall.seen.end_ns >= op.t_ns - KEEP_NS:
                self._waiting -= 1
                _pair(stall, traced)
                return
        self._ops.setdefault(key, deque()).append(traced)

    def clear(self) -> None:
        """Something was missed on one side: what waits cannot be paired by its order any more."""
        for waiting in (self._new_ioctls, self._new_ops, self._ioctls, self._ops, self._passed):
            waiting.clear()
        self._waiting = 0
        self._whole_ns = self._latest_ns + SLACK_NS

    def strays(self, until_ns: int) -> tuple[list[SlotOp], list[Stall]]:
        """Operations whose ioctl no probe saw, and ioctls without a line; each is reported once.

        Both sides must have delivered what was before `until_ns`.  What came within a gap is no
        stray: what was missed is unknown.
        """
        before = until_ns - SLACK_NS
        ops = [t for t in self._passed if t.op.t_ns < before]
        self._passed = [t for t in self._passed if t.op.t_ns >= before]
        for key in list(self._ops):
            ops += self._drop(self._ops, key, lambda traced: traced.op.t_ns < before)
        ioctls: list[Stall] = []
        for key in list(self._ioctls):
            ioctls += self._drop(self._ioctls, key, lambda stall: stall.seen.end_ns < before)
        return (
            [t.op for t in ops if t.op.t_ns >= self._whole_ns],
            [s for s in ioctls if s.seen.start_ns >= self._whole_ns],
        )

    def _drop(
        self, where: MutableMapping[_Key, deque[T]], key: _Key, old: Callable[[T], bool]
    ) -> Iterator[T]:
        waiting = where[key]
        while waiting and old(waiting[0]):
            yield waiting.popleft()
            self._taken(where, key)

    def _make_room(self) -> None:
        if self._waiting >= LIMIT:
            self.clear()
        self._waiting += 1

    def _taken(self, where: MutableMapping[_Key, deque[T]], key: _Key) -> None:
        self._waiting -= 1
        if not where[key]:
            del where[key]


class Issued:
    """What the interposer issued instead of QEMU, and what QEMU had asked for.

    Its log and other probes show what was asked for, at that time: these belong to what was issued,
    and are not reported by themselves.
    """

    def __init__(self) -> None:
        self._pairing = Pairing()
        self._asked: Spans[Stall] = Spans()

    def carried_out(
        self,
        asked: Iterable[Observation],
        windows: Iterable[Observation],
        sizes: Mapping[tuple[int, int], int],
        *,
        traced: bool,
    ) -> list[Stall]:
        """The stalls of one transaction.  `sizes` are of slots that were there before, by place."""
        stalls = tuple(Stall(seen, witness(seen.probe)) for seen in asked)
        for stall in stalls:
            self._asked.add(stall.seen.start_ns, stall.seen.end_ns, stall)
            if traced:
                self._pairing.ioctl(stall)
        found = []
        timed = []
        for seen in windows:
            if (op := seen.update) is not None:
                if op.op is OpKind.DELETE and not op.size:
                    op = msgspec.structs.replace(op, size=sizes.get((op.as_id, op.gpa), 0))
                    seen = msgspec.structs.replace(seen, update=op, site=str(op))
                timed.append((op, seen.start_ns, seen.end_ns))
            found.append(seen)
        missing = missing_window(timed, INTERPOSER)
        if missing is not None:
            found.append(missing)
        return [Stall(seen, witness(seen.probe), asked=stalls) for seen in found]

    def traced(self, traced: TracedOp) -> None:
        """A line shows an operation that was asked for."""
        self._pairing.traced(traced)

    def clear(self) -> None:
        """Something was missed: what waits cannot be paired by its order any more."""
        self._pairing.clear()

    def pair(self) -> None:
        """Bring lines and what was asked for together."""
        self._pairing.pair()

    def know(self, ready: Iterable[Stall]) -> None:
        """Find what these are parts of.

        Those that other probes saw of what was asked for are `superseded`.
        """
        ready = list(ready)
        if self._asked:  # a guest that is not steered pays nothing
            for stall in ready:
                if stall.seen.kind is StallKind.SLOT_UPDATE and stall.seen.probe != INTERPOSER:
                    self._look_up(stall)
        for stall in ready:
            if stall.asked:
                known = {a.transition for a in stall.asked if a.transition is not None}
                stall.transition = known.pop() if len(known) == 1 else None
                stall.logs = all(a.logs for a in stall.asked)
                for a in stall.asked:
                    stall.witnesses = together(stall.witnesses, a.witnesses)

    def _look_up(self, stall: Stall) -> None:
        seen = stall.seen
        for asked in self._asked.find(seen.start_ns, seen.end_ns + 1):
            same_thread = seen.tid in (None, asked.seen.tid)
            if same_thread and _key(asked) == _key(stall):
                asked.witnesses = together(asked.witnesses, stall.witnesses)
                stall.superseded = True
                return

    def forget(self, before_ns: int) -> None:
        """Drop what ended before."""
        self._asked.forget(before_ns)


class Updates:
    """Slot updates, by the thread that made them."""

    def __init__(self, updates: Iterable[Stall]) -> None:
        self._of: dict[int | None, tuple[list[int], list[Stall]]] = {}
        for update in updates:
            if update.seen.probe not in (TRACE, INTERPOSER):
                starts, found = self._of.setdefault(update.seen.tid, ([], []))
                starts.append(update.seen.start_ns)
                found.append(update)

    def inside(self, commit: Stall) -> list[Stall]:
        """The ioctls that a commit issued, in order: those of its thread in its time."""
        starts, updates = self._of.get(commit.seen.tid, ([], []))
        end_ns = commit.seen.end_ns
        low = bisect_left(starts, commit.seen.start_ns)
        high = bisect_right(starts, end_ns, low)
        return [update for update in updates[low:high] if update.seen.end_ns <= end_ns]


def merge(stalls: list[Stall], evidence: Evidence) -> list[Stall]:
    """Windows of one kind that several probes saw: the narrowest is kept for all.

    One whose twin was decided before has been reported already.
    """
    kept: list[Stall] = []
    several = len({stall.seen.probe for stall in stalls}) > 1
    for stall in stalls:
        if any(twins(other, stall) for other in evidence.seen_by_others(stall)):
            continue
        twin = None
        if several:
            probe, start_ns = stall.seen.probe, stall.seen.start_ns
            twin = next(
                (
                    k
                    for k in reversed(kept[-32:])
                    if k.seen.probe != probe and k.seen.end_ns > start_ns and twins(k, stall)
                ),
                None,
            )
        if twin is None:
            kept.append(stall)
            continue
        twin.witnesses = together(twin.witnesses, stall.witnesses)
        twin.transition = twin.transition if twin.transition is not None else stall.transition
        if uncertainty(stall) < uncertainty(twin):
            twin.seen = stall.seen
    return kept


def uncertainty(stall: Stall) -> int:
    """How little is known of where it was and how long it was."""
    seen = stall.seen
    return (seen.end_ns - seen.start_ns) - 2 * seen.at_least_ns + seen.at_most_ns


def twins(one: Stall, other: Stall) -> bool:
    """Two probes saw the same stall of the same victim."""
    a, b = one.seen, other.seen
    shared = overlap(a.start_ns, a.end_ns, b.start_ns, b.end_ns)
    if a.probe == b.probe or not shared:
        return False
    if a.kind is StallKind.SLOT_UPDATE:
        return _key(one) == _key(other)
    if a.kind is StallKind.MISSING:
        return one.transition is not None and one.transition == other.transition
    if a.kind is StallKind.BQL_WAIT:
        fits = a.at_least_ns <= b.at_most_ns and b.at_least_ns <= a.at_most_ns
        return a.site == b.site and fits
    if a.kind is StallKind.VCPU_PAUSE or a.thread == b.thread:
        return shared * 2 >= min(one.length_ns, other.length_ns)
    return False


def _key(stall: Stall) -> _Key | None:
    """What an ioctl has in common with its line."""
    update = stall.seen.update
    if update is None:
        return None
    return (update.as_id, update.slot, update.gpa, update.op is OpKind.DELETE)


def _start(stall: Stall) -> int:
    return stall.seen.start_ns


def _pair(stall: Stall, traced: TracedOp) -> None:
    op = traced.op
    traced.ioctl = stall
    stall.transition = op.transition
    stall.logs = op.transition is None
    stall.witnesses = together(stall.witnesses, witness(TRACE))
    stall.line = op
