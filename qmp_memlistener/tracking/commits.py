"""Groups trace lines into the commits that printed them.

Every outermost `memory_region_transaction_commit` with something to do rebuilds the FlatViews: a
run of `flatview_new` lines, one per root (`flatviews_reset`, system/memory.c), then the slot
operations of that commit.  So a root that comes again, or any root after an operation, begins the
next commit.  The end of a commit is not marked.

Without these lines the operations alone tell commits apart: within one QEMU goes upwards in address
(`Upwards`).  Time says nothing about it: a commit may be preempted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..memslots import OpKind, Order
from ..records import Cause, SlotOp
from .live_slots import LiveSlot, LiveSlots

__all__ = ["Commit", "CommitGrouper", "Upwards"]


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
