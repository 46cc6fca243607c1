"""How many stalls of which length: counted one by one, in bounded memory.  Pure.

A stall has two lengths, at least and at most; whatever is stated is stated of both.  For each kind
and cause count, total and longest are exact, and so is the histogram.  Percentiles are
nearest-rank: the shortest length that at least so many per cent of the stalls do not exceed.  Up
to `EXACT` stalls they are exact too; beyond that lengths are kept by bucket, `1 << _BITS` of equal
width for each power of two (the layout of an HDR histogram), and a percentile is an end of its
bucket, the outer one: of upper bounds never below the exact one, of lower bounds never above, and
off by less than `RELATIVE_ERROR` of it.

What comes out depends on the lengths alone, neither on their order nor on how they were merged.
Lengths are only counted here; what a stall is and what made it, `timeline` decides.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

from ..records import (
    ProbeState,
    StallCauseType,
    StallKind,
    StallRecord,
    StallStatistics,
    SummaryRecord,
)

__all__ = ["BOUNDS_NS", "EXACT", "RELATIVE_ERROR", "Statistics"]

EXACT = 1024
_BITS = 6
RELATIVE_ERROR = 1 / (1 << _BITS)

# 1-2-5 steps, then those of a clock; histograms have the part of it that is used
BOUNDS_NS = (
    0,
    *(digit * 10**power for power in range(3, 10) for digit in (1, 2, 5)),
    *(seconds * 10**9 for seconds in (10, 20, 30, 60, 120, 300, 600)),
)


class Statistics:
    """Stalls by kind and cause type.

    Adding one costs well below a microsecond: lengths are put aside and sorted into buckets 1024 at
    a time.  `len()` is how many there are.
    """

    def __init__(self, records: Iterable[StallRecord] = ()) -> None:
        self._series: dict[tuple[StallKind, StallCauseType], _Series] = {}
        for record in records:
            self.add_record(record)

    def __len__(self) -> int:
        return sum(s.count for s in self._series.values())

    def add(
        self,
        kind: StallKind,
        cause: StallCauseType,
        at_most_ns: int,
        at_least_ns: int | None = None,
    ) -> None:
        """One stall, of exactly that length without a second one; ValueError when there is none."""
        least = at_most_ns if at_least_ns is None else at_least_ns
        if not 0 <= least <= at_most_ns:
            raise ValueError(f"a stall of {least} to {at_most_ns} ns")
        series = self._series.get((kind, cause))
        if series is None:
            series = self._series[kind, cause] = _Series()
        series.most.pending.append(at_most_ns)
        series.least.pending.append(least)
        if len(series.most.pending) > EXACT:
            series.most.fold()
            series.least.fold()

    def add_record(self, record: StallRecord) -> None:
        """One stall as it was recorded, with its bounds and the type of its cause."""
        cause = StallCauseType.UNKNOWN if record.cause is None else record.cause.type
        self.add(record.kind, cause, record.at_most_ns, record.at_least_ns)

    def merge(self, other: Statistics) -> None:
        """Add all that `other` has, which stays as it is."""
        for key, theirs in other._series.items():
            self._series.setdefault(key, _Series()).merge(theirs)

    def statistics(self) -> list[StallStatistics]:
        """By kind, and within a kind the largest total that is certain first; can be asked for at
        any time."""
        found = [series.statistics(*key) for key, series in self._series.items()]
        found.sort(key=attrgetter("cause"))
        found.sort(key=attrgetter("total_min_ns", "total_ns"), reverse=True)
        found.sort(key=attrgetter("kind"))
        return found

    def summary(
        self, *, start_ns: int, end_ns: int, transitions: int, probes: Iterable[ProbeState] = ()
    ) -> SummaryRecord:
        """The record of what was seen in `[start_ns, end_ns)`, by `probes`."""
        return SummaryRecord(
            start_ns=start_ns,
            end_ns=end_ns,
            transitions=transitions,
            stalls=len(self),
            statistics=self.statistics(),
            probes=list(probes),
        )


class _Lengths:
    """One of the two lengths of stalls of one kind and cause; `up`: the upper one.

    `pending` holds lengths that are in no bucket yet: all of them as long as nothing is `folded`.
    """

    __slots__ = ("buckets", "folded", "histogram", "longest", "pending", "total", "up")

    def __init__(self, *, up: bool) -> None:
        self.up = up
        self.pending: list[int] = []
        self.folded = 0
        self.total = 0
        self.longest = 0
        self.buckets: Counter[int] = Counter()
        self.histogram = [0] * len(BOUNDS_NS)

    @property
    def count(self) -> int:
        return self.folded + len(self.pending)

    def fold(self) -> None:
        """Sort what is pending into buckets."""
        pending = self.pending
        if not pending:
            return
        self.folded += len(pending)
        self.total += sum(pending)
        self.longest = max(self.longest, max(pending))
        self.buckets.update(map(_bucket, pending))
        _count(pending, self.histogram)
        pending.clear()

    def merge(self, other: _Lengths) -> None:
        self.folded += other.folded
        self.total += other.total
        self.longest = max(self.longest, other.longest)
        self.buckets.update(other.buckets)
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        self.pending += other.pending
        if self.folded or len(self.pending) > EXACT:
            self.fold()

    def percentiles(self) -> _Percentiles:
        if self.folded:
            self.fold()
            total, longest, histogram = self.total, self.longest, self.histogram
            end = _bucket_last if self.up else _bucket_first
            steps = [(end(b), self.buckets[b]) for b in sorted(self.buckets)]
        else:
            total, longest = sum(self.pending), max(self.pending)
            histogram = [0] * len(BOUNDS_NS)
            _count(self.pending, histogram)
            steps = [(length, 1) for length in sorted(self.pending)]
        p50, p90, p99 = (min(p, longest) for p in _percentiles(steps, self.count, (50, 90, 99)))
        used = [i for i, n in enumerate(histogram) if n]
        span = slice(used[0], used[-1] + 1)
        return _Percentiles(total, p50, p90, p99, longest, list(BOUNDS_NS[span]), histogram[span])


class _Percentiles(NamedTuple):
    total: int
    p50: int
    p90: int
    p99: int
    longest: int
    bounds: list[int]
    histogram: list[int]


class _Series:
    """Stalls of one kind and cause."""

    __slots__ = ("least", "most")

    def __init__(self) -> None:
        self.least, self.most = _Lengths(up=False), _Lengths(up=True)

    @property
    def count(self) -> int:
        return self.most.count

    def merge(self, other: _Series) -> None:
        self.least.merge(other.least)
        self.most.merge(other.most)

    def statistics(self, kind: StallKind, cause: StallCauseType) -> StallStatistics:
        most, least = self.most.percentiles(), self.least.percentiles()
        return StallStatistics(
            kind=kind,
            cause=cause,
            count=self.count,
            total_ns=most.total,
            p50_ns=most.p50,
            p90_ns=most.p90,
            p99_ns=most.p99,
            max_ns=most.longest,
            bounds_ns=most.bounds,
            histogram=most.histogram,
            total_min_ns=least.total,
            p50_min_ns=least.p50,
            p90_min_ns=least.p90,
            p99_min_ns=least.p99,
            max_min_ns=least.longest,
            bounds_min_ns=least.bounds,
            histogram_min=least.histogram,
        )


def _bucket(length: int) -> int:
    """Below `2 << _BITS` each length is its own bucket."""
    shift = max(0, length.bit_length() - _BITS - 1)
    return (shift << _BITS) + (length >> shift)


def _bucket_last(bucket: int) -> int:
    """The longest length in a bucket."""
    shift = max(0, (bucket >> _BITS) - 1)
    return (((bucket - (shift << _BITS)) + 1) << shift) - 1


def _bucket_first(bucket: int) -> int:
    """The shortest length in a bucket."""
    shift = max(0, (bucket >> _BITS) - 1)
    return (bucket - (shift << _BITS)) << shift


def _count(lengths: Iterable[int], histogram: list[int]) -> None:
    for length in lengths:
        histogram[bisect_right(BOUNDS_NS, length) - 1] += 1


def _percentiles(steps: list[tuple[int, int]], count: int, wanted: tuple[int, ...]) -> list[int]:
    """The value at each of the ascending percentages; `steps` are (value, how many), ascending."""
    found: list[int] = []
    seen = 0
    for value, n in steps:
        seen += n
        while len(found) < len(wanted) and seen * 100 >= wanted[len(found)] * count:
            found.append(value)
    return found
