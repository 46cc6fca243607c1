"""The renderer against QEMU's own algorithm, spelled out, on machines nobody would build."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.topology import read_map
from tests.support.trees import Mr, info_mtree, render_by_insertion, trees

Row = tuple[int, int, str, str, int]


def rendered(text: str) -> list[Row]:
    return [(r.start, r.size, str(r.kind), r.name, r.offset) for r in read_map(text).view]


@given(trees())
def test_equals_insertion_in_priority_order(root: Mr) -> None:
    assert rendered(info_mtree({"memory": root})) == render_by_insertion(root)


@given(trees(), st.randoms(use_true_random=False))
def test_printed_order_of_siblings_does_not_matter(root: Mr, rnd: random.Random) -> None:
    def shuffle(mr: Mr) -> None:
        rnd.shuffle(mr.subregions)
        mr.subregions.sort(key=lambda s: -s.priority)
        for sub in mr.subregions:
            shuffle(sub)

    before = rendered(info_mtree({"memory": root}))
    shuffle(root)
    assert rendered(info_mtree({"memory": root})) == before


@given(trees(), st.integers(0, 2 * (1 << 16)))
def test_lookup_finds_the_range_that_holds_the_address(root: Mr, addr: int) -> None:
    view = read_map(info_mtree({"memory": root})).view
    holding = [r for r in view if r.start <= addr < r.end]
    assert view.lookup(addr) == (holding[0] if holding else None)


@given(trees())
def test_mapped_extents_are_visible_ranges_and_holes(root: Mr) -> None:
    """Every byte of a RAM block's mapped extent is visible at its place or part of a hole."""
    result = read_map(info_mtree({"memory": root}))
    for block in result.ram_blocks:
        for m in block.mapped:
            delta = m.start - m.offset
            shown = sum(
                min(r.end, m.end) - max(r.start, m.start)
                for r in result.view.between(m.start, m.end)
                if r.name == block.name and r.start - r.offset == delta
            )
            missing = sum(
                h.size
                for h in block.holes
                if h.start - h.offset == delta and m.start <= h.start < m.end
            )
            assert shown + missing == m.size
