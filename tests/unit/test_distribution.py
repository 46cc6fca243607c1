"""Percentiles by nearest rank, and distributions of times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.distribution import Distribution, percentile

VALUES = st.lists(st.integers(0, 10**9), min_size=1, max_size=50)


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


@given(VALUES)
def test_a_distribution_is_in_order(values: list[int]) -> None:
    found = Distribution.of(values)
    assert found.n == len(values)
    assert found.p50_ns <= found.p90_ns <= found.p99_ns <= found.max_ns == max(values)
    assert found.as_us()["max"] == max(values) / 1000


def test_a_distribution_of_nothing_is_all_zero() -> None:
    assert Distribution.of([]) == Distribution()


def test_what_was_not_measured_is_null_and_not_zero() -> None:
    assert set(Distribution.of([]).as_us().values()) == {None}
    assert set(Distribution.of([0]).as_us().values()) == {0}
