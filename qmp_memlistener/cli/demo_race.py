"""The last part of `demo`: what happens to a vCPU whose code lies in RAM that is taken away.

Two vCPUs: one opens and closes PAM, which makes QEMU delete and add the slot with all RAM above
1 MiB; the other runs code there.  Up to QEMU 7.2 the guest dies of it, from 8.0 on vCPUs are kept
out meanwhile and wait.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..guests import QemuBuild
    from ..records import GuestFailure, ProbeState, Record

__all__ = ["Race", "race"]

WRITES = 200
MEMORY = 256 << 20
SHORTEST_GAP_NS = 100_000
_DEADLINE = 30.0


class Race:
    """What one guest lived through."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.transitions = 0
        self.failure: GuestFailure | None = None
        self.stalls: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.failed = asyncio.Event()
        self.probes: dict[str, ProbeState] = {}

    def take(self, record: Record) -> None:
        """A record of the agent."""
        from ..records import GuestFailure, ProbesRecord, StallRecord, TransitionRecord

        match record:
            case ProbesRecord():
                record.add_to(self.probes)
            case TransitionRecord():
                self.transitions += 1
            case GuestFailure():
                self.failure = self.failure or record
                self.failed.set()
            case StallRecord(cause=cause) if cause is not None and cause.type == "transition":
                self.stalls[record.kind].append((record.at_least_ns, record.at_most_ns))

    def median_ns(self, kind: str) -> tuple[int, int] | None:
        """The bounds of the median length of a kind of stall that a transition made."""
        lengths = self.stalls.get(kind)
        if not lengths:
            return None
        low, high = (round(statistics.median(bound)) for bound in zip(*lengths, strict=True))
        return low, high

    def document(self) -> dict[str, object]:
        """For `--json`."""
        found = {kind: self.median_ns(kind) for kind in sorted(self.stalls)}
        medians = {kind: median for kind, median in found.items() if median is not None}
        return {
            "qemu": self.version,
            "transitions": self.transitions,
            "survived": self.failure is None,
            "failure": self.failure,
            "median_ns": {kind: high for kind, (_, high) in medians.items()},
            "median_min_ns": {kind: low for kind, (low, _) in medians.items()},
            "probes": list(self.probes.values()),
        }


async def race(build: QemuBuild, say: Callable[[str], None]) -> Race:
    """Boot the guest under KVM, let it toggle PAM until it has died or is done."""
    from ..agent import attach
    from ..errors import DeadlineExceeded
    from ..guests import HOST_BRIDGE, I440FX, PAM_RAM, GuestSpec, High, Pulse, boot_args, launch
    from ..reports.lengths import kind_text, span_text
    from ..reports.stalls import measured_lines

    spec = GuestSpec(machine="pc", accel="kvm", memory=MEMORY, smp=2, args=boot_args())
    found = Race(build.version)
    say("")
    say(f"-- QEMU {build.version}: CPU 1 runs code above 1 MiB while CPU 0 writes PAM")
    async with launch(spec.on(build)) as guest:
        assert guest.ram is not None
        pulse = Pulse(guest.ram)
        await pulse.wait_ready()
        await pulse.place(1, High.CODE)
        clock = await pulse.calibrate()
        for cpu in range(2):
            await pulse.reset(cpu, threshold=clock.ticks(SHORTEST_GAP_NS))
        async with attach(f"unix:{guest.monitors[0]}", on_record=found.take) as agent:
            await agent.measuring.wait_started()
            toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), WRITES)
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
                say(f"            {exc.message}")
    if found.failure is not None:
        for line in measured_lines(found.failure, " " * 10):
            say(line)
        say(f"            dead after {writes} of {WRITES} writes, {found.transitions} transitions")
    else:
        say(f"            survived {writes} writes, {found.transitions} transitions")
    for kind in ("vcpu_gap", "vcpu_inhibit", "commit", "missing"):
        median = found.median_ns(kind)
        if median is not None:
            count = len(found.stalls[kind])
            say(f"            {kind_text(kind):<14} median {span_text(*median)} ({count} seen)")
    return found
