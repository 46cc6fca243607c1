"""From pings to windows: what is certain, what is usual, and how close pings follow."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.probes.ping_brackets import (
    RESOLUTION_NS,
    Baseline,
    LoopStall,
    Pace,
    Ping,
    StallFinder,
)

MS = 1_000_000
US = 1_000


def ping(
    begun: int,
    latency: int = 150 * US,
    *,
    oob: int | None = 100 * US,
    blind: int = 0,
    answered: bool = True,
) -> Ping:
    """One whose answer came `latency` after the out-of-band one, which came `oob` after the write;
    `blind` before its answer was read the socket was last found empty."""
    sent = begun + 20 * US
    queued = sent if oob is None else sent + oob
    end = queued + latency
    return Ping(
        begun_ns=begun,
        sent_ns=sent,
        oob_ns=None if oob is None else queued,
        empty_ns=max(begun, end - blind),
        answered_ns=end if answered else None,
    )


def calibrated() -> StallFinder:
    """After two dozen pings of an idle main loop; the last one ended before 100 ms."""
    finder = StallFinder()
    first = [ping(i * 2 * MS, (150 + i) * US) for i in range(24)]
    finder.calibrate(first)
    assert [finder.take(p) for p in first] == [None] * 24
    return finder


def test_an_idle_main_loop_has_no_stalls() -> None:
    finder = calibrated()
    for i in range(1000):
        assert finder.take(ping(100 * MS + i * MS, (150 + i % 40) * US)) is None
    assert 150 * US <= finder.baseline.median_ns <= finder.baseline.usual_ns <= 200 * US
    assert finder.raised == 0


def test_a_stall_is_bracketed_by_the_answer_before_and_by_what_is_proven() -> None:
    finder = calibrated()
    before = ping(100 * MS)
    assert finder.take(before) is None
    late = ping(101 * MS, 50 * MS, blind=MS)
    stall = finder.take(late)
    assert stall is not None
    assert late.answered_ns is not None
    assert (stall.start_ns, stall.end_ns) == (before.empty_ns, late.answered_ns)
    assert stall.at_most_ns == stall.end_ns - stall.start_ns
    assert 47 * MS < stall.at_least_ns < 49 * MS
    assert stall.at_least_ns < stall.estimate_ns < stall.at_most_ns
    assert stall.over
    assert not stall.whole


def test_after_a_long_rest_the_bracket_is_as_wide_as_the_rest() -> None:
    finder = calibrated()
    finder.take(ping(100 * MS))
    stall = finder.take(ping(200 * MS, 50 * MS))
    assert stall is not None
    assert stall.at_most_ns - stall.at_least_ns > 99 * MS


def test_what_we_did_not_look_at_is_not_proven() -> None:
    """The answer may have lain in the socket while this process did not run."""
    finder = calibrated()
    finder.take(ping(100 * MS))
    assert finder.take(ping(101 * MS, 50 * MS, blind=50 * MS)) is None
    finder.take(ping(152 * MS))
    stall = finder.take(ping(153 * MS, 50 * MS, blind=30 * MS))
    assert stall is not None
    assert 18 * MS < stall.at_least_ns < 20 * MS
    assert stall.at_most_ns > 50 * MS


def test_a_late_start_of_the_stall_before_the_previous_answer_was_read() -> None:
    """That answer may have been sent long before we read it."""
    finder = calibrated()
    finder.take(ping(100 * MS, 8 * MS, blind=8 * MS))
    stall = finder.take(ping(109 * MS, 20 * MS))
    assert stall is not None
    assert stall.start_ns <= 100 * MS + 200 * US


def test_when_all_of_qemu_is_silent_nothing_is_proven_of_the_main_loop() -> None:
    finder = calibrated()
    finder.take(ping(100 * MS))
    stall = finder.take(ping(101 * MS, 150 * US, oob=40 * MS))
    assert stall is not None
    assert stall.whole
    assert stall.at_least_ns == 0
    assert stall.at_most_ns > 40 * MS
    # of a few milliseconds, as on any busy host, there is nothing to say
    assert finder.take(ping(150 * MS, 150 * US, oob=4 * MS)) is None


def test_without_out_of_band_the_write_is_where_it_begins() -> None:
    finder = StallFinder()
    first = [ping(i * 2 * MS, oob=None) for i in range(24)]
    finder.calibrate(first)
    for p in first:
        assert finder.take(p) is None
    stall = finder.take(ping(100 * MS, 30 * MS, oob=None))
    assert stall is not None
    assert not stall.whole
    assert 28 * MS < stall.at_least_ns < 30 * MS


def test_a_stall_without_an_end_is_known_so_far() -> None:
    finder = calibrated()
    finder.take(ping(100 * MS))
    stall = finder.take(ping(101 * MS, 70 * MS, answered=False))
    assert stall is not None
    assert not stall.over
    assert stall.end_ns == 101 * MS + 120 * US + 70 * MS
    assert 68 * MS < stall.at_least_ns < 70 * MS
    assert calibrated().take(ping(101 * MS, MS, answered=False)) is None


def test_stalls_do_not_move_the_baseline() -> None:
    finder = calibrated()
    median, usual = finder.baseline.median_ns, finder.baseline.usual_ns
    found = 0
    for i in range(60):
        found += finder.take(ping(100 * MS + i * 100 * MS, 40 * MS)) is not None
    assert found == 60
    assert (finder.baseline.median_ns, finder.baseline.usual_ns) == (median, usual)


def test_a_stall_while_calibrating_is_found_and_does_not_count_as_usual() -> None:
    finder = StallFinder()
    first = [ping(i * 60 * MS, 50 * MS if i == 3 else 150 * US) for i in range(24)]
    finder.calibrate(first)
    assert [i for i, p in enumerate(first) if finder.take(p) is not None] == [3]
    assert finder.baseline.usual_ns < MS


def test_a_main_loop_that_has_become_slow_for_good_is_the_new_usual() -> None:
    finder = calibrated()
    found = [finder.take(ping(100 * MS + i * 100 * MS, 5 * MS)) is not None for i in range(200)]
    assert found[:64] == [True] * 64
    assert not any(found[65:])
    assert finder.raised == 1
    # and quick again at once
    for i in range(300):
        finder.take(ping(30_000 * MS + i * 100 * MS, 150 * US))
    assert finder.baseline.median_ns == 150 * US


def test_an_empty_calibration_says_nothing() -> None:
    baseline = Baseline()
    baseline.calibrate([])
    assert baseline.usual_ns == 0


# -- a main loop that stalls, as it would be seen ------------------------------------------------

BASE = 150 * US


def watch(holds: list[tuple[int, int]], period: int, until: int) -> list[LoopStall]:
    """The stalls seen by pings at `period` of a main loop that does not serve during `holds`."""
    finder = calibrated()
    now, found = 100 * MS, []
    while now < until:
        queued = now + 120 * US
        served = queued
        for start, end in holds:
            if start <= served < end:
                served = end
        answered = served + BASE
        looked = max(now, answered - max(MS, (answered - now) // 50))
        stall = finder.take(Ping(now, now + 20 * US, queued, looked, answered))
        if stall is not None:
            found.append(stall)
        now = answered + period
    return found


@given(
    start=st.integers(150 * MS, 350 * MS),
    length=st.integers(5 * MS, 2_000 * MS),
    period=st.sampled_from([MS, 10 * MS, 100 * MS]),
)
def test_the_bracket_holds_the_truth_whenever_it_began(
    start: int, length: int, period: int
) -> None:
    found = watch([(start, start + length)], period, start + length + 300 * MS)
    if period == MS:
        assert len(found) == 1
        assert abs(found[0].estimate_ns - length) <= max(2 * MS, length // 10)
    for stall in found:
        assert stall.at_least_ns <= length <= stall.at_most_ns
        assert stall.start_ns <= start
        assert start + length <= stall.end_ns


@given(starts=st.lists(st.integers(0, 60), min_size=1, max_size=20, unique=True))
def test_each_of_several_stalls_is_seen_once(starts: list[int]) -> None:
    holds = [(150 * MS + s * 50 * MS, 150 * MS + s * 50 * MS + 20 * MS) for s in sorted(starts)]
    assert len(watch(holds, MS, 4_000 * MS)) == len(holds)


# -- the pace --------------------------------------------------------------------------------------


def test_the_pace_is_slow_then_quick_then_slow_again_by_and_by() -> None:
    pace = Pace()
    assert pace.next_ns(200 * US) == pace.next_ns(200 * US) == Pace.IDLE_NS
    pace.burst(True)
    pace.burst(True)
    assert pace.next_ns(200 * US) == Pace.BURST_NS
    pace.burst(False)
    assert pace.next_ns(200 * US) == Pace.BURST_NS
    pace.burst(False)
    waits = [pace.next_ns(200 * US) for _ in range(40)]
    assert waits == sorted(waits)
    assert waits[0] == Pace.BURST_NS
    assert waits[-1] == Pace.IDLE_NS
    assert all(b <= a * 5 // 4 for a, b in pairwise(waits))


def test_an_end_without_a_beginning_is_none() -> None:
    pace = Pace()
    pace.burst(False)
    pace.burst(True)
    assert pace.next_ns(200 * US) == Pace.BURST_NS


@pytest.mark.parametrize("share", [0.3, 0.05, 0.001])
def test_the_pace_keeps_to_its_share(share: float) -> None:
    """A ping costs about its round trip."""
    pace = Pace(share)
    for on in (True, False):
        pace.burst(on)
        wait = pace.next_ns(500 * US)
        assert 500 * US / (wait + 500 * US) <= share * 1.01


@pytest.mark.parametrize("limit", [3 * MS, 5 * MS, 50 * MS, 10_000 * MS])
def test_a_limit_that_must_be_seen_sets_the_pace(limit: int) -> None:
    pace = Pace(0.0001, must_see_ns=limit)
    wait = pace.next_ns(500 * US)
    assert Pace.BURST_NS <= wait <= max(Pace.BURST_NS, min(Pace.IDLE_NS, limit - RESOLUTION_NS))
