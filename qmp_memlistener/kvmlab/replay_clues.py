"""How a log begins, by QEMU's choice of ids: it gives a new slot the lowest free one.

`kvm_get_free_slot` (accel/kvm/kvm-all.c).  What the operations then do is in `replay_history`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..memslots import LOG_DIRTY_PAGES
from .recorded_ops import RecordedOp

__all__ = ["counts_from_zero", "log_switches"]


def counts_from_zero(ops: Sequence[RecordedOp]) -> bool:
    """The log begins with the guest: ids are 0, 1, 2, … and the first slot is not logged."""
    free: dict[int, int] = {}
    for op in ops:
        if op.ret != 0:
            continue
        due = free.get(op.as_id, 0)
        if op.size == 0 or op.slot < due:
            break
        if op.slot > due or (not free and op.flags & LOG_DIRTY_PAGES):
            return False
        free[op.as_id] = due + 1
    return bool(free)


def log_switches(ops: Sequence[RecordedOp]) -> set[int]:
    """Lines where logging of all slots seems to begin or end, although they look like adds.

    A migration goes through the slots upwards in address and changes the flags of each, all on or
    all off; a DIMM that is plugged meanwhile comes without, and has its own change after.  A
    commit's adds go upwards too, but with ids that go up as well, and among them those that it has
    freed; logged from the beginning they are only while a migration runs, but for a display's,
    which come alone.
    """
    switches: set[int] = set()
    free: set[tuple[int, int]] = set()
    run: list[RecordedOp] = []

    def finish() -> None:
        upwards = all(a.slot < b.slot for a, b in pairwise(run))
        logged = all(op.flags & LOG_DIRTY_PAGES for op in run)
        live = not any((op.as_id, op.slot) in free for op in run)
        if len(run) > 1 and live and (logged or not upwards):
            switches.update(op.where for op in run)
        free.difference_update((op.as_id, op.slot) for op in run)
        run.clear()

    for op in ops:
        if op.ret != 0:
            continue
        last = run[-1] if run else op
        same = (last.mark, last.as_id, last.flags & LOG_DIRTY_PAGES) == (
            op.mark,
            op.as_id,
            op.flags & LOG_DIRTY_PAGES,
        )
        if not op.size or not same or (run and op.gpa <= last.gpa):
            finish()
        if op.size:
            run.append(op)
        else:
            free.add((op.as_id, op.slot))
    finish()
    return switches
