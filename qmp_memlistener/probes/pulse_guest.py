"""A pulse guest as the probe follows it: the new gaps of all its CPUs, at their times.

`GuestFollower.poll` looks at the guest's memory and returns what is new.  It never waits and never
fails: a CPU that does not beat has no news.  When to poll, and where results go, is `pulse`'s
business.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from ..guests import Gap, Heartbeat, PulseMemory, layout
from .model import Observation, StallKind
from .pulse_clock import Anchor, BeatClock, BeatSampler

__all__ = ["SILENT_NS", "GuestFollower", "News"]

SILENT_NS = 1_000_000_000
"""A CPU that has not beaten for so long is not waited for."""

_ANCHOR_EVERY_NS = 100_000_000
_TIGHT_NS = 200_000  # width of an anchor that will do
_GOOD_NS = 40_000  # and of one that is not to be improved upon
# how long a CPU is looked at for one: this takes another's place on a busy host, so it is less than
# the gaps that are looked for, and only when one is needed badly not much less
_SERIES_NS = 100_000
_LONG_SERIES_NS = 300_000
_PATIENCE_NS = 5_000_000_000  # gaps whose time is unknown by then are given up
_STEPS_EVERY_NS = 10_000_000_000  # between two notes that the TSC left its line


@dataclass(slots=True)
class News:
    """What a poll found.

    `complete_ns`: every gap that ended before has been reported.  `fresh` is how many new gaps the
    fullest ring held, `lost` how many by CPU were overwritten or have no time.  `tells`: the times
    of gaps is known.
    """

    gaps: list[Observation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: dict[int, int] = field(default_factory=dict)
    fresh: int = 0
    complete_ns: int = 0
    tells: bool = False

    def lose(self, cpu: int, count: int) -> None:
        if count:
            self.lost[cpu] = self.lost.get(cpu, 0) + count


class _Cpu:
    """One CPU's ring and beats."""

    def __init__(self, memory: PulseMemory, cpu: int, *, from_start: bool) -> None:
        self.cpu = cpu
        self.beat: Heartbeat | None = None
        self.sampler = BeatSampler()
        self.read_tsc = memory.tsc_reader(cpu)
        self.beaten_ns = time.monotonic_ns()
        self.beats_now = False
        self.was_set_back = False  # its TSC, since the look before
        self.tsc_epoch = 0
        self.fresh: list[tuple[int, Gap]] = []  # when found, and the gap
        self.pending: deque[tuple[int, Gap]] = deque()
        self._memory = memory
        self._from_start = from_start
        self._beat_ticks: deque[float] = deque(maxlen=15)

    @property
    def beat_ticks(self) -> int:
        """What a heartbeat usually takes."""
        return round(median(self._beat_ticks)) if self._beat_ticks else 0

    def look(self, news: News) -> Heartbeat | None:
        """Read the gaps that are new; None when the CPU's statistics are just beginning anew.

        They do so when somebody commands it and when the guest boots; the time at which they began
        tells one beginning from another.
        """
        last = self.beat
        look = self._memory.look(self.cpu, last.gaps if last is not None else 0)
        if look is None or not look.beat.last_tsc:
            return None
        beat, gaps, lost = look.beat, look.gaps, look.lost
        if last is None:
            if not self._from_start:
                gaps, lost = (), 0
        elif beat.reset_tsc != last.reset_tsc:
            again = self._memory.look(self.cpu)
            if again is None or again.beat.reset_tsc != beat.reset_tsc or not again.beat.last_tsc:
                return None
            beat, lost = again.beat, again.lost
            gaps = self._memory.gaps_before_restart(self.cpu, last, beat.reset_tsc) + again.gaps
            self.read_tsc = self._memory.tsc_reader(self.cpu)
        elif beat.gaps < last.gaps:
            return None
        now = time.monotonic_ns()
        self.beats_now = last is None or beat.last_tsc != last.last_tsc
        if self.beats_now:
            self.beaten_ns = now
        if last is not None and beat.count > last.count and beat.last_tsc > last.last_tsc:
            per_beat = (beat.last_tsc - last.last_tsc) / (beat.count - last.count)
            self._beat_ticks.append(per_beat)
        self.was_set_back = last is not None and beat.last_tsc < last.last_tsc
        self.beat = beat
        news.fresh = max(news.fresh, len(gaps) + lost)
        news.lose(self.cpu, lost)
        # What a guest writes may be anything.
        self.fresh = [(now, gap) for gap in gaps if gap.ticks <= gap.end_tsc]
        return beat

    def series(self, lasting_ns: int) -> Anchor | None:
        """Quick looks until the CPU has beaten often enough for a good anchor; else the best one.

        None when it does not beat, as where our own thread has taken its place on the host.
        """
        look, read, clock = self.sampler.look, self.read_tsc, time.monotonic_ns
        best: Anchor | None = None
        now = clock()
        until = now + lasting_ns
        while now < until:
            began = now
            tsc = read()
            now = clock()
            anchor = look(began, tsc, now)
            if anchor is None or anchor.at.width >= (best.at.width if best else _TIGHT_NS):
                continue
            best = anchor
            if best.at.width <= _GOOD_NS:
                break
        return best


class GuestFollower:
    """Follows the guest from now on, also over its next boots.

    All CPUs have one clock: KVM keeps the TSCs of a guest together (kvm_synchronize_tsc,
    arch/x86/kvm/x86.c), and TCG has one for all (cpu_get_ticks).
    """

    def __init__(self, memory: PulseMemory, probe: str) -> None:
        self._memory = memory
        self._probe = probe
        self._cpus: list[_Cpu] = []
        self._boots: int | None = None
        self._clock = BeatClock()
        self._tsc_epoch = 0
        self._anchored_ns = 0  # when there was a tight anchor
        self._wide_ns = 0  # and one that was not
        self._steps: list[int] = []
        self._steps_said_ns = -_STEPS_EVERY_NS
        self._best = 0  # the CPU whose heartbeats were seen last in a series
        self._thresholds: dict[int, int] = {}

    def poll(self, *, final: bool = False) -> News:
        """Look at every CPU once.  `final`: there will be no further look."""
        news = News()
        there = self._find_cpus(news)
        start = time.monotonic_ns()
        last: dict[int, int] = {}
        for cpu in self._cpus if there else ():
            began = time.monotonic_ns()
            beat = cpu.look(news)
            ended = time.monotonic_ns()
            if beat is None:
                continue
            if cpu.was_set_back:
                self._set_back(cpu, news)
            cpu.pending.extend(cpu.fresh)
            last[cpu.cpu] = beat.last_tsc
            self._take(cpu.sampler.look(began, beat.last_tsc, ended))
        if there:
            self._calibrate()
        for cpu in self._cpus:
            self._map(cpu, final, news)
        news.complete_ns = self._complete(start, last)
        self._tell_steps(start, final, news)
        news.tells = there and bool(self._cpus) and self._clock.ready
        if self._clock.ready:
            self._tell_thresholds(news)
        return news

    def _find_cpus(self, news: News) -> bool:
        """Begin with CPUs that are new; False while there is no pulse guest in the memory."""
        header = self._memory.header()
        if header is None or not header.ready:
            return header is not None
        first = self._boots is None
        if self._boots not in (None, header.boots):
            news.notes.append(f"the pulse guest booted again, boot number {header.boots}")
        self._boots = header.boots
        for cpu in range(len(self._cpus), min(header.live_cpus, layout.MAX_CPUS)):
            self._cpus.append(_Cpu(self._memory, cpu, from_start=not first))
        return True

    def _calibrate(self) -> None:
        """Get an anchor when one is due: now and then, and after each gap."""
        latest = self._clock.latest_tsc or 0
        waiting = any(cpu.pending and cpu.pending[-1][1].end_tsc > latest for cpu in self._cpus)
        now = time.monotonic_ns()
        if self._clock.ready and not waiting and now - self._anchored_ns < _ANCHOR_EVERY_NS:
            return
        badly = not self._clock.ready or now - self._anchored_ns > 2 * _ANCHOR_EVERY_NS
        beating = [cpu for cpu in self._cpus if cpu.beats_now]
        for cpu in sorted(beating, key=lambda cpu: cpu.cpu != self._best):
            anchor = cpu.series(_LONG_SERIES_NS if badly else _SERIES_NS)
            if anchor is not None:
                self._best = cpu.cpu
                self._take(anchor)
                return

    def _take(self, anchor: Anchor | None) -> None:
        """Give the clock an anchor that is tight, or any when there has been none for long."""
        if anchor is None:
            return
        now = anchor.at.high
        if anchor.at.width <= _TIGHT_NS:
            self._anchored_ns = now
        elif now - max(self._anchored_ns, self._wide_ns) < 2 * _ANCHOR_EVERY_NS:
            return
        else:
            self._wide_ns = now
        step = self._clock.add(anchor)
        if step:
            self._steps.append(step)

    def _tell_steps(self, now_ns: int, final: bool, news: News) -> None:
        """Say that the TSC left its line; under TCG on a busy host it may do so often."""
        due = final or now_ns - self._steps_said_ns >= _STEPS_EVERY_NS
        if not self._steps or not due:
            return
        told = []
        for what, steps in (
            ("stopped for", [step for step in self._steps if step > 0]),
            ("went ahead by", [-step for step in self._steps if step < 0]),
        ):
            if steps:
                times = f" in {len(steps)} steps" if len(steps) > 1 else ""
                told.append(f"{what} {sum(steps) / 1e6:.1f} ms{times}")
        news.notes.append(
            f"the guest's TSC {' and '.join(told)}; gaps since then are timed by a new calibration"
        )
        self._steps_said_ns = now_ns
        self._steps.clear()

    def _set_back(self, cpu: _Cpu, news: News) -> None:
        """A CPU's TSC began anew, as at a reset under TCG: so do, or did, those of the others.

        What is pending is dated by the clock as it was.
        """
        if cpu.tsc_epoch == self._tsc_epoch:
            for any_cpu in self._cpus:
                self._map(any_cpu, True, news)
            self._clock = BeatClock()
            self._tsc_epoch += 1
        cpu.tsc_epoch = self._tsc_epoch

    def _map(self, cpu: _Cpu, final: bool, news: News) -> None:
        """Turn pending gaps into observations, once a heartbeat after them has its time."""
        clock, pending = self._clock, cpu.pending
        now = time.monotonic_ns()
        while pending:
            found_ns, gap = pending[0]
            latest = clock.latest_tsc
            known = clock.ready and latest is not None and latest >= gap.end_tsc
            patience = SILENT_NS if clock.ready else _PATIENCE_NS
            if not known and not final and now - found_ns < patience:
                return
            pending.popleft()
            window = None
            if clock.ready:
                window = clock.window(gap.end_tsc, gap.ticks, cpu.beat_ticks, found_ns)
            if window is None or window.start_ns < 0:
                news.lose(cpu.cpu, 1)
                continue
            news.gaps.append(
                Observation(
                    kind=StallKind.VCPU_GAP,
                    start_ns=window.start_ns,
                    end_ns=window.end_ns,
                    at_least_ns=window.at_least_ns,
                    at_most_ns=window.at_most_ns,
                    probe=self._probe,
                    thread=f"CPU {cpu.cpu}",
                )
            )

    def _complete(self, start_ns: int, last: dict[int, int]) -> int:
        """Up to when everything is reported: each CPU's last heartbeat, silent ones aside."""
        complete = start_ns
        for cpu in self._cpus:
            if start_ns - cpu.beaten_ns > SILENT_NS:
                continue
            known = 0
            if self._clock.ready and cpu.cpu in last and not cpu.pending:
                known = self._clock.not_before(last[cpu.cpu])
            complete = min(complete, max(known, start_ns - SILENT_NS))
        return complete

    def _tell_thresholds(self, news: News) -> None:
        found = {c.cpu: c.beat.threshold for c in self._cpus if c.beat is not None}
        if found == self._thresholds:
            return
        self._thresholds = found
        by_threshold: dict[int, list[str]] = {}
        for cpu, ticks in found.items():
            by_threshold.setdefault(ticks, []).append(str(cpu))
        told = [
            f"above {self._clock.length(ticks).high / 1e3:.0f} us on CPU {', '.join(cpus)}"
            for ticks, cpus in by_threshold.items()
        ]
        news.notes.append(f"the pulse guest reports gaps {', '.join(told)}")
