"""What came of an update, in words: what is said, and that it fits a terminal."""

from __future__ import annotations

import msgspec
import pytest

from qmp_memlistener.memslots import OpKind
from qmp_memlistener.records import SlotOp, StallCause, StallCauseType, StallKind, StallRecord
from qmp_memlistener.reports.updates import outcome_lines
from qmp_memlistener.updates.model import GuestStates, Outcome, Phase, PhaseName, Result, Strategy

BEGUN = 5_000_000_000
MS = 1_000_000
RUNNING = GuestStates("running", "running")
REFUSED = Outcome(
    outcome=Result.REFUSED,
    reason="the guest has no free slot for memory (no slots); nothing was touched",
    remedy="start the guest with -m size,slots=N,maxmem=SIZE, or unplug a DIMM",
    strategy=Strategy.PAUSE,
    phases=[],
    stalls=[],
    slot_ops=[],
    guest_state=RUNNING,
)


def phase(name: PhaseName, start_ms: float, end_ms: float, *seqs: int, stalls: int = 0) -> Phase:
    return Phase(
        name,
        BEGUN + round(start_ms * MS),
        BEGUN + round(end_ms * MS),
        list(seqs),
        list(range(stalls)),
    )


def slot_op(slot: int, op: str = "add", *, predicted: bool = False) -> SlotOp:
    return SlotOp(
        t_ns=BEGUN, as_id=0, slot=slot, op=OpKind(op), gpa=0, size=4096, flags=0, ret=0,
        predicted=predicted, transition=1,
    )  # fmt: skip


def stall(kind: StallKind, took: int) -> StallRecord:
    return StallRecord(
        kind=kind, start_ns=BEGUN, end_ns=BEGUN + took, at_least_ns=took, at_most_ns=took,
        probe="trace", witnesses=["trace"], thread=None, site=None,
        cause=StallCause(StallCauseType.UNKNOWN, None), incident=1,
    )  # fmt: skip


DONE = msgspec.structs.replace(
    REFUSED,
    outcome=Result.DONE,
    reason=None,
    remedy=None,
    phases=[
        phase(PhaseName.PREPARED, 0, 2),
        phase(PhaseName.ACCEPTED, 2, 6.5, 1),
        phase(PhaseName.REALISED, 2, 6, 1, stalls=1),
        phase(PhaseName.GUEST_TOLD, 6.5, 60),
        phase(PhaseName.GUEST_ACTS, 60, 190, 2, 3, 4),
        phase(PhaseName.DRIVER_BOUND, 190, 230),
        phase(PhaseName.SETTLED, 230, 530),
    ],
    stalls=[stall(StallKind.VCPU_PAUSE, 4 * MS)],
    slot_ops=[slot_op(4), slot_op(5), slot_op(4, "delete")],
    transitions=7,
    notes=["qml-dimm0 is the new DIMM, qml-mem0 the memory behind it"],
)


def text(outcome: Outcome, *, width: int = 80) -> list[str]:
    return list(outcome_lines(outcome, "resize +256M", width=width))


def test_what_was_refused_has_reason_and_remedy_and_nothing_else() -> None:
    assert text(REFUSED) == [
        "refused: resize +256M (strategy pause)",
        "  the guest has no free slot for memory (no slots); nothing was touched",
        "  remedy: start the guest with -m size,slots=N,maxmem=SIZE, or unplug a DIMM",
        "  guest: running before, running after",
    ]


def test_what_was_done() -> None:
    assert text(DONE)[:13] == [
        "done: resize +256M (strategy pause)",
        "  note: qml-dimm0 is the new DIMM, qml-mem0 the memory behind it",
        "  guest: running before, running after",
        "",
        "      0 ns  backends made            2.00 ms",
        "   2.00 ms  command carried out      4.50 ms  1 transition",
        "   2.00 ms  map changed by QEMU      4.00 ms  1 transition, 1 stall",
        "   6.50 ms  until the guest reacted  53.5 ms",
        "   60.0 ms  the guest's part          130 ms  3 transitions",
        "    190 ms  driver bound             40.0 ms",
        "    230 ms  quiet since               300 ms",
        "  3 slot operations on 2 slots, 7 transitions",
        "",
    ]
    (row,) = [line for line in text(DONE) if line.startswith("vCPU pause")]
    assert "4.00 ms" in row


def test_without_stalls_there_is_no_table() -> None:
    assert text(msgspec.structs.replace(DONE, stalls=[]))[-1].startswith("  3 slot operations")


@pytest.mark.parametrize("width", [60, 80, 132])
def test_tables_fit(width: int) -> None:
    many = msgspec.structs.replace(
        DONE,
        phases=[phase(PhaseName.GUEST_ACTS, 0, 3_600_000, *range(10_000), stalls=10_000)],
        stalls=[
            stall(kind, 10**n)
            for kind in (StallKind.VCPU_PAUSE, StallKind.COMMIT)
            for n in range(12)
        ],
        slot_ops=[slot_op(n) for n in range(512)],
    )
    for outcome in (DONE, many):
        lines = text(outcome, width=width)
        tables = lines[lines.index("") :]
        assert max(map(len, tables)) <= max(width, 80)
        assert all(line == line.rstrip() for line in tables)


def test_predictions_are_called_so() -> None:
    predicted = msgspec.structs.replace(DONE, slot_ops=[slot_op(4, predicted=True)])
    assert "  1 slot operation (predicted) on 1 slot, 7 transitions" in text(predicted)


def test_the_same_slot_of_two_address_spaces_is_two() -> None:
    ops = [slot_op(4), msgspec.structs.replace(slot_op(4), as_id=1)]
    assert "  2 slot operations on 2 slots, 7 transitions" in text(
        msgspec.structs.replace(DONE, slot_ops=ops)
    )


def test_a_change_of_the_state_is_told() -> None:
    paused = msgspec.structs.replace(DONE, guest_state=GuestStates("running", "paused"))
    assert "  guest: running before, paused after" in text(paused)


def test_a_phase_of_another_version_keeps_its_name() -> None:
    other = msgspec.structs.replace(DONE, phases=[phase(PhaseName("later"), 0, 1)], stalls=[])
    assert text(other)[-2] == "      0 ns  later                    1.00 ms"


def test_nothing_to_do_has_phases_but_no_command() -> None:
    same = msgspec.structs.replace(
        DONE, phases=[], stalls=[], slot_ops=[], notes=["the guest has that much already"]
    )
    assert text(same) == [
        "done: resize +256M (strategy pause)",
        "  note: the guest has that much already",
        "  guest: running before, running after",
    ]
