"""Phases: intervals from the moments that were seen, and what happened in them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.records import StallKind, StallRecord
from qmp_memlistener.updates.model import PhaseName
from qmp_memlistener.updates.phases import Marks, phases_of
from tests.support.records import transition


def stall(incident: int, start: int) -> StallRecord:
    return StallRecord(
        kind=StallKind.COMMIT,
        start_ns=start,
        end_ns=start + 1,
        at_least_ns=1,
        at_most_ns=1,
        probe="uprobes",
        witnesses=["uprobes"],
        thread=None,
        site=None,
        cause=None,
        incident=incident,
    )


def test_a_hotplug_from_the_backend_to_the_quiet() -> None:
    marks = Marks(0, prepared=10, sent=20, accepted=50, own_until=50)
    for t_ns in (70, 90):
        marks.sign(t_ns)
    marks.unbound, marks.bound, marks.settled = 75, 80, 120
    phases = phases_of(
        marks,
        [transition(1, 30), transition(2, 45), transition(3, 70), transition(4, 90)],
        [stall(7, 40), stall(8, 85)],
    )
    assert [(p.name, p.start_ns, p.end_ns) for p in phases] == [
        ("prepared", 0, 10),
        ("realised", 20, 45),
        ("accepted", 20, 50),
        ("guest_told", 50, 70),
        ("guest_acts", 70, 90),
        ("driver_bound", 75, 80),
        ("settled", 90, 120),
    ]
    by_name = {p.name: p for p in phases}
    assert by_name[PhaseName.REALISED].transitions == [1, 2]
    assert by_name[PhaseName.ACCEPTED].stalls == [7]
    assert by_name[PhaseName.GUEST_ACTS].transitions == [3, 4]
    assert by_name[PhaseName.GUEST_ACTS].stalls == [8]


def test_what_came_before_the_reply_is_no_sign_of_the_guest() -> None:
    marks = Marks(0, sent=20, accepted=50, own_until=50)
    marks.sign(49)
    assert marks.first_sign is None
    assert [p.name for p in phases_of(marks, [], [])] == ["accepted"]


def test_what_came_in_a_pause_is_no_sign_of_the_guest() -> None:
    marks = Marks(0, sent=20, accepted=50, own_until=60)
    marks.sign(55)
    phases = phases_of(marks, [transition(1, 55)], [])
    assert [(p.name, p.end_ns) for p in phases] == [("accepted", 50), ("realised", 55)]


def test_what_only_qemu_does_is_its_own_however_late_we_learn_of_it() -> None:
    marks = Marks(0, sent=20, accepted=50, own_until=50)
    marks.own(58)
    assert marks.first_sign is None
    phases = phases_of(marks, [transition(1, 58)], [])
    assert [(p.name, p.end_ns) for p in phases] == [("accepted", 50), ("realised", 58)]


def test_a_guest_that_was_faster_than_our_reading() -> None:
    marks = Marks(0, sent=20, accepted=50, own_until=50)
    marks.sign(40, surely=True)
    marks.sign(45, surely=True)
    phases = phases_of(marks, [transition(1, 30), transition(2, 40), transition(3, 45)], [])
    by_name = {p.name: (p.start_ns, p.end_ns, p.transitions) for p in phases}
    assert by_name[PhaseName.REALISED] == (20, 30, [1])
    assert by_name[PhaseName.GUEST_ACTS] == (40, 45, [2, 3])


def test_a_guest_that_does_nothing() -> None:
    marks = Marks(0, sent=20, accepted=50, settled=400)
    phases = phases_of(marks, [], [])
    assert [(p.name, p.start_ns, p.end_ns) for p in phases] == [
        ("accepted", 20, 50),
        ("settled", 50, 400),
    ]


def test_a_refusal_has_no_phases() -> None:
    assert phases_of(Marks(0, settled=5), [], []) == []


@given(st.lists(st.integers(0, 1000)), st.integers(0, 500), st.integers(0, 500))
def test_phases_are_intervals(signs: list[int], sent: int, took: int) -> None:
    marks = Marks(0, prepared=0, sent=sent, accepted=sent + took, own_until=sent + took)
    for t_ns in signs:
        marks.sign(t_ns)
    marks.settled = 2000
    changes = [transition(i, t_ns) for i, t_ns in enumerate(signs)]
    phases = phases_of(marks, changes, [])
    assert all(p.start_ns <= p.end_ns for p in phases)
    assert all(p.start_ns <= signs[seq] <= p.end_ns for p in phases for seq in p.transitions)
    assert phases == sorted(phases, key=lambda p: p.start_ns)
