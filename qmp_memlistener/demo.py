"""The demo: a real guest punches and fills holes in its RAM, and an agent reports what happened.

Boots small guests, attaches, and has the guests reshape their memory map.  What it finds goes to
callbacks as text, and into one document.  Nothing is printed here.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from .agent import Agent, attach
from .errors import DeadlineExceeded, MissingPrerequisite
from .guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    PAM_ROM,
    Q35,
    GuestSpec,
    High,
    PciAddress,
    Pulse,
    QemuBuild,
    boot_args,
    find_qemu,
    find_qemus,
    kvm_usable,
    launch,
)
from .guests.linux import LinuxImage, LinuxSpec, boot_linux
from .host.bounded import in_thread
from .kvmlab.replay.read import read_plan_inputs
from .memslots import Plan, plan_all
from .records import (
    GuestFailure,
    ProbesRecord,
    ProbeState,
    Record,
    SlotOp,
    StallRecord,
    TransitionRecord,
)
from .reports import Narrator
from .reports.compare import comparison_lines
from .reports.lengths import kind_text, span_text
from .reports.stalls import measured_lines
from .text import count_text
from .updates.compare import CompareOptions, Comparison, compare
from .updates.model import Strategy
from .updates.options import parse_resize

__all__ = ["Screen", "run_demo"]

_MEMORY = 512 << 20
_BAR_ADDRESS = 0xE000_0000
_TOGGLES = 100
_INDENT = " " * 12

_RACE_WRITES = 200
_RACE_MEMORY = 256 << 20
_SHORTEST_GAP_NS = 100_000
_DEADLINE = 30.0

_WINDOW_S = 0.7
_SIZE = "+256M"

_Write = tuple[PciAddress, int, int, int]  # function, register, value, width


@dataclass(frozen=True, slots=True)
class Screen:
    """Where the demo's text goes; both do nothing when only the document is wanted."""

    say: Callable[..., None]
    show_plans: Callable[[Sequence[Plan]], None]
    narrator: Narrator


async def run_demo(
    machine: str, accel: str, version: str | None, repeat: int, screen: Screen
) -> dict[str, object]:
    """Run it; the document of `demo --json`.

    `machine` is pc or q35, `accel` kvm, tcg, or auto: KVM where it works.  `version` names a QEMU
    that is here, by default the oldest.  `repeat` rounds of the comparison, 0 for none.  Raises
    MissingPrerequisite, and what `launch` and `attach` raise.
    """
    say = screen.say
    build = await in_thread(find_qemu, version)
    if accel == "auto":
        probe = await in_thread(kvm_usable, build)
        accel = "kvm" if probe else "tcg"
        if not probe:
            say(f"KVM does not work here ({probe.reason}), so the guest runs under TCG")
    facts: dict[str, object] = {"qemu": build.version, "machine": machine, "accel": accel}
    say(f"QEMU {build.version}, machine {machine}, {accel}, 1 vCPU: booting")
    demo = _Demo(machine, screen)
    facts |= await demo.run(build, accel)
    if accel == "kvm":
        builds = [build] if version is not None else find_qemus()
        facts["races"] = [(await _race(b, say)).document() for b in builds]
    else:
        say("", "what happens to a vCPU whose code is taken away shows under KVM only")
    if repeat:
        facts["comparison"] = await _compare_strategies(build, repeat, say)
    return {"schema": 1, **facts, **demo.document()}


# -- a guest that reshapes its map -----------------------------------------------------------------


class _Demo:
    """A guest opens and closes holes; the first transition is planned under every strategy."""

    def __init__(self, machine: str, screen: Screen) -> None:
        self._bridge = I440FX if machine == "pc" else Q35
        self._machine = machine
        self._screen = screen
        self._quiet = False
        self._transitions = 0
        self._slot_ops = 0
        self._predicted = 0
        self._probes: dict[str, ProbeState] = {}

    async def run(self, build: QemuBuild, accel: str) -> dict[str, object]:
        """Facts for the document."""
        spec = GuestSpec(
            machine=self._machine,
            accel=accel,
            memory=_MEMORY,
            # one vCPU: while it waits for its own write, none can meet the missing RAM
            smp=1,
            args=(
                *boot_args(),
                *("-device", "VGA,addr=0x4"),
                *("-object", "memory-backend-ram,id=shared,size=1M"),
                *("-device", "ivshmem-plain,id=iv0,memdev=shared,addr=0x5"),
            ),
        )
        with TemporaryDirectory(prefix="qmp-memlistener-") as directory:
            recording = f"{directory}/demo.jsonl"
            facts = await self._reshape(spec.on(build), recording)
            self._explain(recording)
        return facts

    async def _reshape(self, spec: GuestSpec, recording: str) -> dict[str, object]:
        say = self._screen.say
        async with launch(spec) as guest:
            assert guest.ram is not None
            pulse = Pulse(guest.ram)
            await pulse.wait_ready()
            target = f"unix:{guest.monitors[0]}"
            say(f"attaching to {guest.monitors[0]}", "")
            async with attach(target, record=recording, on_record=self._take) as agent:
                for title, writes in self._steps():
                    say("", f"-- the guest {title}")
                    before = self._transitions
                    for address, register, value, width in writes:
                        await pulse.write_config(address, register, value, width)
                        await agent.settle()
                    if self._transitions == before:
                        say(f"{_INDENT}QEMU's map stays as it is: no such register here")
                say("", f"-- the guest maps BAR 2 of iv0 at {_BAR_ADDRESS:#x}, and unmaps it")
                await pulse.map_bar(PciAddress(0, 5), 2, _BAR_ADDRESS)
                await pulse.unmap_bar(PciAddress(0, 5))
                await agent.settle()
                title = f"the guest opens and closes PAM {_TOGGLES} times, as fast as it can"
                say("", f"-- {title}")
                facts = await self._toggle(pulse, agent)
                facts |= {"snapshots": agent.snapshots[0], "source": agent.source}
                agent.measuring.state().add_to(self._probes)
        return facts

    def _explain(self, recording: str) -> None:
        """Plans for the first transition that changes RAM."""
        told = read_plan_inputs(recording)
        first = next(
            (t for t in told.transitions if len(t.before[0]) and t.before != t.after), None
        )
        if first is not None:
            self._screen.say(
                "", "-- the first transition under every strategy (`qmp-memlistener plan`)"
            )
            plans = plan_all(
                first.before, first.after, table=first.table, rules=told.rules, log=first.log
            )
            self._screen.show_plans(plans)

    def document(self) -> dict[str, object]:
        return {
            "transitions": self._transitions,
            "slot_ops": self._slot_ops,
            "predicted_slot_ops": self._predicted,
            "probes": list(self._probes.values()),
        }

    def _steps(self) -> Iterator[tuple[str, list[_Write]]]:
        def writes(register: int, *values: int, width: int = 1) -> list[_Write]:
            return [(HOST_BRIDGE, register, value, width) for value in values]

        bridge = self._bridge
        yield (
            "opens the BIOS area as RAM (PAM), makes it read-only, closes it",
            writes(bridge.pam, PAM_RAM << 4, PAM_ROM << 4, 0),
        )
        yield "opens SMRAM over the VGA window, closes it", writes(bridge.smram, 0x4A, 0x0A)
        if bridge.esmramc is not None:
            yield (
                "takes the top 8 MiB of its RAM away (TSEG), gives it back",
                writes(bridge.esmramc, 0x05, 0x00),
            )
        if bridge.pciexbar is not None:
            yield (
                "puts PCI Express configuration space over its RAM, takes it away",
                writes(bridge.pciexbar, 0x1000_0001, 0x1000_0000, width=8),
            )

    async def _toggle(self, pulse: Pulse, agent: Agent) -> dict[str, object]:
        before = self._transitions, self._slot_ops
        self._quiet = True
        start = time.monotonic_ns()
        toggle = await pulse.toggle(HOST_BRIDGE, self._bridge.pam, (PAM_RAM << 4, 0), _TOGGLES)
        await toggle.wait()
        took_ms = (time.monotonic_ns() - start) / 1e6
        await agent.settle()
        self._quiet = False
        seen = self._transitions - before[0]
        ops = self._slot_ops - before[1]
        self._screen.say(
            f"{_INDENT}{_TOGGLES} writes in {took_ms:.0f} ms: "
            f"{count_text(seen, 'transition')}, {count_text(ops, 'slot operation')} seen"
        )
        return {"toggles": _TOGGLES, "toggles_seen": seen}

    def _take(self, record: Record) -> None:
        """A record of the agent."""
        if isinstance(record, ProbesRecord):
            record.add_to(self._probes)
        if isinstance(record, TransitionRecord):
            self._transitions += 1
        elif isinstance(record, SlotOp):
            self._slot_ops += 1
            self._predicted += record.predicted
        if not self._quiet:
            for line in self._screen.narrator.lines(record):
                self._screen.say(line)


# -- a vCPU whose code lies in RAM that is taken away ----------------------------------------------


class _Race:
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
                f"{_INDENT}dead after {writes} of {_RACE_WRITES} writes, "
                f"{count_text(self.transitions, 'transition')}"
            )
        else:
            transitions = count_text(self.transitions, "transition")
            yield f"{_INDENT}survived {writes} writes, {transitions}"
        medians = self.medians()
        for kind in ("vcpu_gap", "vcpu_inhibit", "commit", "missing"):
            if kind in medians:
                span, count = span_text(*medians[kind]), len(self.stalls[kind])
                yield f"{_INDENT}{kind_text(kind):<14} median {span} ({count} seen)"


async def _race(build: QemuBuild, say: Callable[..., None]) -> _Race:
    """Boot a guest under KVM and let it toggle PAM until it has died or is done.

    One vCPU opens and closes PAM, which makes QEMU delete and add the slot with all RAM above
    1 MiB; the other runs code there.  Up to QEMU 7.2 the guest dies of it, from 8.0 on vCPUs are
    kept out meanwhile and wait.
    """
    spec = GuestSpec(machine="pc", accel="kvm", memory=_RACE_MEMORY, smp=2, args=boot_args())
    found = _Race(build.version)
    say("", f"-- QEMU {build.version}: CPU 1 runs code above 1 MiB while CPU 0 writes PAM")
    async with launch(spec.on(build)) as guest:
        assert guest.ram is not None
        pulse = Pulse(guest.ram)
        await pulse.wait_ready()
        await pulse.place(1, High.CODE)
        clock = await pulse.calibrate()
        for cpu in range(2):
            await pulse.reset(cpu, threshold=clock.ticks(_SHORTEST_GAP_NS))
        async with attach(f"unix:{guest.monitors[0]}", on_record=found.take) as agent:
            await agent.measuring.wait_started()
            toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), _RACE_WRITES)
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
                say(f"{_INDENT}{exc.message}")
    say(*found.lines(writes))
    return found


# -- Linux with more memory, under every strategy --------------------------------------------------


async def _compare_strategies(
    build: QemuBuild, repeat: int, say: Callable[..., None]
) -> Comparison | None:
    """Boot Linux under TCG and compare; None, and the reason said, when there is no Linux guest."""
    say("", f"-- Linux under QEMU {build.version} gets 256 MiB more, under every strategy")
    try:
        image = await in_thread(LinuxImage.build)
    except MissingPrerequisite as exc:
        say(f"{_INDENT}left out: {exc.message}")
        return None
    # a DIMM for direct and pause, a virtio-mem device with room for hole
    async with (
        boot_linux(image, LinuxSpec(machine="pc", virtio_mem=1 << 30), build) as linux,
        attach(f"unix:{linux.guest.monitors[0]}", guarded=True) as agent,
    ):
        await agent.measuring.wait_started()
        found = await compare(
            agent,
            parse_resize(_SIZE),
            tuple(Strategy),
            CompareOptions(repeat, _WINDOW_S),
            lambda text: say(f"{_INDENT}{text}"),
        )
    say("", *comparison_lines(found, f"resize {_SIZE}"))
    return found
