"""A plan: the ops of one strategy for one transition, and what the guest can notice of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ..errors import InputError
from ..topology.model import FlatView
from .commit import PlanTask, batch_full, batch_incremental, pause, qemu
from .dirty_log import LogChange
from .exposure import DirtyBytes, Exposure, Missing, Step, expose
from .hole import DEFAULT_MAX_HOLES, hole
from .hole_split import hole_split
from .ops import Op
from .rules import Rules, name_backing, slot_table, views_by_as
from .slots import MOST_PAGES, SlotTable

__all__ = ["Plan", "PlanStrategy", "plan", "plan_all"]

Views = FlatView | Iterable[FlatView] | Mapping[int, FlatView]


class PlanStrategy(StrEnum):
    """The ways to carry out a transition."""

    QEMU = "qemu"
    PAUSE = "pause"
    BATCH_INCREMENTAL = "batch-incremental"
    BATCH_FULL = "batch-full"
    HOLE = "hole"
    HOLE_SPLIT = "hole-split"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a strategy does for a transition.

    `before` is the table the ops start from: the one given, or for `hole` the same as if slots
    had followed their RAM blocks all along.  `after` is what the ops leave.  `inhibit` says that
    QEMU (>= 8.0) keeps vCPUs out of ioctls during its commit, in the address spaces
    `inhibited`.  The ranges that miss between QEMU's ioctls are reported all the same.
    """

    strategy: PlanStrategy
    rules: Rules
    ops: tuple[Op, ...]
    before: SlotTable
    after: SlotTable
    exposure: Exposure
    vcpus_kicked: bool
    inhibited: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def inhibit(self) -> bool:
        """QEMU blocks vCPU ioctls because a removed section overlaps an added one."""
        return bool(self.inhibited)

    @property
    def missing(self) -> tuple[Missing, ...]:
        """Ranges that are memory before and after, but not all the time."""
        return self.exposure.missing

    @property
    def steps(self) -> tuple[Step, ...]:
        """What the guest sees as one change each."""
        return self.exposure.steps

    @property
    def dirty(self) -> DirtyBytes:
        """What becomes of the dirty bitmaps."""
        return self.exposure.dirty

    @property
    def atomic(self) -> bool:
        """No vCPU can find memory missing: nothing misses, or only where QEMU inhibits."""
        return all(m.as_id in self.inhibited for m in self.missing)


def plan(
    before: Views,
    after: Views,
    strategy: PlanStrategy | str = PlanStrategy.QEMU,
    *,
    table: SlotTable | None = None,
    rules: Rules | None = None,
    log: LogChange | None = None,
    hand_back: bool = False,
    max_holes: int | None = DEFAULT_MAX_HOLES,
) -> Plan:
    """Plan the transition from `before` to `after` under one strategy.

    `table` is the slot table before (default: the one QEMU builds from nothing); slots of which
    it does not say what backs them are matched with the ranges of `before`.  One that a plan of
    `hole-split` left (`SlotTable.qemu`) goes on there; other strategies take QEMU's slots of it.
    `log` says which dirty logs start or stop.  `hand_back`: batches return the bitmaps of removed
    slots instead of dropping them.  `max_holes` bounds the holes of a slot (`hole`; None: no
    bound).

    Raises InputError when the table does not go with the views or a range has more pages than a
    slot may have, ValueError for no strategy.
    """
    change = _change(before, after, table, rules or Rules(), log)
    return _carry_out(change, PlanStrategy(strategy), hand_back, max_holes)


def plan_all(
    before: Views,
    after: Views,
    *,
    table: SlotTable | None = None,
    rules: Rules | None = None,
    log: LogChange | None = None,
    hand_back: bool = False,
    max_holes: int | None = DEFAULT_MAX_HOLES,
) -> tuple[Plan, ...]:
    """One plan for each strategy, in the order of `PlanStrategy`; arguments as for `plan`."""
    change = _change(before, after, table, rules or Rules(), log)
    return tuple(_carry_out(change, strategy, hand_back, max_holes) for strategy in PlanStrategy)


def _change(
    before: Views, after: Views, table: SlotTable | None, rules: Rules, log: LogChange | None
) -> PlanTask:
    old, new = views_by_as(before), views_by_as(after)
    split = None
    if table is not None and table.qemu is not None:
        split, table = table.copy(), table.qemu
    if table is None:
        mine = slot_table(old, rules)
    else:
        mine = name_backing(table, old, rules)
        if mine is table:
            mine = table.copy()  # the plan keeps it, the caller may go on changing theirs
    for slot in (*mine, *slot_table(new, rules)):
        if slot.size > MOST_PAGES * rules.page_size:
            # kvm_set_phys_mem (accel/kvm/kvm-all.c) splits on s390x alone
            raise InputError(
                f"{slot} has more than {MOST_PAGES} pages: KVM refuses such a slot (EINVAL), and "
                "QEMU aborts",
                remedy="no guest has it: give memory of that size as several DIMMs",
            )
    return PlanTask(old, new, mine, rules, log, split)


def _carry_out(
    change: PlanTask, strategy: PlanStrategy, hand_back: bool, max_holes: int | None
) -> Plan:
    done = hole(change, max_holes) if strategy is PlanStrategy.HOLE else _OTHERS[strategy](change)
    return Plan(
        strategy,
        change.rules,
        done.ops,
        done.before,
        done.after,
        expose(done.ops, done.before, done.after, change.rules.page_size, hand_back=hand_back),
        done.vcpus_kicked,
        done.inhibited,
        done.notes,
    )


_OTHERS = {
    PlanStrategy.QEMU: qemu,
    PlanStrategy.PAUSE: pause,
    PlanStrategy.BATCH_INCREMENTAL: batch_incremental,
    PlanStrategy.BATCH_FULL: batch_full,
    PlanStrategy.HOLE_SPLIT: hole_split,
}
