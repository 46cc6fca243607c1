"""Shared by the benchmarks: interleaved runs, medians with their spread, growth by size.

Never a verdict: it prints figures.  Sizes are run in turn, not one after the other, so that a slow
minute of the machine hits all of them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Sample", "interleaved", "print_growth"]


@dataclass(frozen=True)
class Sample:
    """Seconds of each run."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{min(self.seconds) * 1e3:.1f}..{max(self.seconds) * 1e3:.1f}"


def interleaved(cases: Mapping[str, Callable[[], object]], runs: int = 5) -> dict[str, Sample]:
    """Run every case once as warm-up, then `runs` rounds over all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(runs + 1):
        for name, case in cases.items():
            gc.collect()
            start = time.perf_counter()
            case()
            took = time.perf_counter() - start
            if turn:
                seconds[name].append(took)
    return {name: Sample(tuple(s)) for name, s in seconds.items()}


def print_growth(title: str, sizes: Sequence[int], results: Mapping[str, Sample]) -> None:
    """A row a size: median, spread, and the time against n log n from the smallest size."""
    import math

    print(f"\n{title}")
    print(f"{'n':>8} {'median ms':>10} {'spread ms':>16} {'against n log n':>16}")
    first = results[str(sizes[0])].median
    for n in sizes:
        sample = results[str(n)]
        expected = first * (n * math.log(n)) / (sizes[0] * math.log(sizes[0]))
        print(
            f"{n:>8} {sample.median * 1e3:>10.1f} {sample.spread:>16} "
            f"{sample.median / expected:>15.2f}x"
        )
