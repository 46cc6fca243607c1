"""From samples of a thread to the windows in which it did not do its work.  Pure.

A sample says what a thread was doing at some moment within `[before_ns, after_ns)`, and its
schedule: time on a CPU, time ready to run without one, how often it was given one.  As long as that
count stays what it was, a thread that slept has slept on.  That proves more than states do:

- A thread that slept before and after, and was given a CPU once in between, was awake in one piece,
  for just the time that its schedule says: even when no sample fell into it.
- Two samples of a thread at work belong to one piece of work when it slept all the time between
  them, or was awake all the time, or slept deep in a task at both and they are close.  Else it may
  have rested in between: then only the longest piece counts for `at_least_ns`, and all of it for
  `at_most_ns`.
- What it waited for a CPU is the host scheduler's doing, exactly so long (`HostWait`).

A main loop that goes round without ever resting looks as one that is busy with a single task.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..model import HostWait
from .states import Activity, Schedule

__all__ = ["LOOP_BUSY", "RESOLUTION_NS", "Finder", "Busy", "Sample", "VCPU_BUSY"]

RESOLUTION_NS = 2_000_000
PROVEN_NS = 500_000
"""So much must be proven of a window that is told; and its middle must be half the resolution."""
WAIT_NS = 50_000
"""Shorter waits for a CPU play no part."""
ACCOUNT_NS = 50_000
"""What a turn without work takes: to be woken, to look at events, to sleep again."""
_NEAR_NS = 3_000_000
"""Two samples of one stall are as close as this, or as a twentieth of it."""
_TURN_NS = 400_000
"""A thread that is awake loses its CPU no more often than this for long, our looks included."""

LOOP_BUSY = frozenset(Activity) - {Activity.RESTS}
VCPU_BUSY = frozenset({Activity.LOCK, Activity.BLOCKED, Activity.HELD})


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read of a thread.  `deep`: it sleeps within a task, and not where its loop waits."""

    before_ns: int
    after_ns: int
    activity: Activity
    schedule: Schedule
    what: str | None = None
    deep: bool = False


@dataclass(frozen=True, slots=True)
class Busy:
    """A window: inside `[start_ns, end_ns)`, how long is bracketed; `what` it was doing.

    `over` is False when it went on at `end_ns`.
    """

    start_ns: int
    end_ns: int
    at_least_ns: int
    at_most_ns: int
    what: str | None
    over: bool


@dataclass(slots=True)
class _Open:
    start_ns: int
    base: Schedule | None
    first: Sample
    last: Sample
    known_ns: int  # until when it is known to have gone on
    since_ns: int  # since when in one piece
    longest_ns: int = 0
    deep_since_ns: int = 0  # the piece in which it was last seen deep in a task
    deep_known_ns: int = -(1 << 62)
    seen: Counter[str | None] = field(default_factory=Counter)

    def note(self, sample: Sample) -> None:
        """The latest sample of it."""
        self.last = sample
        self.seen[sample.what] += 1
        if sample.deep:
            self.deep_since_ns, self.deep_known_ns = self.since_ns, self.known_ns

    def extend(self, at_ns: int) -> None:
        """It went on until then, in one piece."""
        self.known_ns = max(self.known_ns, at_ns)
        if self.last.deep:
            self.deep_known_ns = self.known_ns
        self.longest_ns = max(self.longest_ns, self.known_ns - self.since_ns)


class Finder:
    """Takes the samples of one thread in order.

    `busy` are the activities that make a window.  `counts_awake`: to be awake is one of them, so
    the schedule tells of those that no sample met.
    """

    def __init__(self, busy: frozenset[Activity]) -> None:
        self._busy = busy
        self._counts_awake = Activity.AWAKE in busy
        self._last: Sample | None = None
        self._known_ns = 0  # the last sample still held at this moment
        self._sure_ns = 0  # not busy at this moment for certain, though it may have waited since
        self._open: _Open | None = None

    @property
    def open(self) -> bool:
        """A window has begun and is not over."""
        return self._open is not None

    @property
    def open_since_ns(self) -> int | None:
        """When it began, at the latest."""
        return None if self._open is None else self._open.first.after_ns

    def still(self, at_ns: int) -> None:
        """It sleeps and its schedule is what it was: it has not run since the last sample."""
        self._known_ns = at_ns
        if self._open is not None:
            self._open.extend(at_ns)

    def waited(self, sample: Sample) -> HostWait | None:
        """How long it waited for a CPU since the last sample; call it before `take`."""
        if self._last is None:
            return None
        waited = sample.schedule.waited_ns - self._last.schedule.waited_ns
        times = sample.schedule.times - self._last.schedule.times
        if waited < WAIT_NS or times < 1:
            return None
        start = max(self._last.before_ns, self._known_ns) - waited
        return HostWait(start, sample.after_ns, waited, times)

    def take(self, sample: Sample) -> Busy | None:
        """The next sample; gives the window that is over by it, if it is worth telling."""
        last, self._last = self._last, sample
        known = self._known_ns
        self._known_ns = sample.before_ns
        busy = sample.activity in self._busy
        if self._open is not None:
            if busy:
                self._go_on(self._open, sample)
                return None
            return self._close(self._open, sample)
        if not busy:
            found = None
            if self._counts_awake and last is not None:
                found = self._between(last, sample, known)
            self._sure_ns = sample.before_ns
            return found
        if last is None:
            start, base = sample.before_ns, None
        else:
            start, base = self._since(last, sample, known), last.schedule
        self._open = _Open(start, base, sample, sample, sample.before_ns, sample.after_ns)
        self._open.note(sample)
        return None

    def end(self, at_ns: int) -> Busy | None:
        """No more samples come; what goes on is told as far as it is known."""
        opened, self._open = self._open, None
        if opened is None:
            return None
        end = max(at_ns, opened.known_ns)
        at_least = opened.longest_ns
        return _told(opened.start_ns, end, at_least, opened.seen, over=False)

    # -- the rules -----------------------------------------------------------------------------

    def _since(self, last: Sample, sample: Sample, known_ns: int) -> int:
        """When it can have begun: it may have waited for a CPU while it seemed to sleep."""
        waited = 0
        if self._counts_awake:
            waited = sample.schedule.waited_ns - last.schedule.waited_ns
        return max(known_ns - max(0, waited), min(self._sure_ns, known_ns))

    def _go_on(self, opened: _Open, sample: Sample) -> None:
        near = max(_NEAR_NS, (sample.before_ns - opened.first.after_ns) // 20)
        if sample.deep and sample.after_ns - opened.deep_known_ns <= near:
            # it slept in a task at both, so shortly after each other that they are taken for one
            opened.since_ns = min(opened.since_ns, opened.deep_since_ns)
            opened.extend(sample.before_ns)
        elif _one_piece(opened.last, sample, opened.known_ns, near):
            opened.extend(sample.before_ns)
        else:
            opened.since_ns = sample.after_ns
            opened.known_ns = max(opened.known_ns, sample.before_ns)
        opened.note(sample)

    def _close(self, opened: _Open, sample: Sample) -> Busy | None:
        self._open = None
        self._sure_ns = sample.before_ns
        at_least = opened.longest_ns
        if self._counts_awake and opened.base is not None:
            at_least = max(at_least, self._accounted(opened, opened.base, sample))
        return _told(opened.start_ns, sample.after_ns, at_least, opened.seen, over=True)

    def _accounted(self, opened: _Open, base: Schedule, sample: Sample) -> int:
        """What the schedule proves of a window at whose both ends the thread slept."""
        awake, times = _awake(base, sample.schedule)
        if times == 1:
            return awake - ACCOUNT_NS
        span = opened.known_ns - opened.first.after_ns
        ends = sample.after_ns - opened.start_ns - span
        slept = sample.after_ns - opened.start_ns - awake
        if slept <= ends + span // 10 and times <= 2 + span // _TURN_NS:
            return min(span, awake)
        return awake // max(1, times) - ACCOUNT_NS

    def _between(self, last: Sample, sample: Sample, known_ns: int) -> Busy | None:
        """It rested at both, and may have worked in between."""
        awake, times = _awake(last.schedule, sample.schedule)
        if times < 1 or awake // times < RESOLUTION_NS // 2:
            return None
        start = self._since(last, sample, known_ns)
        return _told(start, sample.after_ns, awake // times - ACCOUNT_NS, Counter(), over=True)


def _awake(before: Schedule, after: Schedule) -> tuple[int, int]:
    """How long a thread was awake, and how often it was given a CPU meanwhile."""
    cpu = after.cpu_ns - before.cpu_ns + after.waited_ns - before.waited_ns
    return max(0, cpu), after.times - before.times


def _one_piece(one: Sample, other: Sample, known_ns: int, near_ns: int) -> bool:
    """Between two samples at work there was no rest; the first still held at `known_ns`."""
    awake, times = _awake(one.schedule, other.schedule)
    if times == 0:
        return True
    if other.after_ns - known_ns > near_ns:
        return False
    slept = other.after_ns - known_ns - awake
    return times <= 2 and slept * 10 <= (other.before_ns - known_ns) * 3


def _told(
    start_ns: int, end_ns: int, at_least_ns: int, seen: Counter[str | None], *, over: bool
) -> Busy | None:
    """The window, when it is worth telling."""
    at_most = end_ns - start_ns
    at_least = min(max(0, at_least_ns), at_most)
    if at_least < PROVEN_NS or (at_least + at_most) < RESOLUTION_NS:
        return None
    what = seen.most_common(1)[0][0] if seen else None
    return Busy(start_ns, end_ns, at_least, at_most, what, over)
