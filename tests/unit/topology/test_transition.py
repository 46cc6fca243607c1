"""What a transition says, in QEMU's order and in words."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given

from qmp_memlistener.topology import (
    FlatRange,
    FlatView,
    Hole,
    Kind,
    Mapping,
    diff,
    ram_blocks,
    read_map,
)
from tests.support.trees import Mr, info_mtree, trees

MIB = 1 << 20


def ram(start: int, end: int, offset: int | None = None, name: str = "pc.ram") -> FlatRange:
    return FlatRange(start, end - start, Kind.RAM, name, start if offset is None else offset)


def mmio(start: int, size: int, name: str, owner: str | None = None) -> FlatRange:
    return FlatRange(start, size, Kind.IO, name, owner=owner)


def view(*ranges: FlatRange) -> FlatView:
    return FlatView(ranges)


WHOLE = view(ram(0, 64 * MIB))
HOLED = view(ram(0, MIB), mmio(MIB, 4096, "regs", "dev0"), ram(MIB + 4096, 64 * MIB))


def test_punching_a_hole() -> None:
    t = diff(WHOLE, HOLED)
    assert t.removed == (WHOLE[0],)
    assert t.added == tuple(HOLED)
    assert t.kept == ()
    assert t.holes_punched == (Hole("pc.ram", MIB, 4096, MIB, "regs", "dev0"),)
    assert not t.holes_filled


def test_filling_it_again_is_the_inverse() -> None:
    t = diff(HOLED, WHOLE)
    assert t.removed == tuple(HOLED)
    assert t.added == (WHOLE[0],)
    assert [h.start for h in t.holes_filled] == [MIB]
    assert not t.holes_punched


def test_a_hole_moves_and_grows() -> None:
    moved = view(
        ram(0, 2 * MIB), mmio(2 * MIB, 4096, "regs", "dev0"), ram(2 * MIB + 4096, 64 * MIB)
    )
    t = diff(HOLED, moved)
    assert not t.holes_punched
    assert not t.holes_filled
    assert [(c.before.start, c.after.start) for c in t.holes_moved] == [(MIB, 2 * MIB)]
    assert [(m.before, m.after) for m in t.mmio_moved] == [(MIB, 2 * MIB)]
    grown = view(ram(0, MIB), mmio(MIB, 8192, "regs", "dev0"), ram(MIB + 8192, 64 * MIB))
    assert [(c.before.size, c.after.size) for c in diff(HOLED, grown).holes_resized] == [
        (4096, 8192)
    ]


def test_ram_that_ends_earlier_has_a_hole_at_its_end() -> None:
    """TSEG: the top of RAM goes to another address space."""
    shorter = view(ram(0, 56 * MIB))
    t = diff(WHOLE, shorter)
    assert [(h.start, h.size, h.covered_by) for h in t.holes_punched] == [(56 * MIB, 8 * MIB, None)]
    assert not t.ram_vanished


def test_a_dimm_appears_and_vanishes() -> None:
    plugged = view(WHOLE[0], ram(1 << 32, (1 << 32) + MIB, 0, "m0"))
    t = diff(WHOLE, plugged)
    assert [(c.name, c.start, c.size) for c in t.ram_appeared] == [("m0", 1 << 32, MIB)]
    assert t.kept == (WHOLE[0],)
    assert [c.name for c in diff(plugged, WHOLE).ram_vanished] == ["m0"]
    assert not diff(plugged, WHOLE).holes_punched


def test_ram_that_becomes_read_only_flips_and_is_no_hole() -> None:
    rom = FlatRange(0xC0000, 0x4000, Kind.ROM, "pc.ram", 0xC0000, region_kind=Kind.RAM)
    t = diff(WHOLE, view(ram(0, 0xC0000), rom, ram(0xC4000, 64 * MIB)))
    assert [(f.start, f.size, f.before, f.after) for f in t.flips] == [
        (0xC0000, 0x4000, Kind.RAM, Kind.ROM)
    ]
    assert not t.holes_punched


def test_a_slot_mark_is_no_difference() -> None:
    marked = [FlatRange(r.start, r.size, r.kind, r.name, r.offset, memslot=True) for r in WHOLE]
    assert not diff(WHOLE, FlatView(marked))


def test_blocks_mapped_twice_are_told_apart_by_their_distance() -> None:
    v = view(ram(0, MIB, 0), ram(16 * MIB, 17 * MIB, MIB), ram(32 * MIB, 33 * MIB, 0))
    (block,) = ram_blocks(v)
    assert block.mapped == (
        Mapping(0, MIB, 0),
        Mapping(16 * MIB, MIB, MIB),
        Mapping(32 * MIB, MIB, 0),
    )
    assert block.holes == ()


def spans(ranges: Sequence[FlatRange]) -> list[int]:
    return [r.start for r in ranges]


@given(trees(), trees())
def test_passes_lead_from_one_view_to_the_other(a: Mr, b: Mr) -> None:
    before = read_map(info_mtree({"memory": a})).view
    after = read_map(info_mtree({"memory": b})).view
    t = diff(before, after)
    assert sorted([*t.kept, *t.added], key=lambda r: r.start) == list(after)
    assert set(t.removed) | set(t.kept) == set(before)
    assert spans(t.removed) == sorted(spans(t.removed))
    assert spans(t.added) == sorted(spans(t.added))
    assert bool(t) == (before != after)


@given(trees(), trees())
def test_the_inverse_swaps_punched_and_filled(a: Mr, b: Mr) -> None:
    before = read_map(info_mtree({"memory": a})).view
    after = read_map(info_mtree({"memory": b})).view
    there, back = diff(before, after), diff(after, before)
    assert set(there.holes_punched) == set(back.holes_filled)
    assert set(there.holes_filled) == set(back.holes_punched)
    assert there.ram_appeared == back.ram_vanished


def test_a_flat_view_has_the_hole_that_offsets_prove() -> None:
    """RAM above 4 GiB begins at the offset where that below ends: TSEG is in front of its last."""
    flat = (
        'FlatView #0\n AS "memory", root: system\n Root memory region: system\n'
        "  0000000000000000-000000003fbfffff (prio 0, ram): pc.ram KVM\n"
        "  000000003fc00000-000000003fffffff (prio 1, i/o): tseg-blackhole\n"
        "  0000000100000000-000000013fffffff (prio 0, ram): pc.ram @0000000040000000 KVM\n\n"
    )
    (block,) = read_map(flat).ram_blocks
    assert [(m.start, m.size) for m in block.mapped] == [(0, 1 << 30), (1 << 32, 1 << 30)]
    assert [(h.start, h.size, h.covered_by) for h in block.holes] == [
        (0x3FC00000, 0x400000, "tseg-blackhole")
    ]
    # where nothing is in front, nobody knows that RAM was mapped there
    (block,) = read_map(
        flat.replace("000000003fffffff (prio 1", "000000003fdfffff (prio 1")
    ).ram_blocks
    assert block.holes == ()
