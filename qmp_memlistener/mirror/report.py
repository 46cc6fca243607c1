"""What a mirror tells: its report, and how slots differ from a map.  Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import msgspec

from ..memslots import READONLY, Rules, Slot, SlotTable, slot_table
from ..topology import FlatView
from ..updates.model import Strategy
from .backend import MEMORY

__all__ = ["MapDifference", "MirrorReport", "Shown", "Times", "map_differences"]


@dataclass(frozen=True, slots=True)
class Shown:
    """Memory: RAM block, its owner, the offset of the first byte, whether stores are refused."""

    block: str | None
    owner: str | None
    offset: int | None
    readonly: bool

    def __str__(self) -> str:
        at = f"{self.block} @{self.offset:#x}" if self.offset is not None else "unknown memory"
        return f"{at} (read-only)" if self.readonly else at


@dataclass(frozen=True, slots=True)
class MapDifference:
    """In `[start, end)` the backend has `found`, the guest's map has `wanted`; None: no memory."""

    start: int
    end: int
    wanted: Shown | None
    found: Shown | None

    def __str__(self) -> str:
        found = "no memory" if self.found is None else str(self.found)
        wanted = "no memory" if self.wanted is None else str(self.wanted)
        return f"{self.start:#x}-{self.end - 1:#x} has {found} instead of {wanted}"


class Times(msgspec.Struct, frozen=True):
    """How often something was done, and how long it took in all and at most (ns): None for what
    was never done."""

    count: int = 0
    total_ns: int = 0
    longest_ns: int | None = None

    def plus(self, ns: int) -> Times:
        return Times(self.count + 1, self.total_ns + ns, max(self.longest_ns or 0, ns))


class MirrorReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a mirror has done so far, and whether it is in step.

    in_step           the backend shows the last map that was told; `why_not` says why it does not
    transitions       maps told, the one at the beginning included
    operations        calls that changed the backend
    slots_added, slots_deleted, flags_changed, holes_marked, holes_unmarked    the same by kind
    slots_touched     slots that a transition changed, summed over the transitions
    exposed           updates between whose operations memory was missing that is there before and
                      after: users of the backend could see that
    bitmaps_dropped   bytes of dirty bitmaps that went with slots and holes
    updates           from the first call to the last, pause included
    pauses            of the guest by the mirror, from STOP to RESUME
    already_paused    updates under `pause` of a guest that stood still anyhow
    unpaused          updates under `pause` in which the guest ran, wholly or in part
    lag               from QEMU's first operation for a transition to the end of the mirror's
    rebuilt           times the backend was emptied and filled again
    dropped           changes that were never told because the mirror was too slow
    checks            comparisons with a map; `differences` are those of the last one
    notes             the last hundred remarks
    """

    strategy: Strategy
    in_step: bool
    why_not: str | None
    transitions: int
    operations: int
    slots_added: int
    slots_deleted: int
    flags_changed: int
    holes_marked: int
    holes_unmarked: int
    slots_touched: int
    exposed: int
    bitmaps_dropped: int
    updates: Times
    pauses: Times
    already_paused: int
    unpaused: int
    lag: Times
    rebuilt: int
    dropped: int
    checks: int
    differences: tuple[MapDifference, ...]
    notes: tuple[str, ...]


# start, end, block, owner, gpa less offset, read-only
_Piece = tuple[int, int, str | None, str | None, int | None, bool]


def map_differences(
    view: FlatView, slots: Iterable[Slot], rules: Rules | None = None
) -> tuple[MapDifference, ...]:
    """Where `slots` (of address space 0) do not show what `view` does, in address order.

    How the memory is cut into slots, their ids and dirty logging do not count.  Neighbours that
    differ in the same way are one.  Raises InputError when the slots overlap.  O(n log n).
    """
    wanted = _pieces(slot_table(view, rules or Rules()))
    found = _pieces(SlotTable(slots))
    edges = sorted({edge for p in (*wanted, *found) for edge in p[:2]})
    out: list[MapDifference] = []
    last: tuple[object, object] | None = None
    for start, end in pairwise(edges):
        a, b = _at(wanted, start), _at(found, start)
        what = (a and a[2:], b and b[2:])
        if what[0] == what[1]:
            last = None
            continue
        if last == what and out[-1].end == start:
            out[-1] = MapDifference(out[-1].start, end, out[-1].wanted, out[-1].found)
        else:
            out.append(MapDifference(start, end, _shown(a, start), _shown(b, start)))
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


def _shown(piece: _Piece | None, start: int) -> Shown | None:
    if piece is None:
        return None
    _, _, block, owner, delta, readonly = piece
    return Shown(block, owner, start - delta if delta is not None else None, readonly)
