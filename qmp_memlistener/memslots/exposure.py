"""What the guest can notice of a plan: the states between its ops, ids, dirty bitmaps, kicks.

A *step* is what the guest sees as one change: a single op, a batch, or everything between park
and unpark.  The states inside a step cannot be observed; those between steps can.  So a plan of
one step exposes nothing, whatever the order inside, and `missing` counts steps, not ops.
Whether QEMU hides the states between its ioctls (>= 8.0) is a matter of the plan, not of this
module: the ranges are reported all the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec

from .intervals import Range, complement, cut, put
from .ops import Op, OpKind
from .slots import AS_SHIFT, LOG_DIRTY_PAGES, Slot, SlotTable, bitmap_bytes

__all__ = ["DirtyBytes", "Exposure", "Missing", "Step", "expose"]


class Missing(msgspec.Struct, frozen=True, gc=False):
    """`[start, start + size)` has memory before and after, and none after `steps` steps between."""

    as_id: int
    start: int
    size: int
    steps: int


class Step(msgspec.Struct, frozen=True, gc=False):
    """Ops `[first, first + count)`, which the guest sees as one change.

    `missing` is how many bytes that are there before and after the plan are missing once the
    step is done.
    """

    first: int
    count: int
    missing: int

    @property
    def atomic(self) -> bool:
        """It leaves nothing missing."""
        return self.missing == 0


class DirtyBytes(msgspec.Struct, frozen=True):
    """Bytes of KVM's dirty bitmaps.  Only slots with LOG_DIRTY_PAGES have one.

    kept          bitmaps of slots that live on, less the bits behind new holes
    dropped       bitmaps of slots that are deleted or no longer logged, and bits behind new holes
    reallocated   bitmaps of slots that are added
    allocated     bitmaps of live slots whose log starts
    handed_back   bitmaps of deleted slots that the ioctl returns instead of dropping them

    Bits behind holes are counted in whole bytes, rounded up for each slot.
    """

    kept: int = 0
    dropped: int = 0
    reallocated: int = 0
    allocated: int = 0
    handed_back: int = 0


class Exposure(msgspec.Struct, frozen=True):
    """What `expose` found.

    `missing` is in address order (then address space); neighbours that miss for as many steps
    are one.  `slot_ids_changed` are the ids (with the address space in the upper 16 bits, as the
    ioctl takes them) of slots that were deleted although RAM of theirs is in a slot that was
    added: it lives on under another id, or in a slot made anew under the same one.
    """

    missing: tuple[Missing, ...]
    steps: tuple[Step, ...]
    slot_ids_changed: tuple[int, ...]
    dirty: DirtyBytes


def expose(
    ops: Sequence[Op],
    before: SlotTable,
    after: SlotTable,
    page_size: int = 4096,
    *,
    hand_back: bool = False,
) -> Exposure:
    """Walk the states of a plan from the table `before` to the table `after`.

    `hand_back` says that a batch returns the dirty bitmaps of the slots it removes.
    O(n log n) in the number of ops.
    """
    groups = _steps(ops)
    missing: list[Missing] = []
    lost = [0] * (len(groups) + 1)
    if len(groups) > 1:
        touched = _touched(ops, groups, before)
        for as_id in sorted(touched):
            missing += _missing(as_id, touched[as_id], lost)
        missing.sort(key=lambda m: (m.start, m.as_id))
    steps = []
    now = 0
    for (first, count), change in zip(groups, lost, strict=False):
        now += change
        steps.append(Step(first, count, now))
    return Exposure(
        tuple(missing),
        tuple(steps),
        _ids_changed(ops, before, after),
        _dirty(ops, before, page_size, hand_back),
    )


_OPENS = {OpKind.PARK, OpKind.BATCH_BEGIN}
_CLOSES = {OpKind.UNPARK, OpKind.BATCH_COMMIT}


def _steps(ops: Sequence[Op]) -> list[tuple[int, int]]:
    """First op and number of ops of each step."""
    out: list[tuple[int, int]] = []
    depth = first = 0
    for i, op in enumerate(ops):
        if op.op in _OPENS:
            depth += 1
        elif op.op in _CLOSES:
            depth -= 1
        if depth == 0:
            out.append((first, i + 1 - first))
            first = i + 1
    return out


_Change = tuple[int, int, int, int]  # start, end, step, +1 mapped or -1 gone


def _touched(
    ops: Sequence[Op], groups: Sequence[tuple[int, int]], before: SlotTable
) -> dict[int, list[_Change]]:
    """Every range that an op maps or takes away, by address space."""
    out: dict[int, list[_Change]] = {}
    holes: dict[tuple[int, int], list[Range]] = {}  # of slots whose holes changed
    for step, (first, count) in enumerate(groups):
        for op in ops[first : first + count]:
            if op.slot < 0 or op.op is OpKind.FLAGS:
                continue
            changes = out.setdefault(op.as_id, [])
            which = (op.as_id, op.slot)
            if op.op is OpKind.ADD:
                holes[which] = []
                changes.append((op.gpa, op.end, step, 1))
            elif op.op is OpKind.DELETE:
                gone = holes.pop(which) if which in holes else _holes_of(before, which)
                for start, end in complement(op.gpa, op.end, gone) if gone else ((op.gpa, op.end),):
                    changes.append((start, end, step, -1))
            else:
                if which not in holes:
                    holes[which] = list(_holes_of(before, which))
                if op.op is OpKind.SET_HOLE:
                    put(holes[which], op.gpa, op.end)
                    changes.append((op.gpa, op.end, step, -1))
                else:
                    cut(holes[which], op.gpa, op.end)
                    changes.append((op.gpa, op.end, step, 1))
    return out


def _holes_of(table: SlotTable, which: tuple[int, int]) -> Sequence[Range]:
    slot = table.get(*which)
    return slot.holes if slot is not None else ()


def _missing(as_id: int, changes: list[_Change], lost: list[int]) -> list[Missing]:
    """Sweep the addresses; `lost` gets the change of missing bytes by step."""
    out: list[Missing] = []
    changes.sort()
    active: list[_Change] = []
    edges = sorted({c[0] for c in changes} | {c[1] for c in changes})
    next_change = 0
    for at, behind in pairwise(edges):
        if active:
            active = [c for c in active if c[1] > at]
        while next_change < len(changes) and changes[next_change][0] == at:
            active.append(changes[next_change])
            next_change += 1
        if len(active) < 2:
            continue
        steps = 0
        for since, until in _gaps(active):
            steps += until - since
            lost[since] += behind - at
            lost[until] -= behind - at
        if not steps:
            continue
        last = out[-1] if out else None
        if last is not None and last.start + last.size == at and last.steps == steps:
            out[-1] = Missing(as_id, last.start, behind - last.start, steps)
        else:
            out.append(Missing(as_id, at, behind - at, steps))
    return out


def _gaps(changes: Sequence[_Change]) -> Iterator[tuple[int, int]]:
    """The spans of steps `[since, until)` after which an address is missing.

    The changes are those that touch the address.  It is mapped or not, so it was mapped before
    if they would otherwise take it away without it being there.
    """
    net: dict[int, int] = {}
    for change in sorted(changes, key=_step):
        net[change[2]] = net.get(change[2], 0) + change[3]
    total = lowest = 0
    for delta in net.values():
        total += delta
        lowest = min(lowest, total)
    if lowest == 0 or total == lowest:
        return  # never gone, or gone for good
    here = -lowest
    since: int | None = None
    for step, delta in net.items():
        here += delta
        if here == 0 and since is None:
            since = step
        elif here and since is not None:
            yield since, step
            since = None


def _step(change: _Change) -> int:
    return change[2]


def _ids_changed(ops: Sequence[Op], before: SlotTable, after: SlotTable) -> tuple[int, ...]:
    deleted = [op for op in ops if op.op is OpKind.DELETE]
    if not deleted:
        return ()
    added: dict[object, list[Range]] = {}
    for op in ops:
        if op.op is OpKind.ADD:
            slot = after.get(op.as_id, op.slot)
            if slot is not None:
                backing, span = _backing(slot)
                added.setdefault(backing, []).append(span)
    reach: dict[object, tuple[list[int], list[int]]] = {}
    for backing, spans in added.items():
        spans.sort()
        ends: list[int] = []
        for _, end in spans:
            ends.append(max(end, ends[-1]) if ends else end)
        reach[backing] = ([start for start, _ in spans], ends)
    changed = set()
    for op in deleted:
        slot = before.get(op.as_id, op.slot)
        if slot is None:
            continue
        backing, (start, end) = _backing(slot)
        starts, ends = reach.get(backing, ([], []))
        i = bisect_left(starts, end) - 1
        if i >= 0 and ends[i] > start:
            changed.add(op.as_id << AS_SHIFT | op.slot)
    return tuple(sorted(changed))


def _backing(slot: Slot) -> tuple[object, Range]:
    """What a slot's RAM is, and the range of it: of the block, or of gpa when that is unknown."""
    if slot.block is None or slot.offset is None:
        return slot.as_id, (slot.gpa, slot.end)
    return (slot.as_id, slot.block, slot.owner), (slot.offset, slot.offset + slot.size)


def _dirty(ops: Sequence[Op], before: SlotTable, page_size: int, hand_back: bool) -> DirtyBytes:
    logged: Mapping[tuple[int, int], Slot] = {
        (s.as_id, s.slot): s for s in before if s.flags & LOG_DIRTY_PAGES
    }
    live = set(logged)
    punched: dict[tuple[int, int], int] = {}
    kept = dropped = reallocated = allocated = handed_back = 0
    in_batch = False
    for op in ops:
        which = (op.as_id, op.slot)
        if op.op is OpKind.BATCH_BEGIN or op.op is OpKind.BATCH_COMMIT:
            in_batch = op.op is OpKind.BATCH_BEGIN
        elif op.op is OpKind.DELETE and which in live:
            live.discard(which)
            if hand_back and in_batch:
                handed_back += bitmap_bytes(op.size, page_size)
            else:
                dropped += bitmap_bytes(op.size, page_size)
        elif op.op is OpKind.ADD and op.flags & LOG_DIRTY_PAGES:
            reallocated += bitmap_bytes(op.size, page_size)
        elif op.op is OpKind.FLAGS:
            if op.flags & LOG_DIRTY_PAGES and which not in live:
                allocated += bitmap_bytes(op.size, page_size)
            elif which in live and not op.flags & LOG_DIRTY_PAGES:
                live.discard(which)
                dropped += bitmap_bytes(op.size, page_size)
        elif op.op is OpKind.SET_HOLE and which in live:
            punched[which] = punched.get(which, 0) + op.size
    for which in live:
        total = bitmap_bytes(logged[which].size, page_size)
        gone = min(-(-punched.get(which, 0) // (page_size * 8)), total)
        kept += total - gone
        dropped += gone
    return DirtyBytes(kept, dropped, reallocated, allocated, handed_back)
