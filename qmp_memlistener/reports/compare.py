"""A comparison of strategies as a table: per kind of stall what a round lost, and the differences.

Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..updates.compare import CONTROL, Comparison, Round
from ..updates.compare_stats import Difference, Summary, percentile
from .stalls import count_text, duration_text, kind_text

__all__ = ["comparison_lines"]

ENOUGH_FOR_P90 = 10
ENOUGH_FOR_P99 = 100
"""With fewer rounds the percentile is the largest value, and says nothing of its own."""


def comparison_lines(found: Comparison, what: str) -> Iterator[str]:
    """Lines of at most 80 columns; `what` says in words what was done in each round."""
    counts = {s.strategy: s.n for s in found.summary}
    rounds = max(counts.values(), default=0)
    window = duration_text(found.window_ns)
    yield f"{what}: {count_text(rounds, 'round')} each in random order (seed {found.seed}),"
    yield f"{window} looked at from the beginning of each; {CONTROL} did nothing"
    for skipped in found.skipped:
        yield f"{skipped.strategy} is not possible: {skipped.reason}"
        if skipped.remedy:
            yield f"  remedy: {skipped.remedy}"
    failed = [r for r in found.rounds if r.outcome != "done"]
    for each in failed:
        yield f"round {each.order} ({each.strategy}) left out: {each.outcome}: {each.reason}"
    if found.ended_early is not None:
        yield f"ended early: {found.ended_early}"
        if found.remedy:
            yield f"  remedy: {found.remedy}"
    if not found.summary:
        yield "nothing to compare"
        return
    yield ""
    yield from _operations(found.rounds)
    yield ""
    yield "time that a round lost to stalls of a kind, all together"
    yield ""
    columns = "".join(f"{name:>9}" for name in ("p50", "p90", "p99", "max", "longest"))
    yield f"{'kind':<13}{'strategy':<9}{columns}{'count':>7}"
    last = None
    for row in sorted(found.summary, key=lambda s: (s.kind, _rank(s.strategy))):
        yield _row(row, show_kind=row.kind != last)
        last = row.kind
    yield ""
    yield "differences of the medians, with the interval that holds them at 95 %"
    yield ""
    yield from _differences(found.differences)


def _rank(strategy: str) -> int:
    return ["direct", "pause", "hole", CONTROL].index(strategy)


def _operations(rounds: Sequence[Round]) -> Iterator[str]:
    yield f"{'strategy':<10}{'rounds':>7}{'slot operations':>17}{'slots':>7}{'transitions':>13}"
    names = sorted({r.strategy for r in rounds}, key=_rank)
    for name in names:
        own = [r for r in rounds if r.strategy == name and r.outcome == "done"]
        if not own:
            continue
        ops, slots, changes = (
            percentile([getattr(r, key) for r in own], 50)
            for key in ("slot_ops", "slots", "transitions")
        )
        yield f"{name:<10}{len(own):>7}{ops:>17}{slots:>7}{changes:>13}"


def _row(s: Summary, *, show_kind: bool) -> str:
    p90 = duration_text(s.p90_ns) if s.n >= ENOUGH_FOR_P90 else "-"
    p99 = duration_text(s.p99_ns) if s.n >= ENOUGH_FOR_P99 else "-"
    kind = kind_text(s.kind) if show_kind else ""
    return (
        f"{kind:<13}{s.strategy:<9}{duration_text(s.p50_ns):>9}{p90:>9}{p99:>9}"
        f"{duration_text(s.max_ns):>9}{duration_text(s.longest_ns):>9}{s.stalls:>7}"
    )


def _differences(found: Sequence[Difference]) -> Iterator[str]:
    for d in sorted(found, key=lambda d: (d.kind, _rank(d.a), _rank(d.b))):
        pair = f"{kind_text(d.kind):<13}{d.a} - {d.b}"
        if not d.seen:
            yield f"{pair:<32}no difference seen ({_interval(d)})"
        else:
            yield f"{pair:<32}{_signed(d.median_diff_ns):>10}  ({_interval(d)})"


def _interval(d: Difference) -> str:
    low, high = d.ci95_ns
    return f"{_signed(low)} to {_signed(high)}"


def _signed(ns: int) -> str:
    sign = "-" if ns < 0 else "+" if ns else ""
    return f"{sign}{duration_text(abs(ns))}"
