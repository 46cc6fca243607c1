"""Carries out plans on a lab machine, operation by operation, and takes the time of each part.

`SlotExecutor` is for strategies whose slots are KVM's own: delete, add, change flags, with vCPUs
held where the plan says so.  Those that make holes in live slots are in `hole_execution`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import OperationFailed
from ..memslots import Missing, Op, OpKind, Plan, Slot, SlotTable
from .dirty_ring import DirtyRings
from .host_memory import HostMemory
from .machine import Machine
from .vm import SlotRefused

__all__ = [
    "HostMemories",
    "BlockName",
    "ExecutionResult",
    "Executor",
    "FetchedLog",
    "Log",
    "RingLog",
    "SlotExecutor",
    "hva_of",
    "nothing",
    "refused",
    "ring_log",
]

BlockName = tuple[str | None, str | None]
"""Name and owner of what backs a slot."""

HostMemories = Mapping[BlockName, HostMemory]


def hva_of(memories: HostMemories, slot: Slot) -> int:
    """Where the slot's first byte lies in our address space."""
    return memories[slot.block, slot.owner].hva + (slot.offset or 0)


@dataclass(frozen=True, slots=True)
class FetchedLog:
    """A dirty bitmap as KVM gave it: a bit a page from `gpa` on."""

    gpa: int
    size: int
    bitmap: bytes

    def dirty(self, gpa: int) -> bool:
        """The page that holds `gpa` is in it and marked."""
        page = (gpa - self.gpa) >> 12
        return 0 <= page < self.size >> 12 and bool(self.bitmap[page >> 3] >> (page & 7) & 1)


@dataclass(frozen=True, slots=True)
class RingLog:
    """Pages that dirty rings told of."""

    pages: frozenset[int]

    def dirty(self, gpa: int) -> bool:
        return gpa & ~0xFFF in self.pages


Log = FetchedLog | RingLog


def ring_log(rings: DirtyRings, slots: Iterable[Slot]) -> RingLog:
    """What is in the rings, of slots that are there now; whatever else is lost.  Raises OSError."""
    start = {slot.kvm_slot: slot.gpa for slot in slots}
    return RingLog(
        frozenset(start[slot] + (page << 12) for slot, page in rings.take() if slot in start)
    )


@dataclass(slots=True)
class ExecutionResult:
    """One plan, carried out.

    All of it took `[begin_ns, end_ns)`, its system calls `calls_ns` of that.  RAM that is there
    before and after had no slot for at most `missing_ns` while vCPUs could look; vCPUs were kept
    out for `stall_ns`.  `results` has 0 or -errno of each KVM_SET_USER_MEMORY_REGION, by the
    plan's operation.  `logs` were fetched on the way.  `deleted` are KVM's ids of the slots that
    were deleted.
    """

    begin_ns: int = 0
    end_ns: int = 0
    calls_ns: int = 0
    missing_ns: int = 0
    stall_ns: int = 0
    results: dict[int, int] = field(default_factory=dict)
    logs: list[Log] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)

    @property
    def took_ns(self) -> int:
        return self.end_ns - self.begin_ns

    def failure(self) -> int:
        """The errno of the first operation that KVM refused, 0 for none."""
        return next((-result for result in self.results.values() if result), 0)


class Executor(Protocol):
    """Keeps the slots of one machine."""

    def install(self, table: SlotTable) -> None:
        """Make the slots of an empty machine.  Raises SlotRefused."""

    def carry_out(self, plan: Plan) -> ExecutionResult:
        """Do what the plan says, vCPUs running.  Raises OperationFailed when the plan is not for
        the slots there are; what KVM refuses is in the result."""

    def slots(self) -> list[Slot]:
        """The slots as KVM has them."""

    def fetch_logs(self) -> list[Log]:
        """The dirty logs of all logged slots, cleared by that.  Raises SlotRefused."""

    def waiting_at(self) -> list[int]:
        """gpas of holes at which a vCPU waits inside KVM, not told before."""

    def close(self) -> None: ...


class SlotExecutor:
    """Slots are KVM's slots.  `sync` fetches the dirty log of a logged one before its delete."""

    def __init__(self, machine: Machine, memories: HostMemories, *, sync: bool = False) -> None:
        self._machine = machine
        self._memories = memories
        self._sync = sync
        self.table = SlotTable()

    def install(self, table: SlotTable) -> None:
        for slot in table:
            hva = hva_of(self._memories, slot)
            self._machine.vm.set_region(slot.kvm_slot, slot.gpa, slot.size, hva, slot.flags)
        self.table = table

    def slots(self) -> list[Slot]:
        return list(self.table)

    def fetch_logs(self) -> list[Log]:
        rings = self._machine.rings
        if rings is not None:
            return [ring_log(rings, self.table)]
        return [self._fetch(slot) for slot in self.table if slot.logged]

    def waiting_at(self) -> list[int]:
        return []

    def close(self) -> None:
        """KVM's slots go with the machine."""

    def carry_out(self, plan: Plan, slots: Sequence[Slot] | None = None) -> ExecutionResult:
        """`slots` are those that the operations are about, for plans that KVM may refuse."""
        if plan.before != self.table:
            raise OperationFailed("the plan is for other slots than the machine has")
        about = list(slots) if slots is not None else _about(plan)
        done = ExecutionResult()
        inside = held_by(plan)
        gap = _Gap(plan.ops, plan.missing) if not inside else None
        inhibited = bool(plan.inhibited)
        machine = self._machine
        done.begin_ns = time.monotonic_ns()
        try:
            if inhibited:
                machine.hold()
            self._operate(plan.ops, about, done, gap)
        finally:
            if machine.held:
                machine.release()
                done.stall_ns = machine.stall_ns
            done.end_ns = time.monotonic_ns()
        if gap is not None and gap.since_ns:
            done.missing_ns = max(gap.until_ns - gap.since_ns, 0)
        if slots is not None or not done.failure():
            self.table = plan.after
        return done

    def _operate(
        self, ops: Sequence[Op], about: Sequence[Slot], done: ExecutionResult, gap: _Gap | None
    ) -> None:
        machine, region, now = self._machine, self._machine.vm.region, time.monotonic_ns
        hvas = [
            hva_of(self._memories, s) if op.slot >= 0 else 0
            for op, s in zip(ops, about, strict=True)
        ]
        for i, op in enumerate(ops):
            kind = op.op
            if kind is OpKind.PARK:
                machine.hold(through_bql=True)
                continue
            if kind is OpKind.BATCH_BEGIN:
                machine.hold()
                continue
            if kind is OpKind.UNPARK or kind is OpKind.BATCH_COMMIT:
                machine.release()
                done.stall_ns = machine.stall_ns
                continue
            slot = about[i]
            if kind is OpKind.DELETE:
                if self._sync and slot.logged and self.table.get(op.as_id, op.slot) is not None:
                    since = now()
                    done.logs.append(self._fetch(slot))
                    done.calls_ns += now() - since
                since = now()
                result = region(slot.kvm_slot, op.gpa, 0, hvas[i])
                until = now()
                done.deleted.append(slot.kvm_slot)
            else:
                since = now()
                result = region(slot.kvm_slot, op.gpa, op.size, hvas[i], op.flags)
                until = now()
            done.calls_ns += until - since
            done.results[i] = result
            if gap is not None:
                gap.note(i, since, until)

    def _fetch(self, slot: Slot) -> Log:
        if self._machine.rings is not None:
            return ring_log(self._machine.rings, self.table)
        return FetchedLog(slot.gpa, slot.size, self._machine.vm.dirty_log(slot.kvm_slot, slot.size))


def _about(plan: Plan) -> list[Slot]:
    """The slot that each operation of a plan adds, changes or deletes."""
    now = {(s.as_id, s.slot): s for s in plan.before}
    out: list[Slot] = []
    for op in plan.ops:
        which = (op.as_id, op.slot)
        if op.slot < 0:
            out.append(_NOWHERE)
            continue
        if op.op is OpKind.ADD:
            new = plan.after.get(*which)
            assert new is not None, "what a plan adds, it leaves"
            now[which] = new
        out.append(now[which])
    return out


_NOWHERE = Slot(0, -1, 0, 0)


def held_by(plan: Plan) -> bool:
    """vCPUs stand while the plan's slots are incomplete: nobody can see what is missing."""
    return plan.atomic


class _Gap:
    """From the beginning of the delete that takes away what should stay to the end of the add
    that brings the last of it back: an upper bound of how long it was missing."""

    def __init__(self, ops: Sequence[Op], missing: Sequence[Missing]) -> None:
        touching = [
            i
            for i, op in enumerate(ops)
            if op.slot >= 0
            and op.op is not OpKind.FLAGS
            and any(
                m.as_id == op.as_id and m.start < op.end and op.gpa < m.start + m.size
                for m in missing
            )
        ]
        self._first = touching[0] if touching else -1
        self._last = touching[-1] if touching else -1
        self.since_ns = self.until_ns = 0

    def note(self, index: int, since_ns: int, until_ns: int) -> None:
        if index == self._first:
            self.since_ns = since_ns
        if index == self._last:
            self.until_ns = until_ns


def nothing(machine: Machine) -> ExecutionResult:
    """The control: a slot is set to what it is, nothing to do for KVM.  Raises SlotRefused."""
    private = machine.private
    begin_ns = time.monotonic_ns()
    machine.vm.set_region(machine.private_slot, private.gpa, private.size, private.memory.hva)
    end_ns = time.monotonic_ns()
    return ExecutionResult(begin_ns, end_ns, end_ns - begin_ns)


def refused(results: Mapping[int, int], ops: Sequence[Op]) -> SlotRefused | None:
    """What KVM refused first, as an error."""
    for i, result in results.items():
        if result:
            op = ops[i]
            what = f"{op.op} of slot {op.slot} at {op.gpa:#x}+{op.size:#x}"
            return SlotRefused(what, -result)
    return None
