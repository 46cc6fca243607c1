"""Sorted lists of disjoint half-open ranges `(start, end)`: join, complement, difference."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

__all__ = ["Range", "complement", "cut", "cutting", "intersect", "join", "put", "subtract"]

Range = tuple[int, int]


def join(ranges: Iterable[Range]) -> list[Range]:
    """`ranges`, given in ascending order, with those that touch or overlap made one."""
    out: list[Range] = []
    for start, end in ranges:
        if out and start <= out[-1][1]:
            if end > out[-1][1]:
                out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def subtract(a: Sequence[Range], b: Sequence[Range]) -> list[Range]:
    """What of `a` is not in `b`.  O(len(a) + len(b))."""
    out: list[Range] = []
    j = 0
    for start, end in a:
        while j and b[j - 1][1] > start:
            j -= 1
        while j < len(b) and b[j][1] <= start:
            j += 1
        while j < len(b) and b[j][0] < end:
            if b[j][0] > start:
                out.append((start, b[j][0]))
            start = b[j][1]
            j += 1
        if start < end:
            out.append((start, end))
    return out


def complement(start: int, end: int, ranges: Sequence[Range]) -> list[Range]:
    """What of `[start, end)` is not in `ranges`."""
    return subtract([(start, end)], ranges)


def intersect(ranges: Sequence[Range], start: int, end: int) -> list[Range]:
    """What of `ranges` lies in `[start, end)`."""
    i = bisect_right(ranges, start, key=_end)
    j = bisect_left(ranges, end, key=_start)
    return [(max(low, start), min(high, end)) for low, high in ranges[i:j]]


def put(ranges: list[Range], start: int, end: int) -> None:
    """Add `[start, end)` in place, joined with what it touches."""
    i = bisect_left(ranges, start, key=_end)
    j = bisect_right(ranges, end, key=_start)
    if i < j:
        start = min(start, ranges[i][0])
        end = max(end, ranges[j - 1][1])
    ranges[i:j] = [(start, end)]


def cut(ranges: list[Range], start: int, end: int) -> None:
    """Take `[start, end)` out in place."""
    i = bisect_right(ranges, start, key=_end)
    j = bisect_left(ranges, end, key=_start)
    ranges[i:j] = subtract(ranges[i:j], [(start, end)])


def cutting(a: Sequence[Range], b: Sequence[Range]) -> tuple[set[int], set[int]]:
    """The indices of those ranges of `a` and of `b` that overlap one of the other list."""
    in_a: set[int] = set()
    in_b: set[int] = set()
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i][0] < b[j][1] and b[j][0] < a[i][1]:
            in_a.add(i)
            in_b.add(j)
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return in_a, in_b


def _start(r: Range) -> int:
    return r[0]


def _end(r: Range) -> int:
    return r[1]
