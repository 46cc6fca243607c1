"""Opening an attachment: connect, start tracing, take the first snapshot, start the probes.

Whatever is begun here is undone by the stack that is given, in reverse and whatever the reason
for leaving.  What can be done with a guest once the attachment is open is the Agent's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from functools import partial

from ..host.bounded import in_thread
from ..memslots import Rules
from ..probes import StallKind
from ..probes.registry import choose
from ..qmp import (
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
from ..qmp.trace_lines import STAMP_BOUND_NS
from ..records import Header, Note, Record, RecordingWriter, SteeringRecord
from ..topology import MemoryMap
from ..tracking import Tracker
from ..waits import waiting
from .background import Background
from .failures import FailureWatch
from .guest_events import GuestEvents
from .leftovers import switch_off_profiler
from .monitors import Monitors, connect_monitors, context_of, rules_of
from .probe_runner import Measuring
from .publisher import Publisher
from .source import MakeTracker, PollSource, Source
from .steered import SteeringWatch
from .tracing import TraceSource

__all__ = ["AttachOptions", "Attached", "Opening"]

_MISSED = "the map is polled: holes that come and go between two snapshots are not seen"


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """What `attach` was asked for; its docstring says what each means."""

    target: str | Target
    trace: bool
    probes: tuple[str, ...] | None
    max_overhead: float | None
    must_see: Mapping[StallKind, int]
    freeze: str | None
    record: str | None
    ping_monitor: str | Target | None
    ops_monitor: str | Target | None
    guarded: bool
    probes_at_once: bool
    on_record: Callable[[Record], None] | None
    deadline: float


@dataclass(frozen=True, slots=True)
class Attached:
    """What an open attachment is made of; `source` has taken its first snapshot."""

    monitors: Monitors
    facts: GuestFacts
    header: Header
    source: Source
    measuring: Measuring
    steering: SteeringWatch
    remarks: list[str]

    @property
    def tracker(self) -> Tracker:
        """What folds the transitions."""
        return _tracker_of(self.source)


class Opening:
    """Opens one attachment, once; `stack` undoes it, and adds to `unrestored` what it cannot."""

    def __init__(
        self,
        options: AttachOptions,
        stack: AsyncExitStack,
        publisher: Publisher,
        background: Background,
        unrestored: list[str],
    ) -> None:
        self._options = options
        self._stack = stack
        self._publisher = publisher
        self._background = background
        self._remarks: list[str] = []
        self._unrestored = unrestored
        self._measuring: Measuring | None = None
        self._source: Source | None = None

    async def run(self) -> Attached:
        """Raises as entering the block of `attach` does."""
        stack = self._stack
        monitors = await self._connect()
        with waiting("for QEMU to report its version"):
            facts = await read_facts(monitors.observer)
        rules = await in_thread(rules_of, facts.version, monitors.pid)
        steering = SteeringWatch(monitors.owner.process if monitors.owner is not None else None)
        self._remarks += await steering.begin()
        files = stack.enter_context(ExitStack())  # a recording takes everything that follows
        if monitors.owner is not None:
            self._remarks += await switch_off_profiler(monitors.observer, monitors.owner)
        stack.push_async_callback(self._publisher.dispatcher.close)
        stack.callback(self._publisher.records.close)
        stack.push_async_callback(self._finish_measuring)
        with waiting("for QEMU to switch on trace events"):
            session, untraced = await self._start_tracing(monitors)
        source = await self._start_source(
            monitors.observer,
            session,
            partial(_make_tracker, facts, rules, traced=session is not None),
        )
        self._source = source
        # before the log is closed: what is in it and not read yet is reported too
        stack.push_async_callback(self._end_tasks)
        header = _header_of(str(self._options.target), facts, monitors.pid, untraced)
        self._publish_header(header, files)
        self._publisher.records.subscribe(steering.take, (SteeringRecord,))
        self._publisher.records.publish(steering.first())
        self._watch_events(monitors, facts, source)
        with waiting("for QEMU to show its memory map"):
            await source.snapshot()
        self._background.spawn(source.keep_snapshots(), "snapshots")
        self._background.spawn(self._watch_monitor(monitors.observer, source), "monitor")
        measuring = await self._start_measuring(monitors, facts, header, source, untraced)
        looking = steering.keep_looking(measuring, self._publisher.records.publish)
        self._background.spawn(looking, "steering")
        return Attached(monitors, facts, header, source, measuring, steering, self._remarks)

    async def _connect(self) -> Monitors:
        options = self._options
        monitors = await connect_monitors(
            self._stack,
            options.target,
            freeze=options.freeze,
            ping=options.ping_monitor,
            operations=options.ops_monitor,
            ping_first=options.probes is None or "ping" in options.probes,
            guarded=options.guarded,
            deadline=options.deadline,
        )
        self._remarks += monitors.remarks
        return monitors

    # -- the map -----------------------------------------------------------------------------

    async def _start_tracing(
        self, monitors: Monitors
    ) -> tuple[TraceSession | None, TraceUnavailable | None]:
        """The session, or why there is none."""
        if not self._options.trace:
            self._remarks.append(_MISSED)
            return None, TraceUnavailable(TraceReason.NOT_ASKED, "tracing was not requested")
        try:
            session = await start_tracing(monitors.observer, guest=monitors.owner)
        except TraceUnavailable as exc:
            remedy = f"; to get it: {exc.remedy}" if exc.remedy else ""
            self._remarks += [f"no tracing: {exc.message}{remedy}", _MISSED]
            return None, exc
        self._remarks += session.remarks
        self._stack.push_async_callback(self._stop_tracing, session)
        return session, None

    async def _stop_tracing(self, session: TraceSession) -> None:
        """What could not be put back is reported to those who still listen, and kept."""
        restored = await session.stop()
        told = list(restored.remarks)
        if restored.undone is not None:
            self._unrestored.append(f"the guest's trace events and log: {restored.undone}")
            told.append(f"not put back: {self._unrestored[-1]}; the next attach does it")
        now = time.monotonic_ns()
        self._publisher.publish([Note(t_ns=now, text=text) for text in told])

    async def _start_source(
        self,
        monitor: Monitor,
        session: TraceSession | None,
        make_tracker: MakeTracker,
    ) -> Source:
        publish = self._publisher.publish
        if session is None:
            idle = await measure_idle(monitor)
            polling = PollSource(monitor, idle, publish, make_tracker)
            self._publisher.follow(polling)
            return polling
        tail = await self._stack.enter_async_context(session.tail())
        source = TraceSource(monitor, session, tail, publish, make_tracker, self._own_command)
        self._publisher.follow(source)
        self._background.spawn(source.read(), "trace lines")
        return source

    # -- records -----------------------------------------------------------------------------

    def _publish_header(self, header: Header, files: ExitStack) -> None:
        records = self._publisher.records
        if self._options.record is not None:
            writer = files.enter_context(RecordingWriter(self._options.record, header))
            records.writer = writer.write_all
        if self._options.on_record is not None:
            self._options.on_record(header)
            records.subscribe(self._options.on_record)
        now = time.monotonic_ns()
        records.publish(Note(t_ns=now, text=remark) for remark in self._remarks)

    def _watch_events(self, monitors: Monitors, facts: GuestFacts, source: Source) -> None:
        """QMP events become records, and failures of the guest are explained."""
        monitor = monitors.observer
        events = GuestEvents(monitor, source, self._publisher.publish)
        self._stack.push_async_callback(events.close)
        self._stack.callback(monitor.subscribe(events.take))
        failures = FailureWatch(
            monitor,
            self._publisher.publish,
            settle=self._settle,
            view=lambda: _tracker_of(source).map,
            machine=facts.machine,
            pid=monitors.pid,
        )
        self._stack.push_async_callback(failures.close)
        self._publisher.records.subscribe(failures.record, failures.kinds)
        self._stack.callback(monitor.subscribe(failures.event))

    async def _settle(self) -> None:
        """Transitions that happened are reported, and the stalls that they caused."""
        now = time.monotonic_ns()
        if self._source is not None:
            await self._source.settle()
        if self._measuring is not None:
            await self._measuring.settle(now)

    async def _watch_monitor(self, monitor: Monitor, source: Source) -> None:
        """When the peer goes: report what is left, then say that it is lost."""
        error = await asyncio.shield(monitor.lost)
        await source.finish()
        _tracker_of(source).flush()
        self._publisher.publish()
        self._background.give_up(error)

    async def _end_tasks(self) -> None:
        """Take in what has happened until now, stop the tasks, publish what they had in hand."""
        source = self._source
        assert source is not None, "there are tasks"
        await source.finish()
        await self._background.end()
        if source.tracker is not None:
            source.tracker.flush()  # no further snapshot comes
        self._publisher.publish()

    # -- stalls ------------------------------------------------------------------------------

    async def _start_measuring(
        self,
        monitors: Monitors,
        facts: GuestFacts,
        header: Header,
        source: Source,
        untraced: TraceUnavailable | None,
    ) -> Measuring:
        context = context_of(
            monitors,
            facts,
            untraced,
            named=self._options.probes is not None,
            max_share=self._options.max_overhead,
            must_see=self._options.must_see,
        )
        context = replace(context, must_ping=self._options.ping_monitor is not None)
        choices = await choose(context, self._options.probes)
        records = self._publisher.records
        measuring = Measuring(
            choices,
            source,
            records.publish,
            self._background.give_up,
            stamp_bound_ns=header.stamp_bound_ns or 0,
        )
        records.subscribe(measuring.take, measuring.kinds)
        self._measuring = measuring
        measuring.prepare(self._stack, _tracker_of(source).slots)
        if self._options.probes_at_once:
            await measuring.start()
        self._background.spawn(measuring.keep_releasing(), "stalls")
        return measuring

    def _own_command(self, name: str, start_ns: int, end_ns: int) -> None:
        if self._measuring is not None:
            self._measuring.own_command(name, start_ns, end_ns)

    async def _finish_measuring(self) -> None:
        if self._measuring is not None:
            await self._measuring.finish()


def _make_tracker(
    facts: GuestFacts, rules: Rules, maps: dict[int, MemoryMap], t_ns: int, *, traced: bool
) -> Tracker:
    return Tracker(
        maps,
        t_ns,
        has_slots=facts.accel == "kvm" or facts.kvm is True,
        traced=traced,
        rules=rules,
    )


def _tracker_of(source: Source) -> Tracker:
    tracker = source.tracker
    assert tracker is not None, "the first snapshot has been taken"
    return tracker


def _header_of(
    target: str, facts: GuestFacts, pid: int | None, untraced: TraceUnavailable | None
) -> Header:
    from .. import __version__

    if untraced is None:
        source = "trace events: every slot operation and topology change"
    else:
        source = f"snapshots only, short-lived holes may be missed ({untraced.message})"
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
        pid=pid,
        source=source,
        stamp_bound_ns=STAMP_BOUND_NS if untraced is None else None,
    )
