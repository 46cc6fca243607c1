"""The probes of one attachment and the timeline they feed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack

from ..errors import MemListenerError
from ..memslots import SlotTable
from ..probes import HostWait, Observation, Probe, StallKind
from ..probes.registry import Choice
from ..records import (
    CommandRecord,
    GuestState,
    Lost,
    MeasurementRecord,
    Note,
    ProbesRecord,
    ProbeState,
    QmpEvent,
    Record,
    SlotOp,
    StallRecord,
    SteeringRecord,
    SummaryRecord,
    TransitionRecord,
)
from ..timeline import Timeline
from ..timeline.coverage import Coverage, one_sided
from ..timeline.summary import Statistics
from ..waits import waiting
from .source import Source

__all__ = ["Measuring"]

log = logging.getLogger(__name__)

START_S = 0.5
"""So long an attachment waits for its probes."""
RELEASE_S, IDLE_S = 0.05, 0.25
"""So often the timeline is asked for stalls that are decided, and so often while it has none."""
FINISH_S = 0.5
LATE_NS = 50_000_000
"""QEMU may be interrupted for so long between an ioctl and its line."""
_STOP_DEADLINE = 5.0
_STARTING = "start "
_STARTS = ("it is being started", None)


class Measuring:
    """Starts probes, is their `Sink`, and publishes what the timeline makes of it.

    `choices` are all probes with their verdicts; those that are usable are started.  `give_up` is
    called when records can no longer be published.
    """

    def __init__(
        self,
        choices: list[Choice],
        source: Source,
        publish: Callable[[Iterable[Record]], None],
        give_up: Callable[[MemListenerError], None],
        *,
        stamp_bound_ns: int,
    ) -> None:
        self._choices = choices
        self._source = source
        self._publish_records = publish
        self._give_up = give_up
        self._timeline = Timeline(stamp_bound_ns=stamp_bound_ns)
        self._active: list[Probe] = []
        self._why_not: dict[str, tuple[str | None, str | None]] = {}
        self._coverage = Coverage()
        self._measured_by: list[ProbeState] = []  # once they are stopped
        self._changed = asyncio.Event()  # which probes are at work, or what they measure
        self._bursts = 0
        self._announced: dict[str, int] = {}
        self._statistics = Statistics()
        self._start_ns = time.monotonic_ns()
        self._transitions = 0
        self._telling = False
        self._begun = False
        self._looking = asyncio.Lock()
        self._starting: set[asyncio.Task[None]] = set()

    # -- for the agent -----------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The probes that are active."""
        names = (probe.info.name for probe in self._active)
        return tuple(name for name in names if name not in self._why_not)

    def measured(self, start_ns: int, end_ns: int) -> frozenset[StallKind]:
        """The kinds of stall of which everything in `[start_ns, end_ns)` was seen."""
        return self._coverage.measured(start_ns, end_ns)

    def prepare(self, stack: AsyncExitStack, slots: SlotTable) -> None:
        """What there is to know before `start`; `stack` stops the probes."""
        for slot in slots:
            self._timeline.know_slot(slot.as_id, slot.gpa, slot.size)
        stack.push_async_callback(self.stop)

    async def start(self) -> None:
        """Start the usable probes, once.  One that fails is reported as such.

        What takes longer than `START_S` goes on in the background, and is reported when it is done.
        """
        if self._begun:
            return
        self._begun = True
        self._starting = {
            asyncio.create_task(self._start(choice), name=f"{_STARTING}{choice.info.name}")
            for choice in self._choices
        }
        _, late = await asyncio.wait(self._starting, timeout=START_S)
        self._starting = late
        for task in late:
            task.add_done_callback(self._started)
        self._publish([self.state()])

    def _started(self, task: asyncio.Task[None]) -> None:
        """One that took long is ready: say so."""
        self._starting.discard(task)
        self._changed.set()
        if not task.cancelled():
            self._publish([self.state()])

    async def wait_started(self) -> None:
        """Return when every probe is active or has failed; some may take seconds."""
        await self.start()
        while self._starting:
            names = ", ".join(t.get_name().removeprefix(_STARTING) for t in self._starting)
            with waiting(f"for probes to start: {names}"):
                await asyncio.wait(self._starting, return_when=asyncio.FIRST_COMPLETED)

    async def wait_ready(self, timeout_s: float) -> tuple[str, ...]:
        """Wait until every probe that can work measures something; returns those that do not yet.

        One that measures during operations only is ready within a burst.
        """
        await self.start()
        until = time.monotonic() + timeout_s
        while (late := self._not_ready()) and (left := until - time.monotonic()) > 0:
            self._changed.clear()
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return late

    def _not_ready(self) -> tuple[str, ...]:
        starting = (task.get_name().removeprefix(_STARTING) for task in self._starting)
        silent = (
            probe.info.name
            for probe in self._active
            if probe.info.measures
            and probe.info.name not in self._why_not
            and not self._coverage.measures_now(probe.info.name)
        )
        return (*starting, *silent)

    async def _start(self, choice: Choice) -> None:
        name, verdict = choice.info.name, choice.verdict
        if not verdict.usable:
            self._why_not[name] = (verdict.reason, verdict.remedy)
            return
        self._timeline.expect(name, time.monotonic_ns())
        try:
            await choice.probe.start(self)
        except MemListenerError as exc:
            self._why_not[name] = (exc.message, exc.remedy)
            self._timeline.forget(name)
        except Exception as exc:  # a defect of one probe must not cost the user the others
            log.exception("probe %s did not start", name)
            self._why_not[name] = (repr(exc), "please report it with the log")
            self._timeline.forget(name)
        else:
            if not self._coverage.knows(name):
                self.measures(name, choice.info.measures)
            self._active.append(choice.probe)
            await self._keep_up(choice.probe)

    def state(self) -> ProbesRecord:
        """Which probes are active, and why the others are not."""
        active = set(self.names)
        states = [self._state_of(choice, choice.info.name in active) for choice in self._choices]
        return ProbesRecord(t_ns=time.monotonic_ns(), probes=states)

    def _state_of(self, choice: Choice, active: bool) -> ProbeState:
        info = choice.info
        reason, remedy = (None, None) if active else self._why_not.get(info.name, _STARTS)
        return ProbeState(
            name=info.name,
            measures=list(info.measures),
            active=active,
            reason=reason,
            remedy=remedy,
            resolution_ns=info.resolution_ns,
            cost=info.cost,
        )

    kinds = (TransitionRecord, SlotOp, GuestState, QmpEvent, Lost)
    """What `take` wants to be given."""

    def take(self, record: Record) -> None:
        """A record of the map or the guest, as it is published."""
        self._transitions += isinstance(record, TransitionRecord)
        if isinstance(record, Lost) and not self._telling:
            self._timeline.lost("trace")
            self._coverage.lost("trace", time.monotonic_ns())
        self._timeline.record(record)

    def own_command(self, name: str, start_ns: int, end_ns: int) -> None:
        self._timeline.command(
            CommandRecord(
                name=name, start_ns=start_ns, busy_until_ns=end_ns, end_ns=end_ns, probe="agent"
            )
        )

    async def keep_releasing(self) -> None:
        """Publish stalls as they are decided, for ever."""
        while True:
            await asyncio.sleep(RELEASE_S if self._timeline.pending else IDLE_S)
            await self.release()

    async def release(self) -> None:
        """Publish what is decided by now."""
        reached = self._source.reported_to()
        await self._release(None if reached is None else reached - LATE_NS)
        self._compare_witnesses()

    async def _release(self, reached_ns: int | None) -> None:
        """Trace lines up to `reached_ns` have been taken in."""
        if reached_ns is not None:
            self.advance("trace", reached_ns)
        await self._hand_out(lambda: self._timeline.release(time.monotonic_ns()))

    def _compare_witnesses(self) -> None:
        """Trace lines and uprobes must show the same slot operations: report differences."""
        for text in one_sided(*self._timeline.strays(), self._coverage):
            self.note(text)

    async def burst(self, on: bool) -> None:
        """An operation begins or is over."""
        self._bursts += 1 if on else -1
        for probe in tuple(self._active):
            await self._keep_up(probe)

    async def _keep_up(self, probe: Probe) -> None:
        """Announce to a probe the bursts that it missed: it may have started within one."""
        name = probe.info.name
        while self._bursts != (announced := self._announced.get(name, 0)):
            on = announced < self._bursts
            self._announced[name] = announced + (1 if on else -1)
            await probe.burst(on)

    async def settle(self, reached_ns: int) -> None:
        """Publish every stall that had ended by `reached_ns`; transitions up to then are known.

        What a probe that does not answer saw is published later.
        """
        for probe in tuple(self._active):
            try:
                await probe.flush()
            except MemListenerError as exc:
                self.note(f"{probe.info.name}: {exc.message}")
        await self._release(reached_ns)

    async def stop(self) -> None:
        """Stop the probes and take in what they had in hand.  Idempotent."""
        for task in self._starting:
            task.cancel()
        if self._starting:
            await asyncio.wait(self._starting, timeout=_STOP_DEADLINE)
        self._measured_by = self.state().probes
        active, self._active = self._active, []
        if not active:
            return
        stopping = [asyncio.ensure_future(probe.stop()) for probe in active]
        _, late = await asyncio.wait(stopping, timeout=_STOP_DEADLINE)
        for task in late:
            task.cancel()
        for task, probe in zip(stopping, active, strict=True):
            if task.done() and not task.cancelled() and task.exception() is not None:
                log.error("probe %s: %r", probe.info.name, task.exception())

    async def finish(self) -> None:
        """Everything is reported: publish the stalls that are left, and the summary.

        Whoever ends does not wait longer than `FINISH_S` for stalls: the rest is reported as lost.
        """
        try:
            async with asyncio.timeout(FINISH_S):
                await self._hand_out(self._timeline.finish)
        except TimeoutError:
            left = self._timeline.waiting
            self._tell_loss("stalls that were not decided in time at the end", left)
        self._compare_witnesses()
        self._publish([self.summary()])

    def summary(self) -> SummaryRecord:
        """Statistics of all stalls so far."""
        return self._statistics.summary(
            start_ns=self._start_ns,
            end_ns=time.monotonic_ns(),
            transitions=self._transitions,
            probes=self._measured_by or self.state().probes,
        )

    async def _hand_out(self, decided: Callable[[], list[Record]]) -> None:
        """Some at a time: many may be decided at once."""
        while True:
            records = decided()
            for record in records:
                if isinstance(record, StallRecord):
                    self._statistics.add_record(record)
            if records:
                self._publish(records)
            if not self._timeline.more:
                return
            await asyncio.sleep(0)

    def _publish(self, records: Iterable[Record]) -> None:
        """Publish; a recording that cannot be written ends the attachment, not a probe."""
        try:
            self._publish_records(records)
        except MemListenerError as exc:
            self._give_up(exc)

    async def look_again(self, name: str) -> None:
        """Start a probe that was wanted and could not work for the guest, if by now it can."""
        async with self._looking:
            at, choice = next((i, c) for i, c in enumerate(self._choices) if c.info.name == name)
            if not choice.wanted or choice.verdict.usable:
                return
            choice = Choice(choice.probe, await choice.probe.check())
            if not choice.verdict.usable:
                return
            self._choices[at] = choice
            if self._begun:
                self._why_not.pop(name, None)
                await self._start(choice)
                self._publish([self.state()])

    # -- the probes' sink: `probes.Sink` says what is what ------------------------------------

    def observe(self, observations: list[Observation]) -> None:
        self._timeline.observe(observations)

    def host_waits(self, waits: list[HostWait]) -> None:
        self._timeline.host_waits(waits)

    def carried_out(self, asked: list[Observation], windows: list[Observation]) -> None:
        self._timeline.carried_out(asked, windows)

    def steered(self, change: SteeringRecord) -> None:
        self._publish([change])

    def command(self, span: CommandRecord) -> None:
        self._timeline.command(span)

    def measure(self, measurement: MeasurementRecord) -> None:
        self._publish([measurement])

    def advance(self, probe: str, t_ns: int) -> None:
        self._timeline.advance(probe, t_ns)
        self._coverage.advance(probe, t_ns)

    def measures(self, probe: str, kinds: Iterable[StallKind]) -> None:
        self._coverage.measures(probe, kinds, time.monotonic_ns())
        self._changed.set()

    def note(self, text: str) -> None:
        self._publish([Note(t_ns=time.monotonic_ns(), text=text)])

    def lost(self, probe: str, what: str, count: int | None = None) -> None:
        self._timeline.lost(probe)
        self._coverage.lost(probe, time.monotonic_ns())
        self._tell_loss(f"{probe}: {what}", count)

    def failed(self, probe: str, error: Exception) -> None:
        self._timeline.forget(probe)
        self._coverage.lost(probe, time.monotonic_ns())
        self.measures(probe, ())
        message = getattr(error, "message", None) or repr(error)
        self._why_not[probe] = (f"it cannot go on: {message}", getattr(error, "remedy", None))
        self._tell_loss(f"{probe} cannot go on: {message}", None)
        self._publish([self.state()])

    def _tell_loss(self, what: str, count: int | None) -> None:
        self._telling = True  # it comes back through `take`, and is none of the trace
        try:
            self._publish([Lost(t_ns=time.monotonic_ns(), what=what, count=count)])
        finally:
            self._telling = False
