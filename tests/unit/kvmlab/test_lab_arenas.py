"""Slots with holes as real slots and host mappings: nothing is missing on the way."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.kvmlab.arenas import Arena, Piece, arenas_of, shown, slots_by_arena, steps_of
from qmp_memlistener.memslots import (
    Plan,
    PlanStrategy,
    Slot,
    SlotTable,
    follow_blocks,
    plan,
    slot_table,
)
from qmp_memlistener.memslots.rules import Rules
from qmp_memlistener.topology.model import FlatView
from tests.unit.memslots.memslots_model import PAGE, PAGES, content_of, io, ram, rom, view_of, views

Shown = dict[int, tuple[tuple[str | None, str | None], int]]

SPACE = 2 * PAGES * PAGE


def plans_of(maps: list[FlatView]) -> list[Plan]:
    """`hole` plans from each map to the next."""
    rules = Rules()
    table = follow_blocks(slot_table(maps[0], rules), [{0: m} for m in maps], rules, None)
    out: list[Plan] = []
    for before, after in itertools.pairwise(maps):
        out.append(plan(before, after, PlanStrategy.HOLE, table=table, max_holes=None))
        table = out[-1].after
    return out


def put(content: Shown, piece: Piece) -> None:
    for page in range(piece.start // PAGE, piece.end // PAGE):
        if piece.block is None:
            content.pop(page, None)
        else:
            content[page] = (piece.block, piece.offset + page * PAGE - piece.start)


def content(table: SlotTable | tuple[Slot, ...], arenas: tuple[Arena, ...]) -> Shown:
    out: Shown = {}
    for arena, slots in slots_by_arena(arenas, table).items():
        for piece in shown(arena, slots):
            put(out, piece)
    return out


@settings(max_examples=200, deadline=None)
@given(st.lists(views(aligned=True), min_size=2, max_size=5))
def test_steps_lead_from_map_to_map_and_miss_nothing(maps: list[FlatView]) -> None:
    plans = plans_of(maps)
    arenas = arenas_of([t for p in plans for t in (p.before, p.after)])
    for done, view in zip(plans, maps[1:], strict=True):
        now = content(done.before, arenas)
        stays = now.keys() & content_of(view).keys()
        for step in steps_of(done):
            for piece in step.pieces:
                put(now, piece)
                assert now.keys() >= stays, "RAM that stays is missing within a step"
            assert now == content(step.after, arenas)
        expected = {page: ((name, None), at) for page, (name, at) in content_of(view).items()}
        assert now == expected


@given(st.lists(views(aligned=True), min_size=1, max_size=4))
def test_arenas_do_not_overlap_and_hold_every_slot(maps: list[FlatView]) -> None:
    tables = [t for p in plans_of([*maps, maps[0]]) for t in (p.before, p.after)]
    arenas = arenas_of(tables)
    for a, b in itertools.pairwise(arenas):
        assert a.end <= b.gpa
    for table in tables:
        found = slots_by_arena(arenas, table)
        assert sum(len(slots) for slots in found.values()) == len(table)


def test_rom_in_front_of_ram_shares_a_slot_with_it() -> None:
    before = view_of(ram(0, 8 * PAGE))
    after = view_of(ram(0, 2 * PAGE), rom(2 * PAGE, PAGE), ram(3 * PAGE, 5 * PAGE))
    (done,) = plans_of([before, after])
    arenas = arenas_of([done.before, done.after])
    assert [(a.gpa, a.size, a.readonly) for a in arenas] == [(0, 8 * PAGE, False)]
    (step,) = steps_of(done)
    (piece,) = step.pieces
    assert (piece.start, piece.end, piece.block) == (2 * PAGE, 3 * PAGE, ("pc.rom", None))


def test_rom_alone_is_a_read_only_arena() -> None:
    (done,) = plans_of([view_of(rom(0, PAGE)), view_of(rom(0, PAGE), io(PAGE, PAGE))])
    assert [a.readonly for a in arenas_of([done.before])] == [True]
