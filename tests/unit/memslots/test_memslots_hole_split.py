"""`hole-split`: what is split once stays split, and the rest of the RAM is never touched again."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.memslots import (
    LogChange,
    OpKind,
    Order,
    Plan,
    Rules,
    SlotTable,
    plan,
    slot_table,
)
from qmp_memlistener.topology.model import FlatView
from tests.unit.memslots.memslots_model import PAGE, Vm, content_of, io, ram, rom, view_of, views

MIB = 1 << 20
TOP = 32763
WHOLE = view_of(ram(0, 8 * MIB))
HOLED = view_of(ram(0, MIB), io(MIB, MIB), ram(2 * MIB, 6 * MIB))
SHADOW = view_of(ram(0, MIB), rom(MIB, MIB), ram(2 * MIB, 6 * MIB))


def split(
    before: FlatView,
    after: FlatView,
    table: SlotTable | None = None,
    *,
    rules: Rules | None = None,
    log: LogChange | None = None,
) -> Plan:
    return plan(before, after, "hole-split", table=table, rules=rules, log=log)


def ops(done: Plan) -> list[tuple[str, int, int, int]]:
    return [(op.op.value, op.slot, op.gpa, op.size) for op in done.ops]


def test_a_slot_is_split_once_and_stays_split() -> None:
    first = split(WHOLE, HOLED)
    assert ops(first) == [
        ("park", -1, 0, 0),
        ("delete", 0, 0, 8 * MIB),
        ("add", 0, 0, MIB),
        ("add", 1, 2 * MIB, 6 * MIB),
        ("unpark", -1, 0, 0),
    ]
    assert (first.atomic, first.vcpus_kicked) == (True, True)
    fill = split(HOLED, WHOLE, first.after)
    assert ops(fill) == [("add", TOP, MIB, MIB)]
    assert (fill.atomic, fill.vcpus_kicked) == (True, False)
    assert fill.after.qemu == slot_table(WHOLE)
    again = split(WHOLE, HOLED, fill.after)
    assert ops(again) == [("delete", TOP, MIB, MIB)]
    assert again.after == first.after


def test_memory_that_another_block_takes_the_place_of_is_missing_between_the_two() -> None:
    first = split(WHOLE, SHADOW)
    assert first.atomic
    fill = split(SHADOW, WHOLE, first.after)
    assert ops(fill) == [("delete", 1, MIB, MIB), ("add", TOP, MIB, MIB)]
    assert [(m.start, m.size, m.steps) for m in fill.missing] == [(MIB, MIB, 1)]
    assert not fill.atomic
    again = split(WHOLE, SHADOW, fill.after)
    assert ops(again) == [("delete", TOP, MIB, MIB), ("add", 1, MIB, MIB)]


def test_a_logged_piece_goes_only_while_vcpus_are_paused() -> None:
    on = split(WHOLE, WHOLE, log=LogChange(migration=True))
    assert [(op.op.value, op.flags) for op in on.ops] == [("flags", 1)]
    first = split(WHOLE, HOLED, on.after)
    fill = split(HOLED, WHOLE, first.after)
    assert [(op.op.value, op.flags) for op in fill.ops] == [("add", 1)]
    again = split(WHOLE, HOLED, fill.after)
    assert [op.op.value for op in again.ops] == ["park", "delete", "unpark"]
    off = split(HOLED, HOLED, again.after, log=LogChange(migration=False))
    assert [(op.op.value, op.flags) for op in off.ops] == [("flags", 0), ("flags", 0)]


def test_a_log_that_stops_in_a_transition_does_so_while_vcpus_are_paused() -> None:
    on = split(WHOLE, WHOLE, log=LogChange(migration=True), rules=Rules(Order.V7_2))
    first = split(WHOLE, HOLED, on.after, rules=Rules(Order.V7_2))
    back = LogChange(migration=False)
    fill = split(HOLED, WHOLE, first.after, rules=Rules(Order.V7_2), log=back)
    assert [(op.op.value, op.flags) for op in fill.ops] == [
        *(("park", 0), ("flags", 0), ("flags", 0), ("add", 0), ("unpark", 0)),
    ]


def test_other_strategies_take_qemus_slots_of_such_a_table() -> None:
    first = split(WHOLE, HOLED)
    fill = split(HOLED, WHOLE, first.after)
    done = plan(WHOLE, HOLED, table=fill.after)
    assert done.before == slot_table(WHOLE)
    assert done.ops == plan(WHOLE, HOLED).ops


RULES = st.sampled_from([Rules(Order.V7_2), Rules(Order.V8_0), Rules(slots=12)])


@settings(max_examples=200, deadline=None)
@given(st.lists(views(), min_size=2, max_size=7), RULES, st.booleans())
def test_it_follows_a_guest_for_long(history: list[FlatView], rules: Rules, logged: bool) -> None:
    """KVM has what QEMU asked for, in pieces; what stays is not touched but by a split."""
    table: SlotTable | None = None
    asked: SlotTable | None = None
    log = LogChange(migration=True) if logged else None
    for before, after in pairwise(history):
        done = split(before, after, table, rules=rules, log=log)
        vm = Vm(done.before)
        list(vm.run(done.ops, done.after))
        assert vm.reach() == content_of(after)
        qemu = plan(before, after, table=asked, rules=rules, log=log)
        asked = qemu.after
        assert done.after.qemu == asked
        for piece in done.after:
            whole = asked.at(piece.as_id, piece.gpa)
            assert whole is not None
            assert piece.end <= whole.end
            assert (piece.key, piece.flags) == (whole.key, whole.flags)
        table, log = done.after, None


@settings(max_examples=200, deadline=None)
@given(views(), views(), RULES)
def test_what_comes_back_takes_no_split(before: FlatView, after: FlatView, rules: Rules) -> None:
    """From the second time on what is there before and after is not touched."""
    first = split(before, after, rules=rules)
    back = split(after, before, first.after, rules=rules)
    again = split(before, after, back.after, rules=rules)
    was, now = content_of(before), content_of(after)
    for done in (back, again):
        for op in done.ops:
            if op.op is not OpKind.FLAGS:
                pages = range(op.gpa // PAGE, op.end // PAGE)
                assert not any(p in was and was[p] == now.get(p) for p in pages), op
        logged = {s.slot for s in done.before if s.logged}
        forgets = [o for o in done.ops if o.op is OpKind.DELETE and o.slot in logged]
        assert done.vcpus_kicked == bool(forgets)
