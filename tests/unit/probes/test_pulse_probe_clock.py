"""The clock of the pulse probe: what it says of a time is never wrong, and soon narrow."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.probes.pulse_clock import Anchor, BeatClock, BeatSampler, Bounds

MS = 1_000_000
START = 5_000_000 * MS
LATER = 1 << 62


class Truth:
    """A TSC that runs at `rate` ticks per ns, and stood still for `stopped` (tsc, ns) times."""

    def __init__(self, rate: float, tsc: int = 1 << 40) -> None:
        self.rate = rate
        self.tsc0 = tsc
        self.stops: list[tuple[int, int]] = []

    def tsc(self, ns: int) -> int:
        away = 0
        for at_tsc, length in self.stops:
            at_ns = int(self.ns(at_tsc))
            away += max(0, min(length, ns - at_ns))
        return self.tsc0 + int((ns - START - away) * self.rate)

    def ns(self, tsc: int) -> float:
        """The moment at which the TSC got this value."""
        away = sum(length for at_tsc, length in self.stops if at_tsc < tsc)
        return START + (tsc - self.tsc0) / self.rate + away


def anchors(
    truth: Truth, start_ms: float, end_ms: float, step_ms: float, width_ns: int, seed: int = 1
) -> Iterator[Anchor]:
    """Honest anchors: the moment is somewhere in the bounds."""
    chance = random.Random(seed)
    at = START + start_ms * MS
    while at < START + end_ms * MS:
        tsc = truth.tsc(round(at))
        low = int(truth.ns(tsc)) - chance.randrange(width_ns)
        yield Anchor(tsc, Bounds(low, low + width_ns + 2))
        at += step_ms * MS


def fed(truth: Truth, end_ms: float = 1000, width_ns: int = 30_000) -> BeatClock:
    clock = BeatClock()
    for anchor in anchors(truth, 0, end_ms, 20, width_ns):
        assert clock.add(anchor) == 0
    return clock


@given(
    rate=st.floats(0.5, 6.0),
    width=st.integers(100, 200_000),
    seed=st.integers(0, 1 << 32),
    at_ms=st.floats(-500, 4000),
)
def test_the_bounds_enclose_the_truth(rate: float, width: int, seed: int, at_ms: float) -> None:
    truth = Truth(rate)
    clock = BeatClock()
    for anchor in anchors(truth, 0, 3000, 50, width, seed):
        assert clock.add(anchor) == 0
    assert clock.ready
    tsc = truth.tsc(START + round(at_ms * MS))
    found = clock.locate(tsc)
    assert found.low - 1 <= truth.ns(tsc) <= found.high + 1
    assert clock.not_before(tsc) <= truth.ns(tsc) + 1
    assert found.width <= 2 * width + 500_000
    ticks = round(10 * MS * rate)
    length = clock.length(ticks)
    assert length.low - 1 <= ticks / rate <= length.high + 1


def test_many_anchors_are_better_than_each() -> None:
    truth = Truth(2.6)
    clock = fed(truth, width_ns=100_000)
    found = clock.locate(truth.tsc(START + 950 * MS))
    assert found.width < 50_000


def test_it_is_not_ready_before_it_knows_the_rate() -> None:
    truth = Truth(2.6)
    clock = BeatClock()
    ready = []
    for anchor in anchors(truth, 0, 100, 10, 30_000):
        clock.add(anchor)
        ready.append(clock.ready)
    assert ready[:2] == [False, False]
    assert ready[-1]
    clock = BeatClock()
    for use in (lambda: clock.locate(1), lambda: clock.length(1), lambda: clock.window(2, 1, 1, 3)):
        with pytest.raises(ValueError, match="not ready"):
            use()


@given(wide_ms=st.integers(0, 100), step_ms=st.integers(3, 40), seed=st.integers(0, 1 << 32))
def test_a_wide_first_anchor_costs_no_time(wide_ms: int, step_ms: int, seed: int) -> None:
    """On a busy host the first look may be far from the second."""
    truth = Truth(2.6)
    clock = BeatClock()
    clock.add(next(anchors(truth, 0, 1, 1, 1 + wide_ms * MS, seed)))
    for anchor in anchors(truth, 100, 600, step_ms, 100_000, seed):
        assert clock.add(anchor) == 0
    assert clock.ready


def test_a_gap_is_enclosed_and_its_length_known() -> None:
    truth = Truth(2.6)
    clock = fed(truth)
    start, end = START + 500 * MS, START + 503 * MS
    ticks = truth.tsc(end) - truth.tsc(start)
    window = clock.window(truth.tsc(end), ticks, round(20_000 * 2.6), LATER)
    assert window.start_ns <= start
    assert end <= window.end_ns
    assert window.at_least_ns <= 3 * MS <= window.at_most_ns + 1
    assert window.at_most_ns - window.at_least_ns < 30_000
    assert window.end_ns - window.start_ns < 3 * MS + 100_000


def test_a_gap_was_over_when_it_was_seen() -> None:
    truth = Truth(2.6)
    clock = fed(truth, width_ns=100_000)
    end = START + 1000 * MS
    ticks = truth.tsc(end) - truth.tsc(end - 3 * MS)
    assert clock.window(truth.tsc(end), ticks, 0, LATER).end_ns > end + 100
    window = clock.window(truth.tsc(end), ticks, 0, end + 100)
    assert window.end_ns == end + 100
    assert window.at_least_ns <= 3 * MS <= window.at_most_ns + 1


def test_a_long_silence_is_measured_by_its_ends() -> None:
    """Ten minutes without a beat: the rate's error alone would be milliseconds."""
    truth = Truth(2.6)
    clock = fed(truth)
    for anchor in anchors(truth, 600_000, 601_000, 20, 30_000):
        assert clock.add(anchor) == 0
    start, end = truth.tsc(START + 990 * MS), truth.tsc(START + 600_000 * MS)
    window = clock.window(end, end - start, 50_000, LATER)
    assert window.start_ns <= truth.ns(start)
    assert truth.ns(end) <= window.end_ns
    assert window.at_most_ns - window.at_least_ns < 200_000


@pytest.mark.parametrize("length_ms", [5, 250])
def test_a_tsc_that_stands_still_begins_a_new_line(length_ms: int) -> None:
    truth = Truth(2.6)
    clock = fed(truth)
    truth.stops.append((truth.tsc(START + 1005 * MS), length_ms * MS))
    steps = [
        clock.add(anchor)
        for anchor in anchors(truth, 1020 + length_ms, 2000 + length_ms, 20, 30_000)
    ]
    assert abs(steps[0] - length_ms * MS) < 200_000
    assert set(steps[1:]) == {0}
    for at_ms in (900, 1500 + length_ms, 1900 + length_ms):
        tsc = truth.tsc(START + at_ms * MS)
        found = clock.locate(tsc)
        assert found.low <= truth.ns(tsc) <= found.high
        assert found.width < 100_000
    # In between it is only known that it was on one line or the other.
    tsc = truth.tsc(START + 1003 * MS)
    found = clock.locate(tsc)
    assert found.low <= truth.ns(tsc) <= found.high
    assert found.width >= length_ms * MS
    # A gap over the step is as long as its ends are apart, whatever the ticks say.
    start, end = truth.tsc(START + 970 * MS), truth.tsc(START + (1040 + length_ms) * MS)
    window = clock.window(end, end - start, 0, LATER)
    real = truth.ns(end) - truth.ns(start)
    assert window.at_least_ns <= real <= window.at_most_ns
    assert window.at_most_ns - window.at_least_ns < 200_000


def test_a_tsc_that_is_set_forward_makes_no_long_gap() -> None:
    truth = Truth(2.6)
    clock = fed(truth)
    later = Truth(2.6, truth.tsc0 + round(60_000 * MS * 2.6))
    steps = [clock.add(anchor) for anchor in anchors(later, 1000, 1500, 20, 30_000)]
    assert abs(steps[0] + 60_000 * MS) < 5 * MS
    start, end = truth.tsc(START + 970 * MS), later.tsc(START + 1010 * MS)
    window = clock.window(end, end - start, 0, LATER)
    assert window.start_ns <= START + 970 * MS
    assert window.end_ns >= START + 1010 * MS
    assert window.at_most_ns < 41 * MS


def test_a_step_before_the_rate_is_known_spoils_nothing() -> None:
    truth = Truth(2.6)
    clock = BeatClock()
    early = list(anchors(truth, 0, 21, 20, 2_000))
    truth.stops.append((truth.tsc(START + 30 * MS), 100 * MS))
    for anchor in [*early, *anchors(truth, 150, 1150, 20, 2_000)]:
        assert clock.add(anchor) == 0
    tsc = truth.tsc(START + 1000 * MS)
    found = clock.locate(tsc)
    assert found.low <= truth.ns(tsc) <= found.high
    assert found.width < 10_000


def test_a_clock_that_is_slewed_is_followed() -> None:
    """CLOCK_MONOTONIC changes its pace by 10 ppm every second, up and down."""
    clock = BeatClock()
    ns, tsc = float(START), 1 << 40
    rate, worst = 2.6, 0.0
    for step in range(3000):
        pace = 1 + 10e-6 * ((step // 50) % 3 - 1)
        ns += 20 * MS * pace
        tsc += round(20 * MS * rate)
        assert clock.add(Anchor(tsc, Bounds(int(ns) - 20_000, int(ns) + 20_000))) == 0
        if step > 100:
            found = clock.locate(tsc - round(10 * MS * rate))
            truth = ns - 10 * MS * pace
            worst = max(worst, found.low - truth, truth - found.high)
            assert found.width < 100_000
    assert worst <= 1


def test_an_anchor_that_is_not_later_tells_nothing() -> None:
    truth = Truth(2.6)
    clock = fed(truth)
    latest = clock.latest_tsc
    assert latest is not None
    assert clock.add(Anchor(latest, Bounds(0, 1))) == 0
    assert clock.add(Anchor(latest - 5, Bounds(0, 1))) == 0
    assert clock.latest_tsc == latest


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 40)), min_size=5, max_size=60),
    st.integers(1, 60),
)
def test_a_sample_never_claims_too_much(beats: list[tuple[int, int]], every: int) -> None:
    """Beats read the TSC and store it after a delay of any length; looks see what is stored."""
    now, stored = 0, []
    for pause, delay in beats:
        read = now + pause
        now = read + delay
        stored.append((now, read))
    sampler = BeatSampler()
    for look in range(0, now + every, every):
        seen = [read for at, read in stored if at <= look]
        anchor = sampler.look(look, seen[-1] if seen else 0, look + 1)
        if anchor is not None:
            assert anchor.at.low <= anchor.tsc <= anchor.at.high


def test_a_sampler_needs_two_changes_and_bears_a_tsc_set_back() -> None:
    sampler = BeatSampler()
    assert sampler.look(0, 10, 1) is None
    assert sampler.look(2, 20, 3) is None
    assert sampler.look(4, 20, 5) is None
    assert sampler.look(6, 30, 7) == Anchor(30, Bounds(0, 7))
    assert sampler.look(8, 5, 9) is None
    assert sampler.look(10, 6, 11) is None
    assert sampler.look(12, 7, 13) == Anchor(7, Bounds(8, 13))
