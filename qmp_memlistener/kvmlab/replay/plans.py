"""PURE: what each strategy does for every transition of a replay.

Strategies that are about QEMU's own operations repeat those that were recorded; the others plan
their own from the slots before and after.  Also where the guest may work meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from msgspec.structs import replace

from ...errors import OperationFailed
from ...memslots import (
    GUEST_MEMFD,
    READONLY,
    Op,
    OpKind,
    Order,
    Plan,
    PlanStrategy,
    Rules,
    Slot,
    SlotTable,
    expose,
    follow_blocks,
    plan,
    slot_table,
)
from ...memslots.intervals import join
from ...memslots.ops import BATCH_BEGIN, BATCH_COMMIT, PARK, UNPARK
from ...topology import FlatRange, FlatView
from ..executor import NO_SLOT
from ..strategies import LabStrategy
from .transitions import AppliedOp, ReplayInput, ReplayTransition

__all__ = ["Planned", "addresses", "free_place", "plans_for", "slots_for", "without"]

_WORDS = 48
_FENCE = {
    PlanStrategy.PAUSE: (PARK, UNPARK),
    PlanStrategy.BATCH_INCREMENTAL: (BATCH_BEGIN, BATCH_COMMIT),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A strategy's plan for one transition.

    `recorded` are the operations that it repeats, in the plan's order, with the slot that each is
    about and what KVM answered then.  None: the plan is its own, and KVM should refuse nothing.
    """

    plan: Plan
    recorded: tuple[AppliedOp, ...] | None = None


def plans_for(
    strategy: LabStrategy, source: ReplayInput
) -> tuple[SlotTable, Iterable[SlotTable], Iterator[Planned]]:
    """The slots to start from, all tables where they must be known, and the plans in turn.

    One plan for each transition of `without(source)`; tables only for a strategy with holes.
    The iterator raises OperationFailed when the strategy cannot follow.
    """
    rules = dataclasses.replace(source.rules, order=strategy.order)
    if strategy.hole is not None:
        views = [t.view_before for t in source.transitions]
        views += [t.view_after for t in source.transitions[-1:]]
        first = follow_blocks(source.initial, views, rules, None)
        plans = list(_own(strategy, source, rules, first))
        return first, [first, *(p.plan.after for p in plans)], iter(plans)
    if strategy.chunk is not None:
        view = source.transitions[0].view_before if source.transitions else {}
        first = slot_table(_views(view, strategy.chunk), rules)
        return first, (), _own(strategy, source, rules, first)
    if strategy.plan is PlanStrategy.HOLE_SPLIT:
        return source.initial, (), _own(strategy, source, rules, source.initial)
    recorded = (_recorded(strategy, t, source.rules) for t in source.transitions)
    return source.initial, (), recorded


def slots_for(strategy: LabStrategy, source: ReplayInput) -> int:
    """How many slots it has at most, without planning: splitting RAM can take millions."""
    tables = [source.initial, *(t.after for t in source.transitions)]
    if strategy.plan is PlanStrategy.HOLE_SPLIT:
        return len({(s.as_id, at) for table in tables for s in table for at in (s.gpa, s.end)})
    if strategy.chunk is None:
        return max(map(len, tables))
    return max(sum(s.size // strategy.chunk + 2 for s in table) for table in tables)


def _recorded(strategy: LabStrategy, t: ReplayTransition, rules: Rules) -> Planned:
    recorded = t.applied
    fence = _FENCE.get(strategy.plan)
    if fence is not None and recorded:
        recorded = (AppliedOp(fence[0], NO_SLOT), *recorded, AppliedOp(fence[1], NO_SLOT))
    good = [a.op for a in recorded if a.ret == 0]
    overlap = strategy.order is Order.V8_0 and _overlaps(good)
    done = Plan(
        strategy.plan,
        rules,
        tuple(a.op for a in recorded),
        t.before,
        t.after,
        expose(good, t.before, t.after),
        fence is not None,
        (0,) if overlap else (),
    )
    return Planned(done, recorded)


def _overlaps(ops: Iterable[Op]) -> bool:
    """A delete and an add share addresses: then QEMU from 8.0 on keeps vCPUs out."""
    ops = list(ops)
    gone = [op for op in ops if op.op is OpKind.DELETE]
    return any(
        d.as_id == op.as_id and d.gpa < op.end and op.gpa < d.end
        for op in ops
        if op.op is OpKind.ADD
        for d in gone
    )


def _own(
    strategy: LabStrategy, source: ReplayInput, rules: Rules, first: SlotTable
) -> Iterator[Planned]:
    table = first
    for t in source.transitions:
        done = plan(
            _views(t.view_before, strategy.chunk),
            _views(t.view_after, strategy.chunk),
            strategy.plan,
            table=table,
            rules=rules,
            log=t.log,
            max_holes=None,
        )
        if done.before != table:
            raise OperationFailed(
                f"{strategy.name} does not go on from the slots that transition {t.seq} left"
            )
        table = done.after
        yield Planned(done)


def _views(views: dict[int, FlatView], chunk: int | None) -> dict[int, FlatView]:
    if chunk is None:
        return views
    return {as_id: _split(view, chunk) for as_id, view in views.items()}


def _split(view: FlatView, chunk: int) -> FlatView:
    """Ranges cut at multiples of `chunk` in their block, each part a region of its own."""
    out: list[FlatRange] = []
    for r in view:
        if not r.kind.backed:
            out.append(r)
            continue
        edges = range(-(-(r.offset + 1) // chunk) * chunk, r.offset + r.size, chunk)
        for a, b in pairwise((r.offset, *edges, r.offset + r.size)):
            name = f"{r.name}[{a // chunk}]"
            start = r.start + a - r.offset
            out.append(FlatRange(start, b - a, r.kind, name, a, r.owner, r.region_kind))
    return FlatView(out, view.address_space)


def chunk_of(name: str) -> str:
    """The block that a part made by `_split` is of."""
    return name.rsplit("[", 1)[0]


def without(source: ReplayInput, most_spaces: int) -> tuple[ReplayInput, list[str]]:
    """The replay without what a lab VM cannot have, and what that was, in words.

    Address spaces beyond the first `most_spaces`; guest_memfd behind slots.
    """
    ops = [op for t in source.transitions for op in t.ops]
    if not any(op.as_id >= most_spaces or op.flags & GUEST_MEMFD for op in ops) and not any(
        s.as_id >= most_spaces or s.flags & GUEST_MEMFD for s in source.initial
    ):
        return source, []
    left_out = 0
    memfd = False
    transitions = []
    for t in source.transitions:
        kept = tuple(_plain_op(a) for a in t.applied if a.op.as_id < most_spaces)
        left_out += len(t.applied) - len(kept)
        memfd = memfd or any(op.flags & GUEST_MEMFD for op in t.ops)
        before, after = _table(t.before, most_spaces), _table(t.after, most_spaces)
        transitions.append(ReplayTransition(t.seq, kept, before, after, t.log))
    notes = []
    if left_out:
        notes.append(
            f"{left_out} operations of address spaces from {most_spaces} on are left out: "
            "this KVM has no more"
        )
    if memfd:
        notes.append("slots with guest_memfd have plain memory behind them here")
    kept_transitions = tuple(t for t in transitions if t.applied)
    initial = _table(source.initial, most_spaces)
    return dataclasses.replace(source, initial=initial, transitions=kept_transitions), notes


def _plain(slot: Slot) -> Slot:
    return replace(slot, flags=slot.flags & ~GUEST_MEMFD)


def _plain_op(a: AppliedOp) -> AppliedOp:
    op = replace(a.op, flags=a.op.flags & ~GUEST_MEMFD)
    return AppliedOp(op, _plain(a.slot), a.ret)


def _table(table: SlotTable, most_spaces: int) -> SlotTable:
    return SlotTable(_plain(s) for s in table if s.as_id < most_spaces)


def addresses(t: ReplayTransition, reach: int, vcpu: int, vcpus: int) -> list[int]:
    """Words of RAM that is there before and after, below `reach`, of the vCPU's own.

    First in the slots that go: at both ends and in the middle of what stays of them.  Odd ones are
    ROM, only to be read.
    """
    gone = [(op.gpa, op.end) for op in t.ops if op.op is OpKind.DELETE and op.as_id == 0]
    after = {(s.gpa, s.end): s for s in t.after.slots(0)}
    touched: list[int] = []
    other: list[int] = []
    for old in t.before.slots(0):
        for start, end in after:
            new = after[start, end]
            low, high = max(old.gpa, start), min(old.end, end, reach)
            if low >= high:
                continue
            odd = bool((old.flags | new.flags) & READONLY)
            words = _words(low, high, vcpu, vcpus, odd)
            hit = any(a < high and low < b for a, b in gone)
            (touched if hit else other).extend(words)
    return list(dict.fromkeys((*touched, *other)))[:_WORDS]


def _words(low: int, high: int, vcpu: int, vcpus: int, odd: bool) -> list[int]:
    """First, middle and last words of whole pages; vCPUs do not share one, and 0 ends a table."""
    off = 64 * vcpu + 8
    middle = (low + high) // 2 & ~4095
    found = (low + off, middle + off, high - 64 * vcpus + off)
    return [word | odd for word in found if low <= word < high]


def free_place(source: ReplayInput, size: int, reach: int) -> int | None:
    """The lowest gpa from 16 MiB on, in steps of 2 MiB, that no slot ever covers; None for none."""
    step = 2 << 20
    ranges = [(s.gpa, s.end) for s in source.initial]
    ranges += [(s.gpa, s.end) for t in source.transitions for s in t.slots if s.slot >= 0]
    at = 16 << 20
    for start, end in join(sorted(ranges)):
        if start >= at + size:
            break
        at = max(at, -(-end // step) * step)
    return at if at + size <= reach else None
