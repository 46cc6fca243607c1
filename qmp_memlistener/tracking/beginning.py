"""The slots that were there before a file's first operation: what is known, and what is guessed.

Of a recording the first map tells them, all but the ids; of a log that begins in a guest's life
nothing does.  The operations tell the rest, as far as they can: the first one with an id that is a
delete or a change of flags is about a slot from before.  What they do not tell is in `guesses`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

from msgspec.structs import replace

from ..memslots import LOG_DIRTY_PAGES, OpKind
from ..memslots.intervals import Range, put
from ..memslots.slots import Backing
from ..records import SlotOp
from ..topology.model import ADDRESS_SPACE_SIZE
from .guesses import counts_from_zero, guess_ids, guess_sizes
from .live_slots import LiveSlot
from .replaying import PAGE, FileKind, Traced

__all__ = ["Ids", "beginning"]

Ids = dict[int, frozenset[int]]


@dataclass(slots=True)
class _Space:
    there: dict[int, LiveSlot] = field(default_factory=dict)  # of the map, ids unknown, by gpa
    ever: list[Range] = field(default_factory=list)  # where a slot has been
    used: set[int] = field(default_factory=set)
    named: set[int] = field(default_factory=set)  # used, or asked for in vain
    taken: set[int] = field(default_factory=set)  # below one that QEMU gave out: the lowest free
    top: int = 0

    def has_been(self, start: int, end: int) -> bool:
        i = bisect_left(self.ever, (end, 0)) - 1
        return i >= 0 and self.ever[i][1] > start

    def next_above(self, gpa: int) -> int:
        i = bisect_right(self.ever, (gpa, ADDRESS_SPACE_SIZE))
        return self.ever[i][0] if i < len(self.ever) else ADDRESS_SPACE_SIZE


def beginning(traced: Traced) -> tuple[list[LiveSlot], Ids]:
    """The slots, all with ids and sizes, and the ids in use by slots of unknown place.

    Raises InputError when there are more slots than ids.
    """
    found = _Beginning(traced)
    for number, commit in enumerate(traced.commits):
        for op, shown in commit:
            found.take(op, shown, number)
    guess_sizes(found.slots, found.unsized, traced.commits)
    slots: list[LiveSlot] = []
    for as_id, space in found.spaces.items():
        here = [s for s in found.slots.values() if s.as_id == as_id]
        slots += guess_ids(here, space.named, space.taken)
    given = {(s.as_id, s.slot) for s in slots}
    hidden = {
        as_id: frozenset(i for i in space.taken if (as_id, i) not in given)
        for as_id, space in found.spaces.items()
    }
    if count := sum(map(len, hidden.values())):
        traced.remarks.add(f"slots that were there from the start, at unknown places: {count}")
    if slots:
        unsure = f" (sizes guessed: {len(found.unsized)})" if found.unsized else ""
        traced.remarks.add(
            f"slots that were there before the first operation: {len(slots)}{unsure}"
        )
    return slots, hidden


class _Beginning:
    """Takes the operations in order; what was there before them.

    `slots` are by address space and gpa.  `unsized` are those of which only a delete tells: where
    the next slot begins, and the number of the commit.
    """

    def __init__(self, traced: Traced) -> None:
        self.spaces: dict[int, _Space] = {}
        self.slots: dict[tuple[int, int], LiveSlot] = {}
        self.unsized: dict[tuple[int, int], tuple[int, int]] = {}
        self._whole = traced.kind is FileKind.LOG and counts_from_zero(traced.commits)
        self._late = traced.kind is FileKind.LOG and not self._whole
        for s in traced.slots:
            space = self._space(s.as_id)
            self.slots[s.as_id, s.gpa] = space.there[s.gpa] = s
            put(space.ever, s.gpa, s.end)

    def _space(self, as_id: int) -> _Space:
        return self.spaces.setdefault(as_id, _Space())

    def take(self, op: SlotOp, shown: Backing | None, number: int) -> None:
        """The next operation, of commit `number`."""
        space = self._space(op.as_id)
        space.named.add(op.slot)
        if op.ret != 0:
            return
        before = op.slot not in space.used and (
            self._is_of_map(op, space) or self._was_there(op, shown, space, number)
        )
        if op.op is OpKind.ADD and not before:
            if not self._whole:
                ids = range(space.top, op.slot)
                space.taken.update(i for i in ids if i not in space.used)
            space.top = max(space.top, op.slot + 1)
        put(space.ever, op.gpa, op.gpa + (op.size or PAGE))
        space.used.add(op.slot)
        space.taken.discard(op.slot)

    def _is_of_map(self, op: SlotOp, space: _Space) -> bool:
        """It shows the id of a slot of the first map."""
        known = space.there.get(op.gpa) if op.op is not OpKind.ADD else None
        if known is None or not (op.op is OpKind.DELETE or known.size == op.size):
            return False
        del space.there[op.gpa]
        flags = known.flags if op.op is OpKind.DELETE else _flags_before(op)
        self.slots[op.as_id, op.gpa] = replace(known, slot=op.slot, hva=op.hva, flags=flags)
        return True

    def _was_there(self, op: SlotOp, shown: Backing | None, space: _Space, number: int) -> bool:
        """It is about a slot that nothing showed, if there can have been one."""
        taken = self._late and op.slot in space.taken
        if op.op is OpKind.ADD and not taken:
            return False
        if space.has_been(op.gpa, op.gpa + (op.size or PAGE)):
            return False
        bound, key = space.next_above(op.gpa), (op.as_id, op.gpa)
        flags = 0 if op.op is OpKind.DELETE else _flags_before(op)
        size = min(op.size, bound - op.gpa)
        backing = shown or (None, None, 0)
        self.slots[key] = LiveSlot(op.as_id, op.slot, op.gpa, size, flags, op.hva, *backing)
        if not size:
            self.unsized[key] = bound, number
        return True


def _flags_before(op: SlotOp) -> int:
    """QEMU makes no call when the flags stay, so they were others."""
    return op.flags ^ LOG_DIRTY_PAGES
