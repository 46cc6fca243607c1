"""Which of the guesses that a rendering makes its visible pieces depend on (see `render`).

`info mtree` does not show the order of overlapping siblings, nor whether some regions answer by
themselves.  A guess on which nothing visible depends is not reported.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from .model import Region

__all__ = ["NOTHING", "Doubts", "Inherited", "Overlap", "Clipped", "Visible"]

NOTHING = "nothing"
"""Stands for what is behind a region when no other is."""

# Steps in finding out what overlapping siblings hide.  What is beyond is named without a closer
# look.
_MAX_LOOKS = 200_000


class Inherited(NamedTuple):
    """What a region passes on to everything below it and, as an alias, behind it."""

    readonly: bool = False
    nonvolatile: bool = False
    unmergeable: bool = False
    device_memory: bool = False


@dataclass(slots=True)
class Clipped:
    """A region clipped to where it could be seen; its index is its rank."""

    start: int
    end: int
    region: Region
    offset: int
    flags: Inherited


Visible = tuple[int, int, int, Clipped]
"""Start, end, rank and piece of what is visible."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """`[start, end)` is of two siblings; `front` and `behind` are the ranks of their pieces."""

    start: int
    end: int
    front: range
    behind: range
    names: tuple[str, str]


class Doubts:
    """Collects guesses while `pieces` grow, and then finds those that matter.

    `overlaps` are siblings whose order is guessed, `unseen` pairs of names that are beyond all
    limits.
    """

    def __init__(self, pieces: Sequence[Clipped]) -> None:
        self.overlaps: list[Overlap] = []
        self.unseen: set[tuple[str, str]] = set()
        self._pieces = pieces
        self._taken: set[int] = set()
        self._ghosts: list[tuple[int, Clipped]] = []
        self._visible: Sequence[Visible] = ()
        self._starts: list[int] = []
        self._looks = 0

    def note_guess(self, piece: Clipped, *, taken: bool) -> None:
        """Whether this region answers is guessed: `taken` for one that does.

        Call it when its place among the pieces is at their end.
        """
        if taken:
            self._taken.add(len(self._pieces))
        else:
            self._ghosts.append((len(self._pieces), piece))

    def pairs(self, visible: Sequence[Visible]) -> set[tuple[str, str]]:
        """Names of two regions of which either could be visible somewhere; the first is shown."""
        self._visible = visible
        self._starts = [v[0] for v in visible]
        out = self.unseen | {o.names for o in self.overlaps if self._matters(o)}
        for rank, ghost in self._ghosts:
            shown = self._behind(rank, ghost)
            if shown is not None:
                out.add((shown, ghost.region.name))
        if self._taken:
            out |= {(p.region.name, NOTHING) for _, _, rank, p in visible if rank in self._taken}
        return out

    def _between(self, start: int, end: int) -> Iterator[Visible]:
        """What is visible there, clipped; it ends early when too much was looked at."""
        i = max(bisect_right(self._starts, start) - 1, 0)
        for lo, hi, rank, piece in islice(self._visible, i, None):
            self._looks += 1
            if lo >= end or self._looks > _MAX_LOOKS:
                return
            if hi > start:
                yield max(lo, start), min(hi, end), rank, piece

    def _matters(self, overlap: Overlap) -> bool:
        """The one in front hides something of the one behind."""
        pieces = self._pieces
        for lo, hi, rank, _ in self._between(overlap.start, overlap.end):
            if rank in overlap.front:
                self._looks += len(overlap.behind)
                for behind in overlap.behind:
                    if pieces[behind].start < hi and pieces[behind].end > lo:
                        return True
        return self._looks > _MAX_LOOKS

    def _behind(self, rank: int, ghost: Clipped) -> str | None:
        """What is visible where the region would be; None when it would be hidden everywhere."""
        at = ghost.start
        for lo, hi, other, piece in self._between(ghost.start, ghost.end):
            if lo > at:
                return NOTHING
            if other >= rank:
                return piece.region.name
            at = hi
        return NOTHING if at < ghost.end else None
