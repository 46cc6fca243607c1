"""A vCPU whose code lies in RAM that is taken away: as QEMU does it, and under `steer`."""

from __future__ import annotations

import asyncio
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator

from ..agent import attach
from ..errors import DeadlineExceeded, MissingPrerequisite, TargetLost
from ..guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    GuestSpec,
    High,
    LaunchedGuest,
    Pulse,
    QemuBuild,
    boot_args,
    launch,
)
from ..host.bounded import in_thread
from ..host.processes import Process
from ..memslots import Rules
from ..qmp import Monitor, UnixTarget
from ..records import (
    GuestFailure,
    ProbesRecord,
    ProbeState,
    Record,
    StallKind,
    StallRecord,
    TransitionRecord,
)
from ..reports.lengths import kind_text, span_text
from ..reports.stalls import measured_lines
from ..steer import Mode, judge, steer
from ..text import count_text

__all__ = ["INDENT", "Race", "races"]

INDENT = " " * 12
_WRITES = 200
_MEMORY = 256 << 20
_SHORTEST_GAP_NS = 100_000
_DEADLINE = 30.0


class Race:
    """What one guest lived through."""

    def __init__(self, version: str, strategy: Mode | None) -> None:
        self.version = version
        self.strategy = strategy
        self.transitions = 0
        self.failure: GuestFailure | None = None
        self.stalls: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.failed = asyncio.Event()
        self.probes: dict[str, ProbeState] = {}

    def take(self, record: Record) -> None:
        """A record of the agent."""
        match record:
            case ProbesRecord():
                record.add_to(self.probes)
            case TransitionRecord():
                self.transitions += 1
            case GuestFailure():
                self.failure = self.failure or record
                self.failed.set()
            case StallRecord(kind=StallKind.MISSING) if self.strategy is not None:
                pass  # told by QEMU's log: what QEMU asked for, not what KVM was given
            case StallRecord(cause=cause) if cause is not None and cause.type == "transition":
                self.stalls[record.kind].append((record.at_least_ns, record.at_most_ns))

    def medians(self) -> dict[str, tuple[int, int]]:
        """The bounds in ns of the median length of each kind of stall that a transition made."""
        out = {}
        for kind, lengths in sorted(self.stalls.items()):
            low, high = (round(statistics.median(bound)) for bound in zip(*lengths, strict=True))
            out[kind] = low, high
        return out

    def document(self) -> dict[str, object]:
        medians = self.medians()
        return {
            "qemu": self.version,
            "strategy": self.strategy.name.lower() if self.strategy is not None else None,
            "transitions": self.transitions,
            "survived": self.failure is None,
            "failure": self.failure,
            "median_ns": {kind: high for kind, (_, high) in medians.items()},
            "median_min_ns": {kind: low for kind, (low, _) in medians.items()},
            "probes": list(self.probes.values()),
        }

    def lines(self, writes: int) -> Iterator[str]:
        if self.failure is not None:
            yield from measured_lines(self.failure, " " * 10)
            yield (
                f"{INDENT}dead after {writes} of {_WRITES} writes, "
                f"{count_text(self.transitions, 'transition')}"
            )
        else:
            transitions = count_text(self.transitions, "transition")
            yield f"{INDENT}survived {writes} writes, {transitions}"
        medians = self.medians()
        for kind in ("vcpu_gap", "vcpu_inhibit", "commit", "missing"):
            if kind in medians:
                span, count = span_text(*medians[kind]), len(self.stalls[kind])
                yield f"{INDENT}{kind_text(kind):<14} median {span} ({count} seen)"


async def races(build: QemuBuild, say: Callable[..., None]) -> list[Race]:
    """A guest as QEMU treats it; where that kills it, one more under `steer`'s `hole`."""
    found = [await _race(build, say)]
    if Rules.parse(build.version).queued:
        return found
    try:
        found.append(await _race(build, say, Mode.HOLE))
    except MissingPrerequisite as exc:
        say(f"{INDENT}left out: {exc.message}")
        if exc.remedy:
            say(f"{INDENT}remedy: {exc.remedy}")
    return found


async def _race(build: QemuBuild, say: Callable[..., None], strategy: Mode | None = None) -> Race:
    """Boot a guest under KVM and let it toggle PAM until it has died or is done.

    One vCPU opens and closes PAM, which makes QEMU delete and add the slot with all RAM above
    1 MiB; the other runs code there.  Up to QEMU 7.2 the guest dies of it, unless it is steered;
    from 8.0 on vCPUs are kept out meanwhile and wait.  Raises MissingPrerequisite when it cannot
    be steered.
    """
    spec = GuestSpec(machine="pc", accel="kvm", memory=_MEMORY, smp=2, args=boot_args())
    found = Race(build.version, strategy)
    under = f", steered with `{strategy.name.lower()}`" if strategy is not None else ""
    say("", f"-- QEMU {build.version}{under}: CPU 1 runs code above 1 MiB while CPU 0 writes PAM")
    async with launch(spec.on(build)) as guest:
        assert guest.ram is not None
        pulse = Pulse(guest.ram)
        await pulse.wait_ready()
        if strategy is not None:
            await _steer(guest, strategy)
        await pulse.place(1, High.CODE)
        clock = await pulse.calibrate()
        for cpu in range(2):
            await pulse.reset(cpu, threshold=clock.ticks(_SHORTEST_GAP_NS))
        async with attach(f"unix:{guest.monitors[0]}", on_record=found.take) as agent:
            await agent.measuring.wait_started()
            toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), _WRITES)
            done = asyncio.create_task(toggle.wait(_DEADLINE))
            failed = asyncio.create_task(found.failed.wait())
            try:
                await asyncio.wait([done, failed], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (done, failed):
                    task.cancel()
            writes = toggle.done
            try:
                await agent.settle()
            except DeadlineExceeded as exc:
                say(f"{INDENT}{exc.message}")
    say(*found.lines(writes))
    return found


async def _steer(guest: LaunchedGuest, strategy: Mode) -> None:
    process = await in_thread(Process.read, guest.pid)
    async with await Monitor.connect(UnixTarget(str(guest.monitors[0]))) as monitor:
        if process is None:
            raise TargetLost(f"QEMU (pid {guest.pid}) has ended")
        await in_thread(judge, process, monitor.version, kvm=True, wanted=strategy)
        await steer(process, strategy)
