"""Groups trace lines into the commits that printed them.

Every outermost `memory_region_transaction_commit` with something to do rebuilds the FlatViews: a
run of `flatview_new` lines, one per root (`flatviews_reset`, system/memory.c), then the slot
operations of that commit.  So a root that comes again, or any root after an operation, begins the
next commit.  The end of a commit is not marked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ..recording import Cause
from .live_slots import LiveSlot, LiveSlots, RawOp

__all__ = ["Commit", "CommitGrouper", "SeenOp"]


class SeenOp(msgspec.Struct, frozen=True, gc=False):
    """A traced operation and what it did: `add`, `delete` or `flags`, to a slot of `size`."""

    raw: RawOp
    what: str
    size: int


@dataclass(slots=True)
class Commit:
    """One commit; `slots_after` are the slots it left, if it added or deleted any.

    `merged` counts it and those before it that changed no slot and are told with it.
    """

    t_ns: int
    merged: int = 1
    roots: set[int] = field(default_factory=set)
    ops: list[SeenOp] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    moves_bar: bool = False  # of memory; no slot need change for it
    slots_after: tuple[LiveSlot, ...] = ()

    @property
    def changes_slots(self) -> bool:
        """It added or deleted slots; changed flags alone leave the map as it was."""
        return any(op.what != "flags" for op in self.ops)


class CommitGrouper:
    """Feed it lines in order; `done` are the commits that are complete."""

    def __init__(self, live: LiveSlots) -> None:
        self.done: list[Commit] = []
        self._live = live
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

    def view_rebuilt(self, t_ns: int, root: int) -> None:
        """A `flatview_new` line."""
        now = self._open
        if now is None or now.ops or root in now.roots:
            now = self._begin(t_ns)
        now.roots.add(root)

    def slot_operation(self, op: RawOp) -> None:
        """A `kvm_set_user_memory` line.

        Where `flatview_new` lines are missing, a delete after an add begins the next commit.
        """
        now = self._open
        if now is None or (
            not now.roots and op.size == 0 and any(seen.what == "add" for seen in now.ops)
        ):
            now = self._begin(op.t_ns)
        what, size = self._live.apply(op)
        now.ops.append(SeenOp(op, what, size))

    def cause(self, cause: Cause, *, after: bool = False, moves_bar: bool = False) -> None:
        """A line that tells why: printed before the commit it concerns, or `after` it.

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
            if now.changes_slots:
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

    def _begin(self, t_ns: int) -> Commit:
        self.close()
        self._open = Commit(t_ns, causes=self._causes, moves_bar=self._moves_bar)
        self._causes, self._moves_bar = [], False
        return self._open
