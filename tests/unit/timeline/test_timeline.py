"""The timeline: what belongs together, and what is left open."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.memslots import OpKind
from qmp_memlistener.probes import Observation, StallKind
from qmp_memlistener.records import (
    Record,
    SlotOp,
    StallCause,
    StallCauseType,
    StallRecord,
)
from qmp_memlistener.timeline import Timeline
from qmp_memlistener.timeline.evidence import STEP
from tests.support.records import transition
from tests.unit.timeline.timeline_support import (
    BOUND,
    MS,
    RAM,
    SIZE,
    ioctl,
    new,
    only,
    slot_op,
    stalls,
    toggle,
    window,
)


def test_gap_operations_and_commit_of_one_toggle_are_one_incident() -> None:
    timeline = new()
    toggle(timeline, 4, 10 * MS)
    records = timeline.finish()
    assert sorted(s.kind for s in stalls(records)) == [
        "commit",
        "missing",
        "slot_update",
        "slot_update",
        "vcpu_gap",
    ]
    assert len({s.incident for s in stalls(records)}) == 1
    assert all(s.cause is not None and s.cause.type == "transition" for s in stalls(records))
    assert all(s.cause is not None and s.cause.ref == 4 for s in stalls(records))
    gap = only(records, StallKind.VCPU_GAP)
    assert gap.witnesses == ["pulse", "trace", "uprobes"]
    assert gap.cause is not None
    assert gap.cause.explained_ns == MS
    assert gap.during == [4]


def test_a_commit_is_decided_together_with_what_lies_in_it() -> None:
    """Whichever moment of it the other probes have got to."""
    for reached in range(0, 1_100_000, 50_000):
        timeline = new()
        for probe in ("uprobes", "trace"):
            timeline.expect(probe, 0)
        toggle(timeline, 1, 10 * MS)
        timeline.advance("uprobes", 20 * MS)
        timeline.advance("trace", 10 * MS + reached)
        records = timeline.release(11 * MS)
        records += timeline.finish()
        assert [s.cause for s in stalls(records) if s.cause is None or s.cause.ref != 1] == []
        assert len({s.incident for s in stalls(records)}) == 1
        assert {"trace", "uprobes"} <= set(only(records, StallKind.COMMIT).witnesses)


@pytest.mark.parametrize("before", range(5))
def test_many_that_are_decided_in_turns_are_whole_as_well(before: int) -> None:
    timeline = new()
    pauses = [window(StallKind.VCPU_PAUSE, n * MS, (n + 1) * MS) for n in range(before)]
    timeline.observe(pauses)  # a turn ends at another of the windows of a toggle
    for i in range(STEP):
        toggle(timeline, i + 1, 10 * MS * (i + 1))
    turns = [timeline.finish() for _ in range(10)]
    assert sum(map(bool, turns)) > 2
    records: list[Record] = [
        record
        for turn in turns
        for record in turn
        if isinstance(record, StallRecord) and record.kind is not StallKind.VCPU_PAUSE
    ]
    assert {s.cause and s.cause.type for s in stalls(records)} == {"transition"}
    assert len({s.incident for s in stalls(records)}) == STEP


def test_a_line_that_may_be_late_makes_a_window_that_wide() -> None:
    timeline = new()
    timeline.record(transition(1, 50 * MS, 2))
    late = msgspec.structs.replace(slot_op(1, 50 * MS, "delete"), late_ns=20 * MS)
    timeline.record(late)
    timeline.record(slot_op(1, 51 * MS, "add", slot=4))
    first, second = stalls(timeline.finish(), StallKind.SLOT_UPDATE)
    assert (first.start_ns, first.end_ns, first.at_least_ns) == (30 * MS, 50 * MS, 0)
    assert (second.start_ns, second.end_ns) == (50 * MS - BOUND, 51 * MS)


def test_a_commit_without_operations_may_have_ended_as_long_before_as_its_line_is_late() -> None:
    for late_ns, cause in ((None, "unknown"), (20 * MS, "transition")):
        timeline = new()
        timeline.observe([window(StallKind.COMMIT, 40 * MS, 41 * MS)])
        timeline.record(msgspec.structs.replace(transition(1, 50 * MS, 0), late_ns=late_ns))
        commit = only(timeline.finish(), StallKind.COMMIT)
        assert commit.cause is not None
        assert commit.cause.type == cause


def test_missing_lasts_from_the_delete_to_the_end_of_the_add() -> None:
    timeline = new()
    toggle(timeline, 1, 10 * MS)
    missing = only(timeline.finish(), StallKind.MISSING)
    assert (missing.start_ns, missing.end_ns) == (10 * MS + 200_000, 10 * MS + 600_000)
    assert (missing.at_least_ns, missing.at_most_ns) == (100_000, 400_000)
    assert missing.site == f"{RAM:#x}-{RAM + SIZE - 1:#x}"


def test_without_trace_a_delete_is_as_large_as_the_slot_was_known_to_be() -> None:
    timeline = new()
    timeline.know_slot(0, RAM, SIZE)
    for at in (10 * MS, 20 * MS):
        timeline.observe(
            [
                window(StallKind.COMMIT, at, at + MS),
                ioctl(at + 200_000, at + 400_000, 0),
                ioctl(at + 500_000, at + 600_000, SIZE),
            ]
        )
    assert len(stalls(timeline.finish(), StallKind.MISSING)) == 2


def test_a_delete_that_is_not_followed_by_an_add_leaves_nothing_missing() -> None:
    timeline = new()
    timeline.know_slot(0, RAM, SIZE)
    timeline.observe([window(StallKind.COMMIT, 0, MS), ioctl(200_000, 400_000, 0)])
    assert not stalls(timeline.finish(), StallKind.MISSING)


def test_other_memory_at_the_same_place_is_not_what_was_missing() -> None:
    """A device's ROM gives way to RAM: the RAM was not there before."""
    timeline = new()
    timeline.know_slot(0, RAM, SIZE)
    other = SlotOp(
        t_ns=600_000, as_id=0, slot=4, op=OpKind.ADD, gpa=RAM, size=SIZE, flags=2, hva=0x99000
    )
    added = window(StallKind.SLOT_UPDATE, 500_000, 600_000, update=other)
    timeline.observe([window(StallKind.COMMIT, 0, MS), ioctl(200_000, 400_000, 0), added])
    assert not stalls(timeline.finish(), StallKind.MISSING)


def test_trace_lines_alone_give_brackets_that_hold_the_truth() -> None:
    """The ioctls of `toggle` ran at 200-400 and 500-600 us; lines come up to 0.2 ms late."""
    timeline = new()
    at = 10 * MS
    timeline.record(transition(1, at + 150_000, 2))
    timeline.record(slot_op(1, at + 480_000, "delete"))
    timeline.record(slot_op(1, at + 680_000, "add"))
    records = timeline.finish()
    first, second = stalls(records, StallKind.SLOT_UPDATE)
    assert first.probe == second.probe == "trace"
    assert first.start_ns <= at + 200_000
    assert at + 400_000 <= first.end_ns
    assert first.at_least_ns <= 200_000 <= first.at_most_ns
    assert second.at_least_ns <= 100_000 <= second.at_most_ns
    missing = only(records, StallKind.MISSING)
    assert missing.at_least_ns <= 100_000
    assert missing.at_most_ns >= 400_000
    assert missing.cause is not None
    assert (missing.cause.type, missing.cause.ref) == ("transition", 1)


def test_nothing_is_decided_before_every_probe_has_spoken() -> None:
    timeline = new()
    for probe in ("uprobes", "ping"):
        timeline.expect(probe, 0)
    timeline.observe([window(StallKind.COMMIT, 0, MS)])
    timeline.advance("uprobes", 10 * MS)
    assert not timeline.release(10 * MS)
    timeline.advance("ping", 10 * MS)
    assert stalls(timeline.release(10 * MS), StallKind.COMMIT)


def test_what_came_in_is_pending_until_it_is_handed_out() -> None:
    timeline = new()
    pending = [timeline.pending]
    timeline.observe([window(StallKind.COMMIT, 0, MS)])
    pending.append(timeline.pending)
    timeline.release(10 * MS)
    pending.append(timeline.pending)
    timeline.record(transition(1, 20 * MS))
    pending.append(timeline.pending)
    timeline.release(30 * MS)
    pending.append(timeline.pending)
    assert pending == [False, True, False, True, False]


def test_a_probe_that_is_stuck_or_gone_does_not_hold_up_the_others_for_ever() -> None:
    timeline = new()
    for probe in ("uprobes", "ping"):
        timeline.expect(probe, 0)
    timeline.observe(
        [window(StallKind.COMMIT, 0, MS), window(StallKind.COMMIT, 100 * MS, 101 * MS)]
    )
    timeline.advance("uprobes", 10_000 * MS)
    assert len(stalls(timeline.release(3_050 * MS))) == 1
    timeline.forget("ping")
    assert len(stalls(timeline.release(3_050 * MS))) == 1


def test_what_comes_late_joins_what_was_told_before() -> None:
    """A hold that lasts minutes is over long after the commit in it was reported."""
    timeline = new()
    timeline.expect("uprobes", 0)
    toggle(timeline, 3, 10 * MS)
    timeline.advance("uprobes", 20 * MS)
    told = stalls(timeline.release(20 * MS))
    timeline.observe([window(StallKind.BQL_HOLD, 9 * MS, 11 * MS)])
    timeline.advance("uprobes", 30 * MS)
    late = only(timeline.release(30 * MS), StallKind.BQL_HOLD)
    assert {late.incident} == {s.incident for s in told}


def test_after_a_loss_operations_are_not_paired_by_order() -> None:
    """One ioctl was not seen; the next toggle's must not be taken for it."""
    timeline = new()
    timeline.record(transition(1, 10 * MS, 2))
    timeline.record(slot_op(1, 10 * MS + 100_000, "delete"))
    timeline.record(slot_op(1, 10 * MS + 200_000, "add"))
    timeline.lost("uprobes")
    toggle(timeline, 2, 20 * MS)
    records = timeline.finish()
    assert only(records, StallKind.COMMIT).cause == StallCause(StallCauseType.TRANSITION, 2, MS)


@given(st.integers(1, 12), st.randoms(use_true_random=False), st.integers(0, 3))
def test_every_toggle_is_tied_whatever_the_order_of_arrival(
    count: int, rng: random.Random, batches: int
) -> None:
    """Ties depend on times and contents only, not on which probe was quicker."""
    whole = new()
    for seq in range(1, count + 1):
        toggle(whole, seq, seq * 10 * MS)
    expected = _shape(whole.finish())

    collected = new()
    seen: list[Observation] = []
    for seq in range(1, count + 1):
        at = seq * 10 * MS
        seen += [
            window(StallKind.COMMIT, at, at + MS),
            ioctl(at + 200_000, at + 400_000, 0),
            ioctl(at + 500_000, at + 600_000, SIZE),
            window(StallKind.VCPU_GAP, at - 50_000, at + MS + 40_000, "pulse", tid=None),
        ]
    rng.shuffle(seen)
    for i in range(batches + 1):
        collected.observe(seen[i :: batches + 1])
    for seq in range(1, count + 1):
        at = seq * 10 * MS
        collected.record(transition(seq, at + 250_000, 2))
        collected.record(slot_op(seq, at + 480_000, "delete"))
        collected.record(slot_op(seq, at + 680_000, "add"))
    assert _shape(collected.finish()) == expected
    assert len(expected) == 5 * count


def _shape(records: list[Record]) -> list[tuple[object, ...]]:
    return sorted(
        (s.start_ns, s.kind, s.cause.type if s.cause else "", s.cause.ref if s.cause else None)
        for s in stalls(records)
    )


def test_a_window_must_hold_what_is_claimed_of_it() -> None:
    with pytest.raises(ValueError, match="not a window"):
        window(StallKind.COMMIT, 10, 5)
    with pytest.raises(ValueError, match="not a window"):
        Observation(StallKind.COMMIT, 0, 10, 5, 11, "x")


SECOND = 1_000_000_000


def both_reached(t_ns: int) -> Timeline:
    timeline = Timeline(stamp_bound_ns=BOUND)
    for probe in ("trace", "uprobes"):
        timeline.expect(probe, 0)
        timeline.advance(probe, t_ns)
    return timeline


def test_operations_that_only_one_witness_saw_are_strays_once() -> None:
    timeline = both_reached(10 * SECOND)
    timeline.observe([ioctl(MS, 2 * MS, 0), ioctl(5 * MS, 6 * MS, SIZE, slot=4)])
    timeline.record(slot_op(None, 2 * MS, "delete"))  # a pair
    timeline.record(slot_op(None, 3 * MS, "delete"))  # forged
    timeline.record(slot_op(None, 4 * MS, "add", slot=9))  # forged
    ops, ioctls = timeline.strays()
    assert [(op.t_ns, op.slot) for op in ops] == [(3 * MS, 3), (4 * MS, 9)]
    assert [seen.update.slot for seen in ioctls if seen.update is not None] == [4]
    assert timeline.strays() == ([], [])


def test_a_forged_line_before_the_true_one_is_found() -> None:
    timeline = both_reached(10 * SECOND)
    timeline.record(slot_op(None, MS, "delete"))
    timeline.record(slot_op(None, 5 * MS, "delete"))
    timeline.strays()
    late = both_reached(10 * SECOND)
    late.record(slot_op(None, MS, "delete"))
    late.observe([ioctl(4 * MS, 5 * MS, 0)])
    late.record(slot_op(None, 5 * MS, "delete"))
    assert [op.t_ns for op in late.strays()[0]] == [MS]


def test_no_strays_before_both_have_delivered_or_after_a_loss() -> None:
    timeline = both_reached(SECOND)
    timeline.record(slot_op(None, SECOND // 2, "delete"))
    assert timeline.strays() == ([], [])  # its ioctl may be on its way
    timeline.lost("uprobes")
    timeline.record(slot_op(None, SECOND // 2 + MS, "add"))  # whose ioctl was lost
    for probe in ("trace", "uprobes"):
        timeline.advance(probe, 10 * SECOND)
    assert timeline.strays() == ([], [])


def test_without_uprobes_there_are_no_strays() -> None:
    timeline = Timeline(stamp_bound_ns=BOUND)
    timeline.expect("trace", 0)
    timeline.advance("trace", 10 * SECOND)
    timeline.record(slot_op(None, MS, "delete"))
    assert timeline.strays() == ([], [])
