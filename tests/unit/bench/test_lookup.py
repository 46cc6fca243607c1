"""The counted array and trees of slots, against searching one by one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.bench.slot_costs.lookup_array import (
    ARRAY_5_7,
    ARRAY_5_14,
    SLOT_BYTES,
    ArrayLayout,
    SlotArray,
)
from tools.bench.slot_costs.lookup_steps import Interval
from tools.bench.slot_costs.lookup_tree import SlotTree

PAGES = st.integers(0, 400)


@st.composite
def disjoint(draw: st.DrawFn) -> list[Interval]:
    """Slots that do not overlap, in any order."""
    cuts = sorted(draw(st.sets(PAGES, max_size=40)))
    pairs = [pair for pair in pairwise(cuts) if draw(st.booleans())]
    slots = [Interval(start, end, i) for i, (start, end) in enumerate(pairs)]
    return draw(st.permutations(slots))


overlapping = st.lists(st.tuples(PAGES, st.integers(1, 50)), max_size=30).map(
    lambda pairs: [Interval(start, start + size, i) for i, (start, size) in enumerate(pairs)]
)


def holder(slots: list[Interval], page: int) -> int | None:
    return next((s.slot for s in slots if s.start <= page < s.end), None)


def check_tree(tree: SlotTree, slots: list[Interval], *, ends: bool) -> None:
    """The rules of a red-black tree, and that it holds these slots in order."""
    nil, found = tree._nil, []

    def walk(node: object) -> int:
        if node is nil:
            return 1
        assert isinstance(node, type(nil))
        for child in (node.left, node.right):
            assert not (node.red and child.red)
            assert child is nil or child.parent is node
        blacks = walk(node.left)
        found.append(node.slot)
        assert walk(node.right) == blacks
        if ends:
            below = (node.left.subtree_end, node.right.subtree_end)
            assert node.subtree_end == max(node.slot.end, *below)
        return blacks + (not node.red)

    walk(tree._root)
    assert not tree._root.red
    assert [s.start for s in found] == sorted(s.start for s in slots)
    assert sorted(found) == sorted(slots)


@given(slots=disjoint(), pages=st.lists(PAGES, max_size=30))
def test_all_structures_find_the_slot_that_holds_a_page(
    slots: list[Interval], pages: list[int]
) -> None:
    array = SlotArray(slots)
    tree = SlotTree(slots, ends=True)
    for page in pages:
        expected = holder(slots, page)
        for find in (array.find, array.find_cached, array.scan):
            assert find(page).slot == expected
        for find in (tree.find, tree.find_cached, tree.covering):
            assert find(page).slot == expected


@given(slots=overlapping, pages=st.lists(PAGES, max_size=30))
def test_the_interval_tree_finds_the_first_of_several_slots(
    slots: list[Interval], pages: list[int]
) -> None:
    tree = SlotTree(slots, ends=True)
    for page in pages:
        covering = {s.slot: s.start for s in slots if s.start <= page < s.end}
        found = tree.covering(page).slot
        if not covering:
            assert found is None
        else:
            assert found is not None
            assert covering[found] == min(covering.values())


@given(data=st.data(), slots=disjoint(), ends=st.booleans())
def test_a_tree_keeps_its_rules_through_updates(
    data: st.DataObject, slots: list[Interval], ends: bool
) -> None:
    tree = SlotTree(ends=ends)
    inside: list[Interval] = []
    outside = list(slots)
    for _ in range(3 * len(slots)):
        if outside and (not inside or data.draw(st.booleans())):
            slot = outside.pop(data.draw(st.integers(0, len(outside) - 1)))
            tree.add(slot)
            inside.append(slot)
        else:
            slot = inside.pop(data.draw(st.integers(0, len(inside) - 1)))
            tree.remove(slot)
            outside.append(slot)
        check_tree(tree, inside, ends=ends)
    for slot in slots:
        for page in (slot.start, slot.end - 1):
            assert tree.find_cached(page).slot == holder(inside, page)


@given(data=st.data(), slots=disjoint())
def test_an_array_finds_the_same_through_updates(
    data: st.DataObject, slots: list[Interval]
) -> None:
    array = SlotArray(slots)
    inside = list(slots)
    for slot in slots:
        for page in data.draw(st.lists(PAGES, max_size=5)):
            assert array.find_cached(page).slot == holder(inside, page)
        if data.draw(st.booleans()):
            array.remove(slot)
            inside.remove(slot)
    for page in range(0, 400, 7):
        assert array.find_cached(page).slot == holder(inside, page)


@given(slots=disjoint(), page=PAGES)
def test_a_scan_costs_what_asking_each_slot_costs(slots: list[Interval], page: int) -> None:
    found = SlotArray(slots).scan(page)
    assert found.slots_read == len(slots)
    assert found.comparisons == sum(1 if page < s.start else 2 for s in slots)


@pytest.mark.parametrize("count", [1, 8, 64, 509, 4096])
def test_steps_of_a_search_grow_with_the_logarithm(count: int) -> None:
    slots = [Interval(i * 2, i * 2 + 1, i) for i in range(count)]
    array, tree = SlotArray(slots), SlotTree(slots)
    halvings = math.ceil(math.log2(count + 1))
    for page in range(0, 2 * count, max(1, count // 50)):
        assert array.find(page).slots_read <= halvings + 1
        # a red-black tree is at most twice as high as a full one
        assert tree.find(page).slots_read <= 2 * math.log2(count + 1)


def test_what_is_found_again_takes_two_comparisons() -> None:
    slots = [Interval(i * 32, i * 32 + 16, i) for i in range(100)]
    for structure in (SlotArray(slots), SlotTree(slots)):
        first = structure.find_cached(40 * 32)
        again = structure.find_cached(40 * 32 + 15)
        assert (again.slot, again.comparisons, again.slots_read) == (40, 2, 1)
        assert first.comparisons > 2
        structure.forget()
        assert structure.find_cached(40 * 32).comparisons > 2


def test_a_miss_keeps_what_was_found_last() -> None:
    slots = [Interval(i * 32, i * 32 + 16, i) for i in range(100)]
    for structure in (SlotArray(slots), SlotTree(slots)):
        structure.find_cached(40 * 32)
        assert structure.find_cached(50 * 32 + 20).slot is None
        assert structure.find_cached(40 * 32).comparisons == 2


def test_a_slot_that_was_removed_is_not_found_last() -> None:
    slots = [Interval(0, 16, 0), Interval(32, 48, 1)]
    for structure in (SlotArray(slots), SlotTree(slots)):
        assert structure.find_cached(0).slot == 0
        structure.remove(slots[0])
        assert structure.find_cached(0).slot is None
        assert structure.find_cached(40).slot == 1
        structure.remove(slots[1])
        assert structure.find_cached(40).slot is None


@pytest.mark.parametrize("layout", [ARRAY_5_7, ARRAY_5_14])
def test_bytes_that_an_update_of_the_array_moves(layout: ArrayLayout) -> None:
    """The highest slot lies first: all others make room for it, none for the lowest."""
    slots = [Interval(i * 2, i * 2 + 1, i) for i in range(10)]
    array = SlotArray(slots, layout)
    whole = layout.header_bytes + 10 * SLOT_BYTES
    for slot, behind in ((slots[9], 9), (slots[0], 0), (slots[4], 4)):
        removed, added = array.remove(slot), array.add(slot)
        assert removed.bytes_copied == whole * layout.copies_to_remove
        assert added.bytes_copied == whole - SLOT_BYTES
        assert removed.bytes_shifted == added.bytes_shifted == behind * SLOT_BYTES
        assert removed.comparisons == 0
        assert added.comparisons == behind + (slot != slots[9])


def test_headers_are_those_of_linux() -> None:
    """u64 generation, short ids[], atomic_t, int, aligned to 8."""
    assert ARRAY_5_7.header_bytes == 1040
    assert ARRAY_5_14.header_bytes == 65_552


def test_a_tree_that_grows_in_order_rotates_and_compares_log_n() -> None:
    tree = SlotTree()
    for i in range(1024):
        work = tree.add(Interval(i, i + 1, i))
        assert work.comparisons <= 2 * math.log2(i + 1) + 1
        assert work.rotations <= 2
        assert work.bytes_copied == work.bytes_shifted == 0


def test_removing_what_is_not_there_is_an_error() -> None:
    tree = SlotTree([Interval(0, 1, 0)])
    with pytest.raises(KeyError):
        tree.remove(Interval(0, 2, 0))
