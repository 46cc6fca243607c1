"""How the slots of a mirror differ from a map.  Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import itemgetter

from ..memslots import READONLY, Rules, Slot, SlotTable, slot_table
from ..records import MemoryShown, MirrorDifference
from ..topology import FlatView
from .backend import MEMORY

__all__ = ["map_differences"]


# start, end, block, owner, gpa less offset, read-only
_Piece = tuple[int, int, str | None, str | None, int | None, bool]


def map_differences(
    view: FlatView, slots: Iterable[Slot], rules: Rules | None = None
) -> tuple[MirrorDifference, ...]:
    """Where `slots` (of address space 0) do not show what `view` does, in address order.

    How the memory is cut into slots, their ids and dirty logging do not count.  Neighbours that
    differ in the same way are one.  Raises InputError when the slots overlap.  O(n log n).
    """
    wanted = _pieces(slot_table(view, rules or Rules()))
    found = _pieces(SlotTable(slots))
    edges = sorted({edge for p in (*wanted, *found) for edge in p[:2]})
    out: list[MirrorDifference] = []
    last: tuple[object, object] | None = None
    for start, end in pairwise(edges):
        a, b = _at(wanted, start), _at(found, start)
        what = (a and a[2:], b and b[2:])
        if what[0] == what[1]:
            last = None
            continue
        if last == what and out[-1].end == start:
            out[-1] = MirrorDifference(out[-1].start, end, out[-1].wanted, out[-1].found)
        else:
            out.append(MirrorDifference(start, end, _shown(a, start), _shown(b, start)))
        last = what
    return tuple(out)


def _pieces(table: SlotTable) -> list[_Piece]:
    out: list[_Piece] = []
    for slot in table.slots(MEMORY):
        delta = slot.gpa - slot.offset if slot.offset is not None else None
        for start, end in slot.mapped:
            readonly = bool(slot.flags & READONLY)
            out.append((start, end, slot.block, slot.owner, delta, readonly))
    out.sort(key=itemgetter(0))
    return out


def _at(pieces: Sequence[_Piece], addr: int) -> _Piece | None:
    i = bisect_right(pieces, addr, key=itemgetter(0)) - 1
    return pieces[i] if i >= 0 and addr < pieces[i][1] else None


def _shown(piece: _Piece | None, start: int) -> MemoryShown | None:
    if piece is None:
        return None
    _, _, block, owner, delta, readonly = piece
    return MemoryShown(block, owner, start - delta if delta is not None else None, readonly)
