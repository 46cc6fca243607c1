"""Pictures as SVG inside rows of text: they need no script, stretch to any width and print.

What is certain of a length is filled, what is only possible is an outline up to a cap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, floor, log10
from typing import NamedTuple

from ..records import StallStatistics
from ..reports.lengths import duration_text, kind_text
from ..timeline.summary import BOUNDS_NS
from .lanes import Drawn, Lane
from .markup import Html, shown, tag

__all__ = ["Bar", "bars", "histograms", "strip"]

_WIDE = 1000
_HIGH = 20
_STRIP = 150
_BOUNDS = "Filled: at least so long. Outlined: possibly up to here."


class Bar(NamedTuple):
    """A length between two bounds and what it is in words; None: not measured."""

    label: str
    low: int | None
    high: int | None
    text: str


def bars(found: Sequence[Bar], what: str, note: str = _BOUNDS) -> Html:
    """One row each on a common logarithmic axis; `note` says what the ends of a bar are."""
    lengths = [v for bar in found for v in (bar.low, bar.high) if v]
    first = floor(log10(min(lengths))) - 1 if lengths else 0
    last = max(ceil(log10(max(lengths))), first + 1) if lengths else 1
    rows = [
        tag("div", _cell("label", bar.label), _length(bar, first, last), _cell("value", bar.text),
            class_="row")
        for bar in found
    ]  # fmt: skip
    ends = tag(
        "div",
        tag("span", _plain(10 ** max(0, first))),
        tag("span", _plain(10 ** max(0, last))),
        class_="ends",
    )
    axis = tag("div", _cell("label", ""), ends, _cell("value", ""), class_="row axis")
    return tag("figure", rows, axis, tag("figcaption", f"{what} Logarithmic. {note}"))


def _plain(ns: int) -> str:
    """A round length without decimals."""
    return duration_text(ns).replace(".00 ", " ").replace(".0 ", " ")


def _cell(kind: str, text: str) -> Html:
    return tag("span", shown(text), class_=kind)


def _length(bar: Bar, first: int, last: int) -> Html:
    def at(ns: int) -> float:
        return round(min(1.0, max(0.0, (log10(ns) - first) / (last - first))) * _WIDE, 1)

    parts = [
        tag("line", x1=x, x2=x, y1=0, y2=_HIGH, class_="grid")
        for x in (at(10**e) for e in range(max(0, first + 1), last))
    ]
    low, high = bar.low or 0, bar.high or 0
    if high:
        begin = at(low) if low else 0
        parts.append(tag("rect", x=0, y=4, width=begin, height=_HIGH - 8, class_="sure"))
        parts.append(
            tag("rect", x=begin, y=6, width=max(1, at(high) - begin), height=_HIGH - 12,
                class_="maybe")
        )  # fmt: skip
        parts.append(tag("line", x1=at(high), x2=at(high), y1=2, y2=_HIGH - 2, class_="cap"))
    return _svg(parts, _WIDE, f"{bar.label}: {bar.text}")


def _svg(parts: Iterable[str], width: float, words: str) -> Html:
    return tag(
        "svg", parts, viewBox=f"0 0 {width} {_HIGH}", preserveAspectRatio="none", role="img",
        aria_label=shown(words),
    )  # fmt: skip


# -- histograms --------------------------------------------------------------------------------


def histograms(found: Sequence[StallStatistics]) -> Iterator[Html]:
    """Of each kind and cause: how often each length was seen, by upper and by lower bounds."""
    used = [b for s in found for b in (*s.bounds_ns, *s.bounds_min_ns) if b in BOUNDS_NS]
    if not used:
        return
    axis = BOUNDS_NS[BOUNDS_NS.index(min(used)) : BOUNDS_NS.index(max(used)) + 1]
    for s in found:
        name = f"{kind_text(s.kind)}, {s.cause}"
        most = dict(zip(s.bounds_ns, s.histogram, strict=False))
        least = dict(zip(s.bounds_min_ns, s.histogram_min, strict=False))
        yield tag("h3", shown(f"{name}: {s.count:,}"))
        if not least or least == most:
            yield _histogram(axis, most, "length")
        else:
            yield _histogram(axis, least, "at least")
            yield _histogram(axis, most, "at most")


def _histogram(axis: Sequence[int], counts: dict[int, int], what: str) -> Html:
    most = max(counts.values(), default=0)
    parts = []
    for i, bound in enumerate(axis):
        n = counts.get(bound, 0)
        if n:
            high = max(1.0, round(n / most * _HIGH, 1))
            hint = tag("title", f"from {duration_text(bound)} on: {n:,}")
            parts.append(
                tag("g", hint, tag("rect", x=i * 10 + 1, y=_HIGH - high, width=8, height=high,
                                   class_="sure" if what != "at most" else "maybe"))
            )  # fmt: skip
    words = ", ".join(f"{duration_text(b)}: {n:,}" for b, n in counts.items() if n)
    ends = tag(
        "div",
        tag("span", _plain(axis[0])),
        tag("span", f"{_plain(axis[-1])} and more"),
        class_="ends",
    )
    picture = tag("div", _svg(parts, 10 * len(axis), f"{what}: {words}"), ends)
    return tag(
        "div", _cell("label", what), picture, _cell("value", f"highest: {most:,}"),
        class_="row tall",
    )  # fmt: skip


# -- lanes without a script --------------------------------------------------------------------


def strip(lane: Lane, start_ns: int, end_ns: int) -> Html:
    """A lane over the whole time, coarser than the script draws it."""
    span = max(1, end_ns - start_ns)

    def at(t_ns: int) -> float:
        return round(min(1.0, max(0.0, (t_ns - start_ns) / span)) * _WIDE, 1)

    kept: dict[int, Drawn] = {}
    for drawn in lane.drawn():
        key = int(at(drawn.start) * _STRIP / _WIDE)
        if key not in kept or drawn.most > kept[key].most:
            kept[key] = drawn
    parts = []
    for d in kept.values():
        begin, sure = at(d.start), at(d.start + d.least) - at(d.start)
        maybe = at(d.start + d.most) - begin
        if maybe > sure:
            parts.append(tag("rect", x=begin, y=6, width=maybe, height=_HIGH - 12, class_="maybe"))
        parts.append(
            tag("rect", x=begin, y=4, width=max(1.5, sure), height=_HIGH - 8, class_="sure")
        )
    count = f"{lane.count:,}"
    return tag(
        "div", _cell("label", lane.name), _svg(parts, _WIDE, f"{lane.name}: {count}"),
        _cell("value", count), class_="row",
    )  # fmt: skip
