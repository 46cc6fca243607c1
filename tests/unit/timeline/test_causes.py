"""What made a stall, and when nothing is known to have."""

from __future__ import annotations

import pytest

from qmp_memlistener.probes import HostWait, StallKind
from qmp_memlistener.records import (
    CommandRecord,
    GuestState,
    StallCause,
    StallCauseType,
)
from tests.support.records import transition
from tests.unit.timeline.timeline_support import (
    MS,
    SIZE,
    UNKNOWN,
    command_record,
    ioctl,
    new,
    only,
    slot_op,
    stalls,
    toggle,
    window,
)


def test_a_gap_without_a_commit_of_its_thread_has_no_known_cause() -> None:
    """The same-value write: an exit, a gap, and nothing else."""
    timeline = new()
    toggle(timeline, 1, 10 * MS)
    timeline.observe([window(StallKind.VCPU_GAP, 30 * MS, 31 * MS, "pulse", tid=None)])
    control = stalls(timeline.finish(), StallKind.VCPU_GAP)[1]
    assert control.cause == UNKNOWN
    assert control.witnesses == ["pulse"]
    assert control.during == []


def test_another_vcpus_gap_during_a_commit_is_not_said_to_be_made_by_it() -> None:
    timeline = new()
    toggle(timeline, 1, 10 * MS)
    timeline.observe(
        [window(StallKind.VCPU_GAP, 10 * MS, 11 * MS, "pulse", thread="CPU 1", tid=None)]
    )
    (gap,) = (s for s in stalls(timeline.finish(), StallKind.VCPU_GAP) if s.thread == "CPU 1")
    assert gap.cause == UNKNOWN
    assert gap.during == [1]


def test_vcpus_that_are_kept_out_stand_still_because_of_it() -> None:
    timeline = new()
    toggle(timeline, 1, 10 * MS)
    timeline.observe(
        [
            window(
                StallKind.VCPU_INHIBIT, 10 * MS + 150_000, 10 * MS + 900_000, thread=None, tid=None
            ),
            window(
                StallKind.VCPU_GAP, 10 * MS + 100_000, 11 * MS, "pulse", thread="CPU 1", tid=None
            ),
        ]
    )
    records = timeline.finish()
    (gap,) = (s for s in stalls(records, StallKind.VCPU_GAP) if s.thread == "CPU 1")
    assert gap.cause == StallCause(StallCauseType.TRANSITION, 1, 750_000)
    assert only(records, StallKind.VCPU_INHIBIT).incident == gap.incident


def test_who_waits_for_the_lock_waits_for_what_its_holder_does() -> None:
    timeline = new()
    toggle(timeline, 2, 10 * MS)
    timeline.observe(
        [
            window(StallKind.BQL_HOLD, 10 * MS - 10_000, 11 * MS + 10_000),
            window(StallKind.BQL_WAIT, 10 * MS + 100_000, 11 * MS + 20_000, thread="main", tid=1),
            window(StallKind.MAIN_LOOP, 10 * MS, 11 * MS + 30_000, "ping", thread="main", tid=None),
        ]
    )
    records = timeline.finish()
    for kind in (StallKind.BQL_HOLD, StallKind.BQL_WAIT, StallKind.MAIN_LOOP):
        cause = only(records, kind).cause
        assert cause is not None
        assert (cause.type, cause.ref) == ("transition", 2)
    assert len({s.incident for s in stalls(records)}) == 1


def test_a_command_explains_the_hold_and_the_main_loop() -> None:
    timeline = new()
    timeline.observe(
        [
            window(StallKind.BQL_HOLD, 0, 50 * MS, thread="main", tid=1),
            window(
                StallKind.MAIN_LOOP,
                -2 * MS,
                50 * MS,
                "ping",
                thread="main",
                tid=None,
                at_least=48 * MS,
            ),
        ]
    )
    timeline.command(command_record("object-add", MS, 49 * MS, 50 * MS, "uprobes"))
    records = timeline.finish()
    for kind in (StallKind.BQL_HOLD, StallKind.MAIN_LOOP):
        assert only(records, kind).cause == StallCause(
            StallCauseType.COMMAND, "object-add", 48 * MS
        )
        assert only(records, kind).witnesses == ["ping", "uprobes"]
    assert [r.name for r in records if isinstance(r, CommandRecord)] == ["object-add"]


def test_a_command_of_ours_is_named_as_such() -> None:
    timeline = new()
    timeline.observe([window(StallKind.MAIN_LOOP, 0, 8 * MS, "ping", thread="main", tid=None)])
    timeline.command(command_record("human-monitor-command", 0, 8 * MS, 8 * MS, "uprobes"))
    timeline.command(command_record("info mtree", MS, 8 * MS, 8 * MS, "agent"))
    records = timeline.finish()
    assert only(records, StallKind.MAIN_LOOP).cause == StallCause(
        StallCauseType.AGENT, "info mtree", 7 * MS
    )


def test_a_short_command_does_not_explain_a_long_stall() -> None:
    timeline = new()
    timeline.observe([window(StallKind.MAIN_LOOP, 0, 50 * MS, "ping", thread="main", tid=None)])
    timeline.command(command_record("object-add", 0, 10 * MS, 50 * MS, "uprobes"))
    assert only(timeline.finish(), StallKind.MAIN_LOOP).cause == StallCause(
        StallCauseType.UNKNOWN, None
    )


def test_a_pause_seen_by_two_probes_is_one_stall_with_two_witnesses() -> None:
    timeline = new()
    timeline.observe(
        [
            window(StallKind.VCPU_PAUSE, 0, 10 * MS, "runstate", thread=None, at_least=9 * MS),
            window(StallKind.VCPU_PAUSE, MS, 10 * MS, "uprobes", thread=None, at_least=8_900_000),
        ]
    )
    timeline.record(GuestState(t_ns=2 * MS, status="paused", running=False))
    pause = only(timeline.finish(), StallKind.VCPU_PAUSE)
    assert pause.probe == "uprobes"
    assert pause.witnesses == ["runstate", "uprobes"]
    assert pause.cause is not None
    assert (pause.cause.type, pause.cause.ref) == ("stop", "paused")


def test_a_transition_without_operations_is_tied_to_the_only_commit_that_fits() -> None:
    timeline = new()
    timeline.observe([window(StallKind.COMMIT, 0, MS), window(StallKind.COMMIT, 5 * MS, 6 * MS)])
    timeline.record(transition(1, 5 * MS + 500_000))
    first, second = stalls(timeline.finish(), StallKind.COMMIT)
    assert first.cause == UNKNOWN
    assert second.cause == StallCause(StallCauseType.TRANSITION, 1, MS)


def test_of_two_commits_that_fit_neither_is_guessed() -> None:
    timeline = new()
    timeline.observe(
        [window(StallKind.COMMIT, 0, 150_000), window(StallKind.COMMIT, 160_000, 300_000)]
    )
    timeline.record(transition(1, 200_000))
    assert all(s.cause == UNKNOWN for s in stalls(timeline.finish(), StallKind.COMMIT))


def test_dirty_logging_is_named() -> None:
    timeline = new()
    timeline.observe(
        [window(StallKind.COMMIT, 0, MS, thread="main"), ioctl(200_000, 400_000, SIZE)]
    )
    timeline.record(slot_op(None, 450_000, "add"))
    records = timeline.finish()
    why = "dirty logging switched off"
    assert only(records, StallKind.SLOT_UPDATE).cause == StallCause(
        StallCauseType.SLOT_OP, why, 200_000
    )
    assert only(records, StallKind.COMMIT).cause == StallCause(StallCauseType.SLOT_OP, why, MS)


@pytest.mark.parametrize(
    ("command", "slots", "why"),
    [
        ("migrate", (3, 4), "dirty logging (migration)"),
        ("calc-dirty-rate", (3, 4), "dirty logging (dirty-rate measurement)"),
        ("migrate", (3,), "dirty logging switched off"),  # a display does that for its memory
        ("query-status", (3, 4), "dirty logging switched off"),
    ],
)
def test_who_asked_for_dirty_logging_is_said_where_it_was_seen(
    command: str, slots: tuple[int, ...], why: str
) -> None:
    timeline = new()
    timeline.command(command_record(command, 0, MS, MS, "uprobes"))
    at = 20 * MS
    seen = [window(StallKind.COMMIT, at, at + MS, thread="tid 9")]
    for n, slot in enumerate(slots):
        start = at + 200_000 * (n + 1)
        seen.append(ioctl(start, start + 100_000, SIZE, slot=slot))
        timeline.record(slot_op(None, start + 150_000, "flags", slot=slot))
    timeline.observe(seen)
    records = timeline.finish()
    assert only(records, StallKind.COMMIT).cause == StallCause(StallCauseType.SLOT_OP, why, MS)
    assert {s.cause.ref for s in stalls(records, StallKind.SLOT_UPDATE) if s.cause} == {why}


def host_wait(start: int, end: int, waited: int, thread: str = "CPU 0") -> HostWait:
    return HostWait(start, end, waited, 1, thread)


def test_a_gap_in_which_the_vcpu_had_no_cpu_is_the_schedulers() -> None:
    timeline = new()
    timeline.host_waits([host_wait(10 * MS, 15 * MS, 3 * MS)])
    timeline.observe([window(StallKind.VCPU_GAP, 11 * MS, 15 * MS, "pulse", tid=None)])
    gap = only(timeline.finish(), StallKind.VCPU_GAP)
    assert gap.cause == StallCause(StallCauseType.SCHEDULER, None, 3 * MS)
    assert gap.witnesses == ["pulse", "threads"]


def test_a_main_loop_without_a_cpu_stalls_because_of_the_scheduler() -> None:
    timeline = new()
    timeline.host_waits([host_wait(10 * MS, 15 * MS, 3 * MS, "main")])
    timeline.observe(
        [window(StallKind.MAIN_LOOP, 10 * MS, 15 * MS, "threads", thread="main", at_least=3 * MS)]
    )
    stall = only(timeline.finish(), StallKind.MAIN_LOOP)
    assert stall.cause is not None
    assert stall.cause.type is StallCauseType.SCHEDULER


@pytest.mark.parametrize(
    "wait",
    [
        host_wait(10 * MS, 15 * MS, MS),  # too little of it
        host_wait(10 * MS, 15 * MS, 5 * MS),  # longer than the gap: it was at another time
        host_wait(20 * MS, 25 * MS, 4 * MS),
        host_wait(10 * MS, 15 * MS, 4 * MS, "CPU 1"),
    ],
)
def test_other_waits_for_a_cpu_explain_nothing(wait: HostWait) -> None:
    timeline = new()
    timeline.host_waits([wait])
    timeline.observe([window(StallKind.VCPU_GAP, 11 * MS, 15 * MS, "pulse", tid=None)])
    assert only(timeline.finish(), StallKind.VCPU_GAP).cause == UNKNOWN


def test_a_transitions_gap_is_its_own_however_long_the_vcpu_had_no_cpu() -> None:
    timeline = new()
    timeline.host_waits([host_wait(9 * MS, 12 * MS, MS)])
    toggle(timeline, 1, 10 * MS)
    gap = only(timeline.finish(), StallKind.VCPU_GAP)
    assert gap.cause is not None
    assert gap.cause.type is StallCauseType.TRANSITION


def test_a_gap_about_a_change_that_only_the_log_tells_of_is_not_the_schedulers() -> None:
    """Who made it is not known: it may have been this very vCPU."""
    timeline = new()
    timeline.expect("trace", 0)
    timeline.host_waits([host_wait(9 * MS, 14 * MS, 3 * MS)])
    timeline.observe([window(StallKind.VCPU_GAP, 10 * MS, 14 * MS, "pulse", tid=None)])
    timeline.record(transition(1, 10 * MS + 250_000, 2))
    timeline.record(slot_op(1, 10 * MS + 480_000, "delete"))
    timeline.record(slot_op(1, 10 * MS + 680_000, "add"))
    gap = only(timeline.finish(), StallKind.VCPU_GAP)
    assert gap.cause == UNKNOWN
    assert gap.during == [1]
