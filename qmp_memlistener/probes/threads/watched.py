"""One thread that is looked at: its files, what was read last, and what became of it."""

from __future__ import annotations

import time

import msgspec

from ..model import HostWait, Observation, StallKind
from .folding import LOOP_BUSY, RESOLUTION_NS, VCPU_BUSY, Busy, Finder, Sample
from .states import (
    Activity,
    LoopClassifier,
    Schedule,
    activity_by_wchan,
    is_held_by_host,
    parse_schedstat,
    parse_syscall,
    vcpu_activity,
)
from .tasks import Access, Examined, Task

__all__ = ["MAIN", "Found", "Watched"]

MAIN = "main"
_CONFIRM_NS = 20_000_000
"""A thread that was woken and has no CPU yet has the same schedule as one that sleeps on: so often
its state is read nevertheless."""
_SLACK_NS = 50_000
_HELD = "stopped by a signal or a debugger, or frozen"
_NO_CPU = "it was ready to run and had no CPU"

Found = HostWait | Observation


class Watched:
    """Looks at one thread; methods raise as `Task` does.  `name` is `main` or `CPU n`."""

    def __init__(self, name: str, task: Task, examined: Examined) -> None:
        self.name = name
        self.task = task
        self.looked_ns = time.monotonic_ns()
        """Everything before that was told, or belongs to a window that is not over."""
        self.held = False
        """Stopped or frozen by the host, as far as is known."""
        self._examined = examined
        self._is_main = name == MAIN
        self._classify = LoopClassifier(examined.calls) if examined.calls is not None else None
        self._finder = Finder(LOOP_BUSY if self._is_main else VCPU_BUSY)
        self._line = b""
        self._times = -1
        self._confirm_ns = 0

    def look(self, *, held: bool = False) -> list[Found]:
        """What is over by now.  `held`: the host holds the whole process, main thread first."""
        before = time.monotonic_ns()
        line = self.task.schedstat()
        changed = held != self.held and not self._is_main
        if line == self._line and before < self._confirm_ns and not changed:
            self._finder.still(before)
            self.looked_ns = before
            return []
        schedule = parse_schedstat(line)
        if not self._is_main:
            self.held = held
        activity, what, deep = self._read(schedule)
        self._line = line
        self._confirm_ns = before + _CONFIRM_NS
        sample = Sample(before, time.monotonic_ns(), activity, schedule, what, deep)
        found: list[Found] = []
        waited = self._finder.waited(sample)
        if waited is not None:
            found.append(msgspec.structs.replace(waited, thread=self.name))
            found += self._without_cpu(waited)
        piece = self._finder.take(sample)
        if piece is not None:
            found.append(self._observation(piece))
        self.looked_ns = before
        return found

    def busy_for_ns(self, now_ns: int) -> int | None:
        """None: it is not busy."""
        since = self._finder.open_since_ns
        return None if since is None else max(0, now_ns - since)

    def end(self, at_ns: int) -> list[Found]:
        """What goes on, as far as it is known."""
        piece = self._finder.end(at_ns)
        return [] if piece is None else [self._observation(piece)]

    def close(self) -> None:
        self.task.close()

    # -- what it is doing ----------------------------------------------------------------------

    def _read(self, schedule: Schedule) -> tuple[Activity, str | None, bool]:
        """Its activity, that in words, and whether it sleeps within a task."""
        if self._examined.access is Access.SYSCALL:
            activity, what, deep = self._by_syscall()
        elif self._examined.access is Access.WCHAN:
            activity, deep = activity_by_wchan(self.task.wchan(), vcpu=not self._is_main), False
            what = _words(activity)
        else:
            activity, deep = self._by_state(), False
            what = _words(activity)
        if self._is_main:
            if activity is Activity.AWAKE:
                self.held = False
            elif schedule.times != self._times:  # `syscall` shows the call it was stopped in
                self.held = self._is_held()
            self._times = schedule.times
        return (Activity.HELD, _HELD, True) if self.held else (activity, what, deep)

    def _by_syscall(self) -> tuple[Activity, str | None, bool]:
        calls = self._examined.calls
        assert calls is not None
        assert self._classify is not None
        sleep = parse_syscall(self.task.syscall())
        activity = self._classify(sleep) if self._is_main else vcpu_activity(sleep, calls)
        what = _words(activity)
        if activity is Activity.BLOCKED and sleep is not None:
            what = "sleeps outside of a call" if sleep.number < 0 else f"in {sleep.name(calls)}"
        return activity, what, self._is_main and self._classify.deep(sleep)

    def _by_state(self) -> Activity:
        """R and D are all that tells without the right to trace it."""
        state = self.task.state()
        if state in (b"T", b"t"):
            return Activity.HELD
        if state == b"D":
            return Activity.BLOCKED
        return Activity.AWAKE if state == b"R" else Activity.RESTS

    def _is_held(self) -> bool:
        if self.task.reads_wchan:
            return is_held_by_host(self.task.wchan())
        return self.task.state() in (b"T", b"t")

    # -- what is told --------------------------------------------------------------------------

    def _without_cpu(self, wait: HostWait) -> list[Found]:
        """A vCPU that waited long for a CPU did not run the guest."""
        each = wait.waited_ns // wait.times
        if self._is_main or each < RESOLUTION_NS:
            return []
        length = wait.end_ns - wait.start_ns
        at_least = max(0, each - _SLACK_NS)
        at_most = min(length, wait.waited_ns + _SLACK_NS)
        piece = Busy(wait.start_ns, wait.end_ns, min(at_least, at_most), at_most, _NO_CPU, True)
        return [self._observation(piece)]

    def _observation(self, piece: Busy) -> Observation:
        kind = StallKind.MAIN_LOOP if self._is_main else StallKind.VCPU_GAP
        return Observation(
            kind=kind,
            start_ns=piece.start_ns,
            end_ns=piece.end_ns,
            at_least_ns=piece.at_least_ns,
            at_most_ns=piece.at_most_ns,
            probe="threads",
            thread=self.name,
            tid=self.task.tid,
            site=piece.what,
        )


def _words(activity: Activity) -> str | None:
    return None if activity in (Activity.AWAKE, Activity.RESTS) else activity.value
