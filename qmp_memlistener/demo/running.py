"""The demo: a real guest punches and fills holes in its RAM, and an agent reports what happened.

Boots small guests, attaches, and has the guests reshape their memory map.  What it finds goes to
callbacks as text, and into one document.  Nothing is printed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from ..agent import Agent, attach
from ..errors import MissingPrerequisite
from ..guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    PAM_ROM,
    Q35,
    GuestSpec,
    PciAddress,
    Pulse,
    QemuBuild,
    boot_args,
    find_qemu,
    find_qemus,
    kvm_usable,
    launch,
)
from ..guests.linux import LinuxImage, LinuxSpec, boot_linux
from ..host.bounded import in_thread
from ..kvmlab.replay.read import read_plan_inputs
from ..memslots import Plan, plan_all
from ..records import (
    ProbesRecord,
    ProbeState,
    Record,
    SlotOp,
    TransitionRecord,
)
from ..reports import Narrator
from ..reports.compare import comparison_lines
from ..text import count_text
from ..updates.compare import CompareOptions, Comparison, compare
from ..updates.model import Strategy
from ..updates.options import parse_resize
from .race import INDENT, races

__all__ = ["Screen", "run_demo"]

_MEMORY = 512 << 20
_BAR_ADDRESS = 0xE000_0000
_TOGGLES = 100


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
        facts["races"] = [race.document() for b in builds for race in await races(b, say)]
    else:
        say(
            "",
            "what happens to a vCPU whose code is taken away, and how `steer` keeps it alive, "
            "shows under KVM only",
        )
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
                        say(f"{INDENT}QEMU's map stays as it is: no such register here")
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
            f"{INDENT}{_TOGGLES} writes in {took_ms:.0f} ms: "
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


# -- Linux with more memory, under every strategy --------------------------------------------------


async def _compare_strategies(
    build: QemuBuild, repeat: int, say: Callable[..., None]
) -> Comparison | None:
    """Boot Linux under TCG and compare; None, and the reason said, when there is no Linux guest."""
    say("", f"-- Linux under QEMU {build.version} gets 256 MiB more, under every strategy")
    try:
        image = await in_thread(LinuxImage.build)
    except MissingPrerequisite as exc:
        say(f"{INDENT}left out: {exc.message}")
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
            lambda text: say(f"{INDENT}{text}"),
        )
    say("", *comparison_lines(found, f"resize {_SIZE}"))
    return found
