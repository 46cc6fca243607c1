"""Statistics of a comparison, against definitions and against distributions that are known."""

from __future__ import annotations

import random
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.recording import StallRecord
from qmp_memlistener.updates.compare_stats import (
    differences,
    interval,
    percentile,
    summaries,
    totals,
)

VALUES = st.lists(st.integers(0, 10**9), min_size=1, max_size=50)


def stall(kind: str, length: int) -> StallRecord:
    return StallRecord(
        kind=kind,
        start_ns=0,
        end_ns=length,
        at_least_ns=0,
        at_most_ns=length,
        probe="ping",
        witnesses=["ping"],
        thread=None,
        site=None,
        cause=None,
        incident=1,
    )


@given(VALUES, st.floats(0, 100))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(
    values: list[int], percent: float
) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(v <= found for v in values) >= len(values) * percent / 100
    smaller = [v for v in values if v < found]
    assert len(smaller) < max(1e-9, len(values) * percent / 100)


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_round_without_a_stall_counts_as_nothing_lost() -> None:
    rounds: dict[str, list[list[StallRecord]]] = {
        "direct": [[stall("commit", 5), stall("commit", 7)], []],
        "control": [[], []],
    }
    assert totals(rounds["direct"][0]) == {"commit": 12}
    direct, control = summaries(rounds)
    assert (direct.n, direct.p50_ns, direct.max_ns) == (2, 0, 12)
    assert (direct.stalls, direct.longest_ns) == (2, 7)
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


@given(VALUES)
def test_the_same_values_show_no_difference(values: list[int]) -> None:
    rounds = [[stall("commit", v)] for v in values]
    assert not any(d.seen for d in differences({"direct": rounds, "pause": rounds}))


@given(VALUES, VALUES)
def test_an_interval_turns_with_its_sides(a: list[int], b: list[int]) -> None:
    low, high = interval(a, b)
    assert low <= high
    assert min(a) - max(b) <= low
    assert high <= max(a) - min(b)


@pytest.mark.parametrize("shape", ["even", "skewed"])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(shape: str) -> None:
    """With 20 rounds a side and a true difference of 500."""
    chance = random.Random(7)

    def draw(middle: int) -> list[int]:
        if shape == "even":
            return [round(chance.gauss(middle, 200)) for _ in range(20)]
        # an exponential has its median at log(2) of its mean
        return [round(middle - 1000 * log(2) + chance.expovariate(1 / 1000)) for _ in range(20)]

    held = 0
    for seed in range(150):
        low, high = interval(draw(2500), draw(2000), seed)
        held += low <= 500 <= high
    assert 0.89 <= held / 150 <= 1.0
