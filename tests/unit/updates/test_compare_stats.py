"""Statistics of a comparison, against definitions and against distributions that are known."""

from __future__ import annotations

import random
from collections.abc import Iterable
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.records import StallKind, StallRecord
from qmp_memlistener.updates.compare.stats import (
    ENOUGH_ROUNDS,
    Round,
    differences,
    interval,
    summaries,
    totals,
)
from qmp_memlistener.updates.model import Result
from tests.unit.updates.compare_fakes import stall as stall_at

VALUES = st.lists(st.integers(0, 10**9), min_size=1, max_size=50)


def stall(kind: str, length: int, at_least: int | None = None) -> StallRecord:
    return stall_at(kind, 0, length, at_least)


def a_round(stalls: Iterable[StallRecord], *measured: StallKind) -> Round:
    """Of which these kinds were measured throughout."""
    return Round("", 0, Result.DONE, None, 0, list(stalls), 0, 0, 0, 0, list(measured))


def seen(*stalls: StallRecord) -> Round:
    """A round in which these kinds were measured."""
    return a_round(stalls, StallKind.COMMIT, StallKind.VCPU_GAP)


def exact(*values: int) -> list[tuple[int, int]]:
    return [(v, v) for v in values]


def test_a_round_without_a_stall_counts_as_nothing_lost() -> None:
    rounds = {
        "direct": [seen(stall("commit", 5), stall("commit", 7)), seen()],
        "control": [seen(), seen()],
    }
    assert totals(rounds["direct"][0].stalls) == {"commit": (12, 12)}
    direct, control = summaries(rounds)
    assert (direct.n, direct.p50_ns, direct.p90_ns, direct.max_ns) == (2, 6, 12, 12)
    assert (direct.stalls, direct.longest_ns) == (2, 7)
    assert (direct.longest_p50_ns, direct.longest_p90_ns) == (4, 7)
    assert (control.n, control.max_ns, control.stalls) == (2, 0, 0)


def test_a_difference_that_is_always_there_is_seen() -> None:
    rounds = {
        "direct": [seen(stall("commit", 100 + n)) for n in range(10)],
        "control": [seen(stall("commit", 10 + n)) for n in range(10)],
    }
    (found,) = differences(rounds)
    assert (found.a, found.b, found.kind) == ("direct", "control", "commit")
    assert found.median_diff_ns == 90
    assert found.seen
    assert found.ci95_ns is not None
    assert found.ci95_ns[0] > 0


def test_one_long_stall_among_many_short_ones_is_seen_in_the_longest() -> None:
    chance = random.Random(3)

    def noise() -> list[StallRecord]:
        return [stall("vcpu_gap", round(chance.expovariate(1 / 100))) for _ in range(300)]

    rounds = {
        "direct": [seen(*noise(), stall("vcpu_gap", 2500 + n)) for n in range(10)],
        "control": [seen(*noise()) for _ in range(10)],
    }
    (found,) = differences(rounds)
    assert found.longest_seen
    assert found.ci95_ns is not None
    assert found.longest_ci95_ns is not None
    (low, high), (one_low, one_high) = found.ci95_ns, found.longest_ci95_ns
    assert high - low > 5 * (one_high - one_low)


@pytest.mark.parametrize("rounds", [1, ENOUGH_ROUNDS - 1, ENOUGH_ROUNDS])
def test_few_rounds_show_no_difference(rounds: int) -> None:
    (found,) = differences(
        {
            "direct": [seen(stall("commit", 100))] * rounds,
            "control": [seen(stall("commit", 10))] * (rounds + 5),
        }
    )
    assert found.ci95_ns == (90, 90)
    assert found.enough == found.seen == (rounds >= ENOUGH_ROUNDS)


@given(VALUES)
def test_the_same_values_show_no_difference(values: list[int]) -> None:
    rounds = [seen(stall("commit", v)) for v in values]
    assert not any(d.seen for d in differences({"direct": rounds, "pause": rounds}))


@given(VALUES, VALUES)
def test_an_interval_lies_where_differences_can_lie(a: list[int], b: list[int]) -> None:
    low, high = interval(exact(*a), exact(*b))
    assert low <= high
    assert min(a) - max(b) <= low
    assert high <= max(a) - min(b)


@pytest.mark.parametrize("rounds", [ENOUGH_ROUNDS, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.parametrize("shape", ["even", "skewed"])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(
    shape: str, rounds: int
) -> None:
    """That is 500; of 150 trials 95 % are 142, and fewer than 134 a rare accident."""
    chance = random.Random(7)

    def draw(middle: int) -> list[tuple[int, int]]:
        if shape == "even":
            return exact(*(round(chance.gauss(middle, 200)) for _ in range(rounds)))
        # an exponential has its median at log(2) of its mean
        low = middle - 1000 * log(2)
        return exact(*(round(low + chance.expovariate(1 / 1000)) for _ in range(rounds)))

    held = 0
    for seed in range(150):
        low, high = interval(draw(2500), draw(2000), seed)
        held += low <= 500 <= high
    assert held >= 134


def test_rounds_that_did_not_measure_a_kind_are_left_out_and_counted() -> None:
    blind = a_round((), StallKind.VCPU_GAP)
    rounds = {
        "direct": [seen(stall("commit", 100)) for _ in range(6)] + [blind] * 3,
        "control": [seen()] * 6 + [blind],
    }
    direct, control = summaries(rounds)
    assert (direct.n, direct.missing, direct.p50_ns, direct.p50_min_ns) == (6, 3, 100, 100)
    assert (control.n, control.missing, control.max_ns) == (6, 1, 0)
    (found,) = differences(rounds)
    assert found.ci95_ns == (100, 100)
    assert found.enough


def test_a_difference_within_the_bounds_of_what_was_measured_is_not_seen() -> None:
    wide = {
        "direct": [seen(stall("commit", 105, 2)) for _ in range(9)],
        "control": [seen(stall("commit", 3, 1)) for _ in range(9)],
    }
    direct, _ = summaries(wide)
    assert (direct.p50_min_ns, direct.p50_ns, direct.max_min_ns, direct.max_ns) == (2, 105, 2, 105)
    (found,) = differences(wide)
    assert found.diff_bounds_ns == found.ci95_ns == (-1, 104)
    assert not found.seen


PAIRS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=20)


@given(PAIRS, st.randoms())
def test_whatever_the_true_lengths_were_they_lie_between_the_bounds(
    pairs: list[tuple[int, int]], chance: random.Random
) -> None:
    bounds = [(min(p), max(p)) for p in pairs]
    true = [chance.randint(low, high) for low, high in bounds]
    (of_bounds,) = summaries({"direct": [seen(stall("commit", h, low)) for low, h in bounds]})
    (of_true,) = summaries({"direct": [seen(stall("commit", t)) for t in true]})
    for name in ("p50", "p90", "p99", "max", "longest"):
        low, high = getattr(of_bounds, f"{name}_min_ns"), getattr(of_bounds, f"{name}_ns")
        assert low <= getattr(of_true, f"{name}_ns") <= high
