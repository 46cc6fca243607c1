"""Statistics of a comparison: percentiles over rounds, and intervals for differences.  Pure.

A round's value of a kind of stall is how long the guest stood still in that way in all, 0 when it
did not.  Percentiles are nearest-rank, so each is a value that was seen.  The interval of a
difference of medians is a percentile bootstrap (Efron and Tibshirani, An Introduction to the
Bootstrap, 13.3): rounds are drawn again, with replacement, for each side.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import ceil
from statistics import median

import msgspec

from ..recording import StallRecord

__all__ = ["Difference", "Summary", "differences", "percentile", "summaries", "totals"]

RESAMPLES = 2000
CONFIDENCE = 0.95


class Summary(msgspec.Struct, frozen=True):
    """Stalls of one kind under one strategy, over `n` rounds: the time a round lost to them in all.

    `stalls` is how many there were in all rounds together, `longest_ns` the longest of them.
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


class Difference(msgspec.Struct, frozen=True):
    """The median of `a` less that of `b`, with the interval that holds it with 95 % confidence.

    `seen` is False when the interval holds 0: no difference was seen.
    """

    a: str
    b: str
    kind: str
    median_diff_ns: int
    ci95_ns: tuple[int, int]
    seen: bool


def percentile(values: Sequence[int], percent: float) -> int:
    """The smallest value that at least so many per cent of them do not exceed.

    Raises ValueError when there is none.
    """
    if not values:
        raise ValueError("no values")
    rank = max(1, ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


def totals(stalls: Sequence[StallRecord]) -> dict[str, int]:
    """By kind: how long these stalls were together, by their upper bounds."""
    found: dict[str, int] = {}
    for stall in stalls:
        found[stall.kind] = found.get(stall.kind, 0) + stall.at_most_ns
    return found


def summaries(rounds: Mapping[str, Sequence[Sequence[StallRecord]]]) -> list[Summary]:
    """Of the stalls of each round by strategy; every kind that was seen anywhere, for each."""
    found = []
    for kind in _kinds(rounds):
        for strategy, each in rounds.items():
            if not each:
                continue
            values = [totals(stalls).get(kind, 0) for stalls in each]
            single = [s.at_most_ns for stalls in each for s in stalls if s.kind == kind]
            found.append(
                Summary(
                    strategy,
                    kind,
                    len(values),
                    percentile(values, 50),
                    percentile(values, 90),
                    percentile(values, 99),
                    max(values),
                    len(single),
                    max(single, default=0),
                )
            )
    return found


def differences(
    rounds: Mapping[str, Sequence[Sequence[StallRecord]]], seed: int = 0
) -> list[Difference]:
    """For each kind and each two strategies that have rounds."""
    found = []
    for kind in _kinds(rounds):
        values = {
            strategy: [totals(stalls).get(kind, 0) for stalls in each]
            for strategy, each in rounds.items()
            if each
        }
        for a, b in combinations(values, 2):
            diff = round(median(values[a]) - median(values[b]))
            low, high = interval(values[a], values[b], seed)
            seen = not low <= 0 <= high
            found.append(Difference(a, b, kind, diff, (low, high), seen))
    return found


def interval(a: Sequence[int], b: Sequence[int], seed: int = 0) -> tuple[int, int]:
    """Where the difference of the medians lies; the same for the same values and seed."""
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
