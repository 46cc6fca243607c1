"""Statistics of a comparison: percentiles over rounds, and intervals for differences.  Pure.

A round has two values of a kind of stall: how long the guest stood still in that way in all, and
the longest time at once; both are 0 when it did not.  Where small stalls are many, as vCPU gaps
under TCG, only the second tells what an update did.  The interval of a difference of medians is a
percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3): rounds are
drawn again, with replacement, for each side.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import ceil
from statistics import median

import msgspec

from ..distribution import percentile
from ..recording import StallRecord

__all__ = [
    "ENOUGH_ROUNDS",
    "Difference",
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


class Summary(msgspec.Struct, frozen=True):
    """Stalls of one kind under one strategy, over `n` rounds: the time a round lost to them in all.

    p50 is the median.  The others are nearest-rank, values that were seen: of few rounds p99 (fewer
    than 100) and p90 (fewer than 10) are the longest one.  `stalls` is how many there were in all
    rounds together, `longest_ns` the longest of them; `longest_p50_ns` to `longest_p99_ns` are of
    the longest one of each round.
    """

    strategy: str
    kind: str
    n: int
    p50_ns: int
    p90_ns: int
    p99_ns: int
    max_ns: int
    stalls: int
    longest_ns: int
    longest_p50_ns: int = 0
    longest_p90_ns: int = 0
    longest_p99_ns: int = 0


class Difference(msgspec.Struct, frozen=True):
    """The median of `a` less that of `b`, with the interval that holds it with 95 % confidence.

    `seen` is False when the interval holds 0: no difference was seen.  It is False as well when
    there are not `enough` rounds to tell; the interval is too narrow then.  `longest_…` are the
    same of the longest stall of each round.
    """

    a: str
    b: str
    kind: str
    median_diff_ns: int
    ci95_ns: tuple[int, int]
    seen: bool
    enough: bool = True
    longest_diff_ns: int = 0
    longest_ci95_ns: tuple[int, int] = (0, 0)
    longest_seen: bool = False


def totals(stalls: Sequence[StallRecord]) -> dict[str, int]:
    """By kind: how long these stalls were together, by their upper bounds."""
    found: dict[str, int] = {}
    for stall in stalls:
        found[stall.kind] = found.get(stall.kind, 0) + stall.at_most_ns
    return found


def longest(stalls: Sequence[StallRecord]) -> dict[str, int]:
    """By kind: how long the longest of these stalls was, by its upper bound."""
    found: dict[str, int] = {}
    for stall in stalls:
        found[stall.kind] = max(found.get(stall.kind, 0), stall.at_most_ns)
    return found


def summaries(rounds: Mapping[str, Sequence[Sequence[StallRecord]]]) -> list[Summary]:
    """Of the stalls of each round by strategy; every kind that was seen anywhere, for each."""
    found = []
    for kind in _kinds(rounds):
        for strategy, each in rounds.items():
            if not each:
                continue
            total = [totals(stalls).get(kind, 0) for stalls in each]
            single = [longest(stalls).get(kind, 0) for stalls in each]
            found.append(
                Summary(
                    strategy,
                    kind,
                    len(each),
                    round(median(total)),
                    percentile(total, 90),
                    percentile(total, 99),
                    max(total),
                    sum(s.kind == kind for stalls in each for s in stalls),
                    max(single),
                    round(median(single)),
                    percentile(single, 90),
                    percentile(single, 99),
                )
            )
    return found


def differences(
    rounds: Mapping[str, Sequence[Sequence[StallRecord]]], seed: int = 0
) -> list[Difference]:
    """For each kind and each two strategies that have rounds."""
    total = {name: [totals(r) for r in each] for name, each in rounds.items() if each}
    single = {name: [longest(r) for r in each] for name, each in rounds.items() if each}
    found = []
    for kind in _kinds(rounds):
        for a, b in combinations(total, 2):
            enough = min(len(total[a]), len(total[b])) >= ENOUGH_ROUNDS
            diff, bounds, seen = _difference(kind, total[a], total[b], seed)
            one, one_bounds, one_seen = _difference(kind, single[a], single[b], seed)
            seen, one_seen = enough and seen, enough and one_seen
            found.append(
                Difference(a, b, kind, diff, bounds, seen, enough, one, one_bounds, one_seen)
            )
    return found


def _difference(
    kind: str, a: Sequence[Mapping[str, int]], b: Sequence[Mapping[str, int]], seed: int
) -> tuple[int, tuple[int, int], bool]:
    """Of the medians, its interval, and whether 0 is outside."""
    left, right = [r.get(kind, 0) for r in a], [r.get(kind, 0) for r in b]
    low, high = interval(left, right, seed)
    return round(median(left) - median(right)), (low, high), not low <= 0 <= high


def interval(a: Sequence[int], b: Sequence[int], seed: int = 0) -> tuple[int, int]:
    """Where the difference of the medians lies; the same for the same values and seed."""
    if min(a) == max(a) and min(b) == max(b):
        return a[0] - b[0], a[0] - b[0]
    chance = random.Random(seed)
    drawn = sorted(
        median(chance.choices(a, k=len(a))) - median(chance.choices(b, k=len(b)))
        for _ in range(RESAMPLES)
    )
    tail = (1 - CONFIDENCE) / 2
    low = drawn[int(RESAMPLES * tail)]
    high = drawn[min(RESAMPLES - 1, ceil(RESAMPLES * (1 - tail)) - 1)]
    return round(low), round(high)


def _kinds(rounds: Mapping[str, Sequence[Sequence[StallRecord]]]) -> list[str]:
    return sorted({s.kind for each in rounds.values() for stalls in each for s in stalls})
