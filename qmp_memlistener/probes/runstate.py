"""The `runstate` probe: from STOP to RESUME, as QEMU's own events tell.

Needs nothing.  QEMU stamps each event with its realtime clock in microseconds (qapi/qmp-event.c);
`StopClock` maps that to CLOCK_MONOTONIC and says how sure it is.  It is pure.

STOP is sent when all vCPUs have been paused (do_vm_stop, cpus.c), RESUME just before they are let
go (vm_prepare_start): a vCPU is paused a little longer than the window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..qmp import MonitorEvent
from ..qmp.guest import try_status
from .delivery import Progress
from .model import Context, Observation, ProbeInfo, ProbeUnavailable, Sink, StallKind, Verdict

__all__ = ["Moment", "Offset", "RunStateProbe", "StopClock", "read_offset"]

_DEADLINE_S = 2.0
_LAG_NS = 50_000_000
_STAMP_NS = 1_000
"""A stamp is cut to microseconds."""
_CLOCK_TRIES = 5


@dataclass(frozen=True, slots=True)
class Offset:
    """CLOCK_REALTIME less CLOCK_MONOTONIC lies in `[low_ns, high_ns]`.  Only steps change it."""

    low_ns: int
    high_ns: int

    def with_(self, other: Offset) -> Offset:
        """The two taken together."""
        return Offset(min(self.low_ns, other.low_ns), max(self.high_ns, other.high_ns))


@dataclass(frozen=True, slots=True)
class Moment:
    """Something happened in `[low_ns, high_ns]`, on CLOCK_MONOTONIC.

    `stamp_ns` is QEMU's own time of it, on its realtime clock, None when it gave none; `offset` is
    that of the clocks around then.
    """

    low_ns: int
    high_ns: int
    stamp_ns: int | None
    offset: Offset


class StopClock:
    """When events happened, from their stamps.

    `same_host`: QEMU reads the clock that we read.  Otherwise stamps only tell how far two events
    lie apart, and its clock is taken not to be set while the guest is paused.
    """

    def __init__(self, offset: Offset, *, same_host: bool) -> None:
        self._offset = offset
        self._same_host = same_host

    def refresh(self, offset: Offset) -> None:
        """What the offset is now; nothing that happened before is outstanding."""
        self._offset = offset

    def moment(
        self, stamp_ns: int | None, arrived_ns: int, not_before_ns: int, offset: Offset
    ) -> Moment:
        """When an event happened that arrived at `arrived_ns`.

        It had not happened at `not_before_ns`.  `offset` is as of its arrival; it lies between that
        and the last `refresh`.  A stamp that contradicts the other two is not believed.
        """
        offset = offset.with_(self._offset)
        low, high = min(not_before_ns, arrived_ns), arrived_ns
        if stamp_ns is not None and self._same_host:
            stamp_low = stamp_ns - offset.high_ns
            stamp_high = stamp_ns + _STAMP_NS - offset.low_ns
            if stamp_low <= high and stamp_high >= low:
                low, high = max(low, stamp_low), min(high, stamp_high)
            else:
                stamp_ns = None
        return Moment(low, high, stamp_ns, offset)

    def apart(self, stop: Moment, resume: Moment) -> tuple[int, int]:
        """How long between the two, at least and at most.

        By their moments, and narrower by the difference of their stamps: one clock made both, so
        its offset cancels out, but for what it moved in between.
        """
        low = max(0, resume.low_ns - stop.high_ns)
        high = max(low, resume.high_ns - stop.low_ns)
        if stop.stamp_ns is not None and resume.stamp_ns is not None:
            both = stop.offset.with_(resume.offset)
            moved = both.high_ns - both.low_ns + _STAMP_NS
            between = resume.stamp_ns - stop.stamp_ns
            if low <= between + moved and between - moved <= high:
                return max(low, between - moved), min(high, between + moved)
        return low, high


def read_offset() -> Offset:
    """The two clocks of this host, read as close together as a few tries allow."""
    best: Offset | None = None
    for _ in range(_CLOCK_TRIES):
        before = time.monotonic_ns()
        real = time.time_ns()
        after = time.monotonic_ns()
        found = Offset(real - after, real - before)
        if best is None or found.high_ns - found.low_ns < best.high_ns - best.low_ns:
            best = found
    assert best is not None
    return best


class RunStateProbe:
    """Delivers one `vcpu_pause` for each time the guest was stopped and resumed.

    The bracket holds the error of the clocks.  A guest that is stopped when the probe starts is
    reported when it resumes, as if it had been stopped then (with a note); one that is still
    stopped when the probe stops, up to then.
    """

    info = ProbeInfo(
        name="runstate",
        measures=(StallKind.VCPU_PAUSE,),
        needs="nothing",
        resolution_ns=10_000,
        cost="nothing",
        share=0.0,
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._progress = Progress(self._tell)
        self._clock = StopClock(read_offset(), same_host=context.pid is not None)
        self._sink: Sink | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._running_ns = 0
        self._seen_ns = 0
        self._event_ns = 0
        self._stopped: Moment | None = None
        self._since_before = False

    async def check(self) -> Verdict:
        """Every QEMU sends these events."""
        return Verdict(True)

    async def start(self, sink: Sink) -> None:
        """Listen, then ask whether the guest runs."""
        if not self._context.monitor.is_connected:
            raise ProbeUnavailable(f"the connection to {self._context.monitor.target} is closed")
        self._sink = sink
        self._running_ns = self._seen_ns = time.monotonic_ns()
        self._unsubscribe = self._context.monitor.subscribe(self._take)
        try:
            await self._ask_first()
        except BaseException:
            await self.stop()
            raise
        self._progress.start()

    async def burst(self, on: bool) -> None:
        """Nothing to do: no event is missed."""

    async def flush(self) -> None:
        """When an answer has come, so have all events before it."""
        called_ns = time.monotonic_ns()
        await try_status(self._context.monitor, deadline=_DEADLINE_S)
        if self._sink is not None:
            self._sink.advance(self.info.name, called_ns)

    async def stop(self) -> None:
        """A guest that is still paused is reported as far as it is known."""
        self._progress.stop()
        try:
            if self._stopped is not None and not self._since_before:
                await try_status(self._context.monitor, deadline=_DEADLINE_S)
            self._report_open()
        finally:
            self._sink = None
            unsubscribe, self._unsubscribe = self._unsubscribe, None
            if unsubscribe is not None:
                unsubscribe()

    # -- inside ------------------------------------------------------------------------------

    async def _ask_first(self) -> None:
        asked_ns = time.monotonic_ns()
        status = await try_status(self._context.monitor, deadline=_DEADLINE_S)
        running = self._context.facts.running if status is None else status.running
        now = time.monotonic_ns()
        # an event since we asked knows better
        if running is False and self._event_ns < asked_ns:
            self._stopped = Moment(asked_ns, now, None, read_offset())
            self._since_before = True

    def _take(self, event: MonitorEvent) -> None:
        if event.name not in ("STOP", "RESUME") or self._sink is None:
            return
        self._event_ns = event.t_ns
        not_before = self._running_ns if self._stopped is None else self._stopped.low_ns
        moment = self._clock.moment(event.stamp_ns, event.t_ns, not_before, read_offset())
        if event.name == "STOP":
            self._stopped = self._stopped or moment
            return
        self._running_ns = moment.low_ns
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            if self._since_before:
                self._sink.note("the guest had been stopped since before the probe began to watch")
                self._since_before = False
            self._deliver(stopped, moment)

    def _deliver(self, stopped: Moment, resumed: Moment) -> None:
        assert self._sink is not None
        start, end = stopped.low_ns, max(stopped.low_ns, resumed.high_ns)
        at_least, at_most = self._clock.apart(stopped, resumed)
        at_most = min(at_most, end - start)
        self._sink.observe(
            [
                Observation(
                    kind=StallKind.VCPU_PAUSE,
                    start_ns=start,
                    end_ns=end,
                    at_least_ns=min(at_least, at_most),
                    at_most_ns=at_most,
                    probe=self.info.name,
                )
            ]
        )

    def _report_open(self) -> None:
        """Stopped, and not resumed as far as we know: until now, or until QEMU went away."""
        stopped, self._stopped = self._stopped, None
        if stopped is None or self._since_before or self._sink is None:
            return
        connected = self._context.monitor.is_connected
        until = time.monotonic_ns() if connected else max(self._seen_ns, stopped.high_ns)
        self._sink.note("the guest is still stopped: the pause is reported up to now")
        self._deliver(stopped, Moment(until, until, None, stopped.offset))

    def _tell(self) -> None:
        if self._sink is None or not self._context.monitor.is_connected:
            return
        self._seen_ns = time.monotonic_ns()
        self._clock.refresh(read_offset())
        self._sink.advance(self.info.name, self._seen_ns - _LAG_NS)
