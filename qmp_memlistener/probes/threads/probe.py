"""The thread that reads what QEMU's threads are doing, and the delivery of what comes of it.

Nothing is asked of QEMU for it, but once which threads its vCPUs are.  A look at a thread is one
small read when it has not run since the last one, two otherwise.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import ParamSpec

from ...errors import MemListenerError
from ...host.bounded import in_thread
from ...qmp.guest import read_vcpus
from ...records import MeasurementRecord
from ..delivery import Inbox
from ..model import (
    Context,
    HostWait,
    Observation,
    ProbeInfo,
    ProbeUnavailable,
    Sink,
    StallKind,
    Verdict,
)
from ..uprobes.observing import ThreadNames
from .folding import RESOLUTION_NS
from .rhythm import Rhythm
from .tasks import Access, Examined, Tasks, examine
from .watched import MAIN, Found, Watched

__all__ = ["ThreadsProbe"]

_NAME = "threads"
_RESCAN_NS = 500_000_000
_TELL_NS = 100_000_000
_BLIND_NS = 1_000_000_000
_VCPUS_NS = 5_000_000
"""From one look at vCPUs to the next when nothing else is looked at more often."""
_AT_ONCE = 16
"""So many vCPUs are looked at in one round; of more, each in its turn."""
_ASK_DEADLINE = 2.0
_FLUSH_S = 1.0
_JOIN_S = 2.0

P = ParamSpec("P")


class ThreadsProbe:
    """Main loop and vCPUs, sampled from outside; see `folding` for what a window is.

    Of vCPUs it tells what it can prove: that they waited for a CPU, for a lock or in a call.  What
    one does while it is awake is not known, so `vcpu_gap` is none of the kinds that it measures.
    """

    info = ProbeInfo(
        name=_NAME,
        measures=(StallKind.MAIN_LOOP,),
        needs="QEMU's user or root, where neither Yama nor a namespace forbids to trace it",
        resolution_ns=RESOLUTION_NS,
        cost="nothing in QEMU; 2 to 4 % of a CPU for us",
        share=0.0,
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._rhythm = Rhythm(context.must_see.get(StallKind.MAIN_LOOP))
        self._examined: Examined | None = None
        self._names = ThreadNames(context.pid or 0)
        self._tasks: Tasks | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._flushes: list[tuple[int, asyncio.Future[None]]] = []
        self._lock = threading.Lock()
        # the event loop's side
        self._sink: Sink | None = None
        self._inbox: Inbox | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: asyncio.Task[None] | None = None
        # the thread's own
        self._main: Watched | None = None
        self._vcpus: list[Watched] = []
        self._known: set[int] = set()
        self._named: ThreadNames | None = None
        self._next = 0
        self._begun_ns = 0
        self._told_ns = 0
        self._looks = 0

    async def check(self) -> Verdict:
        """Reads its main thread once."""
        try:
            found = self._examined = await self._examine()
        except ProbeUnavailable as exc:
            return Verdict.no(exc.message, exc.remedy)
        if found.access is Access.SYSCALL:
            return Verdict(True)
        lacks = frozenset() if found.access is Access.WCHAN else frozenset(self.info.measures)
        return Verdict(True, found.reason, found.remedy, lacks)

    async def start(self, sink: Sink) -> None:
        """Open the files of its threads and look from now on.  Raises ProbeUnavailable."""
        found = self._examined or await self._examine()
        guest = self._context.guest
        assert guest is not None, "it was examined"
        tasks = await in_thread(Tasks, guest.process)
        try:
            task = tasks.open(guest.process.pid, found)
            if task is None:
                raise ProbeUnavailable("QEMU's process is gone")
        except BaseException:
            tasks.close()
            raise
        self._examined, self._tasks, self._sink = found, tasks, sink
        self._main = Watched(MAIN, task, found)
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(self._loop)
        self._begun_ns = time.monotonic_ns()
        if found.access is not Access.SYSCALL:
            sink.note(_less(found))
            if found.access is Access.SCHEDSTAT:
                sink.measures(_NAME, ())
        self._ask()
        self._thread = threading.Thread(target=self._run, name="thread sampler", daemon=True)
        self._thread.start()

    async def burst(self, on: bool) -> None:
        """Look every millisecond meanwhile."""
        self._rhythm.burst(on)

    async def flush(self) -> None:
        """Wait for a look at each thread that began after the call; a stall may go on."""
        thread, sink = self._thread, self._sink
        if thread is None or sink is None or not thread.is_alive():
            return
        asked = time.monotonic_ns()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._flushes.append((asked, done))
        await asyncio.wait((done,), timeout=_FLUSH_S)
        if not done.done():
            done.cancel()
            sink.advance(_NAME, asked)

    async def stop(self) -> None:
        """Close the files.  A stall that goes on is delivered as far as it is known."""
        self._stopping = True
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.wait((asking,))
        thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive():
            # what it delivers last is called before this wait is over
            await in_thread(thread.join, _JOIN_S)

    async def _examine(self) -> Examined:
        guest = self._context.guest
        if guest is None:
            raise ProbeUnavailable(
                "QEMU's process is not visible here",
                remedy="run on QEMU's host, in a PID namespace that shows it",
            )
        return await in_thread(examine, guest.process)

    # -- the event loop's side ---------------------------------------------------------------

    def _ask(self) -> None:
        """Which threads are the vCPUs'?  There are new ones."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._learn_vcpus(), name="vCPUs' threads")

    async def _learn_vcpus(self) -> None:
        try:
            vcpus = await read_vcpus(self._context.monitor, deadline=_ASK_DEADLINE)
        except MemListenerError:
            return  # a QEMU that does not answer: names of threads tell, where it gave them any
        if vcpus:
            names = ThreadNames(self._context.pid or 0)
            names.learn_vcpus(vcpus)
            self._names = names

    def _deliver(self, found: list[Found], reached_ns: int, blind_ns: int) -> None:
        sink = self._sink
        assert sink is not None
        if waits := [f for f in found if isinstance(f, HostWait)]:
            sink.host_waits(waits)
        if windows := [f for f in found if isinstance(f, Observation)]:
            sink.observe(windows)
        if blind_ns:
            sink.lost(_NAME, f"no look for {blind_ns / 1e6:.0f} ms: this process did not run")
        sink.advance(_NAME, reached_ns)

    def _flushed(self, flushes: list[asyncio.Future[None]]) -> None:
        for done in flushes:
            if not done.done():
                done.set_result(None)

    def _fail(self, error: Exception) -> None:
        assert self._sink is not None
        self._sink.failed(_NAME, error)

    def _end(self, spent_ns: int) -> None:
        """What it took, measured."""
        assert self._sink is not None
        values: dict[str, int | float | str] = {"looks": self._looks, "own_cpu_ns": spent_ns}
        self._sink.measure(
            MeasurementRecord(
                probe=_NAME, start_ns=self._begun_ns, end_ns=time.monotonic_ns(), values=values
            )
        )

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        spent = time.thread_time_ns()
        try:
            self._look_until_stopped()
        except ProcessLookupError:
            pass  # QEMU has ended; who is attached is told by its monitor
        except PermissionError as error:
            self._post(self._fail, ProbeUnavailable(f"its threads are closed: {error.strerror}"))
        except Exception as exc:  # said to the user; the other probes go on
            self._post(self._fail, exc)
        finally:
            now = time.monotonic_ns()
            self._tell([f for w in self._watched() for f in w.end(now)], now, 0)
            self._post(self._end, time.thread_time_ns() - spent)
            for watched in self._watched():
                watched.close()
            assert self._tasks is not None
            self._tasks.close()

    def _look_until_stopped(self) -> None:
        main = self._main
        assert main is not None
        rescan = due = before = vcpus_due = time.monotonic_ns()
        while not self._stopping:
            now = time.monotonic_ns()
            blind, before = now - before, now
            found = main.look()
            busy = main.busy_for_ns(now)
            if now >= vcpus_due or busy is not None or self._rhythm.in_burst:
                vcpus_due = now + _VCPUS_NS
                self._look_at_vcpus(found, held=main.held)
            self._looks += 1
            if now >= rescan or self._names is not self._named:
                rescan = now + _RESCAN_NS
                self._rescan()
            self._tell(found, now, blind if blind > _BLIND_NS else 0)
            # from tick to tick, so that what a look takes does not add up
            now = time.monotonic_ns()
            due = max(due + self._rhythm.next_ns(busy), now)
            if due > now:
                time.sleep((due - now) / 1e9)

    def _look_at_vcpus(self, found: list[Found], *, held: bool) -> None:
        """Some of them in each round."""
        vcpus = self._vcpus
        if len(vcpus) <= _AT_ONCE:
            turn = vcpus
        else:
            first, self._next = self._next, (self._next + _AT_ONCE) % len(vcpus)
            turn = (vcpus + vcpus)[first : first + _AT_ONCE]
        for vcpu in list(turn):
            try:
                found += vcpu.look(held=held)
            except ProcessLookupError:
                self._drop(vcpu)

    def _rescan(self) -> None:
        """Threads come and go; those that are vCPUs' by now are watched."""
        tasks, examined = self._tasks, self._examined
        assert tasks is not None
        assert examined is not None
        ids, names = tasks.ids(), self._names
        if ids - self._known:
            self._post(self._ask)
        elif names is self._named and ids == self._known:
            return
        self._known, self._named = ids, names
        watched = {vcpu.task.tid for vcpu in self._vcpus}
        for tid in ids - watched:
            if (name := names[tid]).startswith("CPU "):
                task = tasks.open(tid, examined)
                if task is not None:
                    self._vcpus.append(Watched(name, task, examined))
            names.forget(tid)

    def _drop(self, vcpu: Watched) -> None:
        self._vcpus.remove(vcpu)
        vcpu.close()

    def _watched(self) -> list[Watched]:
        assert self._main is not None
        return [self._main, *self._vcpus]

    def _tell(self, found: list[Found], now_ns: int, blind_ns: int) -> None:
        """Hand on what there is, and now and then how far that is."""
        quiet = not found and not self._flushes and not blind_ns
        if quiet and now_ns - self._told_ns < _TELL_NS:
            return
        reached = min(watched.looked_ns for watched in self._watched())
        with self._lock:
            flushed = [done for asked, done in self._flushes if reached >= asked]
            self._flushes = [f for f in self._flushes if reached < f[0]]
        self._told_ns = now_ns
        self._post(self._deliver, found, reached, blind_ns)
        if flushed:
            self._post(self._flushed, flushed)

    def _post(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        assert self._inbox is not None
        if not self._inbox.post(0, call, *args, **kwargs):
            self._stopping = True  # the loop is closed: nobody is there to be told


def _less(found: Examined) -> str:
    remedy = f" (for more: {found.remedy})" if found.remedy else ""
    if found.access is Access.WCHAN:
        return (
            f"QEMU's threads: {found.reason}; they are read by where they sleep, so a main loop "
            f"in a nested event loop looks idle{remedy}"
        )
    return (
        f"QEMU's threads: {found.reason}; only what they wait for a CPU is seen, and what keeps "
        f"the main loop on one{remedy}"
    )
