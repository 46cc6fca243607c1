"""A guest's TSC against CLOCK_MONOTONIC, from looks at its beats.  Pure: no guest, no clock.

`BeatSampler` turns looks into anchors: between which two moments a heartbeat read the TSC.
`BeatClock` lays a line through them and maps TSC values, always as the two bounds between which the
moment lies.  Only the latest anchors count, so a line that bends slowly is followed; where it
breaks (the machine stood still under TCG, somebody set the TSC) a new line begins and the step is
reported.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, floor

__all__ = ["Anchor", "BeatClock", "BeatSampler", "Bounds", "GapWindow"]

_RECENT = 16  # anchors of a line that take part in mapping
_STRAIGHT = 3  # so many at least tell that a line is one
_MUCH = 5
_BASES = 8  # older ones, for the rate
_BASE_EVERY_NS = 4_000_000_000
_READY = 1e-3  # relative error of the rate above which nothing is mapped
# CLOCK_MONOTONIC is slewed by NTP, by far less than this from one second to the next
_DRIFT = 20e-6


@dataclass(frozen=True, slots=True)
class Bounds:
    """A moment (CLOCK_MONOTONIC) or a length, in ns: not before `low`, not after `high`."""

    low: int
    high: int

    @property
    def width(self) -> int:
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Anchor:
    """A heartbeat whose TSC was read within `at`."""

    tsc: int
    at: Bounds

    def reach(self, tsc: int, slow: float, fast: float) -> Bounds:
        """When, by this anchor alone, the TSC had another value; the rate is between two bounds."""
        ticks = tsc - self.tsc
        if ticks < 0:
            slow, fast = fast, slow
        slack = abs(ticks) / slow * _DRIFT
        return Bounds(
            self.at.low + floor(ticks / fast - slack), self.at.high + ceil(ticks / slow + slack)
        )


@dataclass(frozen=True, slots=True)
class GapWindow:
    """A gap: inside `[start_ns, end_ns)`, and how long."""

    start_ns: int
    end_ns: int
    at_least_ns: int
    at_most_ns: int


class BeatSampler:
    """Makes anchors of looks at a CPU's last TSC.

    A heartbeat reads the TSC and stores it later, how much later depends on the host.  So that it
    was stored after some moment does not tell that it was read after it; but it was read after the
    heartbeat before was stored.  Hence an anchor needs two changes.
    """

    def __init__(self) -> None:
        self._tsc: int | None = None
        self._looked_ns = 0  # when a look that showed _tsc began, the latest
        self._not_yet_ns: int | None = None  # ditto for what was there before _tsc

    def look(self, before_ns: int, tsc: int, after_ns: int) -> Anchor | None:
        """One look: `tsc` was there at some moment in `[before_ns, after_ns]`."""
        anchor = None
        if self._tsc is None or tsc < self._tsc:
            self._not_yet_ns = None
        elif tsc > self._tsc:
            if self._not_yet_ns is not None:
                anchor = Anchor(tsc, Bounds(self._not_yet_ns, after_ns))
            self._not_yet_ns = self._looked_ns
        self._tsc, self._looked_ns = tsc, before_ns
        return anchor


@dataclass(slots=True)
class _Line:
    """Anchors between which the TSC ran evenly, from `first_tsc` on."""

    first_tsc: int
    recent: deque[Anchor] = field(default_factory=lambda: deque(maxlen=_RECENT))
    bases: deque[Anchor] = field(default_factory=lambda: deque(maxlen=_BASES))

    def add(self, anchor: Anchor) -> None:
        if not self.bases or anchor.at.low - self.bases[-1].at.high > _BASE_EVERY_NS:
            self.bases.append(anchor)
        elif self.bases[-1].at.width > _MUCH * anchor.at.width:
            self.bases[-1] = anchor  # a wide one, as on a busy host, tells the rate after long only
        if (
            len(self.recent) > _STRAIGHT
            and self.recent[-1].at.width > _MUCH * self.recent[-2].at.width
        ):
            self.recent.pop()  # it tells little beside its neighbours, which should last
        self.recent.append(anchor)

    @property
    def straight(self) -> bool:
        """Three anchors or more, and all agree with a line through the first and the last."""
        if len(self.recent) < _STRAIGHT:
            return False
        first, last = self.recent[0], self.recent[-1]
        slack = (last.at.high - first.at.low) * _DRIFT
        for anchor in self.recent:
            part = (anchor.tsc - first.tsc) / (last.tsc - first.tsc)
            low = first.at.low + (last.at.low - first.at.low) * part - slack
            high = first.at.high + (last.at.high - first.at.high) * part + slack
            if anchor.at.high < low or anchor.at.low > high:
                return False
        return True

    def rate(self) -> tuple[float, float] | None:
        """Bounds of the ticks per ns: those of the pair of anchors that tells most."""
        last = self.recent[-1]
        best: tuple[float, float] | None = None
        for first in (*self.bases, *self.recent):
            ticks = last.tsc - first.tsc
            least = last.at.low - first.at.high
            if ticks <= 0 or least <= 0:
                continue
            found = (ticks / (last.at.high - first.at.low), ticks / least)
            if best is None or found[1] / found[0] < best[1] / best[0]:
                best = found
        return best

    def map(self, tsc: int, slow: float, fast: float) -> Bounds:
        """Where all recent anchors agree that `tsc` was; where they do not, what the nearest say.

        `slow` and `fast` are the bounds of the rate.
        """
        found = [anchor.reach(tsc, slow, fast) for anchor in self.recent]
        low, high = max(b.low for b in found), min(b.high for b in found)
        if low <= high:
            return Bounds(low, high)
        nearest = min(range(len(found)), key=lambda i: abs(tsc - self.recent[i].tsc))
        return found[nearest]


class BeatClock:
    """Maps a TSC to CLOCK_MONOTONIC.

    The line before the present one is kept: a gap may have begun on it.
    """

    def __init__(self) -> None:
        self._lines: deque[_Line] = deque(maxlen=2)
        self._rate: tuple[float, float] | None = None  # bounds of the ticks per ns, when known well

    @property
    def ready(self) -> bool:
        """The rate is known well enough to map anything."""
        return self._rate is not None

    @property
    def latest_tsc(self) -> int | None:
        """The TSC of the latest anchor."""
        return self._lines[-1].recent[-1].tsc if self._lines else None

    def add(self, anchor: Anchor) -> int:
        """Take an anchor; one that is not later than the latest tells nothing new.

        Returns by how many ns, at least, CLOCK_MONOTONIC moved on while the TSC did not (less than
        0: the TSC was set forward), 0 when it lies on the line.
        """
        latest = self.latest_tsc
        if latest is not None and anchor.tsc <= latest:
            return 0
        step = 0
        if self._lines and self._rate is not None:
            expected = self._lines[-1].map(anchor.tsc, *self._rate)
            if anchor.at.low > expected.high:
                step = anchor.at.low - expected.high
            elif anchor.at.high < expected.low:
                step = anchor.at.high - expected.low
        if not self._lines or step:
            self._lines.append(_Line(anchor.tsc))
        line = self._lines[-1]
        line.add(anchor)
        if line.straight:
            # A new line goes by the rate of the one before until its own is known as well.
            limit = _READY if self._rate is None else max(_error(self._rate), _READY / 10)
            rate = line.rate()
            if rate is not None and _error(rate) <= limit:
                self._rate = rate
        elif self._rate is None and len(line.recent) >= _STRAIGHT:
            self._lines.clear()  # it broke before it was known
        return step

    def locate(self, tsc: int) -> Bounds:
        """When the TSC had this value.  ValueError unless `ready`."""
        rate = self._known_rate()
        line = self._lines[-1]
        if len(self._lines) == 1 or tsc >= line.first_tsc:
            return line.map(tsc, *rate)
        older = self._lines[0]
        before = older.map(tsc, *rate)
        if tsc <= older.recent[-1].tsc:
            return before
        # Between the two lines: which of them held is not known.
        after = line.map(tsc, *rate)
        return Bounds(min(before.low, after.low), max(before.high, after.high))

    def not_before(self, tsc: int) -> int:
        """A moment before which the TSC had not reached this value; `locate` costs more.

        ValueError unless `ready`.
        """
        return self._lines[-1].recent[-1].reach(tsc, *self._known_rate()).low

    def length(self, ticks: int) -> Bounds:
        """How long so many ticks take.  ValueError unless `ready`."""
        slow, fast = self._known_rate()
        return Bounds(floor(ticks / fast), ceil(ticks / slow))

    def window(self, end_tsc: int, ticks: int, beat_ticks: int, over_ns: int) -> GapWindow:
        """A gap of `ticks` that ended at `end_tsc`, of which the CPU was at work for one beat.

        At `over_ns` it was seen to be over.  ValueError unless `ready`.
        """
        start, end = self.locate(end_tsc - ticks), self.locate(end_tsc)
        end = Bounds(min(end.low, over_ns), min(end.high, over_ns))
        whole = max(0, end.high - start.low)
        at_least, at_most = end.low - start.high, whole
        if not self._broken(end_tsc - ticks, end_tsc):
            length = self.length(ticks)
            at_least, at_most = max(at_least, length.low), min(at_most, length.high)
        at_least -= self.length(beat_ticks).high
        return GapWindow(start.low, start.low + whole, max(0, min(at_least, at_most)), at_most)

    def _broken(self, start_tsc: int, end_tsc: int) -> bool:
        """The line broke somewhere in between, so the ticks do not tell the length."""
        if len(self._lines) < 2:
            return False
        older, line = self._lines
        return start_tsc < line.first_tsc and end_tsc > older.recent[-1].tsc

    def _known_rate(self) -> tuple[float, float]:
        if self._rate is None:
            raise ValueError("the clock is not ready")
        return self._rate


def _error(rate: tuple[float, float]) -> float:
    return rate[1] / rate[0] - 1
