"""The `ping` probe: how long QEMU's main loop did not answer, seen through a monitor of its own.

Needs no privilege.  A thread sends a cheap command again and again and takes the time
(`ping_link`), the rules that make windows of it are pure (`ping_brackets`), and here is what holds
them together: the thread, the pace, the delivery.

What it sees is in-band QMP waiting, a superset of BQL holds: the main loop may be busy without the
BQL, and QMP's one dispatcher may be busy with another client's command.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import ParamSpec

from ..errors import TargetError
from ..host.bounded import in_thread
from ..qmp import CONNECT_DEADLINE, MonitorState, SocketTarget
from ..qmp.dial import answered
from ..qmp.identity import GuestIdentity
from ..qmp.sockets import listener_state
from .delivery import Inbox
from .model import Context, Observation, ProbeInfo, ProbeUnavailable, Sink, StallKind, Verdict
from .ping_brackets import RESOLUTION_NS, LoopStall, Pace, Ping, StallFinder
from .ping_link import PingLink, Stopped

__all__ = ["PingProbe"]

P = ParamSpec("P")

_NO_MONITOR = "no free QMP monitor is left for pinging"
_ONE_MORE = (
    "give QEMU one more -qmp unix:PATH,server=on,wait=off, or name one that is free with "
    "--ping-monitor"
)
_FIRST_PINGS = 24
_FIRST_PERIOD_NS = 2_000_000
# Negotiating has deadlines of its own.  A stall that begins while the first pings are sent is no
# reason to wait: it will be reported like any other.
_READY_S = 8.0
_STOP_S = 2.0
_LOST_TOO_S = 2.0
_FLUSH_S = 1.0
_FRESH_S = 0.1
_POST_EVERY_NS = 50_000_000
_BLIND_NS = 1_000_000_000
_STOOD_STILL = "the monitor's own thread did not answer either"


class PingProbe:
    """Pings the guest's main loop every 100 ms, in bursts every 1 ms (see `Pace` for exceptions).

    Its windows are of kind `main_loop`: the longest time within the window in which the main loop
    did not take up a command.  See `ping_brackets` for the bracket.  At 100 ms a stall may have
    begun long before the ping that ran into it, so the bracket is that wide.

    A stall is delivered when it is over, or as far as it is known when the probe stops or QEMU
    dies.  However long one lasts, it does not end the probe.
    """

    info = ProbeInfo(
        name="ping",
        measures=(StallKind.MAIN_LOOP,),
        needs="a QMP monitor of its own (a second or third -qmp)",
        resolution_ns=RESOLUTION_NS,
        cost="0.2 to 0.8 ms of QEMU's CPU time for each ping: 10 a second, 1000 a second at most "
        "while an operation runs",
        share=0.005,
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pace = Pace(context.max_share, context.must_see.get(StallKind.MAIN_LOOP))
        self._found: deque[LoopStall] = deque()
        self._reached_ns = 0
        self._posted_ns = 0
        self._asked = False
        self._blind: deque[int] = deque()
        self._raised_to: int | None = None
        # the event loop's side
        self._inbox: Inbox | None = None
        self._told = threading.Event()
        self._link: PingLink | None = None
        self._sink: Sink | None = None
        self._ready: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._ending: asyncio.Task[None] | None = None

    async def check(self) -> Verdict:
        """Usable when there is a free monitor for it; nothing is connected."""
        target = self._context.companions.ping
        if target is None:
            return Verdict.no(_NO_MONITOR, _ONE_MORE)
        state = await in_thread(listener_state, target)
        if state is not None and state.monitor_state is MonitorState.BUSY:
            return Verdict.no(f"{target} serves another client", _ONE_MORE)
        return Verdict(True)

    async def start(self, sink: Sink) -> None:
        """Connect, and learn what is usual for an idle main loop: some 60 ms."""
        target = self._context.companions.ping
        if target is None:
            raise ProbeUnavailable(_NO_MONITOR, remedy=_ONE_MORE)
        loop = asyncio.get_running_loop()
        self._inbox = Inbox(loop)
        meant = self._context.monitor.identity
        self._link = PingLink(await _connect(target, meant), target, meant)
        self._sink = sink
        self._ready = loop.create_future()
        self._ended = loop.create_future()
        threading.Thread(target=self._run, args=(self._link,), name="ping", daemon=True).start()
        try:
            await asyncio.wait((self._ready,), timeout=_READY_S)
            if self._ready.done():
                self._ready.result()
        except TargetError as error:
            await self.stop()
            raise ProbeUnavailable(error.message, remedy=error.remedy) from error
        except BaseException:
            self._sink = None
            self._link.stop()
            raise

    async def burst(self, on: bool) -> None:
        """Ping as often as allowed while `on`; the first of these pings is awaited for a moment,
        so that it bounds the beginning of what follows."""
        self._pace.burst(on)
        if on:
            await self._fresh(_FRESH_S)

    async def flush(self) -> None:
        """Waits for a ping that was answered after the call, but not until a stall is over."""
        called_ns = time.monotonic_ns()
        if not await self._fresh(_FLUSH_S) and self._sink is not None:
            # A stall goes on.  It will end after the call, and nothing else is outstanding.
            self._deliver()
            self._sink.advance(self.info.name, called_ns)

    async def stop(self) -> None:
        """Hang up.  A stall that still goes on is delivered as far as it is known."""
        if self._link is None or self._ended is None:
            return
        self._link.stop()
        await asyncio.wait((self._ended,), timeout=_STOP_S)
        self._sink = None
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.cancel()

    # -- the event loop's side ---------------------------------------------------------------

    async def _fresh(self, seconds: float) -> bool:
        """Whether a ping was answered after the call, and all it knew delivered, in time."""
        if self._sink is None or self._link is None or self._ended is None or self._ended.done():
            return False
        waiting = asyncio.get_running_loop().create_future()
        entry = (time.monotonic_ns(), waiting)
        self._waiting.append(entry)
        self._asked = True
        self._link.wake()
        try:
            await asyncio.wait(
                (waiting, self._ended), timeout=seconds, return_when="FIRST_COMPLETED"
            )
            return waiting.done()
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    def _deliver(self) -> None:
        """Hand out what the thread has found."""
        self._told.clear()
        sink, reached = self._sink, self._reached_ns
        if sink is None:
            return
        observations = []
        while self._found:
            stall = self._found.popleft()
            observations.append(self._observation(stall))
            if not stall.over:
                sink.note("the main loop had not answered the last ping: the stall may be longer")
        if observations:
            sink.observe(observations)
        while self._blind:
            sink.lost(
                self.info.name,
                f"no ping for {self._blind.popleft() / 1e6:.0f} ms: this process did not run",
            )
        raised, self._raised_to = self._raised_to, None
        if raised is not None:
            sink.note(
                f"QEMU's main loop now usually takes {raised / 1e6:.1f} ms to answer: "
                "only what is longer counts as a stall"
            )
        if reached:
            sink.advance(self.info.name, reached)
        for since, waiting in self._waiting:
            if reached >= since and not waiting.done():
                waiting.set_result(None)

    def _observation(self, stall: LoopStall) -> Observation:
        return Observation(
            kind=StallKind.MAIN_LOOP,
            start_ns=stall.start_ns,
            end_ns=stall.end_ns,
            at_least_ns=stall.at_least_ns,
            at_most_ns=stall.at_most_ns,
            probe=self.info.name,
            thread="main",
            tid=self._context.pid,
            site=_STOOD_STILL if stall.whole else None,
        )

    def _on_ready(self, error: Exception | None) -> None:
        assert self._ready is not None
        if self._ready.done():
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)
            self._ready.exception()  # start() may have been cancelled: nobody has to ask for it

    def _on_end(self, error: Exception | None) -> None:
        self._deliver()
        assert self._ended is not None
        if not self._ended.done():
            self._ended.set_result(None)
        if error is not None and self._sink is not None:
            self._ending = asyncio.create_task(self._report(error))

    async def _report(self, error: Exception) -> None:
        """The connection is gone.  With QEMU gone as well there is nothing to say."""
        await asyncio.wait((self._context.monitor.lost,), timeout=_LOST_TOO_S)
        if self._sink is not None and not self._context.monitor.lost.done():
            self._sink.failed(self.info.name, error)

    # -- the thread's side -------------------------------------------------------------------

    def _run(self, link: PingLink) -> None:
        finder = StallFinder()
        error: Exception | None = None
        last: Ping | None = None
        started = False
        try:
            link.negotiate()
            started = True
            self._calibrate(link, finder)
            self._call(self._on_ready, None)
            while True:
                asked, self._asked = self._asked, False
                ping = link.ping()
                # somebody who asked while it was under way may have done so after the answer:
                # then `_asked` stays set, and the next ping follows at once
                self._answered(finder, ping, post=asked or self._asked)
                wait = self._pace.next_ns(finder.baseline.round_trip_ns)
                rested = time.monotonic_ns()
                if not self._asked:
                    link.rest(wait)
                late = time.monotonic_ns() - rested - wait
                if late > _BLIND_NS:
                    self._blind.append(late + wait)
        except Stopped as stopped:
            last = stopped.ping
        except TargetError as lost:
            error, last = lost, link.unanswered
        except Exception as defect:  # of ours: the others go on, and it must be seen
            error = defect
        if last is not None:
            self._note_stall(finder.take(last))
        link.close()
        if not started:
            self._call(self._on_ready, error)
            error = None
        self._call(self._on_end, error)

    def _calibrate(self, link: PingLink, finder: StallFinder) -> None:
        first: list[Ping] = []
        try:
            for _ in range(_FIRST_PINGS):
                first.append(link.ping())
                link.rest(_FIRST_PERIOD_NS)
        finally:
            finder.calibrate(first)
            for ping in first:
                self._answered(finder, ping, post=False)

    def _answered(self, finder: StallFinder, ping: Ping, *, post: bool) -> None:
        assert ping.answered_ns is not None
        raised = finder.raised
        found = finder.take(ping)
        self._note_stall(found)
        self._reached_ns = ping.answered_ns
        if finder.raised > raised:
            self._raised_to = finder.baseline.median_ns
        due = ping.answered_ns - self._posted_ns >= _POST_EVERY_NS
        if found is not None or post or due:
            self._posted_ns = ping.answered_ns
            if not self._told.is_set():  # else what is on its way will hand this out too
                self._told.set()
                self._call(self._deliver)

    def _note_stall(self, stall: LoopStall | None) -> None:
        if stall is not None:
            self._found.append(stall)

    def _call(self, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have the event loop call it; a loop that is closed has no use for it any more."""
        assert self._inbox is not None
        self._inbox.post(0, function, *args, **kwargs)


async def _connect(target: SocketTarget, meant: GuestIdentity) -> socket.socket:
    """Raises ProbeUnavailable."""
    try:
        return (await answered(target, meant, CONNECT_DEADLINE)).sock
    except TargetError as error:
        raise ProbeUnavailable(error.message, remedy=error.remedy) from error
