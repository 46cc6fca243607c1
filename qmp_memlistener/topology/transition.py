"""The difference of two FlatViews: the calls that QEMU's listeners get, and what it means.

`diff` follows `address_space_update_topology_pass` (system/memory.c): one pass that deletes, one
that adds, both in ascending address order; equal ranges are kept.  On top of it the transition
is put into words: holes punched, filled, moved, resized; RAM that appeared or vanished; ranges
that flipped between RAM and ROM; MMIO regions that moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from .memory_map import ram_blocks, shared_extents
from .model import FlatRange, FlatView, Hole, Kind, RamBlock

__all__ = ["Flip", "HoleChange", "Move", "RamChange", "Transition", "diff", "same_range"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HoleChange:
    """A hole that is still there but lies elsewhere (`moved`) or has another size."""

    before: Hole
    after: Hole


class Move(msgspec.Struct, frozen=True, gc=False):
    """An i/o region that is visible at another address than before."""

    name: str
    owner: str | None
    before: int
    after: int
    size: int


class Flip(msgspec.Struct, frozen=True, gc=False):
    """`[start, start + size)` shows the same memory but became writable or read-only."""

    start: int
    size: int
    name: str
    owner: str | None
    before: Kind
    after: Kind


class RamChange(msgspec.Struct, frozen=True, gc=False):
    """A mapping of a RAM block that came or went as a whole."""

    name: str
    owner: str | None
    start: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of an address space from `before` to `after`.

    `removed` and `added` are in the order of QEMU's del and add passes, `kept` as in `after`.
    A hole that changed place or size is in `holes_moved` or `holes_resized` only.
    """

    before: FlatView
    after: FlatView
    removed: tuple[FlatRange, ...]
    added: tuple[FlatRange, ...]
    kept: tuple[FlatRange, ...]
    holes_punched: tuple[Hole, ...] = ()
    holes_filled: tuple[Hole, ...] = ()
    holes_moved: tuple[HoleChange, ...] = ()
    holes_resized: tuple[HoleChange, ...] = ()
    ram_appeared: tuple[RamChange, ...] = ()
    ram_vanished: tuple[RamChange, ...] = ()
    flips: tuple[Flip, ...] = ()
    mmio_moved: tuple[Move, ...] = ()

    def __bool__(self) -> bool:
        """Something changed."""
        return bool(self.removed or self.added)


def same_range(a: FlatRange, b: FlatRange) -> bool:
    """QEMU's `flatrange_equal`: a slot or a dirty mask that differs does not count."""
    return (
        a.start == b.start
        and a.size == b.size
        and a.offset == b.offset
        and a.name == b.name
        and a.owner == b.owner
        and a.kind is b.kind
        and a.nonvolatile == b.nonvolatile
        and a.unmergeable == b.unmergeable
    )


def diff(
    before: FlatView,
    after: FlatView,
    blocks_before: Sequence[RamBlock] | None = None,
    blocks_after: Sequence[RamBlock] | None = None,
) -> Transition:
    """The transition from `before` to `after`; empty when they are equal.

    Give the RAM blocks of the region trees where there are some.  Without them a mapping reaches
    as far as either view shows it, so that RAM which ends earlier than before has a hole there.
    """
    removed: list[FlatRange] = []
    added: list[FlatRange] = []
    kept: list[FlatRange] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old = before[i] if i < len(before) else None
        new = after[j] if j < len(after) else None
        if old is not None and new is not None and same_range(old, new):
            kept.append(new)
            i += 1
            j += 1
        elif old is not None and (new is None or old.start <= new.start):
            # at one address the old range goes first, as in the pass that deletes
            removed.append(old)
            i += 1
        else:
            assert new is not None
            added.append(new)
            j += 1
    if not removed and not added:
        return Transition(before, after, (), (), tuple(kept))
    if blocks_before is None or blocks_after is None:
        extents = shared_extents(before, after)
        blocks_before = ram_blocks(before, extents)
        blocks_after = ram_blocks(after, extents)
    gone, come = _only_in_one(_ram(blocks_before), _ram(blocks_after))
    lost_names = {(c.name, c.owner, c.start - c.offset) for c in gone}
    new_names = {(c.name, c.owner, c.start - c.offset) for c in come}
    holes_old = _holes(blocks_before, lost_names)
    holes_new = _holes(blocks_after, new_names)
    filled, punched = _only_in_one(holes_old, holes_new)
    filled, punched, moved, resized = _pair_holes(filled, punched)
    return Transition(
        before,
        after,
        tuple(removed),
        tuple(added),
        tuple(kept),
        holes_punched=tuple(punched),
        holes_filled=tuple(filled),
        holes_moved=tuple(moved),
        holes_resized=tuple(resized),
        ram_appeared=tuple(come),
        ram_vanished=tuple(gone),
        flips=tuple(_flips(removed, added)),
        mmio_moved=tuple(_moves(removed, added)),
    )


def _ram(blocks: Iterable[RamBlock]) -> list[RamChange]:
    return [RamChange(b.name, b.owner, m.start, m.size, m.offset) for b in blocks for m in b.mapped]


def _holes(blocks: Iterable[RamBlock], without: set[tuple[str, str | None, int]]) -> list[Hole]:
    """Holes of mappings that are there before and after: the others come and go whole."""
    return [
        h for b in blocks for h in b.holes if (b.name, b.owner, h.start - h.offset) not in without
    ]


def _only_in_one(old: Sequence[_T], new: Sequence[_T]) -> tuple[list[_T], list[_T]]:
    olds, news = set(old), set(new)
    return [x for x in old if x not in news], [x for x in new if x not in olds]


def _pair_holes(
    filled: list[Hole], punched: list[Hole]
) -> tuple[list[Hole], list[Hole], list[HoleChange], list[HoleChange]]:
    """Take holes of one coverer out of both lists: a hole that moved or changed size.

    Several of one coverer are paired in address order.
    """
    waiting: dict[tuple[str, str, str | None], deque[Hole]] = {}
    for h in filled:
        if h.covered_by is not None:
            waiting.setdefault((h.block, h.covered_by, h.owner), deque()).append(h)
    moved: list[HoleChange] = []
    resized: list[HoleChange] = []
    paired: set[Hole] = set()
    still_punched: list[Hole] = []
    for new in punched:
        olds = waiting.get((new.block, new.covered_by or "", new.owner))
        if not olds:
            still_punched.append(new)
            continue
        old = olds.popleft()
        paired.add(old)
        (moved if old.size == new.size else resized).append(HoleChange(old, new))
    return [h for h in filled if h not in paired], still_punched, moved, resized


def _flips(removed: Sequence[FlatRange], added: Sequence[FlatRange]) -> list[Flip]:
    """Overlaps of a removed and an added range that show the same bytes with another kind."""
    out: list[Flip] = []
    j = 0
    for old in removed:
        while j < len(added) and added[j].end <= old.start:
            j += 1
        k = j
        while k < len(added) and added[k].start < old.end:
            new = added[k]
            k += 1
            if (
                new.region == old.region
                and new.kind is not old.kind
                and new.start - new.offset == old.start - old.offset
            ):
                lo, hi = max(old.start, new.start), min(old.end, new.end)
                out.append(Flip(lo, hi - lo, new.name, new.owner, old.kind, new.kind))
    return out


def _moves(removed: Sequence[FlatRange], added: Sequence[FlatRange]) -> list[Move]:
    old = {r.region: r for r in removed if r.kind is Kind.IO and r.offset == 0}
    out: list[Move] = []
    for new in added:
        if new.kind is not Kind.IO or new.offset != 0:
            continue
        was = old.get(new.region)
        if was is not None and was.start != new.start and was.size == new.size:
            out.append(Move(new.name, new.owner, was.start, new.start, new.size))
    return out
