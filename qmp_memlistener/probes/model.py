"""What every probe is: what it declares, what it needs, what it delivers.

A probe measures one or more kinds of stall window.  Its `check` answers beforehand whether it can
work for a guest; then it delivers observations to a `Sink` until it is stopped.  Here are only the
types; each probe has a module of its own, `registry` knows them all, and `timeline` merges what
they deliver.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from ..errors import MissingPrerequisite, TraceUnavailable
from ..qmp import Companions, Guest, GuestFacts, Monitor
from ..records import CommandRecord, MeasurementRecord, SlotOp, StallKind, SteeringRecord

__all__ = [
    "StallKind",
    "ProbeInfo",
    "Verdict",
    "Context",
    "Observation",
    "HostWait",
    "Sink",
    "Probe",
    "ProbeUnavailable",
]


class ProbeUnavailable(MissingPrerequisite):
    """A probe cannot work here, or for this guest; carries the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class ProbeInfo:
    """What a probe declares of itself, the same for every guest.

    `needs` and `cost` are shown to users.  `resolution_ns`: shorter windows are missed or wrong.
    `share` is the part of one host CPU that it takes from QEMU at its usual pace, 0.01 for 1 %;
    a probe whose cost depends on what the guest does states what it is for an idle one.
    """

    name: str
    measures: tuple[StallKind, ...]
    needs: str
    resolution_ns: int
    cost: str
    share: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a probe can work for a guest; if not, why and what to do about it.

    `lacks` are kinds that it declares and cannot measure for this guest, though it works;
    `reason` and `remedy` then say why.
    """

    usable: bool
    reason: str | None = None
    remedy: str | None = None
    lacks: frozenset[StallKind] = frozenset()

    @classmethod
    def no(cls, reason: str, remedy: str | None = None) -> Verdict:
        return cls(False, reason, remedy)


@dataclass(frozen=True, slots=True)
class Context:
    """What probes may use of an attachment.

    `guest` is QEMU's process where it is visible, `pid` its id where that much is known.  `monitor`
    is the observer's connection, for short commands only.  `companions.ping` is a free monitor for
    pinging.  `untraced` is why trace lines are not seen, None when they are.
    `named`: the user asked for this set of probes by name, so each does all it can; `must_ping`:
    a monitor for pinging was named.
    `max_share` bounds what one probe may take of a host CPU (None: no bound).  `must_see` are
    limits in ns: a window of that kind that is longer must not be missed, whatever it costs.
    """

    guest: Guest | None
    pid: int | None
    facts: GuestFacts
    monitor: Monitor
    companions: Companions
    untraced: TraceUnavailable | None
    named: bool = False
    must_ping: bool = False
    max_share: float | None = None
    must_see: Mapping[StallKind, int] = field(default_factory=dict)


class Observation(msgspec.Struct, frozen=True, gc=False):
    """One stall window as one probe saw it.

    The stall lies inside `[start_ns, end_ns)` (CLOCK_MONOTONIC) and was at least `at_least_ns` and
    at most `at_most_ns` long.  `thread` names what stalled (`main`, `CPU 0`, `tid 1234`), `tid` is
    its thread id on the host, `site` where in QEMU.  `handoffs` counts, while all vCPUs were being
    paused, how often another thread took the BQL in between.
    """

    kind: StallKind
    start_ns: int
    end_ns: int
    at_least_ns: int
    at_most_ns: int
    probe: str
    thread: str | None = None
    tid: int | None = None
    site: str | None = None
    update: SlotOp | None = None
    handoffs: int | None = None

    def __post_init__(self) -> None:
        if not (
            self.start_ns <= self.end_ns
            and 0 <= self.at_least_ns <= self.at_most_ns <= self.end_ns - self.start_ns
        ):
            raise ValueError(f"not a window: {self}")


class HostWait(msgspec.Struct, frozen=True, gc=False):
    """Inside `[start_ns, end_ns)` a thread was ready to run for `waited_ns` and had no CPU.

    Of so many `times`; once is one wait of just that length.  That is the host's scheduler's doing:
    others had the CPUs, or a quota was used up.  `thread` is named as in observations.
    """

    start_ns: int
    end_ns: int
    waited_ns: int
    times: int
    thread: str | None = None


class Sink(Protocol):
    """Where a probe delivers; every method is called in the event loop's thread."""

    def observe(self, observations: list[Observation]) -> None:
        """Windows, in any order; each once."""

    def host_waits(self, waits: list[HostWait]) -> None:
        """When threads had to wait for a CPU: no stalls, but what may have made some."""

    def carried_out(self, asked: list[Observation], windows: list[Observation]) -> None:
        """What came of one transaction whose operations were issued instead of QEMU's.

        `asked` are the operations of QEMU's: no stalls, but its log and other probes show them.
        """

    def steered(self, change: SteeringRecord) -> None:
        """Another strategy is applied to the guest's transitions."""

    def command(self, span: CommandRecord) -> None:
        """A command that was seen."""

    def measure(self, measurement: MeasurementRecord) -> None:
        """Counters over a span."""

    def advance(self, probe: str, t_ns: int) -> None:
        """Every window of `probe` that ended before `t_ns` has been delivered."""

    def measures(self, probe: str, kinds: Iterable[StallKind]) -> None:
        """From now on `probe` measures these kinds and no others; without a word of this it
        measures all that it declares from the end of `start` on."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def lost(self, probe: str, what: str, count: int | None = None) -> None:
        """Something was missed; reported each time."""

    def failed(self, probe: str, error: Exception) -> None:
        """The probe cannot go on; the others do."""


class Probe(Protocol):
    """One way of seeing stalls, for one attachment."""

    info: ProbeInfo

    async def check(self) -> Verdict:
        """Whether it can work for this guest, trying as little as possible on it."""

    async def start(self, sink: Sink) -> None:
        """Begin; raises ProbeUnavailable.  Cancelled or not, nothing of it may stay in QEMU."""

    async def burst(self, on: bool) -> None:
        """An operation begins (`on`) or has ended: look closer meanwhile.  May be nested."""

    async def flush(self) -> None:
        """Deliver what is there, then call `advance` with a time not before this call."""

    async def stop(self) -> None:
        """End, deliver what is left and undo everything.  Idempotent; does not raise."""
