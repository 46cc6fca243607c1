"""The slot table, its lookups, its file form; interval arithmetic."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.errors import InputError
from qmp_memlistener.memslots import (
    Slot,
    SlotTable,
    bitmap_bytes,
)
from qmp_memlistener.memslots.intervals import (
    complement,
    cut,
    cutting,
    intersect,
    join,
    put,
    subtract,
)


def test_lookups() -> None:
    table = SlotTable([Slot(0, 3, 0x4000, 0x2000), Slot(0, 0, 0, 0x1000), Slot(1, 0, 0, 0x9000)])
    assert len(table) == 3
    assert table.as_ids() == (0, 1)
    assert [s.slot for s in table.slots(0)] == [0, 3]
    low, high = table.slots(0)
    assert table.at(0, 0xFFF) == low
    assert table.at(0, 0x1000) is None
    assert table.at(0, 0x5FFF) == high
    assert table.at(2, 0) is None
    assert table.exact(0, 0x4000, 0x2000) == high
    assert table.exact(0, 0x4000, 0x1000) is None
    assert table.exact(0, 0x5000, 0x1000) is None
    assert table.overlapping(0, 0xFFF, 0x4001) == (low, high)
    assert table.overlapping(0, 0x1000, 0x4000) == ()
    assert table.lowest_free(0) == 1
    assert table.lowest_free(7) == 0
    assert table.mapped(0) == ((0, 0x1000), (0x4000, 0x6000))


def test_a_slot_in_the_hole_of_another() -> None:
    outer = Slot(0, 0, 0, 0x10000, holes=((0x4000, 0x6000),), follows_block=True)
    inner = Slot(0, 1, 0x4000, 0x2000, 2)
    table = SlotTable([outer, inner])
    assert outer.mapped == ((0, 0x4000), (0x6000, 0x10000))
    assert table.at(0, 0x4000) == inner
    assert table.at(0, 0x6000) == outer
    assert table.mapped(0) == ((0, 0x10000),)
    assert table.overlapping(0, 0, 0x10000) == (outer, inner)
    with pytest.raises(InputError, match="overlaps"):
        table.add(Slot(0, 2, 0x3000, 0x1000))
    table.remove(0, 1)
    assert table.at(0, 0x4000) is None
    table.add(Slot(0, 1, 0x5000, 0x1000))


def test_what_kvm_refuses_is_refused() -> None:
    with pytest.raises(InputError, match="overlaps"):
        SlotTable([Slot(0, 0, 0, 0x2000), Slot(0, 1, 0x1000, 0x1000)])
    with pytest.raises(InputError, match="same id"):
        SlotTable([Slot(0, 0, 0, 0x1000), Slot(0, 0, 0x1000, 0x1000)])
    with pytest.raises(InputError, match="not a memslot"):
        SlotTable([Slot(0, 0x10000, 0, 0x1000)])
    with pytest.raises(InputError, match="no slot 5"):
        SlotTable().remove(0, 5)


def test_a_copy_is_its_own() -> None:
    table = SlotTable([Slot(0, 0, 0, 0x1000)])
    other = table.copy()
    other.remove(0, 0)
    assert len(table) == 1
    assert table.at(0, 0) is not None
    assert table != other
    other.add(Slot(0, 0, 0, 0x1000, block="pc.ram", offset=0))
    assert table == other, "what backs a slot does not count"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11), st.integers(0, 3)), max_size=40))
def test_table_keeps_up_with_a_naive_one(steps: list[tuple[bool, int, int]]) -> None:
    table = SlotTable()
    naive: dict[int, tuple[int, int]] = {}
    for adding, page, pages in steps:
        taken = {p for low, n in naive.values() for p in range(low, low + n)}
        lowest = next(i for i in range(100) if i not in naive)
        assert table.lowest_free(0) == lowest
        if adding and pages:
            slot = Slot(0, lowest, page, pages)
            if taken & set(range(page, page + pages)):
                with pytest.raises(InputError):
                    table.add(slot)
            else:
                table.add(slot)
                naive[lowest] = (page, pages)
        elif not adding and page in naive:
            table.remove(0, page)
            del naive[page]
        for p in range(16):
            owner = [i for i, (low, n) in naive.items() if low <= p < low + n]
            found = table.at(0, p)
            assert ([found.slot] if found else []) == owner
        assert table == SlotTable(Slot(0, i, low, n) for i, (low, n) in naive.items())


def test_file_form() -> None:
    text = '[{"slot":65537,"gpa":0,"size":4096,"flags":2},{"slot":0,"gpa":0,"size":4096,"flags":0}]'
    table = SlotTable.from_json(text)
    assert [(s.as_id, s.slot, s.flags) for s in table] == [(0, 0, 0), (1, 1, 2)]
    assert SlotTable.from_json(text.encode()) == table
    again = [
        {"slot": s.slot, "as_id": s.as_id, "gpa": s.gpa, "size": s.size, "flags": s.flags}
        for s in table
    ]
    assert SlotTable.from_json(list(again)) == table


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"slot":0}]',
        '[{"slot":"0","gpa":0,"size":4096}]',
        '[{"slot":0,"gpa":0,"size":0}]',
        '[{"slot":-1,"gpa":0,"size":4096}]',
        '[{"slot":0,"gpa":-4096,"size":4096}]',
        '[{"slot":0,"gpa":0,"size":8192},{"slot":1,"gpa":4096,"size":4096}]',
        '[{"slot":0,"gpa":0,"size":4096},{"slot":0,"gpa":4096,"size":4096}]',
    ],
)
def test_file_that_is_no_table(text: str) -> None:
    with pytest.raises(InputError):
        SlotTable.from_json(text)


def test_bitmap_bytes_are_whole_words() -> None:
    assert bitmap_bytes(4096) == 8
    assert bitmap_bytes(64 * 4096) == 8
    assert bitmap_bytes(65 * 4096) == 16
    assert bitmap_bytes(1 << 30) == 32768
    assert bitmap_bytes(1 << 30, 65536) == 2048


def _ranges(points: set[int]) -> list[tuple[int, int]]:
    return join((p, p + 1) for p in sorted(points))


SETS = st.sets(st.integers(0, 30))


@given(SETS, SETS, st.integers(0, 30), st.integers(1, 10))
def test_intervals_are_sets_of_points(a: set[int], b: set[int], start: int, size: int) -> None:
    assert subtract(_ranges(a), _ranges(b)) == _ranges(a - b)
    end = start + size
    span = set(range(start, end))
    assert intersect(_ranges(a), start, end) == _ranges(a & span)
    assert complement(start, end, _ranges(a)) == _ranges(span - a)
    grown, shrunk = _ranges(a), _ranges(a)
    put(grown, start, end)
    cut(shrunk, start, end)
    assert grown == _ranges(a | span)
    assert shrunk == _ranges(a - span)
    in_a, in_b = cutting(_ranges(a), _ranges(b))
    assert in_a == {i for i, r in enumerate(_ranges(a)) if set(range(*r)) & b}
    assert in_b == {i for i, r in enumerate(_ranges(b)) if set(range(*r)) & a}


def test_copies_that_change_for_ever_do_not_grow() -> None:
    table = SlotTable([Slot(0, i, i << 12, 4096) for i in range(4)])
    for _ in range(1000):
        table = table.copy()
        slot = table.remove(0, 1)
        table.add(slot)
    assert len(table.copy()._spaces[0].free) <= 4


def test_ids_that_were_never_used_take_no_room() -> None:
    table = SlotTable([Slot(0, 32763, 0, 0x1000)])
    tracemalloc.start()
    try:
        copies = [table.copy() for _ in range(100)]
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
    assert {c.lowest_free(0) for c in copies} == {0}


def test_the_lowest_free_id_is_of_no_slot_and_of_none_at_an_unknown_place() -> None:
    slots = [Slot(0, i, i << 20, 0x1000) for i in (0, 3)]
    table = SlotTable(slots, elsewhere={0: frozenset({1, 4})})
    assert table.lowest_free(0) == 2
    table.add(Slot(0, 2, 2 << 20, 0x1000))
    assert table.lowest_free(0) == 5
    assert table.lowest_free(1) == 0
