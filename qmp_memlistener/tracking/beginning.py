"""The slots that were there before a file's first operation: what is known, and what is guessed.

Of a recording the first map tells them, all but the ids; of a log that begins in a guest's life
nothing does.  The operations tell the rest, as far as they can: the first one with an id that is a
delete or a change of flags is about a slot from before.  What they do not tell is in `guesses`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

from msgspec.structs import replace

from ..memslots import LOG_DIRTY_PAGES
from ..memslots.intervals import Range, put
from ..topology.model import ADDRESS_SPACE_SIZE
from .guesses import counts_from_zero, guess_ids, guess_sizes
from .live_slots import LiveSlot
from .replaying import PAGE, Traced

__all__ = ["Ids", "beginning"]

Ids = dict[int, frozenset[int]]


@dataclass(slots=True)
class _Space:
    there: dict[int, LiveSlot] = field(default_factory=dict)  # of the map, ids not told, by gpa
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
    whole = traced.kind == "log" and counts_from_zero(traced.commits)
    late = traced.kind == "log" and not whole
    spaces: dict[int, _Space] = {}
    found: dict[tuple[int, int], LiveSlot] = {}
    unsized: dict[tuple[int, int], tuple[int, int]] = {}  # bound, number of the commit
    for s in traced.slots:
        space = spaces.setdefault(s.as_id, _Space())
        found[s.as_id, s.gpa] = space.there[s.gpa] = s
        put(space.ever, s.gpa, s.end)
    for number, commit in enumerate(traced.commits):
        for op, shown in commit:
            space = spaces.setdefault(op.as_id, _Space())
            space.named.add(op.slot)
            if op.ret != 0:
                continue
            gone, key = op.op == "delete", (op.as_id, op.gpa)
            flags = 0 if gone else op.flags ^ LOG_DIRTY_PAGES  # QEMU makes no call when they stay
            first = op.slot not in space.used
            known = space.there.get(op.gpa) if first and op.op != "add" else None
            before = gone or op.op == "flags"
            before |= late and op.slot in space.taken
            new = True  # a slot, not a change of one
            if known is not None and (gone or known.size == op.size):
                del space.there[op.gpa]
                flags = known.flags if gone else flags
                found[key] = replace(known, slot=op.slot, hva=op.hva, flags=flags)
                new = False
            elif first and before and not space.has_been(op.gpa, op.gpa + (op.size or PAGE)):
                bound = space.next_above(op.gpa)
                size = min(op.size, bound - op.gpa)
                name = shown or (None, None, 0)
                found[key] = LiveSlot(op.as_id, op.slot, op.gpa, size, flags, op.hva, *name)
                if not size:
                    unsized[key] = bound, number
                new = False
            if new and op.op == "add":
                if not whole:
                    ids = range(space.top, op.slot)
                    space.taken.update(i for i in ids if i not in space.used)
                space.top = max(space.top, op.slot + 1)
            put(space.ever, op.gpa, op.gpa + (op.size or PAGE))
            space.used.add(op.slot)
            space.taken.discard(op.slot)
    guess_sizes(found, unsized, traced.commits)
    slots: list[LiveSlot] = []
    for as_id, space in spaces.items():
        here = [s for s in found.values() if s.as_id == as_id]
        slots += guess_ids(here, space.named, space.taken)
    given = {(s.as_id, s.slot) for s in slots}
    hidden = {a: frozenset(i for i in s.taken if (a, i) not in given) for a, s in spaces.items()}
    if count := sum(map(len, hidden.values())):
        traced.remarks.add(f"slots that were there all the time, at places not told: {count}")
    if slots:
        unsure = f" (sizes guessed: {len(unsized)})" if unsized else ""
        traced.remarks.add(
            f"slots that were there before the first operation: {len(slots)}{unsure}"
        )
    return slots, hidden
