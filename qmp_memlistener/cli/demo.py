"""`demo`: a real guest punches and fills holes in its RAM; the agent shows what happened."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import rich_click as click

from ..errors import MissingPrerequisite
from ..host.bounded import in_thread
from .common import json_option, print_json, run_async, say, terminal_shape

if TYPE_CHECKING:
    from ..guests import PciAddress, Pulse, QemuBuild
    from ..memslots import Rules, SlotTable
    from ..records import ProbeState, Record, SlotOp
    from ..topology import Transition

MEMORY = 512 << 20
BAR_ADDRESS = 0xE000_0000
TOGGLES = 100


@click.command("demo")
@click.option("--machine", type=click.Choice(["pc", "q35"]), default="pc", show_default=True)
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto",
              show_default=True, help="auto: KVM where it works, else TCG.")  # fmt: skip
@click.option("--qemu", metavar="VERSION", help="A QEMU that is here, by version; default: the "
              "installed one.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(min=0), default=5, show_default=True, metavar="N",
              help="Rounds of the comparison at the end; 0 leaves it out.")  # fmt: skip
@json_option
def command(machine: str, accel: str, qemu: str | None, repeat: int, as_json: bool) -> None:
    """Boot a small guest that reshapes its own memory map, attach, and show what happens.

    The guest opens and closes PAM segments and SMRAM or TSEG (holes in its RAM) and maps a BAR of
    a device. One transition is planned under every strategy. Under KVM a vCPU then runs code in
    the RAM that comes and goes, on every QEMU that is here: 7.2 dies of it, 10.0 does not. At the
    end a Linux guest gets more memory again and again under every strategy, and they are compared.
    Nothing but these guests is touched.

    Example: qmp-memlistener demo --machine q35
    """
    demo = _Demo(machine, as_json)
    run_async(demo.run(accel, qemu, repeat))
    if as_json:
        print_json(demo.document())


class _Demo:
    def __init__(self, machine: str, as_json: bool) -> None:
        from ..reports import Narrator

        self._machine = machine
        self._as_json = as_json
        width, unicode = terminal_shape()
        self._narrator = Narrator(width=width, unicode=unicode)
        self._quiet = False
        self.first: Transition | None = None
        self._rules: Rules | None = None
        self.after: SlotTable | None = None
        self._first_seq: int | None = None
        self._first_ops: list[SlotOp] = []
        self._facts: dict[str, object] = {}
        self._transitions = 0
        self._slot_ops = 0
        self._predicted = 0
        self._probes: dict[str, ProbeState] = {}

    async def run(self, accel: str, version: str | None, repeat: int) -> None:
        from ..agent import attach
        from ..guests import GuestSpec, Pulse, boot_args, kvm_usable, launch
        from ..listener import MemoryListener

        build = _choose(version)
        if accel == "auto":
            probe = await in_thread(kvm_usable, build)
            accel = "kvm" if probe else "tcg"
            if not probe:
                self._say(f"KVM does not work here ({probe.reason}), so the guest runs under TCG")
        spec = GuestSpec(
            machine=self._machine,
            accel=accel,
            memory=MEMORY,
            # one vCPU: while it waits for its own write, none can meet the missing RAM
            smp=1,
            args=(
                *boot_args(),
                *("-device", "VGA,addr=0x4"),
                *("-object", "memory-backend-ram,id=shared,size=1M"),
                *("-device", "ivshmem-plain,id=iv0,memdev=shared,addr=0x5"),
            ),
        )
        self._facts = {"qemu": build.version, "machine": self._machine, "accel": accel}
        self._say(f"QEMU {build.version}, machine {self._machine}, {accel}, 1 vCPU: booting")
        demo = self

        class FirstTransition(MemoryListener):
            """What a library user writes: told every transition, keeps the first."""

            def commit(self, transition: Transition) -> None:
                if demo.first is None and transition and len(transition.before):
                    demo.first = transition
                    demo.after = agent.slots

        async with launch(spec.on(build)) as guest:
            assert guest.ram is not None
            pulse = Pulse(guest.ram)
            await pulse.wait_ready()
            self._say(f"attaching to {guest.monitors[0]}", "")
            async with attach(f"unix:{guest.monitors[0]}", on_record=self._on_record) as agent:
                agent.register(FirstTransition())
                self._rules = agent.rules
                for title, writes in self._steps():
                    self._say("", f"-- the guest {title}")
                    before = self._transitions
                    for address, register, value, width in writes:
                        await pulse.write_config(address, register, value, width)
                        await agent.settle()
                    if self._transitions == before:
                        self._say(f"{' ' * 12}QEMU's map stays as it is: no such register here")
                self._say("", f"-- the guest maps BAR 2 of iv0 at {BAR_ADDRESS:#x}, and unmaps it")
                await self._bar(pulse)
                await agent.settle()
                title = f"the guest opens and closes PAM {TOGGLES} times, as fast as it can"
                self._say("", f"-- {title}")
                await self._toggle(pulse, agent.settle)
                self._facts["snapshots"] = agent.snapshots[0]
                self._facts["source"] = agent.source
                agent.measuring.state().add_to(self._probes)
        self._explain()
        if accel == "kvm":
            await self._races(build if version is not None else None)
        else:
            self._say("", "what happens to a vCPU whose code is taken away shows under KVM only")
        if repeat:
            from .demo_compare import compare_strategies

            self._facts["comparison"] = await compare_strategies(build, repeat, self._say)

    def document(self) -> dict[str, object]:
        return {
            "schema": 1,
            **self._facts,
            "transitions": self._transitions,
            "slot_ops": self._slot_ops,
            "predicted_slot_ops": self._predicted,
            "probes": list(self._probes.values()),
        }

    async def _races(self, only: QemuBuild | None) -> None:
        """A vCPU whose code is taken away, on every QEMU that is here (or the one asked for)."""
        from ..guests import find_qemus
        from .demo_race import race

        builds = [only] if only is not None else find_qemus()
        races = [await race(build, self._say) for build in builds]
        self._facts["races"] = [r.document() for r in races]

    def _steps(self) -> list[tuple[str, list[tuple[PciAddress, int, int, int]]]]:
        from ..guests import HOST_BRIDGE, I440FX, PAM_RAM, PAM_ROM, Q35

        bridge = I440FX if self._machine == "pc" else Q35
        high = [PAM_RAM << 4, PAM_ROM << 4, 0]
        steps = [
            (
                "opens the BIOS area as RAM (PAM), makes it read-only, closes it",
                [(HOST_BRIDGE, bridge.pam, value, 1) for value in high],
            ),
            (
                "opens SMRAM over the VGA window, closes it",
                [(HOST_BRIDGE, bridge.smram, value, 1) for value in (0x4A, 0x0A)],
            ),
        ]
        if bridge.esmramc is not None:
            steps.append(
                (
                    "takes the top 8 MiB of its RAM away (TSEG), gives it back",
                    [
                        (HOST_BRIDGE, bridge.esmramc, 0x05, 1),
                        (HOST_BRIDGE, bridge.esmramc, 0x00, 1),
                    ],
                )
            )
        if bridge.pciexbar is not None:
            steps.append(
                (
                    "puts PCI Express configuration space over its RAM, takes it away",
                    [
                        (HOST_BRIDGE, bridge.pciexbar, 0x1000_0001, 8),
                        (HOST_BRIDGE, bridge.pciexbar, 0x1000_0000, 8),
                    ],
                )
            )
        return steps

    async def _bar(self, pulse: Pulse) -> None:
        from ..guests import PciAddress

        device = PciAddress(0, 5)
        await pulse.map_bar(device, 2, BAR_ADDRESS)
        await pulse.unmap_bar(device)

    async def _toggle(self, pulse: Pulse, settle: Callable[[], Awaitable[None]]) -> None:
        from ..guests import HOST_BRIDGE, I440FX, PAM_RAM, Q35

        bridge = I440FX if self._machine == "pc" else Q35
        before = self._transitions, self._slot_ops
        self._quiet = True
        start = time.monotonic_ns()
        toggle = await pulse.toggle(HOST_BRIDGE, bridge.pam, (PAM_RAM << 4, 0), TOGGLES)
        await toggle.wait()
        took_ms = (time.monotonic_ns() - start) / 1e6
        await settle()
        self._quiet = False
        seen = self._transitions - before[0]
        ops = self._slot_ops - before[1]
        self._facts |= {"toggles": TOGGLES, "toggles_seen": seen}
        self._say(f"{' ' * 12}{TOGGLES} writes in {took_ms:.0f} ms: {seen} transitions, "
                  f"{ops} slot operations seen")  # fmt: skip

    def _explain(self) -> None:
        from ..memslots import plan_all
        from .plan import print_plans

        if self.first is None or self._as_json:
            return
        self._say("", "-- the first transition under every strategy (`qmp-memlistener plan`)")
        print_plans(
            plan_all(self.first.before, self.first.after, table=self._before(), rules=self._rules)
        )

    def _before(self) -> SlotTable | None:
        """The slots before the first transition: its traced operations, taken back.

        They told the ids of the slots that they are about; at attach nobody knew them.
        """
        from ..memslots import Slot

        if self.after is None:
            return None
        table = self.after.copy()
        for op in reversed(self._first_ops):
            if op.ret or op.as_id:
                continue
            if op.op == "add":
                table.remove(op.as_id, op.slot)
            elif op.op == "delete":
                table.add(Slot(op.as_id, op.slot, op.gpa, op.size))
        return table

    def _on_record(self, record: Record) -> None:
        from ..records import ProbesRecord, SlotOp, TransitionRecord

        if isinstance(record, ProbesRecord):
            record.add_to(self._probes)
        if isinstance(record, TransitionRecord):
            self._transitions += 1
            if self._first_seq is None and (record.removed or record.added):
                self._first_seq = record.seq
        elif isinstance(record, SlotOp):
            if record.transition == self._first_seq and record.transition is not None:
                self._first_ops.append(record)
            self._slot_ops += 1
            self._predicted += record.predicted
        if not self._quiet:
            for line in self._narrator.lines(record):
                self._say(line)

    def _say(self, *lines: str) -> None:
        if not self._as_json:
            say(*lines)


def _choose(version: str | None) -> QemuBuild:
    from ..guests import find_qemus

    builds = find_qemus()
    if not builds:
        raise MissingPrerequisite(
            "no qemu-system-x86_64 is installed",
            remedy="install the Debian package qemu-system-x86 (and seabios)",
        )
    if version is None:
        return builds[0]
    for build in builds:
        if build.version.startswith(version):
            return build
    raise MissingPrerequisite(
        f"QEMU {version} is not here; there are {', '.join(b.version for b in builds)}",
        remedy="`make qemus` in a checkout unpacks other versions beside the installed one",
    )
