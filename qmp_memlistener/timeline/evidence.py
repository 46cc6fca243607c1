"""What the timeline remembers: the latest windows and commands, and which of them overlap a span.

Pure.  What a look-up costs depends on what it finds, not on how much is remembered.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from heapq import heappop, heappush
from itertools import count
from operator import itemgetter
from typing import Generic, TypeVar

import msgspec

from ..probes import HostWait, Observation, StallKind
from ..records import CommandRecord, SlotOp, StallCause, StallCauseType

__all__ = [
    "KEEP_NS",
    "LIMIT",
    "STEP",
    "TRACE",
    "Evidence",
    "Stall",
    "Undecided",
    "overlap",
    "together",
    "witness",
]

KEEP_NS = 30_000_000_000
"""A window that ended longer ago than this plays no part in deciding another."""
TRACE = "trace"
STEP = 500
"""About so many are decided by one call."""
LIMIT = 8192
"""Nor do others than about the latest so many of its kind and order of length."""

_UNKNOWN = StallCause(StallCauseType.UNKNOWN, None)

T = TypeVar("T")


class Stall(msgspec.Struct, eq=False, gc=False):
    """A stall window on its way to a record.

    `transition` is the transition that it is a part of, `line` what QEMU's log has of its ioctl,
    `commit` what it lies in; all where that is known for a fact.  `asked` is what QEMU asked for
    when this was done instead, `superseded`: another stall reports what was done instead of it.
    """

    seen: Observation
    witnesses: frozenset[str] = frozenset()
    commit: Stall | None = None
    transition: int | None = None
    line: SlotOp | None = None
    logs: bool = False  # its ioctl is traced, and is no part of a transition
    why_logs: str = "dirty logging"  # of a commit that does nothing else, in words
    cause: StallCause = _UNKNOWN
    incident: int = 0
    asked: tuple[Stall, ...] = ()
    superseded: bool = False

    @property
    def length_ns(self) -> int:
        """The estimate that causes are weighed against: the middle of the bracket."""
        return max(1, (self.seen.at_least_ns + self.seen.at_most_ns) // 2)


@cache
def witness(probe: str) -> frozenset[str]:
    """A single one.  Of these sets there are few, and thousands of stalls have the same."""
    return frozenset((probe,))


@cache
def together(some: frozenset[str], others: frozenset[str]) -> frozenset[str]:
    """All of them."""
    return some | others


def overlap(one_start: int, one_end: int, start: int, end: int) -> int:
    """Length of what two spans share."""
    return max(0, min(one_end, end) - max(one_start, start))


class Spans(Generic[T]):
    """Things with a beginning and an end; `find` gives those that share time with a span.

    They are kept by order of length (powers of four), each sorted by beginning: whatever overlaps a
    span then begins at most four times its shortest length before it.
    """

    def __init__(self) -> None:
        self._orders: dict[int, tuple[list[int], list[tuple[int, T]]]] = {}

    def __bool__(self) -> bool:
        return bool(self._orders)

    def add(self, start_ns: int, end_ns: int, what: T) -> None:
        """Remember one; the earliest of its order go when there are too many."""
        order = (max(0, end_ns - start_ns).bit_length() + 1) & ~1
        found = self._orders.get(order)
        if found is None:
            found = self._orders[order] = ([], [])
        starts, spans = found
        at = len(starts)
        if starts and start_ns < starts[-1]:
            at = bisect_right(starts, start_ns)
        starts.insert(at, start_ns)
        spans.insert(at, (end_ns, what))
        if len(starts) > LIMIT + LIMIT // 4:
            del starts[:-LIMIT], spans[:-LIMIT]

    def find(self, start_ns: int, end_ns: int) -> Iterator[T]:
        """Those that share time with `[start_ns, end_ns)`, the one that ended first first."""
        found: list[tuple[int, T]] = []
        for order, (starts, spans) in self._orders.items():
            earliest = start_ns - (1 << order)
            if starts[-1] < earliest:
                continue
            low = bisect_left(starts, earliest)
            high = bisect_left(starts, end_ns, low)
            if low < high:
                found += [span for span in spans[low:high] if span[0] > start_ns]
        if len(found) > 1:
            found.sort(key=itemgetter(0))
        return (what for _, what in found)

    def forget(self, before_ns: int) -> None:
        """Drop those that are known to have ended before."""
        for order in list(self._orders):
            starts, spans = self._orders[order]
            gone = bisect_left(starts, before_ns - (1 << order))
            if gone == len(starts):
                del self._orders[order]
            elif gone:
                del starts[:gone], spans[:gone]


class Undecided:
    """Windows that are not decided yet; `more` can be taken at once than the last call gave."""

    def __init__(self) -> None:
        self.more = False
        self._order = count()
        self._waiting: list[tuple[int, int, Stall]] = []  # a heap: what ended first comes first
        self._commits: Spans[Stall] = Spans()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, stall: Stall) -> None:
        """One more."""
        seen = stall.seen
        heappush(self._waiting, (seen.end_ns, next(self._order), stall))
        # The BQL admits one commit at a time; windows of lines are as wide as these may be late.
        if seen.kind is StallKind.COMMIT and seen.probe != TRACE:
            self._commits.add(seen.start_ns, seen.end_ns, stall)

    def median_ns(self) -> int:
        """By when half of them had ended."""
        return sorted(end for end, _, _ in self._waiting)[len(self._waiting) // 2]

    def take(self, horizon: int) -> tuple[list[Stall], int]:
        """The windows that ended by then, or the first of them, and by when those ended.

        A commit and what lies in it come together: each says of the other what it belongs to.
        """
        ready: list[Stall] = []
        self.more = False
        reached = 0
        horizon = self._uncut(horizon)
        while self._waiting and self._waiting[0][0] <= horizon:
            end_ns = self._waiting[0][0]
            if len(ready) >= STEP and end_ns > reached and self._uncut(reached) == reached:
                self.more = True
                horizon = reached
                break
            reached, _, stall = heappop(self._waiting)
            ready.append(stall)
        self._commits.forget(horizon)
        return ready, horizon

    def _uncut(self, t_ns: int) -> int:
        """That time, or when the commit began that lasted beyond it."""
        cut = (c.seen.start_ns for c in self._commits.find(t_ns, t_ns + 1) if c.seen.end_ns > t_ns)
        return min(t_ns, min(cut, default=t_ns))


class Evidence:
    """Windows by kind and probe, and commands, of the last `KEEP_NS`."""

    def __init__(self) -> None:
        self._windows: defaultdict[StallKind, dict[str, Spans[Stall]]] = defaultdict(dict)
        self._commands: Spans[CommandRecord] = Spans()
        self._host_waits: defaultdict[str | None, Spans[HostWait]] = defaultdict(Spans)

    def add(self, stall: Stall) -> None:
        """Remember a window."""
        seen = stall.seen
        of_kind = self._windows[seen.kind]
        spans = of_kind.get(seen.probe)
        if spans is None:
            spans = of_kind[seen.probe] = Spans()
        spans.add(seen.start_ns, seen.end_ns, stall)

    def add_command(self, span: CommandRecord) -> None:
        """Remember a command."""
        self._commands.add(span.start_ns, span.end_ns, span)

    def add_host_wait(self, wait: HostWait) -> None:
        """Remember that a thread had to wait for a CPU."""
        self._host_waits[wait.thread].add(wait.start_ns, wait.end_ns, wait)

    def host_waits(self, thread: str | None, start_ns: int, end_ns: int) -> Iterator[HostWait]:
        """What a thread waited for a CPU about `[start_ns, end_ns)`."""
        spans = self._host_waits.get(thread)
        return iter(()) if spans is None else spans.find(start_ns, end_ns)

    def overlapping(self, kind: StallKind, start_ns: int, end_ns: int) -> Iterator[Stall]:
        """Windows of one kind that share time with `[start_ns, end_ns)`."""
        for spans in self._windows[kind].values():
            yield from spans.find(start_ns, end_ns)

    def seen_by_others(self, stall: Stall) -> Iterator[Stall]:
        """Windows of its kind that share time with it and that another probe saw best."""
        seen = stall.seen
        for probe, spans in self._windows[seen.kind].items():
            if probe != seen.probe:
                yield from spans.find(seen.start_ns, seen.end_ns)

    def commands(self, start_ns: int, end_ns: int) -> Iterator[CommandRecord]:
        """Commands that were under way in `[start_ns, end_ns)`."""
        return self._commands.find(start_ns, end_ns)

    def forget(self, before_ns: int) -> None:
        """Drop what ended before."""
        for of_kind in self._windows.values():
            for spans in of_kind.values():
                spans.forget(before_ns)
        for waits in self._host_waits.values():
            waits.forget(before_ns)
        self._commands.forget(before_ns)
