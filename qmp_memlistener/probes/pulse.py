"""The `pulse` probe: gaps that a guest itself noticed, on each of its CPUs.

The pulse guest makes heartbeats in memory that QEMU shares with us (vm-images/pulse); each CPU
keeps a ring of the gaps between two heartbeats that were longer than its threshold.  A thread of
ours reads them; the guest is given no command and nothing of it is written.  Which gaps there are
is the guest's threshold, 0x100000 ticks when it boots (DEFAULT_THRESHOLD in
vm-images/pulse/layout.inc).  `CPU n` counts as the guest does: 0 is the boot processor, the
others in the order in which they came up.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

from ..guests import PulseMemory
from ..host.bounded import in_thread
from .delivery import Inbox
from .model import Context, ProbeInfo, ProbeUnavailable, Sink, StallKind, Verdict
from .pulse_guest import GuestFollower, News
from .pulse_ram import open_pulse

__all__ = ["PulseProbe"]

_NAME = "pulse"
# seconds between polls; a ring holds 128 gaps, at the default threshold those of 50 ms or more
_IDLE_S = 0.040
_GAPS_S = 0.005
_BURST_S = 0.002
_FLOOD_S = 0.001
_FLOOD = 32  # new gaps in one poll from which the ring may overflow
_GAPS_LAST_NS = 500_000_000
_FLUSH_NS = 200_000_000  # how long a flush waits for heartbeats
_FLUSH_DEADLINE_S = 2.0
_LOST_EVERY_NS = 1_000_000_000
_JOIN_S = 2.0

P = ParamSpec("P")


@dataclass(slots=True)
class _Flush:
    asked_ns: int
    done: asyncio.Future[None]


class PulseProbe:
    """Follows the gap rings of a pulse guest; `start` neither needs nor awaits a beat."""

    info = ProbeInfo(
        name=_NAME,
        measures=(StallKind.VCPU_GAP,),
        needs="the pulse guest, in RAM that QEMU shares with us",
        resolution_ns=500_000,  # 0x100000 ticks at 2.1 GHz or more
        cost="nothing in QEMU; 1 % of a CPU for us, 6 % while gaps come by the hundred a second",
        share=0.0,
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._memory: PulseMemory | None = None
        self._sink: Sink | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: Inbox | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._stopping = False
        self._bursts = 0
        self._lock = threading.Lock()
        self._flushes: list[_Flush] = []
        # the thread's own
        self._complete_ns = 0
        self._gaps_ns = 0
        self._lost: Counter[int] = Counter()
        self._lost_said_ns = 0

    async def check(self) -> Verdict:
        """Usable when a pulse guest's header is found in RAM that QEMU shares."""
        try:
            memory = await self._open()
        except ProbeUnavailable as exc:
            return Verdict.no(exc.message, exc.remedy)
        memory.close()
        return Verdict(True)

    async def start(self, sink: Sink) -> None:
        """Open the guest's RAM and follow it from now on.  Raises ProbeUnavailable."""
        self._memory = await self._open()
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(self._loop)
        self._complete_ns = time.monotonic_ns()
        sink.measures(_NAME, ())
        self._thread = threading.Thread(target=self._run, name="pulse probe", daemon=True)
        self._thread.start()

    async def burst(self, on: bool) -> None:
        """Poll every 2 ms meanwhile."""
        self._bursts += 1 if on else -1
        self._wake.set()

    async def flush(self) -> None:
        """Wait until every CPU has beaten since this call, at most for 0.2 s, and deliver."""
        if self._loop is None or self._sink is None or self._thread is None:
            return
        flush = _Flush(time.monotonic_ns(), self._loop.create_future())
        with self._lock:
            self._flushes.append(flush)
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.wait([flush.done], timeout=_FLUSH_DEADLINE_S)
        if not flush.done.done():
            flush.done.cancel()
            self._sink.advance(_NAME, flush.asked_ns)

    async def stop(self) -> None:
        """Deliver what is there and close the guest's RAM."""
        thread = self._thread
        self._stopping = True
        self._wake.set()
        if thread is not None and thread.is_alive():
            # what it delivers last is called before this wait is over
            await in_thread(thread.join, _JOIN_S)

    async def _open(self) -> PulseMemory:
        guest = self._context.guest
        if guest is None:
            raise ProbeUnavailable(
                "QEMU's process is not visible here, so its memory cannot be found",
                remedy="run on QEMU's host, in a PID namespace that shows it",
            )
        return await in_thread(open_pulse, guest.process)

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._memory is not None
        follower = GuestFollower(self._memory, _NAME)
        try:
            while not self._stopping:
                self._wake.wait(self._poll(follower, final=False))
                self._wake.clear()
            self._poll(follower, final=True)
        except Exception as exc:  # said to the user; the other probes go on
            self._post(0, self._fail, exc)
        finally:
            self._memory.close()

    def _poll(self, follower: GuestFollower, *, final: bool) -> float:
        """Look once and hand on what is new; returns when to look again.

        While the event loop has not taken what is there already, the guest's ring overflows
        instead, which it counts.
        """
        assert self._inbox is not None
        if self._inbox.full and not final:
            return _GAPS_S
        now = time.monotonic_ns()
        news = follower.poll(final=final)
        if news.fresh:
            self._gaps_ns = now
        self._complete_ns = max(self._complete_ns, news.complete_ns)
        flushed = self._flushed(now, final)
        self._lost.update(news.lost)
        lost: Counter[int] = Counter()
        if final or flushed or now - self._lost_said_ns >= _LOST_EVERY_NS:
            lost, self._lost, self._lost_said_ns = self._lost, lost, now
        self._post(len(news.gaps), self._deliver, news, lost, self._complete_ns, flushed)
        if self._flushes or news.fresh >= _FLOOD:
            return _FLOOD_S
        if self._bursts > 0:
            return _BURST_S
        return _GAPS_S if now - self._gaps_ns < _GAPS_LAST_NS else _IDLE_S

    def _flushed(self, now_ns: int, final: bool) -> list[_Flush]:
        """The flushes that need wait no longer; then everything before them counts as reported."""
        done: list[_Flush] = []
        with self._lock:
            waiting, self._flushes = self._flushes, []
            for flush in waiting:
                late = now_ns - flush.asked_ns >= _FLUSH_NS
                ended = final or late or self._complete_ns >= flush.asked_ns
                (done if ended else self._flushes).append(flush)
        for flush in done:
            self._complete_ns = max(self._complete_ns, flush.asked_ns)
        return done

    def _post(self, weight: int, call: Callable[P, None], *args: P.args, **kw: P.kwargs) -> None:
        assert self._inbox is not None
        if not self._inbox.post(weight, call, *args, **kw):
            self._stopping = True  # the loop is closed: there is nobody to report to

    # -- the event loop's thread -------------------------------------------------------------

    def _deliver(
        self, news: News, lost: Counter[int], complete_ns: int, flushed: list[_Flush]
    ) -> None:
        sink = self._sink
        assert sink is not None
        for note in news.notes:
            sink.note(note)
        for cpu, count in lost.items():
            sink.lost(_NAME, f"gaps of CPU {cpu} that were overwritten before we read them", count)
        if news.gaps:
            sink.observe(news.gaps)
        # without a clock for the guest's heartbeats no gap has a time yet
        sink.measures(_NAME, self.info.measures if news.tells else ())
        sink.advance(_NAME, complete_ns)
        for flush in flushed:
            if not flush.done.done():
                flush.done.set_result(None)

    def _fail(self, error: Exception) -> None:
        assert self._sink is not None
        self._sink.failed(_NAME, error)
        for flush in self._flushes:
            if not flush.done.done():
                flush.done.set_result(None)
