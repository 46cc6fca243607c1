"""Carries out plans on a lab machine, operation by operation, and takes the time of each part.

Strategies without holes change KVM's slots: delete, add, change flags, with vCPUs held where the
plan says so.  Those with holes change what the host maps behind slots that stay (`real_slots`).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import OperationFailed
from ..memslots import Missing, Op, OpKind, Plan, Slot, SlotTable
from .arenas import Arena, HoleStep, steps_of
from .machine import Machine
from .memory import HostMemories, hva_of
from .real_slots import RealSlots
from .strategies import HoleKind
from .userfault import Userfault
from .vm import FetchedLog, Log, SlotRefused, ring_log

__all__ = ["NO_SLOT", "ExecutionResult", "Executor", "nothing"]


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

    @property
    def failed(self) -> bool:
        """KVM refused an operation."""
        return any(self.results.values())

    def check(self, ops: Sequence[Op]) -> None:
        """Raises SlotRefused for the first of the plan's `ops` that KVM refused."""
        for i, result in self.results.items():
            if result:
                op = ops[i]
                what = f"{op.op} of slot {op.slot} at {op.gpa:#x}+{op.size:#x}"
                raise SlotRefused(what, -result)


class Executor:
    """Keeps the slots of one machine, and changes them as plans say.

    With `hole` each of `arenas` is one slot of KVM, and holes are made behind it; they must hold
    all that will ever be.  Without it the slots are those of the plans, and `sync` fetches the
    dirty log of a logged one before its delete.
    """

    def __init__(
        self,
        machine: Machine,
        memories: HostMemories,
        *,
        hole: HoleKind | None = None,
        arenas: Sequence[Arena] = (),
        sync: bool = False,
    ) -> None:
        """Raises OSError without userfaultfd, for the strategy that needs it."""
        self._machine = machine
        self._memories = memories
        self._sync = sync
        self._userfault = Userfault() if hole is HoleKind.USERFAULT else None
        self._arenas: RealSlots | None = None
        if hole is not None:
            self._arenas = RealSlots(
                machine.vm,
                lambda block, _: memories[block].fd,
                kind=hole,
                userfault=self._userfault,
                arenas=arenas,
            )
        self.table = SlotTable()

    def install(self, table: SlotTable) -> None:
        """Make the slots of an empty machine.  Raises SlotRefused."""
        if self._arenas is not None:
            self._arenas.change((), tuple(table))
        else:
            for slot in table:
                hva = hva_of(self._memories, slot)
                self._machine.vm.set_region(slot.kvm_slot, slot.gpa, slot.size, hva, slot.flags)
        self.table = table

    def slots(self) -> list[Slot]:
        """The slots as KVM has them."""
        return list(self.table) if self._arenas is None else self._arenas.real()

    def fetch_logs(self) -> list[Log]:
        """The dirty logs of all logged slots, cleared by that.  Raises SlotRefused."""
        if self._machine.rings is not None:
            return [ring_log(self._machine.rings, self.slots())]
        return [self._fetch(slot) for slot in self.slots() if slot.logged]

    def _fetch(self, slot: Slot) -> Log:
        if self._machine.rings is not None:
            return ring_log(self._machine.rings, self.table)
        return FetchedLog(slot.gpa, slot.size, self._machine.vm.dirty_log(slot.kvm_slot, slot.size))

    def waiting_at(self) -> list[int]:
        """gpas of holes at which a vCPU waits in KVM (`hole-userfault`), not reported before."""
        if self._userfault is None or self._arenas is None:
            return []
        return self._arenas.gpas_of(self._userfault.addresses())

    def close(self) -> None:
        """Give host mappings back.  KVM's slots go with the machine."""
        if self._arenas is not None:
            self._arenas.close()
        if self._userfault is not None:
            self._userfault.close()
            self._userfault = None

    # -- plans ---------------------------------------------------------------------------------

    def carry_out(self, plan: Plan, slots: Sequence[Slot] | None = None) -> ExecutionResult:
        """Do what the plan says, vCPUs running; what KVM refuses is in the result.

        `slots` are those that the operations are about, for plans that KVM may refuse.  Raises
        OperationFailed when the plan is not for the slots there are.
        """
        if plan.before != self.table:
            raise OperationFailed("the plan is for other slots than the machine has")
        done = ExecutionResult()
        if self._arenas is not None:
            self._change(self._arenas, plan, done)
        else:
            self._operate(plan, list(slots) if slots is not None else _about(plan), done)
        if slots is not None or not done.failed:
            self.table = plan.after
        return done

    def _change(self, arenas: RealSlots, plan: Plan, done: ExecutionResult) -> None:
        """HoleStep by step: of a step with several operations the guest sees one change."""
        steps = steps_of(plan)
        done.begin_ns = time.monotonic_ns()
        for step in steps:
            if step.ops:
                result = self._take(arenas, step, done)
                done.results |= dict.fromkeys(step.ops, result)
        done.end_ns = time.monotonic_ns()

    def _take(self, arenas: RealSlots, step: HoleStep, done: ExecutionResult) -> int:
        since = time.monotonic_ns()
        result = 0
        try:
            done.deleted += arenas.change(step.pieces, step.after)
        except SlotRefused as exc:
            result = -exc.errno
        except OperationFailed as exc:  # the host's mapping
            cause = exc.__cause__
            result = -((cause.errno if isinstance(cause, OSError) else None) or errno.EIO)
        done.calls_ns += time.monotonic_ns() - since
        self._machine.memory_changed()
        return result

    def _operate(self, plan: Plan, about: Sequence[Slot], done: ExecutionResult) -> None:
        """Operation by operation, vCPUs held where the plan or QEMU (>= 8.0) holds them."""
        machine = self._machine
        gap = None if plan.atomic else _Gap(plan.ops, plan.missing)
        done.begin_ns = time.monotonic_ns()
        try:
            if plan.inhibited:
                machine.hold()
            self._call(plan.ops, about, done, gap)
        finally:
            if machine.held:
                machine.release()
                done.stall_ns = machine.stall_ns
            done.end_ns = time.monotonic_ns()
        if gap is not None and gap.since_ns:
            done.missing_ns = max(gap.until_ns - gap.since_ns, 0)

    def _call(
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
            slot, size = about[i], op.size
            if kind is OpKind.DELETE:
                size = 0
                done.deleted.append(slot.kvm_slot)
                if self._sync and slot.logged and self.table.get(op.as_id, op.slot) is not None:
                    since = now()
                    done.logs.append(self._fetch(slot))
                    done.calls_ns += now() - since
            since = now()
            result = region(slot.kvm_slot, op.gpa, size, hvas[i], op.flags)
            until = now()
            done.calls_ns += until - since
            done.results[i] = result
            if gap is not None:
                gap.note(i, since, until)


def _about(plan: Plan) -> list[Slot]:
    """The slot that each operation of a plan adds, changes or deletes."""
    now = {(s.as_id, s.slot): s for s in plan.before}
    out: list[Slot] = []
    for op in plan.ops:
        which = (op.as_id, op.slot)
        if op.slot < 0:
            out.append(NO_SLOT)
            continue
        if op.op is OpKind.ADD:
            new = plan.after.get(*which)
            assert new is not None, "what a plan adds, it leaves"
            now[which] = new
        out.append(now[which])
    return out


NO_SLOT = Slot(0, -1, 0, 0)
"""What an operation is about that has no slot, such as a pause."""


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
