"""The ways to carry out a transition: each turns one `PlanTask` into ops and the table they leave.

`hole` and `hole-split` have modules of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..topology.model import FlatView
from .commit import QemuOps, qemu_ops
from .dirty_log import DirtyLog, LogChange
from .ops import BATCH_BEGIN, BATCH_COMMIT, PARK, UNPARK, Op, OpKind
from .rules import Rules
from .slots import SlotTable

__all__ = ["PlanTask", "StrategyOps", "batch_full", "batch_incremental", "pause", "qemu"]


@dataclass(frozen=True)
class PlanTask:
    """A transition: the views by address-space id, the table before, and what logs start or stop.

    `table` knows what backs its slots; `pieces` is what KVM has of them (`hole-split`), by default
    the same.
    """

    before: Mapping[int, FlatView]
    after: Mapping[int, FlatView]
    table: SlotTable
    rules: Rules
    log_change: LogChange | None = None
    split: SlotTable | None = None

    @property
    def pieces(self) -> SlotTable:
        return self.table if self.split is None else self.split

    @cached_property
    def log(self) -> DirtyLog:
        """Which regions are logged before and after."""
        return DirtyLog(self.table, self.log_change, self.before.values(), self.after.values())

    @cached_property
    def qemu(self) -> QemuOps:
        """What QEMU does; computed once for all strategies that start from it."""
        return qemu_ops(self.before, self.after, self.table, self.rules, self.log)


@dataclass(frozen=True, slots=True)
class StrategyOps:
    """A strategy's answer.

    `before` is the table its ops start from (the strategy's own form of the table it was given).
    `vcpus_kicked` says that every vCPU has to leave guest mode together and wait.
    """

    ops: tuple[Op, ...]
    before: SlotTable
    after: SlotTable
    vcpus_kicked: bool
    inhibited: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def qemu(change: PlanTask) -> StrategyOps:
    """QEMU's own ioctls; every vCPU is kicked only where QEMU inhibits ioctls."""
    done = change.qemu
    return StrategyOps(done.ops, change.table, done.after, bool(done.inhibited), done.inhibited)


def pause(change: PlanTask) -> StrategyOps:
    """QEMU's own ioctls between park and unpark; nothing at all when there are none."""
    done = change.qemu
    if not done.ops:
        return StrategyOps((), change.table, done.after, False)
    ops = (PARK, *done.ops, UNPARK)
    return StrategyOps(ops, change.table, done.after, True, done.inhibited)


def batch_incremental(change: PlanTask) -> StrategyOps:
    """QEMU's own ioctls as one that the kernel applies in one go, with all vCPUs kicked out.

    No kernel has it: KVM_SET_USER_MEMORY_REGION_LIST stayed an RFC.
    """
    return _batch(change, change.qemu.ops)


def batch_full(change: PlanTask) -> StrategyOps:
    """The same with the whole new map: the kernel drops every slot and starts again.

    Nothing when QEMU has nothing to do.
    """
    if not change.qemu.ops:
        return _batch(change, ())
    ops = [Op(OpKind.DELETE, s.as_id, s.slot, s.gpa, s.size) for s in change.table]
    ops += [Op(OpKind.ADD, s.as_id, s.slot, s.gpa, s.size, s.flags) for s in change.qemu.after]
    return _batch(change, tuple(ops))


def _batch(change: PlanTask, ops: tuple[Op, ...]) -> StrategyOps:
    after = change.qemu.after
    if not ops:
        return StrategyOps((), change.table, after, False)
    return StrategyOps((BATCH_BEGIN, *ops, BATCH_COMMIT), change.table, after, True)
