"""Stamps of QEMU's realtime clock on CLOCK_MONOTONIC, with their error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.probes.runstate import Moment, Offset, StopClock, read_offset

US = 1_000
MS = 1_000_000
S = 1_000_000_000
EPOCH = 1_700_000_000 * S
"""CLOCK_REALTIME when CLOCK_MONOTONIC was 0."""
OFFSET = Offset(EPOCH - 40, EPOCH + 40)


def stamp(t_ns: int, offset: int = EPOCH) -> int:
    """As QEMU stamps what happened at `t_ns`."""
    return (t_ns + offset) // US * US


def test_a_stamp_is_exact_to_a_microsecond() -> None:
    clock = StopClock(OFFSET, same_host=True)
    moment = clock.moment(stamp(5 * S + 123), 5 * S + 3 * MS, 0, OFFSET)
    assert moment.low_ns <= 5 * S + 123 <= moment.high_ns
    assert moment.high_ns - moment.low_ns <= US + 80


def test_without_a_stamp_it_happened_before_it_arrived() -> None:
    clock = StopClock(OFFSET, same_host=True)
    moment = clock.moment(None, 5 * S, 2 * S, OFFSET)
    assert (moment.low_ns, moment.high_ns) == (2 * S, 5 * S)


def test_the_stamp_of_another_host_says_nothing_of_our_clock() -> None:
    clock = StopClock(OFFSET, same_host=False)
    stop = clock.moment(stamp(5 * S, EPOCH + 7 * S), 5 * S + MS, 2 * S, OFFSET)
    assert (stop.low_ns, stop.high_ns) == (2 * S, 5 * S + MS)
    # but how far two of them lie apart
    resume = clock.moment(stamp(6 * S, EPOCH + 7 * S), 6 * S + 9 * MS, stop.low_ns, OFFSET)
    at_least, at_most = clock.apart(stop, resume)
    assert at_least <= S <= at_most
    assert at_most - at_least < 10 * US


@pytest.mark.parametrize("step", [-S, -50 * MS, 50 * MS, S])
def test_a_step_of_the_clock_widens_the_bracket(step: int) -> None:
    """Between STOP and RESUME; each stamp still fits, the difference of the two does not."""
    later = Offset(OFFSET.low_ns + step, OFFSET.high_ns + step)
    clock = StopClock(OFFSET, same_host=True)
    stop = clock.moment(stamp(5 * S), 5 * S + MS, 4 * S, OFFSET)
    clock.refresh(later)
    resume = clock.moment(stamp(8 * S, EPOCH + step), 8 * S + MS, stop.low_ns, later)
    at_least, at_most = clock.apart(stop, resume)
    assert at_least <= 3 * S <= at_most
    assert at_most - at_least < 10 * US


def test_a_step_just_before_the_event_is_in_its_bounds() -> None:
    """Whether the stamp was made before the step or after it is not known."""
    later = Offset(OFFSET.low_ns + 50 * MS, OFFSET.high_ns + 50 * MS)
    for offset in (EPOCH, EPOCH + 50 * MS):
        clock = StopClock(OFFSET, same_host=True)
        moment = clock.moment(stamp(5 * S, offset), 5 * S + MS, 4 * S, later)
        assert moment.low_ns <= 5 * S <= moment.high_ns


def test_a_stamp_that_cannot_be_is_not_believed() -> None:
    clock = StopClock(OFFSET, same_host=True)
    for wrong in (stamp(7 * S), stamp(S)):
        moment = clock.moment(wrong, 5 * S, 4 * S, OFFSET)
        assert (moment.low_ns, moment.high_ns, moment.stamp_ns) == (4 * S, 5 * S, None)


@given(
    stop=st.integers(S, 100 * S),
    length=st.integers(0, 100 * S),
    delays=st.tuples(st.integers(0, 50 * MS), st.integers(0, 50 * MS)),
    step=st.sampled_from([0, 0, -2 * S, 3 * MS]),
    same_host=st.booleans(),
    stamped=st.booleans(),
)
def test_the_bracket_holds_the_truth(
    stop: int, length: int, delays: tuple[int, int], step: int, same_host: bool, stamped: bool
) -> None:
    if not same_host:
        step = 0
    later = Offset(OFFSET.low_ns + step, OFFSET.high_ns + step)
    clock = StopClock(OFFSET, same_host=same_host)
    first = clock.moment(stamp(stop) if stamped else None, stop + delays[0], 0, OFFSET)
    end = stop + length
    last = clock.moment(
        stamp(end, EPOCH + step) if stamped else None, end + delays[1], first.low_ns, later
    )
    assert first.low_ns <= stop <= first.high_ns
    assert last.low_ns <= end <= last.high_ns
    at_least, at_most = clock.apart(first, last)
    assert 0 <= at_least <= length <= at_most
    assert at_most <= last.high_ns - first.low_ns


def test_moments_alone_bound_what_has_no_stamps() -> None:
    clock = StopClock(OFFSET, same_host=True)
    stop, resume = Moment(10, 20, None, OFFSET), Moment(50, 60, None, OFFSET)
    assert clock.apart(stop, resume) == (30, 50)


def test_the_clocks_of_this_host() -> None:
    one, two = read_offset(), read_offset()
    assert 0 <= one.high_ns - one.low_ns < 50 * MS
    assert one.low_ns <= two.high_ns
    assert two.low_ns <= one.high_ns
