"""The summary of stalls: a table by kind and cause, and histograms of their lengths.

Nothing is printed here.
"""

from __future__ import annotations

import textwrap
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..records import (
    ProbeState,
    StallKind,
    StallStatistics,
    SummaryRecord,
)
from ..text import count_text
from ..timeline.summary import BOUNDS_NS
from .lengths import KIND_ORDER, duration_text, kind_text, span_text

__all__ = ["histogram_lines", "probes_lines", "summary_lines"]


_BARS = "▏▎▍▌▋▊▉█"
_COLUMN_BARS = {True: "▁▂▃▄▅▆▇█", False: "123456789"}
_WIDEST_BAR = 60
_WIDEST_STEP = 4
_AT_MOST = "  at most"


def summary_lines(
    summary: SummaryRecord, *, width: int = 80, unicode: bool = True, charts: bool = True
) -> Iterator[str]:
    """A table by kind and cause, and below it, with `charts`, histograms on one logarithmic axis.
    Where bounds are more than 10 % apart both are shown: `2.1-105 ms`.

    Lines are at most `width` long, down to 48 columns: the narrower, the fewer columns has the
    table, and where the histograms find no room they are left out.  `unicode` says that the output
    can show block characters.
    """
    over = duration_text(summary.end_ns - summary.start_ns)
    during = f"{count_text(summary.transitions, 'transition')} in {over}"
    measured = not summary.probes or any(p.active and p.measures for p in summary.probes)
    if not summary.statistics:
        yield f"{'no stall' if measured else 'stalls were not measured'}, {during}"
    else:
        yield f"{count_text(summary.stalls, 'stall')}, {during}"
    if summary.probes:
        yield from probes_lines(summary.probes, width=width)
    if not summary.statistics:
        return
    yield ""
    ordered = sorted(summary.statistics, key=lambda s: (KIND_ORDER.get(s.kind, 99), s.kind))
    yield from _table(ordered, width)
    if charts:
        yield from _chart(ordered, width, unicode=unicode)


def probes_lines(probes: Sequence[ProbeState], *, width: int = 80) -> Iterator[str]:
    """What measured, in a line; why the others did not, in short, below."""
    lines = [f"measured by: {', '.join(p.name for p in probes if p.active) or 'no probe'}"]
    without = [f"{p.name} ({p.reason or 'not requested'})" for p in probes if not p.active]
    if without:
        lines.append(f"  without {', '.join(without)}")
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        yield from textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)


def histogram_lines(
    summary: SummaryRecord, *, width: int = 80, unicode: bool = True
) -> Iterator[str]:
    """For each kind, all causes together: a line for each step of length, with its count."""
    for kind in sorted(
        {s.kind for s in summary.statistics}, key=lambda k: (KIND_ORDER.get(k, 99), k)
    ):
        mine = [s for s in summary.statistics if s.kind == kind]
        least, most = _counts(mine, least=True), _counts(mine)
        if _used(least) == _used(most):
            yield from _histogram(kind, "", most, width, unicode=unicode)
        else:
            yield from _histogram(kind, " at least", least, width, unicode=unicode)
            yield from _histogram(kind, " at most", most, width, unicode=unicode)


def _histogram(
    kind: str, bound_of: str, counts: Mapping[int, int], width: int, *, unicode: bool
) -> Iterator[str]:
    most = max(counts.values(), default=0)
    digits = len(f"{most:,}")
    room = max(1, min(_WIDEST_BAR, width - 13 - digits))
    yield ""
    until = "on" if bound_of else "up to the next"
    yield f"{kind_text(kind)}{bound_of}, from this length {until}"
    for bound, count in counts.items():
        bar = _bar(count, most, room, unicode=unicode)
        yield f"  {_bound_text(bound):>7}  {count:>{digits},}  {bar}".rstrip()


_COLUMNS = ("kind", "cause", "count", "total", "p50", "p90", "p99", "max")
_DROPPED_FIRST = ("p90", "total", "p50", "p99")


def _table(ordered: Sequence[StallStatistics], width: int) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    last = None
    for s in ordered:
        times = (
            span_text(s.total_min_ns, s.total_ns),
            span_text(s.p50_min_ns, s.p50_ns),
            span_text(s.p90_min_ns, s.p90_ns),
            span_text(s.p99_min_ns, s.p99_ns),
            span_text(s.max_min_ns, s.max_ns),
        )
        kind = "" if s.kind == last else kind_text(s.kind)
        rows.append((kind, s.cause, f"{s.count:,}", *times))
        last = s.kind
    widths = {name: max(len(row[i]) for row in rows) for i, name in enumerate(_COLUMNS)}
    for name in _DROPPED_FIRST:
        if sum(widths.values()) + 2 * (len(widths) - 1) <= width:
            break
        del widths[name]
    for row in rows:
        cells = []
        for name, cell in zip(_COLUMNS, row, strict=True):
            if name in widths:
                align = "<" if name in ("kind", "cause") else ">"
                cells.append(f"{cell:{align}{widths[name]}}")
        yield "  ".join(cells)


def _chart(ordered: Sequence[StallStatistics], width: int, *, unicode: bool) -> Iterator[str]:
    """A line for each kind and cause: how often each length was seen, its most frequent one as the
    full height.  Where lower and upper bounds are of different steps they have a line each."""
    axis = list(_steps({**_counts(ordered), **_counts(ordered, least=True)}))
    rows: list[tuple[StallKind, str, dict[int, int]]] = []
    for s in ordered:
        most, least = _counts([s]), _counts([s], least=True)
        differ = bool(s.histogram_min) and _used(most) != _used(least)
        rows.append((s.kind, s.cause, most))
        if differ:
            rows[-1:] = [(s.kind, s.cause, least), (s.kind, _AT_MOST, most)]
    kinds = max(len(kind_text(kind)) for kind, _, _ in rows)
    causes = max(len(cause) for _, cause, _ in rows)
    lead = kinds + causes + 4
    step = min(_WIDEST_STEP, (width - lead) // max(1, len(axis)))
    if step < 1:
        return
    labels = ""
    for i, bound in enumerate(axis):
        text = _bound_text(bound)
        at = i * step
        if (
            _is_decade(bound)
            and (not labels or at > len(labels))
            and at + len(text) <= width - lead
        ):
            labels = f"{labels:<{at}}{text}"
    yield ""
    title = "at least" if any(cause == _AT_MOST for _, cause, _ in rows) else "how long"
    yield f"{title:<{lead}}{labels}"
    bars = _COLUMN_BARS[unicode]
    last = None
    for name, cause, counts in rows:
        most_frequent = max(counts.values(), default=0)
        cells = (
            bars[(counts[b] * len(bars) - 1) // most_frequent] if counts.get(b) else " "
            for b in axis
        )
        kind = "" if name == last else kind_text(name)
        row = f"{kind:<{kinds}}  {cause:<{causes}}  {''.join(c * step for c in cells)}"
        yield row.rstrip()
        last = name


def _counts(statistics: Iterable[StallStatistics], *, least: bool = False) -> dict[int, int]:
    """How many by length, added up; the steps between the first and the last one are all there.

    `least`: by their lower bounds; where there are none, by what there is.
    """
    counts: Counter[int] = Counter()
    for s in statistics:
        lower = least and bool(s.histogram_min)
        bounds, numbers = (
            (s.bounds_min_ns, s.histogram_min) if lower else (s.bounds_ns, s.histogram)
        )
        counts.update(dict(zip(bounds, numbers, strict=False)))
    return _steps(counts)


def _steps(counts: Mapping[int, int]) -> dict[int, int]:
    """In order, with those in between that are not used."""
    first, last = min(counts, default=0), max(counts, default=0)
    return dict(
        sorted(
            {
                **dict.fromkeys(
                    BOUNDS_NS[bisect_right(BOUNDS_NS, first) : bisect_left(BOUNDS_NS, last)], 0
                ),
                **counts,
            }.items()
        )
    )


def _used(counts: Mapping[int, int]) -> dict[int, int]:
    return {bound: count for bound, count in counts.items() if count}


def _bar(count: int, most: int, room: int, *, unicode: bool) -> str:
    if not count:
        return ""
    if not unicode:
        return "#" * max(1, round(count * room / most))
    eighths = max(1, round(count * room * 8 / most))
    rest = eighths % 8
    return _BARS[-1] * (eighths // 8) + (_BARS[rest - 1] if rest else "")


def _is_decade(ns: int) -> bool:
    return ns in (60 * 10**9, 600 * 10**9) or (ns <= 10**10 and str(ns).strip("0") == "1")


def _bound_text(ns: int) -> str:
    """A bound of a histogram, in the largest unit that it is a whole number of."""
    for unit, name in ((60 * 10**9, "min"), (10**9, "s"), (10**6, "ms"), (10**3, "us")):
        if ns and ns % unit == 0:
            return f"{ns // unit} {name}"
    return f"{ns} ns"
