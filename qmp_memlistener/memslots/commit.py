"""In which order QEMU changes its slots: from two FlatViews to KVM_SET_USER_MEMORY_REGION calls.

Holds `address_space_update_topology_pass` (softmmu/memory.c in 7.2, system/memory.c later) as
the KVM listener sees it, and the listener's own queue (>= 8.0), read in 7.2.22 and 10.0.2.
What the guest notices of it is in `exposure`.  Strategies that make these very calls (`qemu`,
`pause`, `batch`) are at the end; those that make others are in `hole` and `hole_split`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

from ..topology.model import FlatRange, FlatView, Kind
from ..topology.transition import same_range
from .dirty_log import DirtyLog, LogChange
from .ops import BATCH_BEGIN, BATCH_COMMIT, PARK, UNPARK, Op, OpKind
from .rules import Rules, Sections, with_id
from .slots import READONLY, Slot, SlotTable

__all__ = [
    "PlanTask",
    "QemuOps",
    "StrategyOps",
    "batch_full",
    "batch_incremental",
    "pause",
    "qemu",
    "qemu_ops",
]


_EMPTY = FlatView(())


@dataclass(frozen=True, slots=True)
class QemuOps:
    """What QEMU does for a transition, and the table it leaves.

    `inhibited` are the address spaces for whose commit QEMU first waits until no vCPU is in an
    ioctl (>= 8.0, `accel_ioctl_inhibit_begin`).
    """

    ops: tuple[Op, ...]
    after: SlotTable
    inhibited: tuple[int, ...]


def qemu_ops(
    before: Mapping[int, FlatView],
    after: Mapping[int, FlatView],
    table: SlotTable,
    rules: Rules,
    log: DirtyLog,
) -> QemuOps:
    """The ioctls QEMU issues for the transition, in its order, and the table they leave.

    Up to 7.2 they go out inside the passes: address space by address space, all deletes, then
    adds and flag changes as their ranges come.  From 8.0 (commit f39b7d2b96) flag changes go out
    at once, while the passes run over all address spaces; deletes and adds wait for each
    listener's `commit`.

    A delete that finds no slot of exactly its range is left out silently, as in QEMU.  `table`
    must know what backs its slots (`name_backing`); an address space without a view on one side
    is taken as empty there.  Raises InputError when the slots added overlap slots that the views
    do not know of.
    """
    sections = Sections(rules, (*before.values(), *after.values()), table, log)
    spaces = [
        _commit(as_id, before.get(as_id, _EMPTY), after.get(as_id, _EMPTY), table, sections, log)
        for as_id in sorted({*before, *after})
    ]
    ops: list[Op] = []
    if rules.queued:
        for space in spaces:
            ops += [op for _, change in space.flags for op in change]
        for space in spaces:
            ops += space.deletes
            ops += [op for _, op in space.adds]
    else:
        for space in spaces:
            ops += space.deletes
            mixed = [(start, (op,)) for start, op in space.adds]
            ops += [op for _, part in sorted((*mixed, *space.flags), key=_place) for op in part]
    changed = {space.as_id: space for space in spaces}
    slots: list[Slot] = []
    for as_id in {*table.as_ids(), *changed}:
        slots += changed[as_id].slots if as_id in changed else table.slots(as_id)
    return QemuOps(
        tuple(ops),
        SlotTable(slots, retired=table.retired, elsewhere=table.elsewhere),
        tuple(space.as_id for space in spaces if rules.queued and space.reshaped),
    )


@dataclass(slots=True)
class _Space:
    """One address space's share.  Adds and flag changes come with the start of their range."""

    as_id: int
    reshaped: bool
    deletes: list[Op] = field(default_factory=list)
    adds: list[tuple[int, Op]] = field(default_factory=list)
    flags: list[tuple[int, tuple[Op, ...]]] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)


def _commit(
    as_id: int,
    before: FlatView,
    after: FlatView,
    table: SlotTable,
    sections: Sections,
    log: DirtyLog,
) -> _Space:
    removed, added, kept = _passes(before, after)
    space = _Space(as_id, _overlap_somewhere(removed, added))
    slots = {s.slot: s for s in table.slots(as_id)}
    for r in removed:
        # `kvm_set_phys_mem(..., add=false)`; what never had a slot finds none
        place = sections.place(r) if r.kind is not Kind.IO else None
        old = table.exact(as_id, *place) if place is not None else None
        if old is not None and slots.pop(old.slot, None) is not None:
            space.deletes.append(Op(OpKind.DELETE, as_id, old.slot, old.gpa, old.size))
    if log.changes:
        for r in kept:
            if log.before(r) != log.after(r):
                _relog(r, slots, table, sections, space)
    free = _lowest_free({*slots, *table.elsewhere.get(as_id, ())})
    for r in added:
        new = sections.after(r, as_id)
        if new is not None:
            new = with_id(new, next(free))
            slots[new.slot] = new
            op = Op(OpKind.ADD, as_id, new.slot, new.gpa, new.size, new.flags)
            space.adds.append((r.start, op))
    space.slots = list(slots.values())
    return space


def _passes(
    before: FlatView, after: FlatView
) -> tuple[list[FlatRange], list[FlatRange], list[FlatRange]]:
    """What is removed, added, and kept (as in `after`), each in ascending address order.

    Ranges of one view are disjoint, so an equal one can only be the one with the same start.
    """
    old_at = {r.start: r for r in before}
    added: list[FlatRange] = []
    kept: list[FlatRange] = []
    for r in after:
        old = old_at.get(r.start)
        if old is not None and (old is r or same_range(old, r)):
            del old_at[r.start]
            kept.append(r)
        else:
            added.append(r)
    return list(old_at.values()), added, kept


def _relog(
    r: FlatRange,
    slots: dict[int, Slot],
    table: SlotTable,
    sections: Sections,
    space: _Space,
) -> None:
    """`kvm_section_update_flags`: no ioctl without a slot or when the flags stay.

    READONLY cannot be toggled on a live slot (Linux refuses it, commit 75d61fbc), so QEMU then
    deletes the slot and sets it again under the same id (`kvm_set_user_memory_region`); its
    trace shows only the second ioctl.
    """
    wanted = sections.after(r, space.as_id)
    old = table.exact(space.as_id, wanted.gpa, wanted.size) if wanted is not None else None
    if wanted is None or old is None or old.flags == wanted.flags:
        return
    slots[old.slot] = with_id(wanted, old.slot)
    what = (space.as_id, old.slot, old.gpa, old.size)
    if (old.flags ^ wanted.flags) & READONLY:
        change: tuple[Op, ...] = (Op(OpKind.DELETE, *what), Op(OpKind.ADD, *what, wanted.flags))
    else:
        change = (Op(OpKind.FLAGS, *what, wanted.flags),)
    space.flags.append((r.start, change))


def _lowest_free(used: Iterable[int]) -> Iterator[int]:
    """Ids that are not in use, lowest first (`kvm_get_free_slot`)."""
    taken = set(used)
    return (i for i in count() if i not in taken)


def _overlap_somewhere(removed: Sequence[FlatRange], added: Sequence[FlatRange]) -> bool:
    """The test of `kvm_region_commit` (>= 8.0): on whole sections, RAM or not, unaligned.

    So a reshape of nothing but MMIO stops the vCPUs too, and pure adds or dels never do.
    """
    i = j = 0
    while i < len(removed) and j < len(added):
        a, b = removed[i], added[j]
        if a.start < b.start + b.size and b.start < a.start + a.size:
            return True
        if a.start < b.start:
            i += 1
        else:
            j += 1
    return False


def _place(change: tuple[int, tuple[Op, ...]]) -> int:
    return change[0]


# -- strategies that make these calls ----------------------------------------------------------


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
