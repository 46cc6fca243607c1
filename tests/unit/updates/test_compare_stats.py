"""Statistics of a comparison, against definitions and against distributions that are known."""

from __future__ import annotations

import random
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.recording import StallRecord
from qmp_memlistener.updates.compare_stats import (
    ENOUGH_ROUNDS,
    differences,
    interval,
    summaries,
    totals,
)
from tests.unit.updates.compare_fakes import stall as stall_at

VALUES = st.lists(st.integers(0, 10**9), min_size=1, max_size=50)


def stall(kind: str, length: int) -> StallRecord:
    return stall_at(kind, 0, length)


def test_a_round_without_a_stall_counts_as_nothing_lost() -> None:
    rounds: dict[str, list[list[StallRecord]]] = {
        "direct": [[stall("commit", 5), stall("commit", 7)], []],
        "control": [[], []],
    }
    assert totals(rounds["direct"][0]) == {"commit": 12}
    direct, control = summaries(rounds)
    assert (direct.n, direct.p50_ns, direct.p90_ns, direct.max_ns) == (2, 6, 12, 12)
    assert (direct.stalls, direct.longest_ns) == (2, 7)
    assert (direct.longest_p50_ns, direct.longest_p90_ns) == (4, 7)
    assert (control.n, control.max_ns, control.stalls) == (2, 0, 0)


def test_a_difference_that_is_always_there_is_seen() -> None:
    rounds = {
        "direct": [[stall("commit", 100 + n)] for n in range(10)],
        "control": [[stall("commit", 10 + n)] for n in range(10)],
    }
    (found,) = differences(rounds)
    assert (found.a, found.b, found.kind) == ("direct", "control", "commit")
    assert found.median_diff_ns == 90
    assert found.seen
    assert found.ci95_ns[0] > 0


def test_one_long_stall_among_many_short_ones_is_seen_in_the_longest() -> None:
    chance = random.Random(3)

    def noise() -> list[StallRecord]:
        return [stall("vcpu_gap", round(chance.expovariate(1 / 100))) for _ in range(300)]

    rounds = {
        "direct": [[*noise(), stall("vcpu_gap", 2500 + n)] for n in range(10)],
        "control": [noise() for _ in range(10)],
    }
    (found,) = differences(rounds)
    assert found.longest_seen
    (low, high), (one_low, one_high) = found.ci95_ns, found.longest_ci95_ns
    assert high - low > 5 * (one_high - one_low)


@pytest.mark.parametrize("rounds", [1, ENOUGH_ROUNDS - 1, ENOUGH_ROUNDS])
def test_few_rounds_show_no_difference(rounds: int) -> None:
    (found,) = differences(
        {
            "direct": [[stall("commit", 100)]] * rounds,
            "control": [[stall("commit", 10)]] * (rounds + 5),
        }
    )
    assert found.ci95_ns == (90, 90)
    assert found.enough == found.seen == (rounds >= ENOUGH_ROUNDS)


@given(VALUES)
def test_the_same_values_show_no_difference(values: list[int]) -> None:
    rounds = [[stall("commit", v)] for v in values]
    assert not any(d.seen for d in differences({"direct": rounds, "pause": rounds}))


@given(VALUES, VALUES)
def test_an_interval_lies_where_differences_can_lie(a: list[int], b: list[int]) -> None:
    low, high = interval(a, b)
    assert low <= high
    assert min(a) - max(b) <= low
    assert high <= max(a) - min(b)


@pytest.mark.parametrize("rounds", [ENOUGH_ROUNDS, 20])
@pytest.mark.parametrize("shape", ["even", "skewed"])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(
    shape: str, rounds: int
) -> None:
    """That is 500; of 150 trials 95 % are 142, and fewer than 134 a rare accident."""
    chance = random.Random(7)

    def draw(middle: int) -> list[int]:
        if shape == "even":
            return [round(chance.gauss(middle, 200)) for _ in range(rounds)]
        # an exponential has its median at log(2) of its mean
        return [round(middle - 1000 * log(2) + chance.expovariate(1 / 1000)) for _ in range(rounds)]

    held = 0
    for seed in range(150):
        low, high = interval(draw(2500), draw(2000), seed)
        held += low <= 500 <= high
    assert held >= 134
