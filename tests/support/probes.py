"""What tests of probes share: a sink that keeps what it is told, and contexts for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

from qmp_memlistener.errors import TraceReason, TraceUnavailable
from qmp_memlistener.guests import LaunchedGuest
from qmp_memlistener.probes import Context, HostWait, Observation, Probe, StallKind
from qmp_memlistener.qmp import (
    Companions,
    GuestFacts,
    Monitor,
    SocketTarget,
    UnixTarget,
    find_guest,
    read_facts,
)
from qmp_memlistener.records import CommandRecord, MeasurementRecord, SteeringRecord
from tests.support.any_monitor import AnyMonitor
from tests.support.host import patience

__all__ = ["NO_FACTS", "Recorder", "at_work", "context_of", "guest_context"]

NO_FACTS = GuestFacts("", "", None, None, None, None, None, None, ())


class Recorder:
    """A `Sink` that keeps everything, in order."""

    def __init__(self) -> None:
        self.observations: list[Observation] = []
        self.asked: list[Observation] = []
        self.waits: list[HostWait] = []
        self.changes: list[SteeringRecord] = []
        self.measurements: list[MeasurementRecord] = []
        self.notes: list[str] = []
        self.losses: list[str] = []
        self.failures: list[Exception] = []
        self.reached: dict[str, int] = {}
        self.measured: dict[str, frozenset[StallKind]] = {}
        self._news = asyncio.Event()

    def observe(self, observations: list[Observation]) -> None:
        self.observations += observations
        self._news.set()

    def host_waits(self, waits: list[HostWait]) -> None:
        self.waits += waits
        self._news.set()

    def carried_out(self, asked: list[Observation], windows: list[Observation]) -> None:
        self.asked += asked
        self.observe(windows)

    def steered(self, change: SteeringRecord) -> None:
        self.changes.append(change)
        self._news.set()

    def command(self, span: CommandRecord) -> None:
        raise AssertionError(f"not a probe that sees commands: {span}")

    def measure(self, measurement: MeasurementRecord) -> None:
        self.measurements.append(measurement)
        self._news.set()

    def advance(self, probe: str, t_ns: int) -> None:
        assert t_ns <= time.monotonic_ns()
        self.reached[probe] = max(self.reached.get(probe, 0), t_ns)
        self._news.set()

    def measures(self, probe: str, kinds: Iterable[StallKind]) -> None:
        self.measured[probe] = frozenset(kinds)
        self._news.set()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._news.set()

    def lost(self, probe: str, what: str, count: int | None = None) -> None:
        self.losses.append(f"{probe}: {what}" if count is None else f"{probe}: {what} ({count})")
        self._news.set()

    def failed(self, probe: str, error: Exception) -> None:
        assert probe
        self.failures.append(error)
        self._news.set()

    def check_nothing_wrong(self) -> None:
        """Nothing was missed and nothing failed."""
        assert self.losses == []
        assert self.failures == []

    def between(self, start_ns: int, end_ns: int) -> list[Observation]:
        """The windows that overlap a span, the longest first."""
        found = [o for o in self.observations if o.start_ns < end_ns and o.end_ns > start_ns]
        return sorted(found, key=lambda o: o.at_most_ns, reverse=True)

    async def wait_for(self, true: Callable[[], bool], seconds: float = 10.0) -> None:
        """Until `true`, which is asked anew at everything that comes."""
        async with asyncio.timeout(patience(seconds)):
            while not true():
                self._news.clear()
                await self._news.wait()


def context_of(monitor: Monitor, ping: SocketTarget | None = None) -> Context:
    """A context without a guest of which anything is known."""
    companions = Companions(None, ping, None, ())
    untraced = TraceUnavailable(TraceReason.NOT_ASKED, "tracing was not asked for")
    return Context(None, None, NO_FACTS, monitor, companions, untraced)


@asynccontextmanager
async def guest_context(guest: LaunchedGuest) -> AsyncIterator[Context]:
    """As an attachment has it: the observer on the first monitor, the second one for pings."""
    async with await AnyMonitor.connect(UnixTarget(str(guest.monitors[0]))) as monitor:
        ping = UnixTarget(str(guest.monitors[1])) if len(guest.monitors) > 1 else None
        yield replace(
            context_of(monitor, ping),
            guest=find_guest(guest.pid),
            pid=guest.pid,
            facts=await read_facts(monitor),
        )


@asynccontextmanager
async def at_work(probe: Probe) -> AsyncIterator[Recorder]:
    """A started probe and what it says; stopped when the block is left."""
    verdict = await probe.check()
    assert verdict.usable, verdict
    recorder = Recorder()
    await probe.start(recorder)
    try:
        yield recorder
    finally:
        await probe.stop()
