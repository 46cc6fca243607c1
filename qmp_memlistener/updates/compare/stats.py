"""Rounds of a comparison and their statistics: percentiles, intervals for differences.  Pure.

A round has two values of a kind of stall: how long the guest was stalled in that way in all, and
the longest time at once; both are 0 when it did not, and there is none when that kind was not
measured.  Where small stalls are many, as vCPU gaps under TCG, only the second shows what an update
did.  A value is known by two bounds, and so is whatever is computed from values: a percentile lies
between those of the lower and of the upper bounds.

The interval of a difference of medians is a percentile bootstrap (Efron and Tibshirani, An
Introduction to the Bootstrap, 13.3): rounds are drawn again, with replacement, for each side; its
ends are those of what each draw allows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import ceil
from statistics import median

import msgspec

from ...distribution import percentile
from ...records import StallKind, StallRecord
from ..model import Result

__all__ = [
    "ENOUGH_ROUNDS",
    "Difference",
    "Round",
    "Summary",
    "differences",
    "interval",
    "longest",
    "summaries",
    "totals",
]

RESAMPLES = 2000
CONFIDENCE = 0.95
ENOUGH_ROUNDS = 5
"""With fewer the interval is too narrow: of 2 rounds a side it holds the true difference in 2 cases
of 3, of 3 in 9 of 10; from 4 on as often as it says."""


Bounds = tuple[int, int]
"""At least, at most."""


class Round(msgspec.Struct, frozen=True):
    """One round; `order` counts from 0 over all rounds that count.

    `[start_ns, start_ns + window_ns)` was looked at; `stalls` are those that touch it.  `outcome`
    is that of the intent (`done` for the control), which took `took_ns`.  `measured`: the kinds of
    stall of which everything in that time was seen; of others `stalls` has what was, and they have
    no value in this round.  `slot_ops` were made and
    `transitions` seen from `start_ns` to the end of the window or of the update, whichever came
    last, on so many different `slots`.  A round that is not `done` is no part of the statistics.
    """

    strategy: str
    order: int
    outcome: Result
    reason: str | None
    start_ns: int
    stalls: list[StallRecord]
    slot_ops: int
    slots: int
    transitions: int
    took_ns: int = 0
    measured: list[StallKind] = []


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Stalls of one kind under one strategy: the time a round lost to them in all.

    `n` rounds measured it, `missing` did not and are left out; without any, all times are None.
    p50 is the median.  The others are nearest-rank, values that were seen: of few rounds p99 (fewer
    than 100) and p90 (fewer than 10) are the longest one.  `stalls` is how many there were in all
    rounds together, `longest_ns` the longest of them; `longest_p50_ns` to `longest_p99_ns` are of
    the longest one of each round.  All these are upper bounds; the lower ones are in `…_min_ns`.
    """

    strategy: str
    kind: StallKind
    n: int
    missing: int = 0
    p50_ns: int | None = None
    p90_ns: int | None = None
    p99_ns: int | None = None
    max_ns: int | None = None
    stalls: int
    longest_ns: int | None = None
    longest_p50_ns: int | None = None
    longest_p90_ns: int | None = None
    longest_p99_ns: int | None = None
    p50_min_ns: int | None = None
    p90_min_ns: int | None = None
    p99_min_ns: int | None = None
    max_min_ns: int | None = None
    longest_min_ns: int | None = None
    longest_p50_min_ns: int | None = None
    longest_p90_min_ns: int | None = None
    longest_p99_min_ns: int | None = None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The median of `a` less that of `b`, with the interval that holds it with 95 % confidence.

    `median_diff_ns` is of the upper bounds; with both it lies in `diff_bounds_ns`, which the
    interval takes in.  `seen` is False when the interval holds 0: no difference was seen.  It is
    False as well when there are not `enough` rounds; the interval is too narrow then.
    Where one of the two has no round that measured this kind, there is no difference: None.
    `longest_…` are the same of the longest stall of each round.
    """

    a: str
    b: str
    kind: StallKind
    median_diff_ns: int | None = None
    ci95_ns: Bounds | None = None
    seen: bool = False
    enough: bool = True
    longest_diff_ns: int | None = None
    longest_ci95_ns: Bounds | None = None
    longest_seen: bool = False
    diff_bounds_ns: Bounds | None = None
    longest_diff_bounds_ns: Bounds | None = None


def totals(stalls: Sequence[StallRecord]) -> dict[StallKind, Bounds]:
    """By kind: how long these stalls were together."""
    found: dict[StallKind, Bounds] = {}
    for stall in stalls:
        low, high = found.get(stall.kind, (0, 0))
        found[stall.kind] = (low + stall.at_least_ns, high + stall.at_most_ns)
    return found


def longest(stalls: Sequence[StallRecord]) -> dict[StallKind, Bounds]:
    """By kind: how long the longest of these stalls was."""
    found: dict[StallKind, Bounds] = {}
    for stall in stalls:
        low, high = found.get(stall.kind, (0, 0))
        found[stall.kind] = (max(low, stall.at_least_ns), max(high, stall.at_most_ns))
    return found


Values = Mapping[str, Sequence[Bounds]]
"""By strategy: what each round that measured it lost."""


def summaries(rounds: Mapping[str, Sequence[Round]]) -> list[Summary]:
    """Of each strategy that has rounds, every kind that was seen anywhere."""
    found = []
    for kind in _kinds(rounds):
        total, single = _values(rounds, kind, totals), _values(rounds, kind, longest)
        for strategy, each in rounds.items():
            if not each:
                continue
            n = len(total[strategy])
            stalls = sum(s.kind == kind for r in each if kind in r.measured for s in r.stalls)
            summary = Summary(
                strategy=strategy, kind=kind, n=n, missing=len(each) - n, stalls=stalls
            )
            if n:
                (low, high), (one_low, one_high) = (
                    (_quantiles([b[0] for b in v]), _quantiles([b[1] for b in v]))
                    for v in (total[strategy], single[strategy])
                )
                summary = msgspec.structs.replace(
                    summary,
                    p50_ns=high[0], p90_ns=high[1], p99_ns=high[2], max_ns=high[3],
                    p50_min_ns=low[0], p90_min_ns=low[1], p99_min_ns=low[2], max_min_ns=low[3],
                    longest_p50_ns=one_high[0], longest_p90_ns=one_high[1],
                    longest_p99_ns=one_high[2], longest_ns=one_high[3],
                    longest_p50_min_ns=one_low[0], longest_p90_min_ns=one_low[1],
                    longest_p99_min_ns=one_low[2], longest_min_ns=one_low[3],
                )  # fmt: skip
            found.append(summary)
    return found


def differences(rounds: Mapping[str, Sequence[Round]], seed: int = 0) -> list[Difference]:
    """For each kind and each two strategies that have rounds."""
    found = []
    for kind in _kinds(rounds):
        total, single = _values(rounds, kind, totals), _values(rounds, kind, longest)
        for a, b in combinations([name for name, each in rounds.items() if each], 2):
            enough = min(len(total[a]), len(total[b])) >= ENOUGH_ROUNDS
            if not total[a] or not total[b]:
                found.append(Difference(a=a, b=b, kind=kind, enough=False))
                continue
            of_uppers, bounds, ci = _difference(total[a], total[b], seed)
            of_longest, one_bounds, one_ci = _difference(single[a], single[b], seed)
            found.append(
                Difference(
                    a=a,
                    b=b,
                    kind=kind,
                    median_diff_ns=of_uppers,
                    diff_bounds_ns=bounds,
                    ci95_ns=ci,
                    seen=enough and not ci[0] <= 0 <= ci[1],
                    enough=enough,
                    longest_diff_ns=of_longest,
                    longest_diff_bounds_ns=one_bounds,
                    longest_ci95_ns=one_ci,
                    longest_seen=enough and not one_ci[0] <= 0 <= one_ci[1],
                )
            )
    return found


def _values(
    rounds: Mapping[str, Sequence[Round]],
    kind: StallKind,
    value: Callable[[Sequence[StallRecord]], dict[StallKind, Bounds]],
) -> Values:
    return {
        name: [value(r.stalls).get(kind, (0, 0)) for r in each if kind in r.measured]
        for name, each in rounds.items()
    }


def _quantiles(values: Sequence[int]) -> tuple[int, int, int, int]:
    """p50, p90, p99 and the largest."""
    p90, p99 = percentile(values, 90), percentile(values, 99)
    return round(median(values)), p90, p99, max(values)


def _difference(
    a: Sequence[Bounds], b: Sequence[Bounds], seed: int
) -> tuple[int, Bounds, tuple[int, int]]:
    """Of the medians of the upper bounds; what both bounds allow; the interval."""
    (a_low, a_high), (b_low, b_high) = _medians(a), _medians(b)
    bounds = round(a_low - b_high), round(a_high - b_low)
    return round(a_high - b_high), bounds, interval(a, b, seed)


def _medians(values: Sequence[Bounds]) -> tuple[float, float]:
    return median(low for low, _ in values), median(high for _, high in values)


def interval(a: Sequence[Bounds], b: Sequence[Bounds], seed: int = 0) -> tuple[int, int]:
    """Where the difference of the medians lies; the same for the same values and seed."""
    if len(set(a)) == len(set(b)) == 1:
        return a[0][0] - b[0][1], a[0][1] - b[0][0]
    chance = random.Random(seed)
    lows, highs = [], []
    for _ in range(RESAMPLES):
        left, right = _medians(chance.choices(a, k=len(a))), _medians(chance.choices(b, k=len(b)))
        lows.append(left[0] - right[1])
        highs.append(left[1] - right[0])
    tail = (1 - CONFIDENCE) / 2
    low = sorted(lows)[int(RESAMPLES * tail)]
    high = sorted(highs)[min(RESAMPLES - 1, ceil(RESAMPLES * (1 - tail)) - 1)]
    return round(low), round(high)


def _kinds(rounds: Mapping[str, Sequence[Round]]) -> list[StallKind]:
    return sorted({s.kind for each in rounds.values() for r in each for s in r.stalls})
