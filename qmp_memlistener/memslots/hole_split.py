"""`hole-split`: holes with the slots that every kernel has: a slot that was split stays split.

QEMU's slots and KVM's are two tables (`SlotTable.qemu`): KVM has each of QEMU's slots in one or
more pieces.  Of the slots that QEMU deletes and those that it adds in a transition, only the
difference goes to KVM:

- A piece that lies in an added slot, with the same memory at the same place, stays as it is.
- A piece that does so in part is cut: deleted, and what is left of it added.  It is split, once,
  while all vCPUs are paused; nothing is ever merged, so the next hole there is one delete and its
  fill one add.
- Any other piece of a deleted slot is deleted, while all vCPUs are paused when it is logged: its
  dirty log has to be fetched.  So it is when a piece's logging stops in such a transition.
- What of an added slot no piece has yet is added.
- A piece has QEMU's id of its slot while no other piece has that, else the highest free one:
  QEMU takes the lowest.

Where an address goes from one RAM block to another (ROM to shadow RAM) it is missing between the
delete and the add, unless vCPUs are paused for another reason.

steer/interposer.c does the same in mode `hole`; a test compares the two.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain

import msgspec

from .commit import PlanTask, StrategyOps
from .intervals import complement, intersect, join
from .ops import PARK, UNPARK, Op, OpKind
from .rules import with_id
from .slots import LOG_DIRTY_PAGES, Slot, SlotTable

__all__ = ["hole_split"]


def hole_split(change: PlanTask) -> StrategyOps:
    """The difference of the two maps, on pieces of QEMU's slots; see the module's text."""
    done = change.qemu
    dead = {(op.as_id, op.slot) for op in done.ops if op.op is OpKind.DELETE}
    fresh = [_after(done.after, op) for op in done.ops if op.op is OpKind.ADD]
    flags = {(o.as_id, o.slot): o.flags for o in done.ops if o.op is OpKind.FLAGS}
    work = _Pieces(change)
    added = _Added(fresh)
    parts: list[tuple[Slot, int]] = []
    of: list[list[Slot]] = [[] for _ in fresh]
    paused = False
    for piece in change.pieces:
        owner = change.table.at(piece.as_id, piece.gpa)
        assert owner is not None, "a piece is of a slot"
        which = (piece.as_id, owner.slot)
        if which not in dead:
            if which in flags:
                work.set_flags(piece, flags[which])
                stops = piece.logged and not flags[which] & LOG_DIRTY_PAGES
                paused = paused or (stops and bool(dead) and not change.rules.queued)
            continue
        found = [(i, _common(piece, fresh[i])) for i in added.that_continue(piece)]
        if len(found) == 1 and found[0][1].size == piece.size:
            ((i, same),) = found
            if same.flags != piece.flags:
                work.set_flags(piece, same.flags)
                paused = paused or (piece.logged and not same.logged)
            of[i].append(same)
            continue
        work.delete(piece)
        parts += [(part, i) for i, part in found]
        paused = paused or bool(found) or piece.logged
    for part, i in parts:
        work.add(part, fresh[i].slot)
        of[i].append(part)
    for i, new in enumerate(fresh):
        there = join(sorted((p.gpa, p.end) for p in of[i]))
        for start, end in complement(new.gpa, new.end, there):
            work.add(_part(new, start, end), new.slot)
    ops = (PARK, *work.ops, UNPARK) if paused else tuple(work.ops)
    return StrategyOps(ops, change.pieces, work.table(done.after), paused)


class _Pieces:
    """The pieces that KVM has, and the operations that make them."""

    def __init__(self, change: PlanTask) -> None:
        self.ops: list[Op] = []
        self._before = change.pieces
        self._slots = {(s.as_id, s.slot): s for s in change.pieces}
        self._top: dict[int, int] = {}
        self._ids = change.rules.slots

    def delete(self, piece: Slot) -> None:
        del self._slots[piece.as_id, piece.slot]
        self._top.pop(piece.as_id, None)
        self.ops.append(Op(OpKind.DELETE, piece.as_id, piece.slot, piece.gpa, piece.size))

    def add(self, piece: Slot, wanted: int) -> None:
        piece = with_id(piece, self._free(piece.as_id, wanted))
        self._slots[piece.as_id, piece.slot] = piece
        self._operate(OpKind.ADD, piece)

    def set_flags(self, piece: Slot, flags: int) -> None:
        piece = msgspec.structs.replace(piece, flags=flags)
        self._slots[piece.as_id, piece.slot] = piece
        self._operate(OpKind.FLAGS, piece)

    def table(self, qemu: SlotTable) -> SlotTable:
        return SlotTable(
            self._slots.values(),
            retired=self._before.retired,
            elsewhere=self._before.elsewhere,
            qemu=qemu,
        )

    def _free(self, as_id: int, wanted: int) -> int:
        elsewhere = self._before.elsewhere.get(as_id, frozenset())
        ids = chain((wanted,), range(self._top.get(as_id, self._ids - 1), -1, -1))
        found = next(i for i in ids if (as_id, i) not in self._slots and i not in elsewhere)
        if found != wanted:
            self._top[as_id] = found
        return found

    def _operate(self, kind: OpKind, s: Slot) -> None:
        self.ops.append(Op(kind, s.as_id, s.slot, s.gpa, s.size, s.flags))


def _after(table: SlotTable, op: Op) -> Slot:
    slot = table.get(op.as_id, op.slot)
    assert slot is not None, "what QEMU adds, it leaves"
    return slot


class _Added:
    """The slots that QEMU adds, by place."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._order = sorted(range(len(slots)), key=lambda i: (slots[i].as_id, slots[i].gpa))
        self._ends = [(slots[i].as_id, slots[i].end) for i in self._order]

    def that_continue(self, piece: Slot) -> Iterator[int]:
        """Which of them have some of it: the same memory at the same place, as the same kind."""
        if piece.key is None:
            return
        first = bisect_right(self._ends, (piece.as_id, piece.gpa))
        for place in range(first, len(self._order)):
            i = self._order[place]
            new = self._slots[i]
            if (new.as_id, new.gpa) >= (piece.as_id, piece.end):
                return
            if new.key == piece.key:
                yield i


def _common(piece: Slot, new: Slot) -> Slot:
    ((start, end),) = intersect([(piece.gpa, piece.end)], new.gpa, new.end)
    return msgspec.structs.replace(_part(piece, start, end), flags=new.flags)


def _part(slot: Slot, start: int, end: int) -> Slot:
    offset = slot.offset
    if offset is not None:
        offset += start - slot.gpa
    return msgspec.structs.replace(slot, gpa=start, size=end - start, offset=offset)
