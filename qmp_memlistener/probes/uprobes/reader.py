"""A thread that empties the rings, folds hits into windows and hands them on.

`UprobeReader` is all there is to see of one process through uprobes, without floors and without an
event loop: the probe, the tests and the benchmarks use it.

Order across threads: a hit has its time stamp some microseconds before it can be read.  So what is
read is kept until the next round and only then folded, up to the time the round before began.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import itemgetter

from ..model import StallKind
from .attach import Attachment, thread_ids
from .calls import CommandSpan, Window
from .decode import Hit
from .functions import Func, Group, kinds_of, missing_kinds
from .observing import Strings
from .perf import Architecture, allow_descriptors, measure_hit
from .program import Program, examine, explain
from .release import opening, release
from .windows import Windows

__all__ = ["Batch", "Loss", "UprobeReader"]

PERIOD = 0.01
"""Seconds between two rounds; what is seen is delivered within two of them."""

_CALM_NS = 1_000_000_000  # without a hit for so long, the rings are looked at less often
_CALM_FACTOR = 4
_QUIET_ROUNDS = 2  # a batch with nothing in it is delivered every so many rounds
_RESCAN_NS = 1_000_000_000
_DEAD_KEPT = 8  # threads that ended and whose events are still open


@dataclass(frozen=True, slots=True)
class Loss:
    """Records of a thread that found no room in its ring."""

    tid: int
    count: int


@dataclass(slots=True)
class Batch:
    """What one round found; all windows and commands that ended before `until_ns` are out.

    `open_ns` is when the oldest window began that was still open then, if one was.  `hits` counts
    hits of each group, `threads` are those that are new.  `undecoded` slot updates
    could not be read, `contradictions` holds were dropped (see `Windows`).  `gone`: QEMU has ended.
    """

    until_ns: int
    open_ns: int | None = None
    windows: list[Window] = field(default_factory=list)
    commands: list[CommandSpan] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    hits: dict[Group, int] = field(default_factory=dict)
    short: tuple[int, int] = (0, 0)
    threads: list[int] = field(default_factory=list)
    undecoded: int = 0
    contradictions: int = 0
    gone: bool = False
    error: Exception | None = None


class UprobeReader:
    """Everything that uprobes tell of one QEMU.

    `deliver` is called with a `Batch` in the reader's own thread, about every 10 ms.  `ring_bytes`
    is the size of a thread's ring (default: 4 MiB, less for many threads).  Commits shorter
    than `floor_ns` and do nothing are counted only.
    """

    def __init__(
        self,
        pid: int,
        deliver: Callable[[Batch], None],
        *,
        ring_bytes: int | None = None,
        floor_ns: int = 0,
    ) -> None:
        self.pid = pid
        self.roles: dict[Func, tuple[str, int]] = {}
        self.hit_ns = 0
        """What one hit costs the probed thread at most, in ns."""
        self._deliver = deliver
        self._ring_bytes = ring_bytes
        self._floor_ns = floor_ns
        self._busy_ns = time.monotonic_ns()
        self._requests: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._bql = False
        self._learned = False
        self._pending: list[Hit] = []
        self._round_ns = 0
        self._quiet = 0
        self._rescan_ns = 0
        self._gone = False
        self._dead: deque[int] = deque()
        self._spent: list[int] = []

    @property
    def kinds(self) -> tuple[StallKind, ...]:
        """What this QEMU's functions suffice for; after `start`."""
        return kinds_of(self.roles)

    @property
    def missing(self) -> dict[StallKind, str]:
        """The other kinds, with the functions that are missing."""
        return missing_kinds(self.roles)

    def start(self) -> None:
        """Probe every thread and begin to deliver.  Takes some 50 ms.  Raises ProbeUnavailable."""
        program = examine(self.pid)
        arch, pmu = program.arch, program.pmu
        self.roles = program.roles
        tids = thread_ids(self.pid)
        allow_descriptors(len(tids) * 2 * len(Func))
        with opening(lambda: self._stopping):
            self._open(arch, pmu, program, tids)
        self._round_ns = self._rescan_ns = time.monotonic_ns()
        self._thread = threading.Thread(target=self._run, name=f"uprobes {self.pid}", daemon=True)
        self._thread.start()

    def _open(self, arch: Architecture, pmu: int, program: Program, tids: list[int]) -> None:
        self.hit_ns, self._spent = measure_hit(arch, pmu)
        self._windows = Windows(self.pid, popped=arch.popped, hit_ns=self.hit_ns)
        self._attachment = Attachment(
            arch,
            pmu,
            self.pid,
            program.path,
            self.roles,
            self._ring_bytes,
            given_up=lambda: self._stopping,
            floor_ns=self._floor_ns,
        )
        try:
            self.strings = Strings(self.pid)
            try:
                self._attach(tids)
            except OSError:
                self.strings.close()
                raise
        except OSError as error:
            self._undo()
            raise explain(error, self.pid) from error

    def set_bql(self, on: bool) -> Future[None]:
        """Look at the BQL too, or no longer; done when that is so.

        Its result is an OSError if the kernel refuses, and nothing has changed then.
        """
        return self._ask(lambda: self._set_bql(on))

    def guest_runs(self, running: bool) -> Future[None]:
        """Tell whether the guest ran after `start`: see `Windows.guest_runs`."""
        return self._ask(lambda: self._windows.guest_runs(running))

    def flush(self) -> Future[None]:
        """Done when everything that ended before this call has been delivered."""
        return self._ask(self._flush)

    def give_up(self) -> None:
        """Let a `start` in another thread end early; it raises ProbeUnavailable then."""
        with self._lock:
            self._stopping = True

    def stop(self) -> None:
        """Deliver what is left and take everything out.  Blocks for some milliseconds."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with self._lock:
                self._stopping = True
            self._wake.set()
            thread.join()

    @property
    def bql_known(self) -> bool:
        """Whether the BQL's address has been learned: the main loop must turn once for that.

        It is looked for from the first `set_bql` on.
        """
        return self._windows.bql is not None

    @property
    def peaks(self) -> dict[int, float]:
        """The part of each thread's ring that was in use at most."""
        threads = self._attachment.threads
        return {tid: t.ring.peak / t.ring.size for tid, t in threads.items()}

    # -- in the reader's thread from here on -------------------------------------------------------

    def _ask(self, what: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        with self._lock:
            if self._thread is None or self._stopping:
                future.set_result(None)
                return future
            self._requests.append((what, future))
        self._wake.set()
        return future

    def _run(self) -> None:
        error: Exception | None = None
        try:
            while not self._stopping:
                calm = self._round_ns - self._busy_ns > _CALM_NS
                self._wake.wait(PERIOD * (_CALM_FACTOR if calm else 1))
                self._wake.clear()
                self._answer()
                self._round()
        except Exception as caught:
            error = None if self._stopping else caught
        try:
            self._end(error)
        finally:
            with self._lock:
                self._stopping = True
            self._answer()

    def _answer(self) -> None:
        while self._requests:
            what, future = self._requests.popleft()
            if not future.set_running_or_notify_cancel():
                continue  # who asked has lost patience
            try:
                what()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _groups(self) -> list[Group]:
        return [Group.ALWAYS, Group.MAIN, *([Group.BQL] if self._bql else [])]

    def _attach(self, tids: list[int]) -> list[int]:
        done = self._attachment.attach(tids, self._groups())
        now = time.monotonic_ns()
        for tid in done:
            self._windows.thread(tid, now)
        return done

    def _set_bql(self, on: bool) -> None:
        if on == self._bql or self._gone:
            return
        if on:
            groups = (Group.BQL,) if self.bql_known else (Group.BQL, Group.LEARN)
            try:
                with opening(lambda: self._stopping):
                    for group in groups:
                        self._attachment.switch(group, True)
            except OSError:
                for group in groups:
                    self._attachment.switch(group, False)
                raise
            self._bql = True
            self._windows.bql_on(time.monotonic_ns())
        else:
            self._attachment.switch(Group.BQL, False)
            self._bql = False
            self._flush()
            self._windows.bql_off()

    def _flush(self) -> None:
        """Two rounds: what the first finds is folded in the second."""
        self._round()
        time.sleep(0.001)
        self._round(quiet=False)

    def _round(self, *, quiet: bool = True) -> None:
        """Read the rings; fold what is older than the round before."""
        limit, self._round_ns = self._round_ns, time.monotonic_ns()
        batch = Batch(limit)
        started = self._read(batch)
        at = bisect_left(self._pending, limit, key=itemgetter(0))
        self._fold(batch, at)
        if not self._gone and (started or self._round_ns - self._rescan_ns > _RESCAN_NS):
            self._rescan(batch)
        if self.bql_known and not self._learned:
            self._learned = True
            self._spent += self._attachment.remove(Group.LEARN)
        self._bury()
        self._quiet += 1
        if _has_news(batch) or not quiet or self._quiet >= _QUIET_ROUNDS:
            self._quiet = 0
            self._deliver(batch)

    def _read(self, batch: Batch) -> bool:
        started = False
        for thread, decoded in self._attachment.drain():
            self._pending += decoded.hits
            started |= bool(decoded.started)
            if decoded.lost or decoded.throttled:
                batch.losses.append(Loss(thread.tid, decoded.lost + decoded.throttled))
            if thread.tid in decoded.ended:
                self._dead.append(thread.tid)
        self._pending.sort(key=itemgetter(0))
        return started

    def _fold(self, batch: Batch, count: int) -> None:
        windows = self._windows
        feed, hits = windows.feed, batch.hits
        undecoded, contradictions = windows.undecoded, windows.contradictions
        for hit in self._pending[:count]:
            feed(hit)
            if hit.point is not None:
                self._busy_ns = self._round_ns
                group = hit.point.group
                hits[group] = hits.get(group, 0) + (2 * hit.calls or 1)
        del self._pending[:count]
        batch.windows, batch.commands = windows.take()
        batch.short = windows.take_short()
        batch.undecoded = windows.undecoded - undecoded
        batch.contradictions = windows.contradictions - contradictions

    def _rescan(self, batch: Batch) -> None:
        """Attach what is new: a record tells of a new thread at once, the scan of one missed."""
        self._rescan_ns = self._round_ns
        tids = thread_ids(self.pid)
        if not tids:
            self._gone = batch.gone = True
            return
        threads = self._attachment.threads
        for tid in tids:
            if tid in threads and threads[tid].ended:  # another thread has its id now
                self._spent += self._attachment.drop(tid)
        new = [tid for tid in tids if tid not in threads]
        if new:
            batch.threads = self._attach(new)

    def _bury(self) -> None:
        """Release the probes of threads that ended, when they are many.

        Closing makes the opening of others wait, and a few dead ones cost next to nothing.
        """
        while len(self._dead) > _DEAD_KEPT:
            tid = self._dead.popleft()
            if tid in self._attachment.threads:
                self._windows.ended(tid)
                self._spent += self._attachment.drop(tid)
        if len(self._spent) > _DEAD_KEPT * len(Func):
            release(self._spent)
            self._spent = []

    def _end(self, error: Exception | None) -> None:
        """The last batch, and all probes out."""
        now = time.monotonic_ns()
        for group in (Group.LEARN, Group.BQL, Group.MAIN, Group.ALWAYS):
            self._attachment.switch(group, False)
        batch = Batch(now, gone=self._gone, error=error)
        try:
            self._read(batch)
            for thread in self._attachment.threads.values():
                if untold := thread.untold():
                    batch.losses.append(Loss(thread.tid, untold))
            self._fold(batch, len(self._pending))
            self._windows.finish(now)
            windows, commands = self._windows.take()
            batch.windows += windows
            batch.commands += commands
            self._deliver(batch)
        finally:
            self.strings.close()
            self._undo()

    def _undo(self) -> None:
        release([*self._attachment.close(), *self._spent])
        self._spent = []


def _has_news(batch: Batch) -> bool:
    return bool(
        batch.windows or batch.commands or batch.losses or batch.threads or batch.gone or batch.hits
    )
