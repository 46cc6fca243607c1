"""Arenas: the real slots under slots with holes.

KVM refuses slots that overlap, so where the `hole` plan has one slot in another's hole (ROM in
front of RAM) both share one real slot, an arena: it spans all that they ever span, and what is
behind each part of it is decided by host mappings.  Which slot shows where is arithmetic; mapping
is done in `real_slots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from ..memslots import READONLY, Op, OpKind, Plan, Slot, SlotTable
from ..memslots.intervals import Range, complement, subtract
from .memory import BlockName

__all__ = ["Arena", "Piece", "HoleStep", "arenas_of", "shown", "slots_by_arena", "steps_of"]


@dataclass(frozen=True, slots=True)
class Arena:
    """`[gpa, gpa + size)` of address space `as_id`: one real slot.

    `readonly`: all that it ever shows is.
    """

    as_id: int
    gpa: int
    size: int
    readonly: bool = False

    @property
    def end(self) -> int:
        return self.gpa + self.size

    def holds(self, slot: Slot) -> bool:
        return slot.as_id == self.as_id and self.gpa <= slot.gpa and slot.end <= self.end


def arenas_of(tables: Iterable[SlotTable]) -> tuple[Arena, ...]:
    """The arenas for all slots of these tables, by address space and address."""
    spans = sorted(
        {(s.as_id, s.gpa, s.end, bool(s.flags & READONLY)) for table in tables for s in table}
    )
    out: list[Arena] = []
    for as_id, start, end, readonly in spans:
        last = out[-1] if out else None
        if last is not None and last.as_id == as_id and start < last.end:
            size = max(last.end, end) - last.gpa
            out[-1] = Arena(as_id, last.gpa, size, last.readonly and readonly)
        else:
            out.append(Arena(as_id, start, end - start, readonly))
    return tuple(out)


@dataclass(frozen=True, slots=True)
class Piece:
    """`[start, end)` shows a block from `offset` on, or nothing when `block` is None."""

    start: int
    end: int
    block: BlockName | None = None
    offset: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class HoleStep:
    """What the guest is to see as one change: pieces that change, slots that are there after it.

    `ops` are the indices of the plan's operations in it.
    """

    pieces: tuple[Piece, ...]
    after: tuple[Slot, ...]
    ops: tuple[int, ...]


def steps_of(plan: Plan) -> list[HoleStep]:
    """The steps of a `hole` plan, in order.  A slot that comes has its holes from the start.

    Where one slot gives way to
    another in the same step there is one piece, so that nothing is missing in between.
    """
    now: dict[tuple[int, int], Slot] = {(s.as_id, s.slot): s for s in plan.before}
    out: list[HoleStep] = []
    for step in plan.steps:
        leaving: list[tuple[int, Range]] = []
        coming: list[tuple[Slot, Range]] = []
        indices = []
        new: set[tuple[int, int]] = set()
        for i in range(step.first, step.first + step.count):
            op = plan.ops[i]
            if op.slot < 0:
                continue
            indices.append(i)
            if op.op is OpKind.ADD:
                new.add((op.as_id, op.slot))
            if op.op is not OpKind.SET_HOLE or (op.as_id, op.slot) not in new:
                _apply(op, now, plan.after, leaving, coming)
        out.append(HoleStep(_pieces(leaving, coming), tuple(now.values()), tuple(indices)))
    return out


def _apply(
    op: Op,
    now: dict[tuple[int, int], Slot],
    after: SlotTable,
    leaving: list[tuple[int, Range]],
    coming: list[tuple[Slot, Range]],
) -> None:
    which = (op.as_id, op.slot)
    if op.op is OpKind.DELETE:
        leaving += [(op.as_id, r) for r in now.pop(which).mapped]
    elif op.op is OpKind.ADD:
        new = after.get(*which)
        assert new is not None, "what a plan adds, it leaves"
        now[which] = new
        coming += [(new, r) for r in new.mapped]
    elif op.op is OpKind.FLAGS:
        now[which] = replace(now[which], flags=op.flags)
    elif op.op is OpKind.SET_HOLE:
        now[which] = now[which].with_hole(op.gpa, op.end)
        leaving.append((op.as_id, (op.gpa, op.end)))
    elif op.op is OpKind.CLEAR_HOLE:
        now[which] = now[which].without_hole(op.gpa, op.end)
        coming.append((now[which], (op.gpa, op.end)))


def _pieces(
    leaving: Sequence[tuple[int, Range]], coming: Sequence[tuple[Slot, Range]]
) -> tuple[Piece, ...]:
    pieces = [piece_of(slot, r) for slot, r in coming]
    by_space: dict[int, list[Range]] = {}
    for slot, r in coming:
        by_space.setdefault(slot.as_id, []).append(r)
    for as_id, (start, end) in leaving:
        taken = sorted(by_space.get(as_id, []))
        pieces += [Piece(a, b) for a, b in subtract([(start, end)], taken)]
    return tuple(sorted(pieces, key=lambda p: p.start))


def piece_of(slot: Slot, r: Range) -> Piece:
    """The part `r` of a slot."""
    start, end = r
    offset = (slot.offset or 0) + start - slot.gpa
    return Piece(start, end, (slot.block, slot.owner), offset, slot.flags)


def shown(arena: Arena, slots: Iterable[Slot]) -> list[Piece]:
    """All of an arena: the pieces of the slots in it, and nothing in between."""
    pieces = [piece_of(s, r) for s in slots if arena.holds(s) for r in s.mapped]
    pieces.sort(key=lambda p: p.start)
    taken = [(p.start, p.end) for p in pieces]
    pieces += [Piece(a, b) for a, b in complement(arena.gpa, arena.end, taken)]
    return sorted(pieces, key=lambda p: p.start)


def slots_by_arena(arenas: Sequence[Arena], slots: Iterable[Slot]) -> Mapping[Arena, list[Slot]]:
    """The slots in each arena that has any."""
    out: dict[Arena, list[Slot]] = {}
    for slot in slots:
        for arena in arenas:
            if arena.holds(slot):
                out.setdefault(arena, []).append(slot)
                break
    return out
