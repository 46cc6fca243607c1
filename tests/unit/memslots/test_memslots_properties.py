"""What must hold for every transition, checked against a VM that is simulated page by page."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.memslots import (
    LOG_DIRTY_PAGES,
    LogChange,
    Missing,
    Op,
    OpKind,
    Order,
    Plan,
    PlanStrategy,
    Rules,
    SlotTable,
    plan,
    plan_all,
    slot_table,
)
from qmp_memlistener.memslots.dirty_log import DirtyLog
from qmp_memlistener.topology.model import FlatView, Kind
from tests.unit.memslots.memslots_model import (
    PAGE,
    Vm,
    as_traced,
    content_of,
    fold,
    observed_gaps,
    views,
)

RULES = st.sampled_from([Rules(Order.V7_2), Rules(Order.V8_0)])
LIMITS = st.sampled_from([None, 0, 1, 2, 64])
CHANGES = st.sampled_from([None, LogChange(migration=True)])


def run(done: Plan) -> list[dict[int, tuple[str, int]]]:
    """The states the guest can observe."""
    return list(Vm(done.before).run(done.ops, done.after))


def _pages(m: Missing) -> range:
    return range(m.start // PAGE, (m.start + m.size) // PAGE)


def final_reach(done: Plan) -> dict[int, tuple[str, int]]:
    vm = Vm(done.before)
    list(vm.run(done.ops, done.after))
    return vm.reach()


@settings(max_examples=300, deadline=None)
@given(views(), views(), RULES, LIMITS, CHANGES)
def test_every_plan_ends_in_the_map_asked_for(
    before: FlatView, after: FlatView, rules: Rules, limit: int | None, log: LogChange | None
) -> None:
    for done in plan_all(before, after, rules=rules, log=log, max_holes=limit):
        assert final_reach(done) == content_of(after), done.strategy
        assert Vm(done.after).reach() == content_of(after), done.strategy


@settings(max_examples=300, deadline=None)
@given(views(), views(), RULES, LIMITS)
def test_nothing_is_exposed_but_by_qemu(
    before: FlatView, after: FlatView, rules: Rules, limit: int | None
) -> None:
    for done in plan_all(before, after, rules=rules, max_holes=limit):
        if done.strategy is PlanStrategy.HOLE_SPLIT:
            gaps = observed_gaps(Vm(done.before).reach(), run(done))
            assert {p for m in done.missing for p in _pages(m)} == set(gaps)
            was, now = content_of(before), content_of(after)
            assert all(was[page] != now[page] for page in gaps), "one block gives way to another"
        elif done.strategy is not PlanStrategy.QEMU:
            assert done.missing == ()
            assert done.atomic
            assert observed_gaps(Vm(done.before).reach(), run(done)) == {}
        if not rules.queued:
            assert not done.inhibit


@settings(max_examples=300, deadline=None)
@given(views(), views(), RULES, CHANGES)
def test_what_qemu_exposes_is_found_to_the_page(
    before: FlatView, after: FlatView, rules: Rules, log: LogChange | None
) -> None:
    done = plan(before, after, rules=rules, log=log)
    found = {page: m.steps for m in done.missing for page in _pages(m)}
    states = run(done)
    gaps = observed_gaps(Vm(done.before).reach(), states)
    assert found == gaps
    assert [m.start for m in done.missing] == sorted(m.start for m in done.missing)
    for a, b in pairwise(done.missing):
        assert a.start + a.size < b.start or a.steps != b.steps, "neighbours that could be one"
    old, new = Vm(done.before).reach(), content_of(after)
    for step, state in zip(done.steps, states, strict=True):
        assert step.missing == PAGE * sum(p not in state for p in old if p in new)
    if done.missing:
        assert done.inhibit == rules.queued
        assert done.atomic == rules.queued


@settings(max_examples=300, deadline=None)
@given(views(), views(), RULES, LIMITS)
def test_there_and_back(before: FlatView, after: FlatView, rules: Rules, limit: int | None) -> None:
    for strategy in PlanStrategy:
        there = plan(before, after, strategy, rules=rules, max_holes=limit)
        back = plan(after, before, strategy, table=there.after, rules=rules, max_holes=limit)
        assert final_reach(back) == content_of(before)
        if strategy is PlanStrategy.HOLE:
            assert back.before == there.after
            assert back.after == there.before, "the very table"


@settings(max_examples=200, deadline=None)
@given(st.lists(views(), min_size=2, max_size=6), LIMITS)
def test_hole_follows_a_guest_for_long(history: list[FlatView], limit: int | None) -> None:
    table: SlotTable | None = None
    for before, after in pairwise(history):
        done = plan(before, after, PlanStrategy.HOLE, table=table, max_holes=limit)
        assert final_reach(done) == content_of(after)
        assert observed_gaps(Vm(done.before).reach(), run(done)) == {}
        table = done.after


@settings(max_examples=300, deadline=None)
@given(views(), views(), CHANGES)
def test_hole_keeps_ids_and_dirty_bits(
    before: FlatView, after: FlatView, log: LogChange | None
) -> None:
    table = slot_table(before)
    for slot in list(table):  # a migration runs, so that every slot has a bitmap
        table.remove(slot.as_id, slot.slot)
        table.add(msgspec.structs.replace(slot, flags=slot.flags | LOG_DIRTY_PAGES))
    done = plan(before, after, PlanStrategy.HOLE, table=table, log=log, max_holes=None)
    vm = Vm(done.before)
    for live in vm.slots.values():
        live.dirty = set(live.mapped) if live.flags & LOG_DIRTY_PAGES else set()
    had = {(i, page): live.content[page] for i, live in vm.slots.items() for page in live.dirty}
    list(vm.run(done.ops, done.after))
    for old in done.before:
        new = next((s for s in done.after if s.key == old.key), None)
        if new is not None:
            assert (new.slot, new.gpa, new.size) == (old.slot, old.gpa, old.size)
    reach = content_of(after)
    for (slot_id, page), content in had.items():
        live_slot = vm.slots.get(slot_id)
        stays = live_slot is not None and page in live_slot.mapped
        if reach.get(page) == content and live_slot is not None and live_slot.flags & 1:
            assert stays
            assert page in live_slot.dirty
    assert done.exposure.slot_ids_changed == ()
    # A slot comes only for a block that was not mapped at its place, so no bitmap is made anew
    # for one that was.
    assert not {o.slot for o in done.ops if o.op is OpKind.ADD} & {s.slot for s in done.before}


@settings(max_examples=200, deadline=None)
@given(views(), views(), RULES, st.sampled_from([True, False, None]))
def test_flags_after_a_plan_are_those_of_the_regions(
    before: FlatView, after: FlatView, rules: Rules, migration: bool | None
) -> None:
    change = LogChange(migration=migration)
    table = slot_table(before, rules)
    log = DirtyLog(table, change)
    kinds = {r.name: r.region_kind for v in (before, after) for r in v}
    shown = {r.name: r for v in (before, after) for r in v}
    for strategy in PlanStrategy:
        done = plan(before, after, strategy, table=table, rules=rules, log=change)
        for slot in done.after:
            assert slot.block is not None
            assert slot.logged == log.after(shown[slot.block])
            assert bool(slot.flags & 2) == (kinds[slot.block] in (Kind.ROM, Kind.ROMD))


@settings(max_examples=200, deadline=None)
@given(views(), views(), RULES)
def test_tracing_a_plan_gives_its_table(before: FlatView, after: FlatView, rules: Rules) -> None:
    for strategy in (
        *(PlanStrategy.QEMU, PlanStrategy.PAUSE, PlanStrategy.BATCH_FULL),
        PlanStrategy.HOLE_SPLIT,
    ):
        done = plan(before, after, strategy, rules=rules)
        traced = [as_traced(op) for op in done.ops]
        assert fold(done.before, [t for t in traced if t is not None]) == done.after


@settings(max_examples=200, deadline=None)
@given(views(), views())
def test_both_orders_leave_the_same_table(before: FlatView, after: FlatView) -> None:
    old = plan(before, after, rules=Rules(Order.V7_2))
    new = plan(before, after, rules=Rules(Order.V8_0))
    assert old.after == new.after
    assert sorted(map(_key, old.ops)) == sorted(map(_key, new.ops))


def _key(op: Op) -> tuple[str, int, int, int, int, int]:
    return (op.op.value, op.as_id, op.slot, op.gpa, op.size, op.flags)


@settings(max_examples=100, deadline=None)
@given(views())
def test_no_change_takes_no_op(view: FlatView) -> None:
    for done in plan_all(view, view):
        assert done.ops == ()
        assert done.missing == ()
        assert not done.vcpus_kicked


@settings(max_examples=200, deadline=None)
@given(views(), views(), st.sampled_from([0, 1, 2]))
def test_no_slot_has_more_holes_than_allowed(before: FlatView, after: FlatView, limit: int) -> None:
    done = plan(before, after, PlanStrategy.HOLE, max_holes=limit)
    holes = {s.slot: set(s.holes) for s in done.before}
    closed = False
    for op in done.ops:
        if op.op in (OpKind.BATCH_BEGIN, OpKind.BATCH_COMMIT):
            closed = op.op is OpKind.BATCH_BEGIN
        elif op.op is OpKind.ADD:
            holes[op.slot] = set()
        elif op.op is OpKind.DELETE:
            del holes[op.slot]
        elif op.op in (OpKind.SET_HOLE, OpKind.CLEAR_HOLE):
            pages = {p for low, high in holes[op.slot] for p in range(low, high, PAGE)}
            change = set(range(op.gpa, op.end, PAGE))
            pages = pages | change if op.op is OpKind.SET_HOLE else pages - change
            holes[op.slot] = {(p, p + PAGE) for p in pages}
        if not closed:
            for now in holes.values():
                starts = {low for low, _ in now} - {high for _, high in now}
                assert len(starts) <= limit
    for slot in (*done.before, *done.after):
        assert len(slot.holes) <= limit


@pytest.mark.parametrize("order", list(Order))
def test_two_address_spaces_do_not_mix(order: Order) -> None:
    @settings(max_examples=50, deadline=None)
    @given(views(), views(), views(), views())
    def check(a: FlatView, b: FlatView, c: FlatView, d: FlatView) -> None:
        rules = Rules(order)
        both = plan({0: a, 1: c}, {0: b, 1: d}, rules=rules)
        for as_id, before, after in ((0, a, b), (1, c, d)):
            alone = plan({as_id: before}, {as_id: after}, rules=rules)
            assert [o for o in both.ops if o.as_id == as_id] == list(alone.ops)
            assert (as_id in both.inhibited) == alone.inhibit

    check()
