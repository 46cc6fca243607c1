"""From pings to stall windows of QEMU's main loop, each with its bracket.  Pure.

A ping is two commands in one write: an out-of-band one, which the monitor's own thread answers at
once, and an in-band one, which waits for the main loop (monitor_qmp_dispatcher_co, monitor/qmp.c).

What is certain about a stall that a ping ran into:

- *It began after the previous answer was sent*, because the main loop itself sends that answer.
  So it lies between the last moment at which the previous answer was not there yet and the moment
  at which this one was: `at_most_ns` is the whole of that.
- *It lasted while the request was in QEMU and unanswered*: from the out-of-band answer, which
  QEMU sends before it queues the in-band request, to the last time the socket was found empty.
  Less what an idle main loop takes for a request (`Baseline.usual_ns`), and a little
  for catching up (`_CATCH_UP_NS`), that is `at_least_ns`.

Looking at the socket again and again while an answer is late is what keeps our own lateness out of
`at_least_ns`: the host may wake us late, and another thread may hold the interpreter's lock.  A
late out-of-band answer does the same for QEMU's process.  `estimate_ns` is the middle: a stall
begins anywhere between two pings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["RESOLUTION_NS", "Baseline", "Pace", "Ping", "LoopStall", "StallFinder"]

RESOLUTION_NS = 3_000_000

_WINDOW = 256
_PROVEN_NS = 1_000_000
"""What must be proven of a stall; the rest of the resolution goes to the time between two pings,
to how often a late answer is looked for, and to catching up."""
_CATCH_UP_NS = 800_000
"""After a stall the main loop has other things to do first, and the request may have been there a
moment before the stall began."""
_SILENT_NS = 5_000_000
"""How long all of QEMU has to be silent: on a busy host any process waits for a CPU at times."""
_ACCEPTED_NS = 1_000_000
"""An answer later than usual by more than this says nothing about an idle main loop."""
_STREAK = 64
_SETTLE_EVERY = 16


@dataclass(frozen=True, slots=True)
class Ping:
    """The moments of one ping.

    `begun_ns` is before the write and `sent_ns` after it; `oob_ns` is when the out-of-band answer
    was read, None when there was none; at `empty_ns` the in-band answer was not there yet; at
    `answered_ns` it had been read, None when it never came.
    """

    begun_ns: int
    sent_ns: int
    oob_ns: int | None
    empty_ns: int
    answered_ns: int | None

    @property
    def queued_ns(self) -> int:
        """The request reached the main loop's queue at about this moment, not earlier."""
        return self.sent_ns if self.oob_ns is None else self.oob_ns


@dataclass(frozen=True, slots=True)
class LoopStall:
    """The main loop did not answer for a while: inside `[start_ns, end_ns)`, how long is bracketed.

    `whole`: the monitor's own thread did not answer either, so all of QEMU may have stood still.
    `over` is False when the answer had not come by `end_ns`; then it may have been longer.
    """

    start_ns: int
    end_ns: int
    at_least_ns: int
    at_most_ns: int
    whole: bool
    over: bool

    @property
    def estimate_ns(self) -> int:
        """The middle of the bracket."""
        return (self.at_least_ns + self.at_most_ns) // 2


class Baseline:
    """How late an idle main loop answers: the last few hundred answers that were not stalls."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=_WINDOW)
        self._late: list[int] = []
        self._unsettled = 0
        self.median_ns = 0
        self.usual_ns = 0
        self.round_trip_ns = 0

    def calibrate(self, pings: Iterable[Ping]) -> None:
        """Begin with these; a stall among them does not matter as long as most are none."""
        answered = sorted((p for p in pings if p.answered_ns is not None), key=_latency)
        if not answered:
            return
        times = [_latency(p) for p in answered]
        middle = times[len(times) // 2]
        self.round_trip_ns = _round_trip(answered[len(times) // 2])
        self._recent.extend(t for t in times if t <= middle + _ACCEPTED_NS)
        self._settle()

    def add(self, ping: Ping) -> bool:
        """Take in one answered ping; True when the whole baseline had to be raised.

        A late answer does not move the baseline.  Only when dozens in a row are all late is it the
        guest's new usual, and the quickest quarter of them the new baseline.
        """
        latency, round_trip = _latency(ping), _round_trip(ping)
        if not self._recent or latency <= self.median_ns + _ACCEPTED_NS:
            self._recent.append(latency)
            self._late.clear()
            # it only paces the pings: to ease towards the last ones is good enough
            self.round_trip_ns += (round_trip - self.round_trip_ns) // 8
            self._unsettled += 1
            if self._unsettled >= _SETTLE_EVERY or len(self._recent) < _SETTLE_EVERY:
                self._settle()
            return False
        self._late.append(latency)
        if len(self._late) < _STREAK:
            return False
        self._late.sort()
        self._recent.clear()
        self._recent.extend(self._late[: _STREAK // 4])
        self._late.clear()
        self._settle()
        return True

    def _settle(self) -> None:
        self._unsettled = 0
        times = sorted(self._recent)
        self.median_ns = times[len(times) // 2]
        self.usual_ns = times[(len(times) * 98) // 100]


class StallFinder:
    """Takes pings in order and gives the stalls they ran into."""

    def __init__(self) -> None:
        self.baseline = Baseline()
        self.raised = 0
        self._before: Ping | None = None

    def calibrate(self, pings: Iterable[Ping]) -> None:
        """Take the first pings as what is usual.  They have to be given to `take` as well."""
        self.baseline.calibrate(pings)

    def take(self, ping: Ping) -> LoopStall | None:
        """The next ping, answered or, as the last one of all, not."""
        before, self._before = self._before, ping
        found = self._stall(before, ping)
        if ping.answered_ns is not None and self.baseline.add(ping):
            self.raised += 1
        return found

    def _stall(self, before: Ping | None, ping: Ping) -> LoopStall | None:
        usual = self.baseline.usual_ns
        start = ping.begun_ns if before is None else before.empty_ns
        end = ping.empty_ns if ping.answered_ns is None else ping.answered_ns
        proven = ping.empty_ns - ping.queued_ns - usual - _CATCH_UP_NS
        excess = end - ping.queued_ns - self.baseline.median_ns
        silent = ping.empty_ns - ping.sent_ns - usual
        if proven >= _PROVEN_NS and excess >= RESOLUTION_NS - 500_000:
            whole = False
        elif silent >= _SILENT_NS:
            whole = True
        else:
            return None
        at_most = end - start
        return LoopStall(
            start_ns=start,
            end_ns=end,
            at_least_ns=min(max(0, proven), at_most),
            at_most_ns=at_most,
            whole=whole,
            over=ping.answered_ns is not None,
        )


class Pace:
    """How long to wait between two pings.  `burst` may be called from another thread.

    `IDLE_NS` as a rule, `BURST_NS` while an operation runs, and longer by a quarter from ping to
    ping afterwards.  A ping costs QEMU about as much CPU time as its round trip takes (measured
    on 7.2, 10.0, 11.1: 0.22, 0.17, 0.22 ms against 0.22, 0.18, 0.23), so `max_share` of a CPU
    bounds how close they may follow.  A stall longer than `must_see_ns` must not be missed at any
    price: then four pings fall into what exceeds the resolution, and the share is not minded.
    """

    IDLE_NS = 100_000_000
    BURST_NS = 1_000_000

    def __init__(self, max_share: float | None = None, must_see_ns: int | None = None) -> None:
        self._max_share = max_share if must_see_ns is None else None
        self._idle_ns = self.IDLE_NS
        if must_see_ns is not None:
            wanted = (must_see_ns - RESOLUTION_NS) // 4
            self._idle_ns = min(self.IDLE_NS, max(self.BURST_NS, wanted))
        self._bursts = 0
        self._period_ns = self._idle_ns

    def burst(self, on: bool) -> None:
        """An operation begins or ends; they may overlap."""
        self._bursts = max(0, self._bursts + (1 if on else -1))

    def next_ns(self, round_trip_ns: int) -> int:
        """How long to wait after an answer."""
        if self._bursts:
            wait = self._period_ns = self.BURST_NS
        else:
            wait = self._period_ns
            self._period_ns = min(self._idle_ns, wait + wait // 4)
        if self._max_share:
            wait = max(wait, int(round_trip_ns / self._max_share) - round_trip_ns)
        return wait


def _latency(ping: Ping) -> int:
    """From the moment the request was queued to its answer."""
    assert ping.answered_ns is not None
    return ping.answered_ns - ping.queued_ns


def _round_trip(ping: Ping) -> int:
    assert ping.answered_ns is not None
    return ping.answered_ns - ping.begun_ns
