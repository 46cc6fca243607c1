"""Groups trace lines into the commits that printed them, and makes records of commits.  Pure.

Every outermost `memory_region_transaction_commit` with something to do rebuilds the FlatViews: a
run of `flatview_new` lines, one per root (`flatviews_reset`, system/memory.c), then the slot
operations of that commit.  So a root that comes again, or any root after an operation, begins the
next commit.  The end of a commit is not marked.

Without these lines the operations alone tell commits apart: within one QEMU goes upwards in address
(`Upwards`).  Time says nothing about it: a commit may be preempted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from ..memslots import Op, OpKind, Order
from ..records import (
    Cause,
    CauseType,
    Detail,
    MapRecord,
    Section,
    SlotOp,
    TransitionRecord,
)
from ..topology import FlatView, Hole, MemoryMap, Transition
from .live_slots import UNKNOWN_BLOCK, LiveSlot, LiveSlots

__all__ = [
    "Change",
    "Commit",
    "CommitGrouper",
    "Upwards",
    "map_record",
    "predicted_records",
    "repeated_record",
    "traced_records",
    "transition_record",
]


@dataclass(slots=True)
class Commit:
    """One commit; `slots_after` are the slots it left, if it added or deleted any.

    `merged` counts it and those before it that changed no slot and are reported with it.
    """

    t_ns: int
    late_ns: int | None = None  # as of an operation
    merged: int = 1
    roots: set[int] = field(default_factory=set)
    ops: list[SlotOp] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    moves_bar: bool = False  # of memory; no slot need change for it
    slots_after: tuple[LiveSlot, ...] = ()

    @property
    def changes_slots(self) -> bool:
        """It added or deleted slots; changed flags alone leave the map as it was."""
        return any(op.op is not OpKind.FLAGS for op in self.ops)


class Upwards:
    """Where an operation stands in its commit, which grows from one to the next.

    Up to 7.2 QEMU takes one address space after the other: deletes, then adds and changes of flags
    as their ranges come.  From 8.0 (commit f39b7d2b96) changes of flags go out first, of all
    address spaces, then each one's deletes and adds (`address_space_update_topology_pass`,
    system/memory.c; `kvm_region_commit`, accel/kvm/kvm-all.c).  It changes a slot's flags or
    deletes it, not both.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._place: tuple[int, ...] = ()
        self._flagged: set[tuple[int, int]] = set()

    def begin(self) -> None:
        """The next operation is the first of a commit."""
        self._place = ()
        self._flagged.clear()

    def goes_on(self, op: SlotOp) -> bool:
        """Take the next operation; whether it may be of the same commit as those before.

        When it may not it is the first of the next one.
        """
        what, as_id, gpa = op.op, op.as_id, op.gpa
        if self._order is Order.V7_2:
            place: tuple[int, ...] = (as_id, what is not OpKind.DELETE, gpa)
        else:
            place = (what is not OpKind.FLAGS, as_id, what is OpKind.ADD, gpa)
        fits = place > self._place and (as_id, gpa) not in self._flagged
        if not fits:
            self._flagged.clear()
        self._place = place
        if what is OpKind.FLAGS:
            self._flagged.add((as_id, gpa))
        return fits


class CommitGrouper:
    """Feed it lines in order; `done` are the commits that are complete.

    `keep_slots`: each commit has the slots that it left, which costs as much as there are slots.
    """

    def __init__(
        self, live: LiveSlots, order: Order = Order.V8_0, *, keep_slots: bool = True
    ) -> None:
        self.done: list[Commit] = []
        self._live = live
        self._upwards = Upwards(order)
        self._keep_slots = keep_slots
        self._open: Commit | None = None
        self._causes: list[Cause] = []
        self._moves_bar = False

    @property
    def count(self) -> int:
        """Commits that were seen and not taken, the open one included."""
        return len(self.done) + (self._open is not None)

    @property
    def first(self) -> Commit | None:
        """The earliest commit that was seen and not taken."""
        return self.done[0] if self.done else self._open

    def view_rebuilt(self, t_ns: int, root: int, late_ns: int | None = None) -> None:
        """A `flatview_new` line."""
        now = self._open
        if now is None or now.ops or root in now.roots:
            now = self._begin(t_ns, late_ns)
        now.roots.add(root)

    def slot_operation(self, op: SlotOp) -> None:
        """A `kvm_set_user_memory` line.

        Where `flatview_new` lines are missing, one that goes back begins the next commit.
        """
        now = self._open
        op = self._live.complete(op)
        if now is None or not (now.roots or self._upwards.goes_on(op)):
            now = self._begin(op.t_ns, op.late_ns)
            self._upwards.goes_on(op)
        self._live.apply(op)
        now.ops.append(op)

    def cause(self, cause: Cause, *, after: bool = False, moves_bar: bool = False) -> None:
        """A line with the cause: printed before the commit it concerns, or `after` it.

        `moves_bar`: a memory BAR comes or goes, so the map changes even where no slot does.
        """
        if not after:
            self._causes.append(cause)
            self._moves_bar |= moves_bar
            return
        target = self._open or (self.done[-1] if self.done else None)
        if target is not None:
            target.causes.append(cause)

    def close(self) -> None:
        """No line came for a while, or one that belongs to the next commit: this one is whole."""
        now, self._open = self._open, None
        if now is not None:
            self._upwards.begin()
            if now.changes_slots and self._keep_slots:
                now.slots_after = tuple(self._live)
            self.done.append(now)

    def take_first(self, count: int) -> list[Commit]:
        """Hand out the earliest of those that are complete."""
        first, self.done = self.done[:count], self.done[count:]
        return first

    def take(self) -> list[Commit]:
        """Close, and hand out every commit seen since the last call."""
        self.close()
        done, self.done = self.done, []
        return done

    def _begin(self, t_ns: int, late_ns: int | None) -> Commit:
        self.close()
        self._open = Commit(t_ns, late_ns, causes=self._causes, moves_bar=self._moves_bar)
        self._causes, self._moves_bar = [], False
        return self._open


# -- what is reported of a commit --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What listeners get at once: a transition, slot operations, or both.

    `view` is the map after it.
    """

    view: FlatView
    transition: Transition | None
    slot_ops: tuple[SlotOp, ...] = ()


def transition_record(
    seq: int, transition: Transition, commit: Commit, detail: Detail, *, merged: int, slot_ops: int
) -> TransitionRecord:
    """The record of a transition that a commit made."""
    filled = [*transition.holes_filled]
    punched = [*transition.holes_punched]
    for change in (*transition.holes_moved, *transition.holes_resized):
        filled.append(change.before)
        punched.append(change.after)
    return TransitionRecord(
        seq=seq,
        t_ns=commit.t_ns,
        cause=_cause(transition, commit.causes, filled, punched),
        removed=Section.list_of(transition.removed),
        added=Section.list_of(transition.added),
        holes_punched=[_known(h) for h in sorted(punched, key=_start)],
        holes_filled=[_known(h) for h in sorted(filled, key=_start)],
        ram_appeared=list(transition.ram_appeared),
        ram_vanished=list(transition.ram_vanished),
        flips=list(transition.flips),
        mmio_moved=list(transition.mmio_moved),
        detail=detail,
        merged=merged,
        slot_ops=slot_ops,
        late_ns=commit.late_ns,
    )


def repeated_record(
    earlier: TransitionRecord, seq: int, commit: Commit, *, merged: int, slot_ops: int
) -> TransitionRecord:
    """The same transition as one before it, and nothing else is known of its cause."""
    return replace(
        earlier,
        seq=seq,
        t_ns=commit.t_ns,
        late_ns=commit.late_ns,
        merged=merged,
        slot_ops=slot_ops,
    )


def traced_records(commit: Commit, seq: int | None) -> list[SlotOp]:
    """The operations of a commit, with the transition that they are of."""
    return commit.ops if seq is None else [replace(op, transition=seq) for op in commit.ops]


def predicted_records(ops: Iterable[Op], t_ns: int, seq: int) -> list[SlotOp]:
    """Operations that were not seen, as QEMU's rules give them."""
    return [
        SlotOp(
            t_ns=t_ns,
            as_id=op.as_id,
            slot=op.slot,
            op=op.op,
            gpa=op.gpa,
            size=op.size,
            flags=op.flags,
            predicted=True,
            transition=seq,
        )
        for op in ops
    ]


def map_record(m: MemoryMap, t_ns: int) -> MapRecord:
    return MapRecord(
        t_ns=t_ns,
        address_space=m.view.address_space,
        ranges=Section.list_of(m.view),
        ram_blocks=list(m.ram_blocks),
    )


def _cause(
    transition: Transition, seen: Sequence[Cause], filled: Sequence[Hole], punched: Sequence[Hole]
) -> Cause:
    """What was seen to cause it; else the regions that came or went, which is all there is."""
    if len(seen) > 1:
        return Cause(CauseType.SEVERAL, causes=list(seen))
    if seen:
        return seen[0]
    regions: dict[tuple[str, str | None], None] = {
        (h.covered_by, h.owner): None for h in (*punched, *filled) if h.covered_by is not None
    }
    if not regions:
        before = {r.region for r in transition.before}
        after = {r.region for r in transition.after}
        changed = (*transition.removed, *transition.added)
        regions = {r.region: None for r in changed if (r.region in before) != (r.region in after)}
    if not regions:
        return Cause(CauseType.UNKNOWN)
    owners = {owner for _, owner in regions}
    owner = owners.pop() if len(owners) == 1 else None
    return Cause(
        CauseType.REGION, owner=owner, regions=list(dict.fromkeys(name for name, _ in regions))
    )


def _known(hole: Hole) -> Hole:
    """RAM of a block that is not known covers as something not known."""
    if hole.covered_by is not None and hole.covered_by.startswith(UNKNOWN_BLOCK):
        return replace(hole, covered_by=None)
    return hole


def _start(hole: Hole) -> int:
    return hole.start
