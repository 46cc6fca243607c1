"""Stall windows out of slot operations: from the lines or the ioctls of one commit.  Pure.

Two kinds come from here.  `slot_update`, from trace lines only (probes that see the ioctl itself
deliver it directly), and `missing`: RAM that is there before and after a commit, and had no slot
for a while in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..memslots import OpKind
from ..probes import Observation
from ..records import SlotOp, StallKind

__all__ = ["Timed", "missing_window", "trace_windows"]

Timed = tuple[SlotOp, int, int]
"""An operation that took effect at or after the first time and at or before the second, in ns."""


def missing_window(ops: Iterable[Timed], probe: str) -> Observation | None:
    """The time in which RAM of address space 0 was missing that one commit took and gave back.

    From the first delete of such RAM to the last add of it: QEMU deletes everything first and then
    adds (address_space_update_topology_pass, memory.c), so the ranges are gone together.  None
    when nothing that was deleted came back.
    """
    first: Timed | None = None
    last: Timed | None = None
    low, high = 1 << 64, 0
    deleted: list[Timed] = []
    for timed in ops:
        op = timed[0]
        if op.as_id != 0:
            continue
        if op.op is OpKind.DELETE:
            deleted.append(timed)
            continue
        if op.op is not OpKind.ADD:
            continue
        for candidate in deleted:
            gone = candidate[0]
            same_memory = (gone.hva or 0) - gone.gpa == (op.hva or 0) - op.gpa
            if same_memory and gone.gpa < op.end and op.gpa < gone.end:
                if first is None or candidate[1] < first[1]:
                    first = candidate
                last = timed
                low = min(low, max(gone.gpa, op.gpa))
                high = max(high, min(gone.end, op.end))
    if first is None or last is None or last[2] <= first[1]:
        return None
    return Observation(
        kind=StallKind.MISSING,
        start_ns=first[1],
        end_ns=last[2],
        at_least_ns=max(0, last[1] - first[2]),
        at_most_ns=last[2] - first[1],
        probe=probe,
        site=f"{low:#x}-{high - 1:#x}",
    )


def trace_windows(begin_ns: int, ops: Sequence[SlotOp], bound_ns: int) -> list[Observation]:
    """What the trace lines of one commit show, with the error of their time stamps.

    `begin_ns` is the time of the commit's first line.  A line's time is late by up to `bound_ns`
    (it is stamped on arrival, unless QEMU stamps its lines) or by its `late_ns`.  QEMU prints a
    slot operation's line when the ioctl is done (kvm_set_user_memory_region, accel/kvm/kvm-all.c),
    so the ioctl ran between the line before and its own; how long in there is not known.
    """
    found: list[Observation] = []
    timed: list[Timed] = []
    before = begin_ns
    for op in ops:
        # lines come in order; a stamp that goes back would be the clock's fault
        late_ns = max(bound_ns, op.late_ns or 0)
        from_ns, to_ns = min(before, op.t_ns) - late_ns, op.t_ns
        before = max(before, op.t_ns)
        found.append(
            Observation(
                kind=StallKind.SLOT_UPDATE,
                start_ns=from_ns,
                end_ns=to_ns,
                at_least_ns=0,
                at_most_ns=to_ns - from_ns,
                probe="trace",
                site=str(op),
                update=op,
            )
        )
        timed.append((op, from_ns, to_ns))
    missing = missing_window(timed, "trace")
    if missing is not None:
        found.append(missing)
    return found
