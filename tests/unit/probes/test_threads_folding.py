"""Windows of samples.  A thread is simulated, and looked at as the probe does."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.probes.threads.folding import LOOP_BUSY, VCPU_BUSY, Busy, Finder, Sample
from qmp_memlistener.probes.threads.rhythm import Rhythm
from qmp_memlistener.probes.threads.states import Activity, Schedule

MS = 1_000_000
US = 1_000
RESTS, AWAKE, LOCK, BLOCKED = Activity.RESTS, Activity.AWAKE, Activity.LOCK, Activity.BLOCKED


@dataclass
class Life:
    """What a thread does, in turn: an activity for so long, the first ns of an awake one waiting
    for a CPU.  It rests otherwise."""

    parts: list[tuple[int, int, Activity, int]] = field(default_factory=list)
    end: int = 0

    def then(self, activity: Activity, ns: int, waits: int = 0) -> Life:
        if ns:
            self.parts.append((self.end, self.end + ns, activity, waits))
            self.end += ns
        return self

    def at(self, t: int) -> tuple[Activity, Schedule]:
        cpu = waited = times = 0
        activity = RESTS
        for start, end, what, waits in self.parts:
            if start > t:
                break
            activity = what if t < end else RESTS
            if what is AWAKE and t >= start + waits:
                times += 1
                waited += waits
                cpu += min(t, end) - start - waits
        return activity, Schedule(cpu, waited, times)


def look(life: Life, times: list[int], busy: frozenset[Activity] = LOOP_BUSY) -> list[Busy]:
    """Look at these times, each for 20 us, as `Watched` does."""
    finder = Finder(busy)
    found = []
    before: tuple[Activity, Schedule] | None = None
    for t in times:
        now = life.at(t)
        if before is not None and now == before and now[0] is not AWAKE:
            finder.still(t)
        else:
            deep = now[0] in (LOCK, BLOCKED)
            piece = finder.take(Sample(t, t + 20 * US, now[0], now[1], None, deep))
            found += [] if piece is None else [piece]
        before = now
    return found


def every(ms: float, until: int, start: int = 0) -> list[int]:
    return list(range(start, until, int(ms * MS)))


def only(found: list[Busy]) -> Busy:
    (piece,) = found
    assert piece.over
    return piece


def test_a_task_is_bracketed_within_two_periods() -> None:
    life = Life().then(RESTS, 10 * MS).then(AWAKE, 50 * MS).then(RESTS, 10 * MS)
    piece = only(look(life, every(2.5, life.end, 300 * US)))
    assert piece.start_ns <= 10 * MS < 60 * MS <= piece.end_ns
    assert piece.at_least_ns <= 50 * MS <= piece.at_most_ns
    assert piece.at_most_ns - piece.at_least_ns <= 5 * MS


def test_a_task_that_no_look_met_is_known_by_its_schedule() -> None:
    life = Life().then(RESTS, 10_100 * US).then(AWAKE, 2_200 * US).then(RESTS, 10 * MS)
    piece = only(look(life, every(2.5, life.end)))
    assert piece.at_least_ns == pytest.approx(2_200 * US, abs=60 * US)
    assert piece.start_ns <= 10_100 * US < 12_300 * US <= piece.end_ns


def test_many_short_tasks_between_two_looks_are_none_that_is_long() -> None:
    life = Life().then(RESTS, 10 * MS)
    for _ in range(100):
        life.then(AWAKE, 400 * US).then(RESTS, 20 * US)
    life.then(RESTS, 10 * MS)
    assert look(life, [0, 5 * MS, *every(10, life.end, 60 * MS)]) == []


def test_short_tasks_that_looks_happen_to_meet_are_none_that_is_long() -> None:
    """Each look meets one; between them the loop rested."""
    life = Life().then(RESTS, 10 * MS)
    for _ in range(50):
        life.then(AWAKE, 300 * US).then(RESTS, 700 * US)
    life.then(RESTS, 10 * MS)
    looks = [0, 5 * MS, *(10 * MS + i * MS + 100 * US for i in range(50)), life.end + MS]
    assert look(life, looks) == []


def test_what_waits_for_a_lock_sleeps_and_is_seen_by_its_state_alone() -> None:
    life = Life().then(RESTS, 10 * MS).then(LOCK, 9 * MS).then(RESTS, 10 * MS)
    life.parts.insert(2, (19 * MS, 19 * MS, AWAKE, 0))
    piece = only(look(life, every(1, life.end, 500 * US)))
    assert piece.at_least_ns <= 9 * MS <= piece.at_most_ns
    assert piece.at_most_ns - piece.at_least_ns <= 2 * MS + 100 * US


def test_a_task_that_sleeps_again_and_again_is_one() -> None:
    """As memory that threads clear: the main thread waits for one after the other."""
    life = Life().then(RESTS, 10 * MS)
    for _ in range(10):
        life.then(AWAKE, 100 * US).then(BLOCKED, 5 * MS)
    life.then(RESTS, 10 * MS)
    piece = only(look(life, every(0.5, life.end, 200 * US)))
    assert piece.at_least_ns >= 49 * MS
    assert piece.at_most_ns >= 51 * MS


def test_a_thread_that_was_woken_and_has_no_cpu_is_not_at_rest() -> None:
    """Its schedule moves only when it gets one; then it says for how long it had none."""
    life = Life().then(RESTS, 10 * MS).then(AWAKE, 41 * MS, waits=40 * MS).then(RESTS, 10 * MS)
    finder = Finder(LOOP_BUSY)
    schedules = (Schedule(0, 0, 1), Schedule(MS, 40 * MS, 2))
    finder.take(Sample(0, 20 * US, RESTS, schedules[0]))
    for t in every(2.5, 50 * MS, 2_500 * US):
        finder.still(t)
    after = Sample(52 * MS, 52 * MS + 20 * US, RESTS, schedules[1])
    waited = finder.waited(after)
    assert waited is not None
    assert (waited.waited_ns, waited.times) == (40 * MS, 1)
    assert waited.start_ns <= 10 * MS
    assert waited.end_ns >= 50 * MS
    piece = finder.take(after)
    assert piece is not None
    assert piece.start_ns <= 10 * MS
    assert piece.at_least_ns == pytest.approx(41 * MS, abs=60 * US)
    assert life.at(55 * MS)[1] == Schedule(MS, 40 * MS, 1)


def test_a_window_that_goes_on_is_told_as_far_as_it_is_known() -> None:
    finder = Finder(LOOP_BUSY)
    finder.take(Sample(0, 20 * US, RESTS, Schedule(0, 0, 1)))
    finder.take(Sample(2 * MS, 2 * MS + 20 * US, BLOCKED, Schedule(0, 0, 2)))
    finder.still(900 * MS)
    piece = finder.end(901 * MS)
    assert piece is not None
    assert not piece.over
    assert piece.at_least_ns == 898 * MS - 20 * US
    assert (piece.start_ns, piece.end_ns, piece.at_most_ns) == (0, 901 * MS, 901 * MS)
    assert finder.end(902 * MS) is None


def test_a_vcpu_at_work_is_no_gap_but_one_that_waits_for_a_lock() -> None:
    life = Life().then(AWAKE, 20 * MS).then(LOCK, 5 * MS).then(AWAKE, 20 * MS)
    piece = only(look(life, every(1, life.end, 300 * US), VCPU_BUSY))
    assert piece.at_least_ns <= 5 * MS <= piece.at_most_ns
    assert piece.at_most_ns <= 7 * MS + 100 * US


@given(
    st.lists(
        st.tuples(
            st.integers(100 * US, 30 * MS),  # at rest
            st.sampled_from([AWAKE, BLOCKED]),
            st.integers(20 * US, 40 * MS),  # at work
            st.integers(0, 10 * MS),  # of that without a CPU
        ),
        min_size=1,
        max_size=8,
    ),
    st.lists(st.integers(100 * US, 6 * MS), min_size=20, max_size=120),
)
def test_what_is_told_holds_the_truth(
    turns: list[tuple[int, Activity, int, int]], steps: list[int]
) -> None:
    """Whatever a thread does and whenever it is looked at: each window holds a stall or more, and
    proves no more than those in it, with rests that are shorter than the time between two looks."""
    life = Life()
    truth = []
    for rest, activity, work, waits in turns:
        life.then(RESTS, rest)
        truth.append((life.end, life.end + work))
        if activity is AWAKE:
            life.then(AWAKE, work, min(waits, work - 1))
        else:
            life.then(AWAKE, 10 * US).then(BLOCKED, work - 10 * US)
    life.then(RESTS, 50 * MS)
    times, t = [], 0
    for step in steps:
        times.append(t)
        t += step
    for piece in look(life, times):
        inside = [
            min(end, piece.end_ns) - max(start, piece.start_ns)
            for start, end in truth
            if start < piece.end_ns and end > piece.start_ns
        ]
        assert inside
        unseen = sum(
            rest
            for (_, one), (other, _) in pairwise(truth)
            if piece.start_ns < one and other < piece.end_ns and (rest := other - one) < max(steps)
        )
        assert piece.at_least_ns <= sum(inside) + unseen + 50 * US
        assert piece.at_most_ns >= max(inside)


def test_the_rhythm() -> None:
    rhythm = Rhythm()
    assert rhythm.next_ns(None) == 2_500 * US
    rhythm.burst(True)
    rhythm.burst(True)
    rhythm.burst(False)
    assert rhythm.next_ns(None) == MS
    rhythm.burst(False)
    assert rhythm.next_ns(None) == 2_500 * US
    assert rhythm.next_ns(0) == 500 * US, "the end of a stall is looked for"
    assert rhythm.next_ns(100 * MS) == 2_500 * US, "a fortieth of it"
    assert rhythm.next_ns(3600 * 1000 * MS) == 20 * MS
    assert Rhythm(3 * MS).next_ns(None) == MS, "two looks fall into what must not be missed"
    assert Rhythm(100 * US).next_ns(None) == 500 * US
