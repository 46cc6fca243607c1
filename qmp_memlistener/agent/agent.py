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
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

from ..errors import CommandFailed, MemListenerError, TargetError, TargetLost
from ..listener import Dispatcher, MemoryListener
from ..memslots import Rules, SlotTable
from ..monitor import (
    Companions,
    Monitor,
    QmpEvent,
    Target,
    TraceUnavailable,
    companions_of,
    find_owner,
    measure_idle,
    parse_target,
    read_facts,
    start_tracing,
)
from ..monitor import GuestFacts as Facts
from ..recording import GuestState, Header, Note, Record, RecordingWriter
from ..recording import QmpEvent as EventRecord
from ..topology import MemoryMap
from ..tracking import Tracker
from .polling import PollSource
from .stream import Records, RecordStream
from .tracing import TraceSource

__all__ = ["Agent", "attach"]

# QMP events that tell of the guest's state, and those that tell of devices and memory
_STATE_EVENTS = frozenset(
    {"STOP", "RESUME", "RESET", "SHUTDOWN", "POWERDOWN", "SUSPEND", "WAKEUP", "GUEST_PANICKED"}
)
_DEVICE_EVENTS = frozenset(
    {
        "ACPI_DEVICE_OST",
        "BALLOON_CHANGE",
        "DEVICE_DELETED",
        "DEVICE_UNPLUG_GUEST_ERROR",
        "MEMORY_DEVICE_SIZE_CHANGE",
        "MEM_UNPLUG_ERROR",
        "MIGRATION",
        "UNPLUG_PRIMARY",
    }
)
_INHIBIT_SYMBOL = b"\0accel_ioctl_inhibit_begin\0"


class Agent:
    """A watched guest.  Made by `attach`.

    `facts` is what the guest said of itself, `header` the first record, `source` how changes are
    seen (`trace` or `polling`), `remarks` what the user should know about this attachment.
    """

    def __init__(self, monitor: Monitor, facts: Facts, companions: Companions) -> None:
        self.monitor = monitor
        self.facts = facts
        self.companions = companions
        self.remarks: list[str] = []
        self.source = "polling"
        self.header: Header
        self._records = Records()
        self._dispatcher = Dispatcher(self._listener_failed)
        self._source: TraceSource | PollSource
        self._lost: asyncio.Future[MemListenerError] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._asides: set[asyncio.Task[None]] = set()

    # -- what is known ---------------------------------------------------------------------

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

    # -- waiting ---------------------------------------------------------------------------

    async def settle(self) -> None:
        """Return when everything that has happened so far is reported and listeners know it.

        With tracing that is exact; without, a snapshot is taken.  Raises TargetError.
        """
        await self._source.settle()
        await self._dispatcher.idle()

    async def wait_lost(self) -> MemListenerError:
        """Wait until the guest is gone or cannot be followed any more; returns the reason."""
        return await asyncio.shield(self._lost)

    @property
    def is_lost(self) -> bool:
        """The guest is gone or cannot be followed any more."""
        return self._lost.done()

    # -- inside ----------------------------------------------------------------------------

    @property
    def _tracker(self) -> Tracker:
        tracker = self._source.tracker
        assert tracker is not None, "attach() takes the first snapshot"
        return tracker

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

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        """A task that lasts as long as the attachment; if it fails, the guest is lost to us."""

        async def guarded() -> None:
            try:
                await work
            except MemListenerError as exc:
                if not isinstance(exc, TargetLost):
                    self._give_up(exc)
            except OSError as exc:
                self._give_up(TargetLost(f"{name} failed: {exc.strerror or exc}"))

        self._tasks.append(asyncio.create_task(guarded(), name=name))

    def _give_up(self, reason: MemListenerError) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)

    async def _watch_monitor(self) -> None:
        """When the peer goes: report what is left, then say that it is lost."""
        error = await asyncio.shield(self.monitor.lost)
        self._finish_tail()
        reader = next((t for t in self._tasks if t.get_name() == "trace lines"), None)
        if reader is not None:
            await asyncio.wait([reader], timeout=1.0)
        tracker = self._source.tracker
        if tracker is not None:
            tracker.flush()
        self._publish(())
        self._give_up(error)

    def _finish_tail(self) -> None:
        """Overridden at attach when there is a tail."""

    def _on_event(self, event: QmpEvent) -> None:
        if event.name in _STATE_EVENTS:
            self._aside(self._report_state(event))
        elif event.name in _DEVICE_EVENTS:
            record = EventRecord(t_ns=event.t_ns, event=event.name, data=dict(event.data))
            self._publish([record])
        if isinstance(self._source, PollSource):
            self._source.poke()

    def _aside(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)

    async def _report_state(self, event: QmpEvent) -> None:
        """STOP does not say why: ask, unless the trace tells anyway."""
        traced = self.source == "trace"
        if traced and event.name in ("STOP", "RESUME"):
            return
        status, running = event.name.lower(), event.name in ("RESUME", "RESET", "WAKEUP")
        try:
            value = await self.monitor.execute("query-status", deadline=2.0)
            if isinstance(value, dict):
                status, running = str(value.get("status")), value.get("running") is True
        except (TargetError, CommandFailed):
            pass  # it is going down; the event is all there is
        self._publish(
            [GuestState(t_ns=event.t_ns, status=status, running=running, event=event.name)]
        )


@asynccontextmanager
async def attach(
    target: str | Target,
    *,
    trace: bool = True,
    record: str | None = None,
    ping_monitor: str | Target | None = None,
    ops_monitor: str | Target | None = None,
    on_record: Callable[[Record], None] | None = None,
    deadline: float = 2.0,
) -> AsyncIterator[Agent]:
    """Attach to a running guest and follow its memory map until the block is left.

    `target` is `unix:PATH`, a path, `HOST:PORT` or `pid:N`.  `trace=False` never touches trace
    events or the log.  `record` names a new file for the recording, `on_record` is called with
    every record from the header on.  `ping_monitor` and `ops_monitor` name further monitors of
    the same QEMU; otherwise free ones are found.

    Raises InputError (no such form of target, the recording exists), TargetUnreachable,
    MonitorBusy, ProtocolViolation, DeadlineExceeded, TargetLost.
    """
    async with AsyncExitStack() as stack:
        monitor = await Monitor.connect(_target(target), deadline=deadline)
        await stack.enter_async_context(monitor)
        owner = await asyncio.to_thread(find_owner, monitor.target, monitor.peer_pid)
        companions = companions_of(
            owner,
            [monitor.target],
            ping=await _socket(ping_monitor),
            operations=await _socket(ops_monitor),
        )
        facts = await read_facts(monitor)
        agent = Agent(monitor, facts, companions)
        agent.remarks += companions.without
        rules = _rules(facts, companions)
        has_slots = facts.accel == "kvm" or facts.kvm is True

        def tracker(maps: dict[int, MemoryMap], t_ns: int) -> Tracker:
            traced = agent.source == "trace"
            return Tracker(maps, t_ns, has_slots=has_slots, traced=traced, rules=rules)

        stack.push_async_callback(agent._dispatcher.close)
        stack.callback(agent._records.close)
        why = "tracing was not asked for"
        if trace:
            try:
                session = await start_tracing(monitor, guest=owner)
            except TraceUnavailable as exc:
                why = exc.message
                agent.remarks.append(f"no tracing: {exc.message}")
                if exc.remedy:
                    agent.remarks.append(f"to get it: {exc.remedy}")
            else:
                await stack.enter_async_context(session)
                tail = await stack.enter_async_context(session.tail())
                agent.source = "trace"
                agent.remarks += session.remarks
                source = TraceSource(monitor, session, agent._publish, tracker)
                agent._source = source
                agent._finish_tail = tail.finish  # type: ignore[method-assign]
                stack.push_async_callback(_end, agent)
                agent._spawn(source.read(tail), "trace lines")
        if agent.source == "polling":
            agent.remarks.append(
                "holes that come and go between two snapshots are not seen: the map is polled"
            )
            agent._source = PollSource(
                monitor, await measure_idle(monitor), agent._publish, tracker
            )
            stack.push_async_callback(_end, agent)
        agent.header = _header(agent, str(target), why, owner.pid if owner is not None else None)
        if record is not None:
            writer = stack.enter_context(RecordingWriter(record, agent.header))
            agent._records.subscribe(writer.write)
        if on_record is not None:
            on_record(agent.header)
            agent._records.subscribe(on_record)
        agent._records.publish(Note(t_ns=time.monotonic_ns(), text=r) for r in agent.remarks)
        stack.callback(monitor.subscribe(agent._on_event))
        await agent._source.snapshot()
        agent._spawn(agent._source.keep_snapshots(), "snapshots")
        agent._spawn(agent._watch_monitor(), "monitor")
        yield agent


async def _end(agent: Agent) -> None:
    """Stop the tasks, the reader last, and report what they had in hand."""
    for task in [*agent._tasks, *agent._asides]:
        task.cancel()
    if agent._tasks:
        await asyncio.wait(agent._tasks, timeout=2.0)
    agent._publish(())


def _target(target: str | Target) -> Target:
    return parse_target(target) if isinstance(target, str) else target


async def _socket(target: str | Target | None):  # type: ignore[no-untyped-def]
    from ..monitor.dial import resolve

    return None if target is None else await resolve(_target(target))


def _rules(facts: Facts, companions: Companions) -> Rules:
    """The order of slot operations: by what the binary has, by its version otherwise.

    Distributors backport the atomic update (QEMU 8.0, commit f39b7d2b96), so the symbol counts.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    rules = Rules.parse(facts.version, page)
    if companions.guest is not None and not rules.queued:
        try:
            with open(f"/proc/{companions.guest.pid}/exe", "rb") as file:
                if _INHIBIT_SYMBOL in file.read():
                    return Rules.parse("8.0", page)
        except OSError:
            pass
    return rules


def _header(agent: Agent, target: str, why: str, pid: int | None) -> Header:
    from .. import __version__

    facts = agent.facts
    traced = agent.source == "trace"
    stamp = None
    source = f"snapshots only, short-lived holes may be missed ({why})"
    if traced:
        source = "trace events: every slot operation and topology change"
        stamp = 200_000  # line to inotify to us, p90 150 us; see docs
    return Header(
        tool_version=__version__,
        monotonic_ns=time.monotonic_ns(),
        realtime_ns=time.time_ns(),
        host_kernel=os.uname().release,
        target=target,
        qemu_version=facts.version,
        qemu_package=facts.package or None,
        machine=facts.machine,
        accel=facts.accel,
        guest_name=facts.name,
        pid=pid if pid is not None else agent.monitor.peer_pid,
        source=source,
        stamp_bound_ns=stamp,
    )
