"""Windows, operations and commands as probes deliver them, and what a timeline made of them."""

from __future__ import annotations

from qmp_memlistener.memslots import OpKind
from qmp_memlistener.probes import Observation, StallKind
from qmp_memlistener.records import (
    CommandRecord,
    Record,
    SlotOp,
    StallCause,
    StallCauseType,
    StallRecord,
)
from qmp_memlistener.timeline import Timeline
from tests.support.records import transition

__all__ = [
    "BOUND",
    "MS",
    "RAM",
    "SIZE",
    "UNKNOWN",
    "command_record",
    "ioctl",
    "new",
    "only",
    "slot_op",
    "stalls",
    "toggle",
    "window",
]

MS = 1_000_000
BOUND = 200_000
UNKNOWN = StallCause(StallCauseType.UNKNOWN, None)
RAM = 0x100000
SIZE = 0x1FF00000


def window(
    kind: StallKind,
    start: int,
    end: int,
    probe: str = "uprobes",
    *,
    thread: str | None = "CPU 0",
    tid: int | None = 7,
    at_least: int | None = None,
    site: str | None = None,
    update: SlotOp | None = None,
) -> Observation:
    return Observation(
        kind=kind,
        start_ns=start,
        end_ns=end,
        at_least_ns=end - start if at_least is None else at_least,
        at_most_ns=end - start,
        probe=probe,
        thread=thread,
        tid=tid,
        site=site,
        update=update,
    )


def command_record(name: str, start: int, busy_until: int, end: int, probe: str) -> CommandRecord:
    return CommandRecord(
        name=name, start_ns=start, busy_until_ns=busy_until, end_ns=end, probe=probe
    )


def ioctl(start: int, end: int, size: int, *, slot: int = 3, tid: int = 7) -> Observation:
    kind = OpKind.ADD if size else OpKind.DELETE
    update = SlotOp(
        t_ns=end, as_id=0, slot=slot, op=OpKind(kind), gpa=RAM, size=size, flags=0, hva=0x7000
    )
    return window(StallKind.SLOT_UPDATE, start, end, tid=tid, update=update)


def slot_op(seq: int | None, t_ns: int, op: str, *, slot: int = 3) -> SlotOp:
    return SlotOp(
        t_ns=t_ns,
        as_id=0,
        slot=slot,
        op=OpKind(op),
        gpa=RAM,
        size=SIZE,
        flags=0,
        ret=0,
        predicted=False,
        transition=seq,
        hva=0x7000,
    )


def toggle(timeline: Timeline, seq: int, at: int) -> None:
    """A vCPU's write makes QEMU delete a slot and add it again: all that the probes tell of it."""
    timeline.observe(
        [
            window(StallKind.COMMIT, at, at + MS),
            ioctl(at + 200_000, at + 400_000, 0),
            ioctl(at + 500_000, at + 600_000, SIZE),
            window(StallKind.VCPU_GAP, at - 50_000, at + MS + 40_000, "pulse", tid=None),
        ]
    )
    timeline.record(transition(seq, at + 250_000, 2))
    timeline.record(slot_op(seq, at + 480_000, "delete"))
    timeline.record(slot_op(seq, at + 680_000, "add"))


def stalls(records: list[Record], kind: StallKind | None = None) -> list[StallRecord]:
    found = [r for r in records if isinstance(r, StallRecord)]
    return found if kind is None else [r for r in found if r.kind == kind]


def only(records: list[Record], kind: StallKind) -> StallRecord:
    (found,) = stalls(records, kind)
    return found


def new() -> Timeline:
    return Timeline(stamp_bound_ns=BOUND)
