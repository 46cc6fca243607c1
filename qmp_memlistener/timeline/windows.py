"""Stall windows out of slot operations: what the lines or the ioctls of one commit tell.  Pure.

Two kinds come from here.  `slot_update`, from trace lines only (probes that see the ioctl itself
deliver it directly), and `missing`: RAM that is there before and after a commit, and had no slot
for a while in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..probes import Observation, SlotUpdate, StallKind
from ..records import SlotOp

__all__ = ["TimedOp", "missing_window", "trace_windows"]


class TimedOp(msgspec.Struct, frozen=True, gc=False):
    """An `add` or `delete` of a slot of `size` bytes, and the bounds of when it took effect.

    It took effect at or after `from_ns` and at or before `to_ns`.  `hva` is the host address of its
    first byte.
    """

    op: str
    as_id: int
    gpa: int
    size: int
    hva: int
    from_ns: int
    to_ns: int

    @property
    def end(self) -> int:
        return self.gpa + self.size


def missing_window(ops: Sequence[TimedOp], probe: str) -> Observation | None:
    """The time in which RAM of address space 0 was missing that one commit took and gave back.

    From the first delete of such RAM to the last add of it: QEMU deletes everything first and then
    adds (address_space_update_topology_pass, memory.c), so the ranges are gone together.  None
    when nothing that was deleted came back.
    """
    first: TimedOp | None = None
    last: TimedOp | None = None
    low, high = 1 << 64, 0
    deleted: list[TimedOp] = []
    for op in ops:
        if op.as_id != 0:
            continue
        if op.op == "delete":
            deleted.append(op)
            continue
        if op.op != "add":
            continue
        for gone in deleted:
            same_memory = gone.hva - gone.gpa == op.hva - op.gpa
            if same_memory and gone.gpa < op.end and op.gpa < gone.end:
                if first is None or gone.from_ns < first.from_ns:
                    first = gone
                last = op
                low = min(low, max(gone.gpa, op.gpa))
                high = max(high, min(gone.end, op.end))
    if first is None or last is None or last.to_ns <= first.from_ns:
        return None
    return Observation(
        kind=StallKind.MISSING,
        start_ns=first.from_ns,
        end_ns=last.to_ns,
        at_least_ns=max(0, last.from_ns - first.to_ns),
        at_most_ns=last.to_ns - first.from_ns,
        probe=probe,
        site=f"{low:#x}-{high - 1:#x}",
    )


def trace_windows(begin_ns: int, ops: Sequence[SlotOp], bound_ns: int) -> list[Observation]:
    """What the trace lines of one commit tell, with the error of their time stamps.

    `begin_ns` is the time of the commit's first line.  A line's time is late by up to `bound_ns`
    (it is stamped on arrival, unless QEMU stamps its lines) or by its `late_ns`.  QEMU prints a
    slot operation's line when the ioctl is done (kvm_set_user_memory_region, accel/kvm/kvm-all.c),
    so the ioctl ran between the line before and its own; how long in there is not known.
    """
    found: list[Observation] = []
    timed: list[TimedOp] = []
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
                site=op_text(op),
                update=SlotUpdate(
                    as_id=op.as_id,
                    slot=op.slot,
                    flags=op.flags,
                    gpa=op.gpa,
                    size=0 if op.op == "delete" else op.size,
                    hva=op.hva or 0,
                    ret=op.ret,
                ),
            )
        )
        timed.append(TimedOp(op.op, op.as_id, op.gpa, op.size, op.hva or 0, from_ns, to_ns))
    missing = missing_window(timed, "trace")
    if missing is not None:
        found.append(missing)
    return found


def op_text(op: SlotOp) -> str:
    """A slot operation as the site of a stall: `delete 3 0x100000+0x1ff00000`."""
    space = f"as {op.as_id} " if op.as_id else ""
    return f"{op.op} {space}{op.slot} {op.gpa:#x}+{op.size:#x}"
