"""Shared by the benchmarks: interleaved runs, medians with their spread, growth by size, figures.

Never a verdict: figures are printed beside what is wanted, and a person judges.  Cases are run in
turn, not one after the other, so that a slow minute of the machine hits all of them; ratios are
taken round by round for the same reason.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Figure",
    "Sample",
    "interleaved",
    "percentile",
    "print_growth",
    "print_growths",
    "print_table",
    "ratios",
    "sizes",
]


@dataclass(frozen=True)
class Figure:
    """One number of the design: what it is, what is wanted, what was seen here."""

    what: str
    wanted: str
    seen: str


@dataclass(frozen=True)
class Sample:
    """What each run gave: seconds, rates, shares, whatever the case measures."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def spread(self, scale: float = 1.0, digits: int = 1) -> str:
        """Smallest and largest value, multiplied by `scale`."""
        low, high = min(self.values) * scale, max(self.values) * scale
        return f"{low:.{digits}f}..{high:.{digits}f}"


def sizes(quick: bool) -> tuple[int, ...]:
    """1k to 100k, in steps of about three."""
    return (1_000, 10_000) if quick else (1_000, 3_000, 10_000, 30_000, 100_000)


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    runs: int = 5,
    *,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Sample]:
    """Seconds of every case: one round as warm-up, then `runs` rounds over all of them.

    The clock is that of this process' CPU time, so what else runs on the machine disturbs little;
    give `time.perf_counter` for what waits or happens elsewhere.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-1, runs):
        for name, case in cases.items():
            gc.collect()
            start = clock()
            case()
            took = clock() - start
            if turn >= 0:
                seconds[name].append(took)
    return {name: Sample(tuple(s)) for name, s in seconds.items()}


def ratios(sample: Sample, base: Sample) -> Sample:
    """`sample` by `base`, round by round."""
    return Sample(tuple(a / b for a, b in zip(sample.values, base.values, strict=True)))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def against_n_log_n(by_size: Mapping[int, Sample]) -> dict[int, float]:
    """The median of each size by what n log n makes of the smallest one's; less is better."""
    smallest = min(by_size)
    unit = by_size[smallest].median / (smallest * math.log(smallest))
    return {n: sample.median / (unit * n * math.log(n)) for n, sample in by_size.items()}


def print_growth(
    title: str, by_size: Mapping[int, Sample], *, each: str = "region", wanted: str = ""
) -> None:
    """A row a size: median, spread, µs for each element, and the median against n log n."""
    print(f"\n{title}" + (f"   (wanted: {wanted})" if wanted else ""))
    growth = against_n_log_n(by_size)
    rows = [
        [
            f"{n:,}",
            f"{sample.median * 1e3:.2f}",
            sample.spread(1e3, 2),
            f"{sample.median * 1e6 / n:.2f}",
            f"{growth[n]:.2f}x",
        ]
        for n, sample in sorted(by_size.items())
    ]
    print_table(["n", "median ms", "spread ms", f"µs/{each}", "to n log n"], rows)


def print_growths(
    title: str, cases: Mapping[str, Mapping[int, Sample]], *, at: int, wanted: str = ""
) -> None:
    """A row a case: the median of each size, the spread at one, the worst against n log n."""
    print(f"\n{title}, median ms   (wanted: {wanted})")
    all_sizes = sorted(next(iter(cases.values())))
    rows = [
        [
            name,
            *(f"{by_size[n].median * 1e3:.1f}" for n in all_sizes),
            by_size[at].spread(1e3),
            f"{max(against_n_log_n(by_size)[n] for n in all_sizes[1:]):.2f}x",
        ]
        for name, by_size in cases.items()
    ]
    columns = ["n", *(f"{n:,}" for n in all_sizes), f"spread at {at:,}", "worst to n log n"]
    print_table(columns, rows)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Plain columns: the first `words` of them, which hold words, to the left, numbers right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(("  " + "  ".join(cells)).rstrip())
