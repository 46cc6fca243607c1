"""attach() and the Agent: one guest, its map, its transitions, its listeners.

    async with attach("unix:/run/vm.qmp") as agent:
        agent.register(Holes())
        error = await agent.wait_lost()

The agent owns the connections and the tasks; what it sees is folded by `tracking`, told to
listeners and published as records.  Leaving the block puts trace events and log back as they
were, whatever the reason for leaving.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from types import TracebackType
from typing import Self

from ..errors import (
    MemListenerError,
    OperationFailed,
    TargetError,
    TargetLost,
)
from ..listener import Dispatcher, MemoryListener
from ..memslots import Rules, SlotTable
from ..monitor import (
    CONNECT_DEADLINE,
    Companions,
    Guest,
    GuestFacts,
    Monitor,
    Target,
    TraceReason,
    TraceSession,
    TraceUnavailable,
    measure_idle,
    read_facts,
    start_tracing,
)
from ..probes import Context, Kind, leftover_notes
from ..probes.registry import choose, known_names
from ..recording import Header, Note, Record, RecordingWriter
from ..topology import MemoryMap
from ..tracking import Tracker
from .failures import FailureWatch
from .guest_events import GuestEvents
from .header import header_of, rules_of
from .measuring import Measuring
from .monitors import connect_monitors
from .polling import PollSource
from .source import Source
from .stream import Records, RecordStream
from .tracing import TraceSource

__all__ = ["Agent", "attach"]

log = logging.getLogger(__name__)

_END_DEADLINE = 2.0
_CLOSE_DEADLINE = 10.0


def attach(
    target: str | Target,
    *,
    trace: bool = True,
    probes: Sequence[str] | None = None,
    max_overhead: float | None = None,
    must_see: Mapping[Kind, int] | None = None,
    freeze: str | None = None,
    record: str | None = None,
    ping_monitor: str | Target | None = None,
    ops_monitor: str | Target | None = None,
    on_record: Callable[[Record], None] | None = None,
    deadline: float = CONNECT_DEADLINE,
) -> Agent:
    """Attach to a running guest and follow its memory map: `async with attach(...) as agent`.

    `target` is `unix:PATH`, a path, `HOST:PORT` or `pid:N`.  `trace=False` never touches trace
    events or the log.  `probes` names those that measure stalls: by default the best that work
    here, none with `()`; `max_overhead` bounds what each may take of a host CPU (0.02: 2 %);
    stalls longer than the limits (ns) in `must_see` are not to be missed, whatever that costs.
    `freeze` is a reason why nobody may touch this guest as long as the block lasts: other
    processes of ours refuse to.  `record` names a new file for the recording, `on_record` is
    called with every record from the header on.  `ping_monitor` and `ops_monitor` name further
    monitors of the same QEMU; otherwise free ones are found.  `deadline` is for the connection,
    in seconds.

    Entering the block raises InputError (no such form of target, the recording exists, a monitor
    of another QEMU, no such probe), GuestFrozen, TargetUnreachable, MonitorBusy,
    ProtocolViolation, DeadlineExceeded or TargetLost.
    """
    return Agent(
        target,
        trace=trace,
        probes=probes,
        max_overhead=max_overhead,
        must_see=must_see,
        freeze=freeze,
        record=record,
        ping_monitor=ping_monitor,
        ops_monitor=ops_monitor,
        on_record=on_record,
        deadline=deadline,
    )


class Agent:
    """A watched guest; made by `attach`, usable inside its block.

    `monitor` is the connection it observes through, `operations` the one that was named for that
    (the observer's when none was, see `operating`), `measuring` the probes at work.
    `facts` is what the guest said of itself, `header` the first record, `remarks` what the user
    should know about this attachment.
    """

    monitor: Monitor
    operations: Monitor
    measuring: Measuring
    facts: GuestFacts
    companions: Companions
    header: Header

    def __init__(
        self,
        target: str | Target,
        *,
        trace: bool,
        probes: Sequence[str] | None,
        max_overhead: float | None,
        must_see: Mapping[Kind, int] | None,
        freeze: str | None,
        record: str | None,
        ping_monitor: str | Target | None,
        ops_monitor: str | Target | None,
        on_record: Callable[[Record], None] | None,
        deadline: float,
    ) -> None:
        self.remarks: list[str] = []
        self._target = target
        self._trace = trace
        self._probes = None if probes is None else known_names(probes)
        self._max_overhead = max_overhead
        self._must_see = dict(must_see or {})
        self._freeze = freeze
        self._record = record
        self._named = (ping_monitor, ops_monitor)
        self._on_record = on_record
        self._deadline = deadline
        self._records = Records(self._subscriber_failed)
        self._dispatcher = Dispatcher(self._listener_failed)
        self._source: Source
        self._lost: asyncio.Future[MemListenerError]
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()
        self._measuring_began = False

    async def __aenter__(self) -> Self:
        self._lost = asyncio.get_running_loop().create_future()
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        closing = asyncio.ensure_future(self._stack.__aexit__(kind, error, trace))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            # the guest is put back as it was all the same
            await asyncio.wait([closing], timeout=_CLOSE_DEADLINE)
            raise

    # -- what is known ---------------------------------------------------------------------

    @property
    def source(self) -> str:
        """How changes are seen: `trace` (every one) or `polling` (some may be missed)."""
        return self._source.name

    @property
    def map(self) -> MemoryMap:
        """The `memory` address space as of the last snapshot."""
        return self._tracker.map

    @property
    def slots(self) -> SlotTable:
        """The memslots: as traced, or as QEMU's rules predict them."""
        return self._tracker.slots

    @property
    def rules(self) -> Rules:
        """The rules by which this QEMU turns its map into slots."""
        return self._tracker.rules

    @property
    def transitions(self) -> int:
        """How many transitions have been reported."""
        return self._tracker.seq

    @property
    def snapshots(self) -> tuple[int, int]:
        """How many snapshots were taken, and the sum of their round trips in ns."""
        return self._source.snapshots, self._source.snapshot_ns

    # -- listening -------------------------------------------------------------------------

    def register(self, listener: MemoryListener) -> None:
        """Tell `listener` the present map and then every change.

        Raises ValueError when it is registered already.
        """
        self._dispatcher.register(listener, self.map.view)

    async def unregister(self, listener: MemoryListener) -> None:
        """Stop telling `listener`, once it knows what has happened so far."""
        await self._dispatcher.unregister(listener)

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]:
        """Call `callback` with every record from now on; returns the way to stop that."""
        return self._records.subscribe(callback)

    def records(self, *, limit: int = 100_000) -> RecordStream:
        """An async iterator over the records from now on; it ends with the attachment."""
        return self._records.stream(limit)

    # -- operating -------------------------------------------------------------------------

    @asynccontextmanager
    async def operating(self) -> AsyncIterator[Monitor]:
        """A monitor for commands that take long, so that snapshots need not wait for them.

        The one that was named, else one that is free, for as long as the block lasts; the
        observer's own when there is no other.
        """
        free = self.companions.operations
        if self.operations is not self.monitor or free is None:
            yield self.operations
            return
        try:
            monitor = await Monitor.connect(free, deadline=self._deadline)
        except TargetError:
            yield self.monitor  # somebody else was quicker
            return
        async with monitor:
            yield monitor

    # -- waiting ---------------------------------------------------------------------------

    async def settle(self, *, listeners_s: float = 2.0) -> None:
        """Return when everything that has happened so far is reported and listeners know it.

        With tracing that is exact; without, a snapshot is taken.  Stalls that have ended are
        reported, too.  A listener that is busy for longer than `listeners_s` seconds is not waited
        for.  Raises TargetError.
        """
        now = time.monotonic_ns()
        await self._source.settle()
        await self.measuring.settle(now)
        told = asyncio.ensure_future(self._dispatcher.idle())
        try:
            await asyncio.wait([told], timeout=listeners_s)
        finally:
            told.cancel()

    async def wait_lost(self) -> MemListenerError:
        """Wait until the guest is gone or cannot be followed any more; returns the reason."""
        return await asyncio.shield(self._lost)

    @property
    def is_lost(self) -> bool:
        """The guest is gone or cannot be followed any more."""
        return self._lost.done()

    # -- opening and closing -----------------------------------------------------------------

    async def _open(self, stack: AsyncExitStack) -> None:
        """Connect, start tracing, take the first snapshot; `stack` undoes it in reverse."""
        ping, operations = self._named
        monitors = await connect_monitors(
            stack,
            self._target,
            freeze=self._freeze,
            ping=ping,
            operations=operations,
            ping_first=self._probes is None or "ping" in self._probes,
            deadline=self._deadline,
        )
        self.monitor, self.operations = monitors.observer, monitors.operations
        self.companions = monitors.companions
        self.remarks += monitors.remarks
        owner, pid = monitors.owner, monitors.pid
        self.facts = await read_facts(self.monitor)
        self._rules = await asyncio.to_thread(rules_of, self.facts.version, pid)
        files = stack.enter_context(ExitStack())  # a recording takes everything that follows
        if owner is not None:
            await self._put_back(owner)
        stack.push_async_callback(self._dispatcher.close)
        stack.callback(self._records.close)
        stack.callback(self._finish_measuring)
        session, untraced = await self._start_tracing(stack, owner)
        stack.push_async_callback(self._end_tasks)
        if session is not None:
            tail = await stack.enter_async_context(session.tail())
            source = TraceSource(
                self.monitor, session, tail, self._publish, self._make_tracker, self._own_command
            )
            self._source = source
            self._spawn(source.read(), "trace lines")
        else:
            idle = await measure_idle(self.monitor)
            self._source = PollSource(self.monitor, idle, self._publish, self._make_tracker)
        self.header = header_of(
            str(self._target),
            self.facts,
            pid,
            traced=session is not None,
            why_not=untraced.message if untraced is not None else None,
        )
        self._publish_header(files)
        events = GuestEvents(self.monitor, self._source, self._publish)
        stack.push_async_callback(events.close)
        stack.callback(self.monitor.subscribe(events.take))
        failures = FailureWatch(
            self.monitor,
            self._publish,
            settle=self._source.settle,
            view=lambda: self.map,
            machine=self.facts.machine,
            pid=pid,
        )
        stack.push_async_callback(failures.close)
        self._records.subscribe(failures.record)
        stack.callback(self.monitor.subscribe(failures.event))
        await self._source.snapshot()
        self._spawn(self._source.keep_snapshots(), "snapshots")
        self._spawn(self._watch_monitor(), "monitor")
        await self._start_measuring(stack, pid, untraced)

    async def _put_back(self, owner: Guest) -> None:
        """What a probe whose agent was killed left switched on; tracing sees to its own."""
        process = owner.process
        for what in leftover_notes.WHAT:
            left = leftover_notes.stale(process.pid, process.start_ticks, what)
            if left is not None and await leftover_notes.restore(self.monitor, left):
                self.remarks.append(f"put back what an agent that was killed had left: {left.text}")

    async def _start_measuring(
        self, stack: AsyncExitStack, pid: int | None, untraced: TraceUnavailable | None
    ) -> None:
        context = Context(
            guest=self.companions.guest,
            pid=pid,
            facts=self.facts,
            monitor=self.monitor,
            companions=self.companions,
            traced=untraced is None,
            why_not_traced=untraced.message if untraced is not None else None,
            trace_remedy=untraced.remedy if untraced is not None else None,
            named=self._probes is not None,
            max_share=self._max_overhead,
            must_see=self._must_see,
        )
        choices = await choose(context, self._probes)
        bound = self.header.stamp_bound_ns or 0
        measuring = Measuring(
            choices, self._source, self._records.publish, self._give_up, stamp_bound_ns=bound
        )
        self._records.subscribe(measuring.take)
        self.measuring = measuring
        self._measuring_began = True
        await measuring.start(stack, self.slots)
        self._spawn(measuring.keep_releasing(), "stalls")

    def _own_command(self, name: str, start_ns: int, end_ns: int) -> None:
        if self._measuring_began:
            self.measuring.own_command(name, start_ns, end_ns)

    def _finish_measuring(self) -> None:
        if self._measuring_began:
            self.measuring.finish()

    async def _start_tracing(
        self, stack: AsyncExitStack, owner: Guest | None
    ) -> tuple[TraceSession | None, TraceUnavailable | None]:
        """The session, or why there is none."""
        if not self._trace:
            self.remarks.append(_MISSED)
            return None, TraceUnavailable(TraceReason.NOT_ASKED, "tracing was not asked for")
        try:
            session = await start_tracing(self.monitor, guest=owner)
        except TraceUnavailable as exc:
            remedy = f"; to get it: {exc.remedy}" if exc.remedy else ""
            self.remarks += [f"no tracing: {exc.message}{remedy}", _MISSED]
            return None, exc
        self.remarks += session.remarks
        return await stack.enter_async_context(session), None

    def _publish_header(self, files: ExitStack) -> None:
        if self._record is not None:
            writer = files.enter_context(RecordingWriter(self._record, self.header))
            self._records.subscribe(writer.write)
        if self._on_record is not None:
            self._on_record(self.header)
            self._records.subscribe(self._on_record)
        now = time.monotonic_ns()
        self._records.publish(Note(t_ns=now, text=remark) for remark in self.remarks)

    async def _end_tasks(self) -> None:
        """Stop the tasks and publish what they had in hand."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_DEADLINE)
        self._publish(())

    # -- inside ----------------------------------------------------------------------------

    @property
    def _tracker(self) -> Tracker:
        tracker = self._source.tracker
        assert tracker is not None, "entering the block takes the first snapshot"
        return tracker

    def _make_tracker(self, maps: dict[int, MemoryMap], t_ns: int) -> Tracker:
        return Tracker(
            maps,
            t_ns,
            has_slots=self.facts.accel == "kvm" or self.facts.kvm is True,
            traced=self._source.name == "trace",
            rules=self._rules,
        )

    def _publish(self, records: Iterable[Record]) -> None:
        """Hand out what the tracker has, then `records`."""
        tracker = self._source.tracker
        if tracker is not None:
            folded, changes = tracker.take()
            self._records.publish(folded)
            self._dispatcher.dispatch(changes)
        self._records.publish(records)

    def _listener_failed(self, listener: MemoryListener, name: str, exc: BaseException) -> None:
        text = f"listener {type(listener).__name__} failed in {name}: {exc!r}"
        self._records.publish([Note(t_ns=time.monotonic_ns(), text=text)])

    def _subscriber_failed(self, exc: Exception) -> None:
        text = f"a subscriber failed and gets no more records: {exc!r}"
        self._records.publish([Note(t_ns=time.monotonic_ns(), text=text)])

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        """A task that lasts as long as the attachment; if it fails, the guest is lost to us."""

        async def guarded() -> None:
            try:
                await work
            except TargetLost:
                pass  # the monitor says so too, once everything is reported
            except MemListenerError as exc:
                self._give_up(exc)
            except OSError as exc:
                self._give_up(TargetLost(f"{name}: {exc.strerror or exc}"))
            except Exception as exc:  # a defect of ours must not leave the user blind
                log.exception("the task for %s failed", name)
                self._give_up(
                    OperationFailed(
                        f"the agent cannot go on: {name} failed with {exc!r}",
                        remedy="please report it with the recording and what the log says",
                    )
                )

        self._tasks.append(asyncio.create_task(guarded(), name=name))

    def _give_up(self, reason: MemListenerError) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)

    async def _watch_monitor(self) -> None:
        """When the peer goes: report what is left, then say that it is lost."""
        error = await asyncio.shield(self.monitor.lost)
        await self._source.finish()
        self._tracker.flush()
        self._publish(())
        self._give_up(error)


_MISSED = "the map is polled: holes that come and go between two snapshots are not seen"
