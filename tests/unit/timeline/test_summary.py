"""Statistics of stalls: exact where they say so, within the stated error where they do not."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.records import (
    StallCause,
    StallCauseType,
    StallKind,
    StallRecord,
    StallStatistics,
    SummaryRecord,
)
from qmp_memlistener.timeline.summary import BOUNDS_NS, EXACT, RELATIVE_ERROR, Statistics

# evenly over the orders of magnitude, as stalls are; with the ends of buckets and of bounds
LENGTHS = st.one_of(
    st.integers(0, 1 << 12),
    st.integers(0, 40).flatmap(lambda e: st.integers(1 << e, (2 << e) - 1)),
    st.sampled_from([b + d for b in BOUNDS_NS for d in (-1, 0, 1) if b + d >= 0]),
)
KINDS = st.sampled_from([StallKind.COMMIT, StallKind.BQL_WAIT])
STALLS = st.tuples(KINDS, st.sampled_from(StallCauseType), LENGTHS)


def many(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [int(math.exp(rng.uniform(0, 25))) for _ in range(count)]


def of(lengths: list[int]) -> StallStatistics:
    """The statistics of these lengths, all of one kind and cause."""
    statistics = Statistics()
    for length in lengths:
        statistics.add(StallKind.COMMIT, StallCauseType.TRANSITION, length)
    (found,) = statistics.statistics()
    return found


def nearest_rank(ordered: list[int], percent: int) -> int:
    return ordered[max(0, math.ceil(percent * len(ordered) / 100) - 1)]


def check(found: StallStatistics, lengths: list[int], error: float) -> None:
    """All that is exact is, and percentiles are above the exact ones by less than `error`."""
    ordered = sorted(lengths)
    assert found.count == len(ordered)
    assert found.total_ns == sum(ordered)
    assert found.max_ns == ordered[-1]
    for percent, value in ((50, found.p50_ns), (90, found.p90_ns), (99, found.p99_ns)):
        exact = nearest_rank(ordered, percent)
        assert exact <= value <= min(ordered[-1], exact + error * exact), percent
    check_histogram(found, ordered)


def check_histogram(found: StallStatistics, lengths: list[int]) -> None:
    assert len(found.bounds_ns) == len(found.histogram)
    assert sum(found.histogram) == len(lengths)
    assert found.histogram[0]
    assert found.histogram[-1]
    first = BOUNDS_NS.index(found.bounds_ns[0])
    assert tuple(found.bounds_ns) == BOUNDS_NS[first : first + len(found.bounds_ns)]
    for i, count in enumerate(found.histogram):
        assert count == sum(bisect_right(found.bounds_ns, n) == i + 1 for n in lengths)


@given(st.lists(LENGTHS, min_size=1, max_size=60))
def test_few_are_exact(lengths: list[int]) -> None:
    check(of(lengths), lengths, 0)


@given(st.lists(LENGTHS, min_size=1, max_size=60), st.integers(EXACT, 2 * EXACT + 3))
def test_many_are_within_the_stated_error(some: list[int], count: int) -> None:
    lengths = (some * (count // len(some) + 1))[: count + 1]
    check(of(lengths), lengths, RELATIVE_ERROR)


@pytest.mark.parametrize("count", [1, 2, EXACT - 1, EXACT, EXACT + 1, 2 * EXACT + 2, 20_000])
def test_any_number(count: int) -> None:
    lengths = many(count, count)
    check(of(lengths), lengths, 0 if count <= EXACT else RELATIVE_ERROR)


@given(st.lists(STALLS, max_size=60), st.randoms(use_true_random=False), st.booleans())
def test_order_does_not_matter(
    stalls: list[tuple[StallKind, StallCauseType, int]], rng: random.Random, grown: bool
) -> None:
    if grown:
        stalls = stalls * (EXACT // 8)
    shuffled = stalls.copy()
    rng.shuffle(shuffled)
    one, other = Statistics(), Statistics()
    for stall in stalls:
        one.add(*stall)
    for stall in shuffled:
        other.add(*stall)
        if rng.random() < 0.01:
            other.statistics()  # asking in between changes nothing
    assert one.statistics() == other.statistics()
    assert len(one) == len(other) == len(stalls)


@given(
    st.lists(st.tuples(st.lists(STALLS, max_size=20), st.sampled_from([1, 40, EXACT])), max_size=4)
)
def test_merging_is_feeding_all(
    parts: list[tuple[list[tuple[StallKind, StallCauseType, int]], int]],
) -> None:
    all_of_them, merged = Statistics(), Statistics()
    for stalls, times in parts:
        part = Statistics()
        for stall in stalls * times:
            part.add(*stall)
            all_of_them.add(*stall)
        before = part.statistics()
        merged.merge(part)
        assert part.statistics() == before
    assert merged.statistics() == all_of_them.statistics()
    assert len(merged) == len(all_of_them)


@pytest.mark.parametrize("count", [3, EXACT, EXACT + 1, 2 * EXACT + 50])
def test_merging_with_itself_doubles(count: int) -> None:
    statistics, twice = Statistics(), Statistics()
    for length in many(count, count):
        statistics.add(StallKind.COMMIT, StallCauseType.UNKNOWN, length)
        twice.add(StallKind.COMMIT, StallCauseType.UNKNOWN, length)
        twice.add(StallKind.COMMIT, StallCauseType.UNKNOWN, length)
    statistics.merge(statistics)
    assert statistics.statistics() == twice.statistics()


def test_memory_is_bounded() -> None:
    """However many lengths there are, some tens of buckets a power of two are all that is kept."""
    statistics = Statistics()
    for length in many(1, 100_000):
        statistics.add(StallKind.COMMIT, StallCauseType.TRANSITION, length)
    (series,) = statistics._series.values()
    for lengths in (series.least, series.most):
        assert len(lengths.pending) <= EXACT
        assert len(lengths.buckets) < 64 * 40


def test_bounds_are_readable_and_ascending() -> None:
    assert BOUNDS_NS[0] == 0
    assert BOUNDS_NS[1] == 1_000
    assert BOUNDS_NS[-1] == 600 * 10**9
    assert all(a < b for a, b in pairwise(BOUNDS_NS))
    assert all(b / a <= 3 for a, b in pairwise(BOUNDS_NS[1:]))


def test_kinds_are_in_order_and_in_them_the_largest_total_first() -> None:
    statistics = Statistics()
    for kind, cause, length in (
        (StallKind.VCPU_GAP, StallCauseType.UNKNOWN, 5),
        (StallKind.COMMIT, StallCauseType.UNKNOWN, 7),
        (StallKind.COMMIT, StallCauseType.TRANSITION, 9),
        (StallKind.COMMIT, StallCauseType.AGENT, 7),
    ):
        statistics.add(kind, cause, length)
    assert [(s.kind, s.cause) for s in statistics.statistics()] == [
        ("commit", "transition"), ("commit", "agent"), ("commit", "unknown"),
        ("vcpu_gap", "unknown"),
    ]  # fmt: skip


@pytest.mark.parametrize("length", [-1, -(1 << 40)])
def test_there_are_no_negative_lengths(length: int) -> None:
    statistics = Statistics()
    with pytest.raises(ValueError, match=str(length)):
        statistics.add(StallKind.COMMIT, StallCauseType.UNKNOWN, length)
    assert len(statistics) == 0
    assert statistics.statistics() == []


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=40), st.sampled_from([1, EXACT]))
def test_both_bounds_are_told_and_what_was_lies_between(
    pairs: list[tuple[int, int]], times: int
) -> None:
    statistics = Statistics()
    pairs = [(min(p), max(p)) for p in pairs * times]
    for at_least, at_most in pairs:
        statistics.add(StallKind.COMMIT, StallCauseType.STOP, at_most, at_least)
    (found,) = statistics.statistics()
    lower, upper = sorted(p[0] for p in pairs), sorted(p[1] for p in pairs)
    assert (found.total_min_ns, found.total_ns) == (sum(lower), sum(upper))
    assert (found.max_min_ns, found.max_ns) == (lower[-1], upper[-1])
    assert sum(found.histogram_min) == sum(found.histogram) == found.count
    for percent in (50, 90, 99):
        low = getattr(found, f"p{percent}_min_ns")
        exact = nearest_rank(lower, percent)
        assert exact - RELATIVE_ERROR * exact <= low <= exact
        assert low <= nearest_rank(upper, percent) <= getattr(found, f"p{percent}_ns")


def test_what_is_certain_ranks_first() -> None:
    """One ping in 100 ms may have met a stall of 105 ms, or of 2."""
    statistics = Statistics()
    statistics.add(StallKind.MAIN_LOOP, StallCauseType.UNKNOWN, 105_000_000, 2_000_000)
    statistics.add(StallKind.MAIN_LOOP, StallCauseType.COMMAND, 30_000_000)
    assert [s.cause for s in statistics.statistics()] == ["command", "unknown"]


def test_statistics_of_former_versions_are_read() -> None:
    (now,) = Statistics([record("commit", 1_500, None)]).statistics()
    old = {k: v for k, v in msgspec.to_builtins(now).items() if "min" not in k}
    read = msgspec.convert(old, StallStatistics)
    assert (read.total_ns, read.total_min_ns, read.histogram_min) == (1_500, None, [])


def record(kind: str, at_most_ns: int, cause: StallCause | None) -> StallRecord:
    return StallRecord(
        kind=StallKind(kind),
        start_ns=0,
        end_ns=at_most_ns + 5,
        at_least_ns=at_most_ns,
        at_most_ns=at_most_ns,
        probe="ping",
        witnesses=["ping"],
        thread=None,
        site=None,
        cause=cause,
        incident=1,
    )


def test_a_summary_of_records() -> None:
    statistics = Statistics(
        [
            record("commit", 1_500, StallCause(StallCauseType.TRANSITION, 3)),
            record("commit", 2_500, StallCause(StallCauseType.TRANSITION, 4)),
            record("commit", 9_000, None),
            record("commit", 11_000, StallCause(StallCauseType.UNKNOWN, None)),
        ]
    )
    summary = statistics.summary(start_ns=10, end_ns=20, transitions=2)
    assert summary == SummaryRecord(
        start_ns=10,
        end_ns=20,
        transitions=2,
        stalls=4,
        statistics=[
            StallStatistics(
                StallKind.COMMIT, StallCauseType.UNKNOWN, 2, 20_000, 9_000, 11_000, 11_000, 11_000,
                [5_000, 10_000], [1, 1],
                20_000, 9_000, 11_000, 11_000, 11_000, [5_000, 10_000], [1, 1],
            ),
            StallStatistics(
                StallKind.COMMIT, StallCauseType.TRANSITION, 2, 4_000, 1_500, 2_500, 2_500, 2_500,
                [1_000, 2_000], [1, 1],
                4_000, 1_500, 2_500, 2_500, 2_500, [1_000, 2_000], [1, 1],
            ),
        ],
    )  # fmt: skip
    line = msgspec.json.encode(summary)
    assert msgspec.json.decode(line, type=SummaryRecord) == summary


def test_a_summary_of_nothing() -> None:
    summary = Statistics().summary(start_ns=1, end_ns=2, transitions=0)
    assert (summary.stalls, summary.statistics) == (0, [])
