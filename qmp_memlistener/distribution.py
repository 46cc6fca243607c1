"""Percentiles of measured values, by nearest rank, and a summary of many times."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import msgspec

__all__ = ["Distribution", "percentile"]


def percentile(values: Sequence[int], percent: float) -> int:
    """The smallest value that at least so many per cent of them do not exceed.

    Raises ValueError when there is none.
    """
    if not values:
        raise ValueError("no values")
    rank = max(1, ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


class Distribution(msgspec.Struct, frozen=True):
    """`n` times in ns; all 0 when there is none."""

    n: int = 0
    p50_ns: int = 0
    p90_ns: int = 0
    p99_ns: int = 0
    max_ns: int = 0

    @classmethod
    def of(cls, values: Sequence[int]) -> Distribution:
        if not values:
            return cls()
        p50, p90, p99 = (percentile(values, p) for p in (50, 90, 99))
        return cls(len(values), p50, p90, p99, max(values))

    def as_us(self) -> dict[str, float | None]:
        """`p50`, `p90`, `p99` and `max` in microseconds, to the nanosecond; None of no times."""
        names = ("p50", "p90", "p99", "max")
        return {name: getattr(self, f"{name}_ns") / 1000 if self.n else None for name in names}
