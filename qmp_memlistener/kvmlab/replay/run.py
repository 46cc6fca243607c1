"""`lab replay`: transitions of a real guest on a VM of our own, under every strategy.

All strategies take part in turn, transition by transition, each on a machine of its own; their
memory is the same, since only one of them runs at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import msgspec

from ...errors import InputError
from ...tracking.replaying import FileKind
from ..abi import Cap
from ..arenas import arenas_of
from ..executor import ExecutionResult, Executor, nothing
from ..machine import Machine
from ..measuring import Totals, Update, measure
from ..memory import PAGE, BlockName, HostMemories, HostMemory
from ..programs import DATA, Private
from ..race import host_facts
from ..strategies import HoleKind, LabStrategy, select, why_not
from ..system import Closing, Cpus
from ..vm import Kvm, most_slots
from ..x86 import GIB, MAX_GIB
from .plans import (
    Planned,
    addresses,
    chunk_of,
    free_place,
    plans_for,
    slots_for,
    without,
)
from .read import HostBlock, ReplayInput, ReplayTransition, read_replay

__all__ = ["ReplayOptions", "ReplayReport", "ReplayResult", "replay_document", "run_replay"]

_MOST_SPLIT = 8192
_OWN_SLOTS = 2  # the private one, and one for a moment more


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`most` bounds the transitions that are replayed; None is all."""

    strategies: tuple[str, ...] = ("all",)
    vcpus: int = 1
    most: int | None = None
    seed: int = 0


class ReplayedTransition(msgspec.Struct, frozen=True):
    """One transition under one strategy: its number, its operations, what it did."""

    seq: int
    ops: int
    return_mismatches: int
    update: Update


class ReplayResult(msgspec.Struct, frozen=True):
    """One strategy.  `skipped` says why it did not run."""

    name: str
    fidelity: str
    skipped: str | None = None
    transitions: tuple[ReplayedTransition, ...] = ()

    @property
    def totals(self) -> Totals:
        return Totals.of([t.update for t in self.transitions])


class ReplayReport(msgspec.Struct, frozen=True):
    """A replay; `notes` say what was guessed or left out."""

    host: dict[str, object]
    source: str
    kind: FileKind
    qemu_version: str | None
    options: ReplayOptions
    results: tuple[ReplayResult, ...]
    notes: tuple[str, ...]


def run_replay(
    path: str,
    options: ReplayOptions,
    *,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ReplayReport:
    """Replay a recording or a QEMU log.  `progress` gets transitions done and in all.

    Raises InputError, RecordingError; MissingPrerequisite when KVM cannot be used here;
    OperationFailed when a vCPU does not go on or memory is short.  Nothing is left behind.
    """
    chosen = select(options.strategies)
    if options.most is not None and options.most < 1:
        raise InputError(f"{options.most} transitions", remedy="use 1 or more")
    source = read_replay(path, page_size=PAGE, most=options.most)
    order = random.Random(options.seed)
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm(device) if device else Kvm())
        source, notes = without(source, max(kvm.capability(Cap.MULTI_ADDRESS_SPACE), 1))
        source = replace(source, rules=replace(source.rules, slots=most_slots(kvm) - 1))
        memory = _memory(stack, source)
        skipped: dict[str, str] = {}
        players: list[_Player] = []
        cpus = Cpus.for_vcpus(options.vcpus)
        for strategy in chosen:
            slots = slots_for(strategy, source) + _OWN_SLOTS
            reason = why_not(strategy, kvm, slots=slots)
            if reason is None and strategy.chunk is not None and slots > _MOST_SPLIT:
                reason = (
                    f"it takes {slots} slots: to change them at every transition takes too long "
                    f"from {_MOST_SPLIT} on"
                )
            if reason is None and strategy.hole is HoleKind.ATTRIBUTES and _spaces(source) > 1:
                reason = "a protected VM has one address space, slots here are in more"
            if reason is not None:
                skipped[strategy.name] = reason
                continue
            with cpus.on(cpus.vcpus):  # where the threads of the vCPUs stay
                player = _Player(kvm, strategy, source, memory, options.vcpus)
            players.append(stack.enter_context(player))
            player.begin()
        stack.enter_context(cpus.on(cpus.own))
        total = len(source.transitions)
        for i in range(total):
            order.shuffle(players)
            for player in players:
                player.play(i)
            if progress is not None:
                progress(i + 1, total)
        done = {p.strategy.name: tuple(p.transitions) for p in players}
        return ReplayReport(
            host_facts(kvm, cpus),
            path,
            source.kind,
            source.qemu_version,
            options,
            tuple(
                ReplayResult(s.name, s.fidelity, skipped.get(s.name), done.get(s.name, ()))
                for s in chosen
            ),
            (*source.notes, *notes),
        )


def _spaces(source: ReplayInput) -> int:
    """Address spaces up to the last that has slots."""
    return 1 + max((op.as_id for t in source.transitions for op in t.ops), default=0)


class _Player(Closing):
    """A machine that goes through the transitions under one strategy."""

    def __init__(
        self,
        kvm: Kvm,
        strategy: LabStrategy,
        source: ReplayInput,
        memory: HostMemories,
        vcpus: int,
    ) -> None:
        self.strategy = strategy
        self.transitions: list[ReplayedTransition] = []
        self._source = source
        self._memory = memory
        reach = MAX_GIB * GIB
        place = free_place(source, Private.size_for(MAX_GIB), reach)
        if place is None:
            raise InputError(
                f"{source.source} leaves no room for the lab's own slot below {MAX_GIB} GiB",
                remedy="replay fewer transitions",
            )
        top = max((e for e in _ends(source) if e <= reach), default=place)
        self._vcpus = vcpus
        self._machine = Machine(
            kvm,
            vcpus=vcpus,
            private_slot=most_slots(kvm) - 1,
            private_gpa=place,
            reach=min(top, reach - GIB),
            vm_type=strategy.vm_type,
        )
        self._reach = self._machine.reach
        self._executor: Executor | None = None
        self._plans: Iterator[Planned] = iter(())

    def begin(self) -> None:
        """Make the slots that are there before the first transition, and start the guest."""
        machine, strategy = self._machine, self.strategy
        table, tables, self._plans = plans_for(strategy, self._source)
        self._executor = Executor(
            machine,
            _Chunks(self._memory) if strategy.chunk else self._memory,
            hole=strategy.hole,
            arenas=arenas_of(tables),
            sync=strategy.sync,
        )
        self._executor.install(table)
        entry, private = machine.entry(DATA), machine.private
        machine.set_tables([[private.scratch_gpa(i)] for i in range(self._vcpus)])
        machine.load(lambda i: (entry, private.cr3, machine.registers(i)))

    def play(self, index: int) -> None:
        """One transition, vCPUs running on what stays.  Raises OperationFailed."""
        machine, planned = self._machine, next(self._plans)
        transition = self._source.transitions[index]
        machine.set_tables([self._addresses(transition, i) for i in range(self._vcpus)])
        machine.release()
        idle = self.strategy.idle
        update, executed = measure(
            machine,
            (lambda: nothing(machine)) if idle else lambda: self._carry_out(planned),
            ids_changed=bool(planned.plan.exposure.slot_ids_changed) and not idle,
        )
        # what they go through now may be gone with the next one
        private = machine.private
        machine.set_tables([[private.scratch_gpa(i)] for i in range(self._vcpus)])
        if idle:
            executed = self._carry_out(planned)  # so that the next one finds what it begins with
        machine.hold()
        self.transitions.append(
            ReplayedTransition(
                transition.seq,
                sum(op.slot >= 0 for op in planned.plan.ops),
                _mismatches(planned, executed),
                update,
            )
        )

    def _addresses(self, transition: ReplayTransition, vcpu: int) -> list[int]:
        found = addresses(transition, self._reach, vcpu, self._vcpus)
        return found or [self._machine.private.scratch_gpa(vcpu)]

    def _carry_out(self, planned: Planned) -> ExecutionResult:
        assert self._executor is not None, "begun"
        recorded = planned.recorded
        if recorded is not None:
            return self._executor.carry_out(planned.plan, [a.slot for a in recorded])
        executed = self._executor.carry_out(planned.plan)
        executed.check(planned.plan.ops)
        return executed

    def close(self) -> None:
        if self._executor is not None:
            self._executor.close()
        self._machine.close()


class _Chunks(dict[BlockName, HostMemory]):
    """Memory of blocks, also for the parts into which a strategy splits them."""

    def __init__(self, memory: HostMemories) -> None:
        super().__init__(memory)

    def __missing__(self, name: BlockName) -> HostMemory:
        block, owner = name
        memory = self[name] = self[chunk_of(block or ""), owner]
        return memory


def _mismatches(planned: Planned, executed: ExecutionResult) -> int:
    """Operations that KVM answered otherwise than it did when they were recorded."""
    recorded = planned.recorded
    if recorded is None:
        return sum(bool(result) for result in executed.results.values())
    return sum(result != recorded[i].ret for i, result in executed.results.items())


def _ends(source: ReplayInput) -> list[int]:
    ends = [s.end for s in source.initial]
    return ends + [s.end for t in source.transitions for s in t.slots]


def _memory(stack: ExitStack, source: ReplayInput) -> dict[BlockName, HostMemory]:
    """Memory for every block, none of it populated.  Raises OperationFailed."""

    def made(block: HostBlock) -> HostMemory:
        size = -(-block.size // PAGE) * PAGE
        return stack.enter_context(HostMemory(size, "replay"))

    # what operations that KVM refused were to map is unknown, and does not matter
    unknown = stack.enter_context(HostMemory(PAGE, "replay"))
    return {
        (None, None): unknown,
        **{(block.name, block.owner): made(block) for block in source.blocks},
    }


def replay_document(report: ReplayReport) -> dict[str, object]:
    """The document of `lab replay --json`; docs/json.md has its keys."""
    return {
        "schema": 1,
        "host": report.host,
        "source": report.source,
        "kind": report.kind,
        "qemu_version": report.qemu_version,
        "notes": list(report.notes),
        "options": msgspec.to_builtins(report.options),
        "strategies": [_entry(r) for r in report.results],
    }


def _entry(r: ReplayResult) -> dict[str, object]:
    totals = r.totals
    measured: dict[str, object] = {
        "transitions": totals.updates,
        "ops": sum(t.ops for t in r.transitions),
        "return_mismatches": sum(t.return_mismatches for t in r.transitions),
        "transitions_hit": totals.hit,
        **totals.as_json(),
    }
    return {
        "name": r.name,
        "skipped": r.skipped,
        "fidelity": r.fidelity,
        **(measured if r.skipped is None else dict.fromkeys(measured)),
        "by_transition": [
            {
                "seq": t.seq,
                "ops": t.ops,
                "return_mismatches": t.return_mismatches,
                **msgspec.to_builtins(t.update),
            }
            for t in r.transitions
        ],
    }
