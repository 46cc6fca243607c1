"""Exposure, bitmaps, ids and the JSON document, on transitions small enough to do by hand."""

from __future__ import annotations

import json

import pytest

from qmp_memlistener.memslots import (
    DirtyBytes,
    LogChange,
    Missing,
    Op,
    OpKind,
    Order,
    PlanStrategy,
    Rules,
    Slot,
    SlotTable,
    expose,
    plan,
    plan_all,
)
from qmp_memlistener.reports.plan import plan_document
from qmp_memlistener.topology.model import FlatView
from tests.unit.memslots.memslots_model import io, ram, view_of

MIB = 1 << 20
BEFORE = view_of(ram(0, 64 * MIB))
PUNCHED = view_of(ram(0, MIB), io(MIB, 0x1000), ram(MIB + 0x1000, 63 * MIB - 0x1000))
LOGGED = SlotTable([Slot(0, 0, 0, 64 * MIB, 1)])


def test_a_hand_made_plan() -> None:
    before = SlotTable([Slot(0, 0, 0, 0x3000), Slot(0, 1, 0x3000, 0x1000)])
    after = SlotTable(
        [Slot(0, 0, 0, 0x1000), Slot(0, 2, 0x1000, 0x1000), Slot(0, 1, 0x3000, 0x1000)]
    )
    ops = [
        Op(OpKind.DELETE, 0, 0, 0, 0x3000),
        Op(OpKind.ADD, 0, 0, 0, 0x1000),
        Op(OpKind.FLAGS, 0, 1, 0x3000, 0x1000, 1),
        Op(OpKind.ADD, 0, 2, 0x1000, 0x1000),
    ]
    found = expose(ops, before, after)
    # the third page is not there afterwards, so it is not missing
    assert found.missing == (Missing(0, 0, 0x1000, 1), Missing(0, 0x1000, 0x1000, 3))
    assert [s.missing for s in found.steps] == [0x2000, 0x1000, 0x1000, 0]
    assert [s.atomic for s in found.steps] == [False, False, False, True]
    assert found.slot_ids_changed == (0,)


def test_missing_twice_counts_twice() -> None:
    table = SlotTable([Slot(0, 0, 0, 0x1000)])
    gone, back = Op(OpKind.DELETE, 0, 0, 0, 0x1000), Op(OpKind.ADD, 0, 0, 0, 0x1000)
    found = expose([gone, back, gone, back], table, table)
    assert found.missing == (Missing(0, 0, 0x1000, 2),)
    assert [s.missing for s in found.steps] == [0x1000, 0, 0x1000, 0]


def test_an_id_that_is_given_again_has_none_of_the_holes_that_it_had() -> None:
    before = SlotTable(
        [
            Slot(0, 0, 0, 0x3000, holes=((0x1000, 0x2000),), follows_block=True),
            Slot(0, 1, 0x1000, 0x1000),
        ]
    )
    gone, back = Op(OpKind.DELETE, 0, 0, 0, 0x3000), Op(OpKind.ADD, 0, 0, 0, 0x3000)
    ops = [gone, Op(OpKind.DELETE, 0, 1, 0x1000, 0x1000), back, gone, back]
    assert expose(ops, before, SlotTable([Slot(0, 0, 0, 0x3000)])).missing == (
        Missing(0, 0, 0x1000, 3),
        Missing(0, 0x1000, 0x1000, 2),
        Missing(0, 0x2000, 0x1000, 3),
    )


def test_a_hole_that_was_filled_is_missing_again_with_its_slot() -> None:
    table = SlotTable([Slot(0, 0, 0, 0x2000)])
    ops = [
        Op(OpKind.SET_HOLE, 0, 0, 0x1000, 0x1000),
        Op(OpKind.CLEAR_HOLE, 0, 0, 0x1000, 0x1000),
        Op(OpKind.DELETE, 0, 0, 0, 0x2000),
        Op(OpKind.ADD, 0, 0, 0, 0x2000),
    ]
    assert expose(ops, table, table).missing == (
        Missing(0, 0, 0x1000, 1),
        Missing(0, 0x1000, 0x1000, 2),
    )


def test_an_id_has_changed_in_whichever_order_its_ram_comes_back() -> None:
    before = SlotTable([Slot(0, 0, 0, 0x1000)])
    after = SlotTable([Slot(0, i, at, 0x1000) for i, at in ((4, 0x8000), (5, 0x9000), (6, 0))])
    ops = [Op(OpKind.DELETE, 0, 0, 0, 0x1000)]
    ops += [Op(OpKind.ADD, 0, i, at, 0x1000) for i, at in ((4, 0x8000), (5, 0x9000), (6, 0))]
    assert expose(ops, before, after).slot_ids_changed == (0,)


def test_neighbours_that_miss_as_long_are_one() -> None:
    table = SlotTable([Slot(0, i, i * 0x1000, 0x1000) for i in range(3)])
    ops = [Op(OpKind.DELETE, 0, i, i * 0x1000, 0x1000) for i in range(3)]
    ops.append(Op(OpKind.ADD, 0, 0, 0, 0x3000))
    after = SlotTable([Slot(0, 0, 0, 0x3000)])
    assert [(m.start, m.size, m.steps) for m in expose(ops, table, after).missing] == [
        (0, 0x1000, 3),
        (0x1000, 0x1000, 2),
        (0x2000, 0x1000, 1),
    ]
    at_once = [Op(OpKind.BATCH_BEGIN), *ops[:3], Op(OpKind.BATCH_COMMIT), ops[3]]
    assert expose(at_once, table, after).missing == (Missing(0, 0, 0x3000, 1),)


def test_what_a_deleted_slot_hides_behind_its_hole_is_not_missing() -> None:
    before = SlotTable([Slot(0, 0, 0, 0x3000, holes=((0x1000, 0x2000),), follows_block=True)])
    after = SlotTable([Slot(0, 0, 0, 0x3000)])
    ops = [Op(OpKind.DELETE, 0, 0, 0, 0x3000), Op(OpKind.ADD, 0, 0, 0, 0x3000)]
    assert [(m.start, m.size) for m in expose(ops, before, after).missing] == [
        (0, 0x1000),
        (0x2000, 0x1000),
    ]
    moved = [
        Op(OpKind.CLEAR_HOLE, 0, 0, 0x1000, 0x1000),
        Op(OpKind.SET_HOLE, 0, 0, 0, 0x1000),
        *ops,
    ]
    assert [(m.start, m.steps) for m in expose(moved, before, after).missing] == [
        (0, 2),
        (0x2000, 1),
    ]


def test_inhibit_hides_what_misses() -> None:
    old = plan(BEFORE, PUNCHED, rules=Rules(Order.V7_2))
    new = plan(BEFORE, PUNCHED, rules=Rules(Order.V8_0))
    assert old.missing == new.missing != ()
    assert (old.atomic, old.inhibit, old.vcpus_kicked) == (False, False, False)
    assert (new.atomic, new.inhibit, new.vcpus_kicked) == (True, True, True)


class TestBitmaps:
    """64 MiB logged: 16384 pages, 2048 bytes of bitmap."""

    @staticmethod
    def dirty(strategy: PlanStrategy, *, hand_back: bool = False) -> DirtyBytes:
        done = plan(BEFORE, PUNCHED, strategy, table=LOGGED, hand_back=hand_back)
        assert all(s.flags == 1 for s in done.after)
        return done.dirty

    @pytest.mark.parametrize(
        "strategy",
        [
            PlanStrategy.QEMU,
            PlanStrategy.PAUSE,
            PlanStrategy.BATCH_INCREMENTAL,
            PlanStrategy.BATCH_FULL,
        ],
    )
    def test_slots_made_anew_lose_theirs(self, strategy: PlanStrategy) -> None:
        # 256 pages: 32 bytes; 16127 pages: 252 words
        assert self.dirty(strategy) == DirtyBytes(dropped=2048, reallocated=32 + 2016)

    @pytest.mark.parametrize("strategy", [PlanStrategy.BATCH_INCREMENTAL, PlanStrategy.BATCH_FULL])
    def test_a_batch_may_hand_them_back(self, strategy: PlanStrategy) -> None:
        found = self.dirty(strategy, hand_back=True)
        assert found == DirtyBytes(reallocated=2048, handed_back=2048)

    def test_a_hole_costs_its_own_bits(self) -> None:
        assert self.dirty(PlanStrategy.HOLE) == DirtyBytes(kept=2047, dropped=1)

    def test_only_a_full_batch_drops_those_of_others(self) -> None:
        other = ram(1 << 32, 64 * MIB, "dimm", 0)
        before, after = view_of(*BEFORE, other), view_of(*PUNCHED, other)
        table = SlotTable([*LOGGED, Slot(0, 1, 1 << 32, 64 * MIB, 1)])
        kept = {p.strategy: p.dirty.kept for p in plan_all(before, after, table=table)}
        assert kept == {
            PlanStrategy.QEMU: 2048,
            PlanStrategy.PAUSE: 2048,
            PlanStrategy.BATCH_INCREMENTAL: 2048,
            PlanStrategy.BATCH_FULL: 0,
            PlanStrategy.HOLE: 2047 + 2048,
            PlanStrategy.HOLE_SPLIT: 2048,
        }

    def test_log_start_allocates_and_log_stop_drops(self) -> None:
        on = plan(BEFORE, BEFORE, log=LogChange(migration=True))
        assert on.dirty == DirtyBytes(allocated=2048)
        off = plan(BEFORE, BEFORE, table=on.after, log=LogChange(migration=False))
        assert off.dirty == DirtyBytes(dropped=2048)

    def test_no_log_no_bitmap(self) -> None:
        for done in plan_all(BEFORE, PUNCHED):
            assert done.dirty == DirtyBytes()


class TestForms:
    def test_pause_puts_qemus_ops_between_park_and_unpark(self) -> None:
        inner = plan(BEFORE, PUNCHED).ops
        done = plan(BEFORE, PUNCHED, "pause")
        assert done.ops == (Op(OpKind.PARK), *inner, Op(OpKind.UNPARK))
        assert done.vcpus_kicked
        (step,) = done.steps
        assert (step.first, step.count, step.atomic) == (0, 5, True)

    def test_batch_incremental_is_qemus_ops_as_one(self) -> None:
        inner = plan(BEFORE, PUNCHED).ops
        done = plan(BEFORE, PUNCHED, "batch-incremental")
        assert done.ops == (Op(OpKind.BATCH_BEGIN), *inner, Op(OpKind.BATCH_COMMIT))
        assert done.vcpus_kicked

    def test_batch_full_starts_again(self) -> None:
        other = ram(1 << 32, MIB, "dimm", 0)
        done = plan(view_of(*BEFORE, other), view_of(*PUNCHED, other), "batch-full")
        assert [(o.op.value, o.slot) for o in done.ops[1:-1]] == [
            ("delete", 0),
            ("delete", 1),
            ("add", 0),
            ("add", 2),
            ("add", 1),
        ]
        assert done.exposure.slot_ids_changed == (0, 1), "all are made anew"

    def test_park_and_batch_ops_name_no_slot(self) -> None:
        for kind in (OpKind.PARK, OpKind.UNPARK, OpKind.BATCH_BEGIN, OpKind.BATCH_COMMIT):
            op = next(o for p in plan_all(BEFORE, PUNCHED) for o in p.ops if o.op is kind)
            assert (op.slot, op.gpa, op.size, op.flags) == (-1, 0, 0, 0)

    def test_the_callers_table_is_left_alone(self) -> None:
        table = SlotTable([Slot(0, 3, 0, 64 * MIB, 0)])
        done = plan(BEFORE, PUNCHED, table=table)
        table.remove(0, 3)
        assert [s.slot for s in done.before] == [3]

    def test_no_such_strategy(self) -> None:
        with pytest.raises(ValueError, match="guess"):
            plan(BEFORE, PUNCHED, "guess")


def test_document_follows_the_contract() -> None:
    text = json.dumps(plan_document(plan_all(BEFORE, PUNCHED, table=LOGGED)))
    document = json.loads(text)
    assert document["schema"] == 1
    assert [p["strategy"] for p in document["plans"]] == [s.value for s in PlanStrategy]
    qemu, _pause, _incremental, _full, hole, _split = document["plans"]
    assert qemu["ops"] == [
        {"op": "delete", "as_id": 0, "slot": 0, "gpa": 0, "size": 64 * MIB, "flags": 0},
        {"op": "add", "as_id": 0, "slot": 0, "gpa": 0, "size": MIB, "flags": 1},
        {
            "op": "add",
            "as_id": 0,
            "slot": 1,
            "gpa": MIB + 0x1000,
            "size": 63 * MIB - 0x1000,
            "flags": 1,
        },
    ]
    assert qemu["missing"] == [
        {"as_id": 0, "start": 0, "size": MIB, "steps": 1},
        {"as_id": 0, "start": MIB + 0x1000, "size": 63 * MIB - 0x1000, "steps": 2},
    ]
    assert qemu["atomic"] is True
    assert qemu["inhibit"] is True
    assert qemu["slot_ids_changed"] == [0]
    assert qemu["dirty_bitmap_bytes"]["dropped"] == 2048
    assert qemu["steps"][0] == {
        "first": 0,
        "count": 1,
        "missing": 64 * MIB - 0x1000,
        "atomic": False,
    }
    assert hole["ops"] == [
        {"op": "set_hole", "as_id": 0, "slot": 0, "gpa": MIB, "size": 0x1000, "flags": 1}
    ]
    assert hole["missing"] == []
    assert hole["slot_ids_changed"] == []
    for p in document["plans"]:
        assert set(p) >= {
            "strategy",
            "ops",
            "missing",
            "atomic",
            "slot_ids_changed",
            "dirty_bitmap_bytes",
        }
        assert set(p["dirty_bitmap_bytes"]) >= {"kept", "dropped", "reallocated"}


def test_views_are_told_apart_by_name() -> None:
    views = (FlatView(tuple(BEFORE), "KVM-SMRAM"), FlatView(tuple(BEFORE), "memory"))
    done = plan(views, (FlatView((), "memory"), FlatView((), "KVM-SMRAM")))
    assert [(o.op, o.as_id) for o in done.ops] == [(OpKind.DELETE, 0), (OpKind.DELETE, 1)]
