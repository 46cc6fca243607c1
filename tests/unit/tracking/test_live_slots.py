"""What the slots of a running guest show: names, holes, and where they differ from the rules."""

from __future__ import annotations

from dataclasses import replace

from qmp_memlistener.memslots import READONLY, OpKind, Rules
from qmp_memlistener.records import SlotOp
from qmp_memlistener.topology import FlatRange, FlatView, Kind, MemoryMap, ram_blocks
from qmp_memlistener.tracking.live_slots import LiveSlots, SlotMaps

MIB = 1 << 20
RAM, VGA = 0x7F00_0000_0000, 0x7F10_0000_0000


def ram(start: int, size: int, name: str = "ram", offset: int | None = None) -> FlatRange:
    return FlatRange(
        start, size, Kind.RAM, name, start if offset is None else offset, None, Kind.RAM
    )


def io(start: int, size: int, name: str = "dev") -> FlatRange:
    return FlatRange(start, size, Kind.IO, name, owner="d0")


def map_of(*ranges: FlatRange) -> MemoryMap:
    view = FlatView(ranges)
    return MemoryMap(view, ram_blocks(view), rendered=True)


def live(*ranges: FlatRange) -> LiveSlots:
    return LiveSlots({0: map_of(*ranges)}, Rules.parse("10.0"))


def op(slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> SlotOp:
    kind = OpKind.ADD if size else OpKind.DELETE
    return SlotOp(
        t_ns=1, as_id=0, slot=slot, op=kind, gpa=gpa, size=size, flags=flags, ret=0, hva=hva
    )


def take(slots: LiveSlots, *ops: SlotOp) -> None:
    for one in ops:
        slots.apply(slots.complete(one))


def names(slots: LiveSlots) -> list[tuple[int, str | None, int]]:
    return [(s.gpa, s.block, s.offset) for s in slots]


def view_of(slots: LiveSlots, before: MemoryMap) -> FlatView:
    return slots.view(tuple(slots), before.view)


def test_each_difference_from_the_rules_is_said() -> None:
    slots = live(ram(0, MIB), ram(2 * MIB, MIB), ram(4 * MIB, MIB))
    take(
        slots,
        op(0, 0, 0, RAM),
        op(1, 2 * MIB, 0, RAM + 2 * MIB),
        op(1, 2 * MIB, MIB // 2, RAM + 2 * MIB),
        op(2, 4 * MIB, MIB, RAM + 4 * MIB, READONLY),
        op(3, 8 * MIB, MIB, VGA),
    )
    assert slots.compare({0: map_of(ram(0, MIB), ram(2 * MIB, MIB), ram(4 * MIB, MIB))}) == [
        "address space 0, gpa 0x0: predicted a slot of 0x100000 bytes, traced none",
        "address space 0, gpa 0x200000: predicted 0x100000 bytes, traced 0x80000",
        "address space 0, gpa 0x400000: predicted flags 0x0, traced 0x2",
        "address space 0, gpa 0x800000: traced a slot of 0x100000 bytes, predicted none",
    ]


def test_a_range_that_a_slot_shows_again_is_as_the_map_had_it() -> None:
    """A trace line does not say that memory is persistent, nor that ROM is a flash."""
    before = map_of(replace(ram(0, MIB), nonvolatile=True), io(2 * MIB, 4096))
    slots = LiveSlots({0: before}, Rules.parse("10.0"))
    take(slots, op(0, 0, 0, RAM), op(0, 0, MIB, RAM))
    assert list(view_of(slots, before)) == list(before.view)


def test_devices_stay_in_the_view_where_no_slot_covers_them() -> None:
    before = map_of(io(0, 4096, "below"), ram(MIB, MIB), io(2 * MIB, 4096), io(4 * MIB, 4096))
    slots = LiveSlots({0: before}, Rules.parse("10.0"))
    take(slots, op(1, 4 * MIB - 8192, 3 * 4096, VGA))
    assert [r.name for r in view_of(slots, before)] == ["below", "ram", "dev", "RAM of slot 1"]
    take(slots, op(2, 2 * MIB + 4096, MIB, VGA + MIB))  # right behind one that is no cover
    assert [r.name for r in view_of(slots, before)][2] == "dev"
    take(slots, op(3, 0, 4096, VGA + 2 * MIB))
    assert "below" not in [r.name for r in view_of(slots, before)]


def test_a_slot_is_named_by_the_next_map_and_names_others_of_its_block() -> None:
    slots = live(ram(0, MIB))
    take(slots, op(1, 4 * MIB, MIB, VGA))
    assert names(slots) == [(0, "ram", 0), (4 * MIB, None, 0)]
    after = map_of(ram(0, MIB), ram(4 * MIB, MIB, "vga", MIB), ram(8 * MIB, MIB, "vga", 0))
    slots.learn({0: after})
    assert names(slots)[1] == (4 * MIB, "vga", MIB)
    take(slots, op(2, 16 * MIB, 4096, VGA - 8192))  # another part of it, by the host address
    assert names(slots)[2] == (16 * MIB, "vga", MIB - 8192)
    take(slots, op(3, 32 * MIB, 2 * MIB, VGA))  # longer than the block: another one's
    assert names(slots)[3] == (32 * MIB, None, 0)


def test_a_block_that_is_elsewhere_now_is_not_taken_for_the_old_one() -> None:
    """It was freed: its name has another address, and its address may have another name."""
    slots = live(ram(0, MIB), ram(4 * MIB, MIB, "vga", 0))
    take(slots, op(1, 4 * MIB, 0, VGA), op(1, 4 * MIB, MIB, VGA))
    take(slots, op(1, 4 * MIB, 0, VGA))
    moved = VGA + (1 << 32)
    take(slots, op(1, 4 * MIB, MIB, moved))
    slots.learn({0: map_of(ram(0, MIB), ram(4 * MIB, MIB, "vga", 0))})
    take(slots, op(2, 8 * MIB, MIB, VGA))
    assert names(slots)[2] == (8 * MIB, None, 0)
    take(slots, op(3, 16 * MIB, MIB, moved))
    assert names(slots)[3] == (16 * MIB, "vga", 0)


def test_what_a_block_does_not_show_any_more_is_its_hole() -> None:
    before = map_of(ram(0, 4 * MIB))
    slots = LiveSlots({0: before}, Rules.parse("10.0"))
    take(
        slots,
        op(0, 0, 0, RAM),
        op(0, 0, MIB, RAM),
        op(1, 2 * MIB, 2 * MIB, RAM + 2 * MIB),
    )
    new, transition = SlotMaps(slots).of(before, tuple(slots))
    assert [(h.block, h.start, h.size) for h in transition.holes_punched] == [("ram", MIB, MIB)]
    (block,) = new.ram_blocks
    assert [(e.start, e.size) for e in block.mapped] == [(0, 4 * MIB)]


def test_memory_that_comes_is_a_block_of_the_map_that_slots_make() -> None:
    before = map_of(ram(0, MIB))
    slots = LiveSlots({0: before}, Rules.parse("10.0"))
    take(slots, op(1, 4 * MIB, MIB, VGA))
    new, transition = SlotMaps(slots).of(before, tuple(slots))
    assert [b.name for b in new.ram_blocks] == ["ram", "RAM of slot 1"]
    assert [r.name for r in transition.added] == ["RAM of slot 1"]
