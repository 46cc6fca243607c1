"""All that is guessed of a log that begins in a guest's life.  What is certain is in `beginning`.

QEMU's choice of ids shows much: it gives a new slot the lowest free one (`kvm_get_free_slot`,
accel/kvm/kvm-all.c).  Only starts of slots are certain; a guessed size never reaches what was there
at the same time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import pairwise

from msgspec.structs import replace

from ..errors import InputError
from ..memslots import LOG_DIRTY_PAGES, OpKind
from ..memslots.intervals import join
from ..memslots.slots import LAST_SLOT
from ..records import SlotOp
from .live_slots import LiveSlot
from .replaying import BackedOp

__all__ = ["counts_from_zero", "guess_ids", "guess_sizes", "log_switches"]

_DEFAULT_SIZE = 2 << 20  # of a slot that is deleted and never seen again: nothing tells


def _done(commits: list[list[BackedOp]]) -> Iterator[SlotOp]:
    return (op for commit in commits for op, _ in commit if op.ret == 0)


def counts_from_zero(commits: list[list[BackedOp]]) -> bool:
    """The log begins with the guest: ids are 0, 1, 2, … and the first slot is not logged."""
    free: dict[int, int] = {}
    for op in _done(commits):
        due = free.get(op.as_id, 0)
        if op.op is OpKind.DELETE or op.slot < due:
            break
        if op.slot > due or (not free and op.flags & LOG_DIRTY_PAGES):
            return False
        free[op.as_id] = due + 1
    return bool(free)


def log_switches(commits: list[list[BackedOp]], *, marked: bool) -> list[LiveSlot]:
    """Slots from before whose logging begins or ends, although that looks as if they were added.

    A migration goes through the slots upwards in address and changes the flags of each.  A commit's
    adds go upwards too, but with ids that go up as well, and among them those that it has freed;
    logged from the beginning they are only while a migration runs, but for a display's, which come
    alone.  `marked`: `commits` are certain.  After a delete of the same commit, ids that go up are
    adds then; a log may begin between the deletes, so that not every id that is free is known.
    """
    slots: list[LiveSlot] = []
    free: set[tuple[int, int]] = set()
    run: list[SlotOp] = []
    deleting = False

    def finish() -> None:
        upwards = all(a.slot < b.slot for a, b in pairwise(run))
        logged = all(op.flags & LOG_DIRTY_PAGES for op in run)
        ids = {(op.as_id, op.slot) for op in run}
        added = upwards if deleting else not logged and upwards
        if len(run) > 1 and not ids & free and not added:
            slots.extend(
                LiveSlot(op.as_id, op.slot, op.gpa, op.size, op.flags, op.hva, None, None, 0)
                for op in run
                if op.op is OpKind.ADD
            )
        free.difference_update(ids)
        run.clear()

    for commit in commits:
        if marked:
            finish()
            deleting = False
        for op in _done([commit]):
            key = (op.as_id, op.flags & LOG_DIRTY_PAGES)
            last = run[-1] if run else op
            same = key == (last.as_id, last.flags & LOG_DIRTY_PAGES)
            if op.op is OpKind.DELETE or not same or (run and op.gpa <= last.gpa):
                finish()
            if op.op is OpKind.DELETE:
                free.add((op.as_id, op.slot))
                deleting = marked
            else:
                run.append(op)
    finish()
    return slots


def guess_sizes(
    found: dict[tuple[int, int], LiveSlot],
    unsized: Mapping[tuple[int, int], tuple[int, int]],
    commits: list[list[BackedOp]],
) -> None:
    """Sizes for slots that only a delete shows, from what comes in their place.

    What is reachable mostly stays so: the slot reached as far as the same memory is set again, and
    as far as anything is set without a gap.  One that is set again at its place is shorter or
    longer now, and a later one there may be as it was.  One that is not may come back later, here
    or elsewhere (as a BAR does).
    """
    adds: dict[int | None, list[tuple[int, SlotOp]]] = {}
    for number, commit in enumerate(commits if unsized else ()):
        for op in _done([commit]):
            if op.op is OpKind.ADD:
                adds.setdefault(op.hva, []).append((number, op))
    starts = sorted(found)
    for key, (bound, number) in unsized.items():
        as_id, gpa = key
        i = bisect_right(starts, key)
        if i < len(starts) and starts[i][0] == as_id:
            bound = min(bound, starts[i][1])
        hva = found[key].hva or 0
        twins = [op for n, op in sorted(adds.get(hva, ()), key=lambda a: a[0] < number)]
        added = [op for op in _done([commits[number]]) if op.op is OpKind.ADD and op.as_id == as_id]
        again = [
            op
            for op in added
            if (op.hva or 0) - op.gpa == hva - gpa and gpa < op.gpa + op.size and op.gpa < bound
        ]
        ranges = join(sorted((op.gpa, op.gpa + op.size) for op in added))
        ends = [op.gpa + op.size for op in again] + [b for a, b in ranges if a <= gpa < b]
        here = [op.size for op in twins if op.gpa == gpa and gpa + op.size <= bound]
        size = max(ends, default=gpa) - gpa
        if not size:
            size = next(iter((*here, *(op.size for op in twins))), _DEFAULT_SIZE)
        elif gpa + size < bound and [op.gpa for op in again] == [gpa]:
            size = next((other for other in here if other != again[0].size), size)
        flags = next((op.flags for op in (*again, *twins)), 0)
        found[key] = replace(found[key], size=min(size, bound - gpa), flags=flags)


def guess_ids(slots: list[LiveSlot], named: set[int], taken: set[int]) -> list[LiveSlot]:
    """Ids for slots of a map that no operation named: those that must have been in use (`taken`),
    then those above all that an operation `named`.

    Raises InputError when there are more slots than ids.
    """
    above = max((*named, *taken), default=-1) + 1
    ids = dict.fromkeys((*sorted(taken), *range(above, LAST_SLOT + 1), *range(above)))
    free = (i for i in ids if i not in named)
    out = []
    for s in sorted(slots, key=lambda s: s.gpa):
        slot = s.slot if s.slot is not None else next(free, None)
        if slot is None:
            raise InputError(
                f"the map has more ranges of RAM than KVM has slots ({LAST_SLOT + 1})",
                remedy="give a file that `qmp-memlistener record` wrote, unchanged",
            )
        out.append(replace(s, slot=slot))
    return out
