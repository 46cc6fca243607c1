"""`hole`: slots follow RAM blocks, and a change of the map is holes that come, grow and go.

A slot stands for one RAM block at one place (gpa minus offset in the block) and spans the whole
extent at which the block is mapped there, before or after; what does not show is a hole in it.
Punching, growing, shrinking and clearing a hole is one op that touches nothing else: the slot
keeps its id and the dirty bits outside the hole.  RAM that ends earlier or later than before
(virtio-mem, TSEG) is a hole at the end of the slot.

Decisions, where the idea leaves room:

- A slot lies in another one's hole (ROM in front of RAM): extents may overlap, what is mapped
  may not.
- An address that changes from one slot to another (PAM: ROM to shadow RAM of another block) is
  a hole that opens and one that closes; done one after the other, nothing would be there in
  between.  Such pairs go into one batch, the rest does not.
- RAM that turns read-only through an alias (PAM without write enable) is no change: KVM maps
  it writable all the same, as QEMU has it do today.  A region that itself turns read-only or
  back gets a new slot under the same id, in the batch: READONLY cannot change on a live slot.
- A slot goes when nothing of it is mapped any more, and comes when something is.  Its last
  form is remembered (`SlotTable.retired`): it comes back with its old id and extent while the
  id is free.
- A new slot gets the lowest id that no slot had before the transition.
- More than `max_holes` holes in a slot: it falls back to one plain slot for each mapped range,
  as QEMU has them, and its changes go into the batch, until the holes fit again.
- RAM beyond the extent of a slot (possible only when the table comes from an earlier plan):
  the slot is recreated, longer, under the same id, in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from .commit import PlanTask, StrategyOps
from .hole_blocks import Block, blocks_of, follow_blocks, give_ids, retire, target
from .intervals import Range, cut, cutting, put, subtract
from .ops import BATCH_BEGIN, BATCH_COMMIT, Op, OpKind
from .rules import Sections
from .slots import LOG_DIRTY_PAGES, Slot, SlotTable

__all__ = ["DEFAULT_MAX_HOLES", "follow_blocks", "hole"]

DEFAULT_MAX_HOLES = 64
"""Room for all that firmware and chipset do to main RAM (VGA, PAM segments, TSEG, PCIEXBAR) and
the Hyper-V overlay pages of two dozen vCPUs, in 1 KiB a slot."""


def hole(change: PlanTask, max_holes: int | None = DEFAULT_MAX_HOLES) -> StrategyOps:
    """Holes for the transition; see the module's text for what is decided how.

    A table in which no slot follows its block yet is first taken as if they always had
    (`follow_blocks`).  `max_holes` None means no limit.
    """
    table = change.table
    if not any(s.follows_block for s in table):
        table = follow_blocks(table, (change.before, change.after), change.rules, max_holes)
    views = (*change.before.values(), *change.after.values())
    sections = Sections(change.rules, views, table, change.log)
    work = _Work()
    slots: list[Slot] = []
    blocks: list[Block] = []
    as_ids = sorted({*change.before, *change.after})
    for as_id in {*table.as_ids()} - {*as_ids}:
        slots += table.slots(as_id)
    for as_id in as_ids:
        found, unknown = blocks_of(as_id, table, change.after.get(as_id), sections)
        here = list(found.values())
        _carry_out(as_id, here, table, max_holes, work)
        blocks += here
        slots += unknown
        slots += [s for b in here for s in (*b.kept, *b.added)]
    return StrategyOps(
        work.ops(),
        table,
        SlotTable(slots, retired=retire(table, blocks), elsewhere=table.elsewhere),
        bool(work.removals or work.additions),
        notes=tuple(work.notes),
    )


@dataclass(slots=True)
class _Work:
    """The ops, in the order in which they are safe.

    Ops outside the batch touch addresses that are not RAM before, or not RAM after, and that no
    other op touches.  Deletes go first so that their ids are free, holes close before others
    open so that a slot never has more than it needs.
    """

    flags: list[Op] = field(default_factory=list)
    deletes: list[Op] = field(default_factory=list)
    removals: list[Op] = field(default_factory=list)  # in the batch
    additions: list[Op] = field(default_factory=list)  # in the batch, after the removals
    clears: list[Op] = field(default_factory=list)
    sets: list[Op] = field(default_factory=list)
    adds: list[Op] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ops(self) -> tuple[Op, ...]:
        batch = [*self.removals, *self.additions]
        if batch:
            batch = [BATCH_BEGIN, *batch, BATCH_COMMIT]
        return (*self.flags, *self.deletes, *batch, *self.clears, *self.sets, *self.adds)


def _carry_out(
    as_id: int, blocks: list[Block], table: SlotTable, max_holes: int | None, work: _Work
) -> None:
    """The ops of one address space; leaves in each block the slots it has afterwards."""
    shrink = [(r, b) for b in blocks for r in subtract(b.was, b.now)]
    grow = [(r, b) for b in blocks for r in subtract(b.now, b.was)]
    shrink.sort(key=_start)
    grow.sort(key=_start)
    leaving, coming = cutting([r for r, _ in shrink], [r for r, _ in grow])
    swapped = {shrink[i][0] for i in leaving} | {grow[i][0] for i in coming}
    crossing = {b.key for i, (_, b) in enumerate(shrink) if i in leaving}
    crossing |= {b.key for i, (_, b) in enumerate(grow) if i in coming}
    for block in blocks:
        wanted = target(as_id, block, table, max_holes)
        whole = block.whole
        if whole is not None and len(wanted) == 1 and _same_place(whole, wanted[0]):
            _move_holes(block, whole, wanted[0], swapped, max_holes, work)
            continue
        places = {(s.gpa, s.size, s.follows_block) for s in wanted}
        block.kept = [s for s in block.slots if (s.gpa, s.size, s.follows_block) in places]
        there = {(s.gpa, s.size, s.follows_block) for s in block.kept}
        block.removed = [s for s in block.slots if (s.gpa, s.size, s.follows_block) not in there]
        block.added = [s for s in wanted if (s.gpa, s.size, s.follows_block) not in there]
        block.kept = [_set_log(s, block.logged, work) for s in block.kept]
    give_ids(as_id, blocks, table)
    for block in blocks:
        _replace(block, block.key in crossing, work, max_holes)
    if swapped:
        first = shrink[min(leaving)]
        more = f" and {len(leaving) - 1} more" if len(leaving) > 1 else ""
        work.notes.append(
            f"at {first[0][0]:#x}{more}, {first[1].key[0]} gives way to another RAM block: "
            "both change in one batch"
        )


def _move_holes(
    block: Block,
    whole: Slot,
    wanted: Slot,
    swapped: set[Range],
    max_holes: int | None,
    work: _Work,
) -> None:
    """Set and clear what differs in the holes of a slot that stays."""
    whole = _set_log(whole, block.logged, work)
    block.kept = [msgspec.structs.replace(whole, holes=wanted.holes)]
    sets = subtract(block.was, block.now)
    clears = subtract(block.now, block.was)
    if not sets and not clears:
        return
    together = _overflows(whole.holes, clears, sets, swapped, max_holes)
    if together:
        work.notes.append(
            f"{_name(whole)}: more than {max_holes} holes on the way, so they change in one batch"
        )
    which = (whole.as_id, whole.slot)
    for kind, ranges, alone, batched in (
        (OpKind.SET_HOLE, sets, work.sets, work.removals),
        (OpKind.CLEAR_HOLE, clears, work.clears, work.additions),
    ):
        for start, end in ranges:
            out = batched if together or (start, end) in swapped else alone
            out.append(Op(kind, *which, start, end - start, whole.flags))


def _overflows(
    holes: Sequence[Range],
    clears: Sequence[Range],
    sets: Sequence[Range],
    swapped: set[Range],
    max_holes: int | None,
) -> bool:
    """Whether the slot has too many holes at some time when they change one by one."""
    if max_holes is None or len(holes) + len(clears) + len(sets) <= max_holes:
        return False
    now = list(holes)
    for start, end in sets:
        if (start, end) in swapped:
            put(now, start, end)
    for start, end in clears:
        if (start, end) in swapped:
            cut(now, start, end)
    most = len(now)
    for start, end in clears:
        cut(now, start, end)
        most = max(most, len(now))
    for start, end in sets:
        put(now, start, end)
        most = max(most, len(now))
    return most > max_holes


def _replace(block: Block, crossing: bool, work: _Work, max_holes: int | None) -> None:
    """Delete and add whole slots: alone when nothing is there before or after, else batched."""
    if not block.removed and not block.added:
        return
    both = bool(block.removed and block.added)
    batched = crossing or both or any(s.holes for s in block.added)
    deletes = work.removals if batched else work.deletes
    adds = work.additions if batched else work.adds
    for s in block.removed:
        deletes.append(Op(OpKind.DELETE, s.as_id, s.slot, s.gpa, s.size))
    for s in block.added:
        adds.append(Op(OpKind.ADD, s.as_id, s.slot, s.gpa, s.size, s.flags))
        for start, end in s.holes:
            adds.append(Op(OpKind.SET_HOLE, s.as_id, s.slot, start, end - start, s.flags))
    if block.added and not block.added[0].follows_block:
        work.notes.append(
            f"{_name(block.added[0])}: {len(block.now)} mapped ranges take more than {max_holes} "
            "holes, so each has a slot, and they change in one batch"
        )
    elif both:
        why = "is recreated, longer" if block.whole is not None else "is one slot again"
        work.notes.append(f"{_name(block.added[0])} {why}, in the batch")


def _set_log(slot: Slot, logged: bool, work: _Work) -> Slot:
    """The slot with its log on or off, and the op for it when that is news."""
    if slot.logged == logged:
        return slot
    flags = slot.flags ^ LOG_DIRTY_PAGES
    work.flags.append(Op(OpKind.FLAGS, slot.as_id, slot.slot, slot.gpa, slot.size, flags))
    return msgspec.structs.replace(slot, flags=flags)


def _same_place(a: Slot, b: Slot) -> bool:
    return a.gpa == b.gpa and a.size == b.size and a.follows_block == b.follows_block


def _name(slot: Slot) -> str:
    return f"slot {slot.slot} of address space {slot.as_id} ({slot.block})"


def _start(change: tuple[Range, Block]) -> int:
    return change[0][0]
