"""Operations that were issued in QEMU's stead, beside what its log and uprobes show: told once."""

from __future__ import annotations

import pytest

from qmp_memlistener.memslots import OpKind
from qmp_memlistener.probes import Observation, StallKind
from qmp_memlistener.records import (
    Cause,
    CauseType,
    CommandRecord,
    Detail,
    SlotOp,
    StallRecord,
    TransitionRecord,
)
from qmp_memlistener.timeline import Timeline

MS = 1_000_000
BASE = 0x100000


def operation(kind: OpKind, t_ns: int, gpa: int = BASE, size: int = 0x20000) -> SlotOp:
    return SlotOp(
        t_ns=t_ns, as_id=0, slot=3, op=kind, gpa=gpa, size=size, flags=0, hva=gpa + (1 << 40)
    )


def seen(op: SlotOp, start_ns: int, probe: str = "interposer", length: int = 1000) -> Observation:
    return Observation(
        *(StallKind.SLOT_UPDATE, start_ns, start_ns + length, length, length, probe),
        tid=7, site=str(op), update=op,
    )  # fmt: skip


def park(start_ns: int, length: int) -> Observation:
    return Observation(
        StallKind.VCPU_INHIBIT, start_ns, start_ns + length, length, length, "interposer"
    )


class Told:
    """A timeline with what came out of it."""

    def __init__(self, *probes: str) -> None:
        self.timeline = Timeline(stamp_bound_ns=MS)
        for probe in ("trace", "interposer", *probes):
            self.timeline.expect(probe, 0)

    def transition(self, seq: int, t_ns: int, *ops: SlotOp) -> None:
        self.timeline.record(
            TransitionRecord(
                seq=seq, t_ns=t_ns, cause=Cause(CauseType.UNKNOWN), removed=[], added=[],
                holes_punched=[], holes_filled=[], detail=Detail.FULL, slot_ops=len(ops),
            )
        )  # fmt: skip
        for op in ops:
            line = {f: getattr(op, f) for f in op.__struct_fields__ if f != "schema"}
            self.timeline.record(SlotOp(**{**line, "transition": seq}))

    def finish(self) -> list[StallRecord]:
        found = self.timeline.finish()
        assert not any(isinstance(r, CommandRecord) for r in found)
        return [r for r in found if isinstance(r, StallRecord)]


def asked(at: int) -> list[SlotOp]:
    """QEMU deletes a slot and adds its two halves; the lines come a little later."""
    return [
        operation(OpKind.DELETE, at + 10_000),
        operation(OpKind.ADD, at + 20_000, size=0x10000),
        operation(OpKind.ADD, at + 30_000, gpa=BASE + 0x10000, size=0x10000),
    ]


@pytest.mark.parametrize("uprobes", [False, True])
def test_what_waited_belongs_to_the_transition_that_asked_for_it(uprobes: bool) -> None:
    """As under `inhibit`: the log is over before KVM is given anything."""
    told = Told(*(["uprobes"] if uprobes else []))
    for seq, at in ((1, 10 * MS), (2, 20 * MS)):
        ops = asked(at)
        told.transition(seq, at, *ops)
        told.timeline.carried_out(
            [seen(op, op.t_ns - 2000) for op in ops],
            [park(at + 40_000, 30_000), *(seen(op, op.t_ns + 40_000, length=500) for op in ops)],
        )
        if uprobes:
            told.timeline.observe([seen(op, op.t_ns - 2500, "uprobes", 2000) for op in ops])
    stalls = told.finish()
    assert {s.probe for s in stalls} == {"interposer"}
    everybody = ["interposer", "trace", "uprobes"] if uprobes else ["interposer", "trace"]
    assert all(s.witnesses == everybody for s in stalls)
    kinds = [s.kind for s in stalls]
    assert kinds.count(StallKind.SLOT_UPDATE) == 6
    assert kinds.count(StallKind.VCPU_INHIBIT) == kinds.count(StallKind.MISSING) == 2
    for stall in stalls:
        assert stall.cause is not None
        assert stall.cause.ref == (1 if stall.start_ns < 20 * MS else 2)
        assert stall.during == [stall.cause.ref]
    assert len({s.incident for s in stalls}) == 2


def test_what_was_not_done_is_not_told() -> None:
    """As under `hole`: four were asked for, one was given, and nothing was missing."""
    told = Told()
    ops = asked(10 * MS)
    told.transition(1, 10 * MS, *ops)
    small = operation(OpKind.DELETE, 11 * MS, gpa=BASE + 0x8000, size=0x1000)
    told.timeline.carried_out([seen(op, op.t_ns - 2000) for op in ops], [seen(small, 10_050_000)])
    (stall,) = told.finish()
    assert (stall.site, stall.during) == ("delete 3 0x108000+0x1000", [1])


def test_missing_ram_is_from_the_delete_to_the_last_add() -> None:
    told = Told()
    told.timeline.know_slot(0, BASE, 0x20000)
    delete = operation(OpKind.DELETE, 0, size=0)  # a slot from before: KVM is told no size
    ops = [delete, *asked(0)[1:]]
    told.timeline.carried_out([], [seen(op, 1000 * n) for n, op in enumerate(ops, 1)])
    first, missing = told.finish()[:2]
    assert first.site == "delete 3 0x100000+0x20000"
    assert missing.kind is StallKind.MISSING
    assert (missing.start_ns, missing.end_ns) == (1000, 4000)
    assert (missing.at_least_ns, missing.at_most_ns) == (1000, 3000)
    assert missing.site == "0x100000-0x11ffff"


def test_what_the_ring_lost_is_told_from_the_log() -> None:
    told = Told()
    first, second = asked(10 * MS), asked(20 * MS)
    told.transition(1, 10 * MS, *first)
    told.timeline.lost("interposer")
    told.transition(2, 20 * MS, *second)
    told.timeline.carried_out(
        [seen(op, op.t_ns - 2000) for op in second], [seen(op, op.t_ns + 40_000) for op in second]
    )
    probes = {s.during[0]: s.probe for s in told.finish() if s.kind is StallKind.SLOT_UPDATE}
    assert probes == {1: "trace", 2: "interposer"}


def test_dirty_logging_is_no_transition() -> None:
    told = Told()
    flags = operation(OpKind.FLAGS, 10 * MS)
    told.timeline.record(flags)
    add = operation(OpKind.ADD, 10 * MS - 500)
    told.timeline.carried_out([seen(add, 10 * MS - 2000)], [seen(add, 10 * MS - 1900, length=500)])
    (stall,) = told.finish()
    assert stall.cause is not None
    assert stall.cause.type == "slot_op"
    assert stall.witnesses == ["interposer", "trace"]
