"""Carries out `hole` plans: each arena is one real slot, and holes are made behind it.

Slot operations remain for arenas that come and go.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence

from ..errors import OperationFailed
from ..memslots import Op, Plan, Slot, SlotTable
from ..memslots.slots import AS_SHIFT
from .arenas import Arena, Step, slots_by_arena, steps_of
from .execution import ExecutionResult, FetchedLog, HostMemories, Log, ring_log
from .machine import Machine
from .real_slot import LabContext, RealSlot
from .strategies import HoleKind
from .userfault import Userfault
from .vm import SlotRefused

__all__ = ["HoleExecutor"]


class HoleExecutor:
    """Slots of the `hole` strategy on a machine; `arenas` must hold all that will ever be."""

    def __init__(
        self, machine: Machine, memories: HostMemories, kind: HoleKind, arenas: Sequence[Arena]
    ) -> None:
        """Raises OSError without userfaultfd."""
        self._machine = machine
        self._numbers = {a: a.as_id << AS_SHIFT | i for i, a in enumerate(arenas)}
        self._reals: dict[Arena, RealSlot] = {}
        self._userfault = Userfault() if kind is HoleKind.USERFAULT else None
        self._context = LabContext(
            machine.vm, lambda block, _: memories[block].fd, kind, self._userfault
        )
        self.table = SlotTable()

    def install(self, table: SlotTable) -> None:
        for arena, slots in slots_by_arena(tuple(self._numbers), table).items():
            self._make(arena, slots)
        self.table = table

    def slots(self) -> list[Slot]:
        return [self._reals[arena].slot for arena in self._numbers if arena in self._reals]

    def fetch_logs(self) -> list[Log]:
        vm = self._machine.vm
        if self._machine.rings is not None:
            return [ring_log(self._machine.rings, self.slots())]
        return [
            FetchedLog(s.gpa, s.size, vm.dirty_log(s.kvm_slot, s.size))
            for s in self.slots()
            if s.logged
        ]

    def waiting_at(self) -> list[int]:
        """gpas in holes at which a vCPU waits (`hole-userfault`), not told before."""
        if self._userfault is None:
            return []
        addresses = self._userfault.addresses()
        return [gpa for a in addresses for r in self._reals.values() if (gpa := r.gpa_of(a)) >= 0]

    def carry_out(self, plan: Plan) -> ExecutionResult:
        if plan.before != self.table:
            raise OperationFailed("the plan is for other slots than the machine has")
        groups = [(step.first, step.count) for step in plan.steps]
        steps = steps_of(plan.ops, groups, plan.before, plan.after)
        done = ExecutionResult()
        done.begin_ns = time.monotonic_ns()
        for step in steps:
            self._take(step, plan.ops, done)
        done.end_ns = time.monotonic_ns()
        if not done.failure():
            self.table = plan.after
        return done

    def _take(self, step: Step, ops: Sequence[Op], done: ExecutionResult) -> None:
        if not step.ops:
            return
        since = time.monotonic_ns()
        result = 0
        try:
            self._change(step, done)
        except SlotRefused as exc:
            result = -exc.errno
        except OperationFailed as exc:  # the host's mapping
            cause = exc.__cause__
            result = -((cause.errno if isinstance(cause, OSError) else None) or errno.EIO)
        done.calls_ns += time.monotonic_ns() - since
        self._machine.memory_changed()
        for i in step.ops:
            if ops[i].slot >= 0:
                done.results[i] = result

    def _change(self, step: Step, done: ExecutionResult) -> None:
        there = slots_by_arena(tuple(self._numbers), step.after)
        for arena in self._numbers:
            slots, real = there.get(arena), self._reals.get(arena)
            if slots is None:
                if real is not None:
                    done.deleted.append(real.number)
                    real.delete(real.slot)
                    del self._reals[arena]
            elif real is None:
                self._make(arena, slots)
            else:
                for piece in step.pieces:
                    if arena.gpa <= piece.start < arena.end:
                        real.show(piece, slots[0])
                real.members = {s.slot: s for s in slots}
                real.set_log(slots[0])

    def _make(self, arena: Arena, slots: Sequence[Slot]) -> None:
        real = RealSlot(self._context, arena, slots, self._numbers[arena], slots[0])
        try:
            real.set(real.wanted_flags, "add", slots[0])
        except BaseException:
            real.close()
            raise
        self._reals[arena] = real

    def close(self) -> None:
        while self._reals:
            self._reals.popitem()[1].close()
        if self._userfault is not None:
            self._userfault.close()
            self._userfault = None
