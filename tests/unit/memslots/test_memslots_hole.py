"""The `hole` strategy on the changes that real machines make."""

from __future__ import annotations

from qmp_memlistener.memslots import (
    LogChange,
    Plan,
    PlanStrategy,
    Rules,
    Slot,
    SlotTable,
    follow_blocks,
    plan,
    slot_table,
)
from qmp_memlistener.topology.model import FlatRange, FlatView, Kind
from tests.unit.memslots.memslots_model import io, pam_rom, ram, rom, view_of

MIB = 1 << 20


def hole(
    before: FlatView,
    after: FlatView,
    table: SlotTable | None = None,
    max_holes: int | None = 64,
    log: LogChange | None = None,
) -> Plan:
    return plan(before, after, PlanStrategy.HOLE, table=table, max_holes=max_holes, log=log)


def ops(done: Plan) -> list[tuple[str, int, int, int]]:
    return [(o.op.value, o.slot, o.gpa, o.size) for o in done.ops]


def slots(table: SlotTable) -> list[tuple[int, int, int, tuple[tuple[int, int], ...]]]:
    return [(s.slot, s.gpa, s.size, s.holes) for s in table]


BEGIN, COMMIT = ("batch_begin", -1, 0, 0), ("batch_commit", -1, 0, 0)
FULL = view_of(ram(0, 0x10000))


def punched(start: int, size: int) -> FlatView:
    return view_of(ram(0, start), io(start, size), ram(start + size, 0x10000 - start - size))


class TestLifeOfAHole:
    def test_set(self) -> None:
        done = hole(FULL, punched(0x4000, 0x1000))
        assert ops(done) == [("set_hole", 0, 0x4000, 0x1000)]
        assert slots(done.after) == [(0, 0, 0x10000, ((0x4000, 0x5000),))]
        assert done.atomic
        assert not done.vcpus_kicked

    def test_grow_and_shrink_by_the_difference(self) -> None:
        small, large = punched(0x4000, 0x1000), punched(0x3000, 0x4000)
        there = hole(small, large)
        assert ops(there) == [("set_hole", 0, 0x3000, 0x1000), ("set_hole", 0, 0x5000, 0x2000)]
        back = hole(large, small, there.after)
        assert ops(back) == [("clear_hole", 0, 0x3000, 0x1000), ("clear_hole", 0, 0x5000, 0x2000)]
        assert back.after == there.before

    def test_move_closes_before_it_opens(self) -> None:
        done = hole(punched(0x4000, 0x1000), punched(0x8000, 0x1000), max_holes=1)
        assert ops(done) == [("clear_hole", 0, 0x4000, 0x1000), ("set_hole", 0, 0x8000, 0x1000)]

    def test_clear(self) -> None:
        done = hole(punched(0x4000, 0x1000), FULL)
        assert ops(done) == [("clear_hole", 0, 0x4000, 0x1000)]
        assert slots(done.after) == [(0, 0, 0x10000, ())]

    def test_one_that_lies_elsewhere_in_part(self) -> None:
        done = hole(punched(0x4000, 0x2000), punched(0x5000, 0x2000))
        assert ops(done) == [("clear_hole", 0, 0x4000, 0x1000), ("set_hole", 0, 0x6000, 0x1000)]


def test_ram_that_ends_earlier_has_a_hole_at_the_end() -> None:
    """virtio-mem and TSEG: the slot spans what either view shows."""
    large, small = view_of(ram(0, 512 * MIB)), view_of(ram(0, 496 * MIB))
    shrink = hole(large, small)
    assert ops(shrink) == [("set_hole", 0, 496 * MIB, 16 * MIB)]
    grow = hole(small, large)
    assert slots(grow.before) == [(0, 0, 512 * MIB, ((496 * MIB, 512 * MIB),))]
    assert ops(grow) == [("clear_hole", 0, 496 * MIB, 16 * MIB)]


def test_slots_of_one_block_become_one_under_the_lowest_id() -> None:
    view = view_of(
        ram(0, 0xC0000), rom(0xC0000, 0x20000), ram(0xE0000, MIB), ram(1 << 32, MIB, offset=2 * MIB)
    )
    table = SlotTable(
        [
            Slot(0, 7, 0, 0xC0000),
            Slot(0, 5, 0xC0000, 0x20000, 2),
            Slot(0, 4, 0xE0000, MIB),
            Slot(0, 2, 1 << 32, MIB),
            Slot(0, 9, 0xFFFC0000, 0x40000, 2),
        ]
    )
    assert slots(hole(view, view, table).before) == [
        (4, 0, 0xE0000 + MIB, ((0xC0000, 0xE0000),)),
        (5, 0xC0000, 0x20000, ()),
        (9, 0xFFFC0000, 0x40000, ()),  # nobody knows what backs it
        (2, 1 << 32, MIB, ()),  # the same block at another place
    ]


class TestPam:
    """ROM in front of RAM: a slot in another one's hole."""

    closed = view_of(ram(0, 0xC0000), rom(0xC0000, 0x20000), ram(0xE0000, MIB))
    halfway = view_of(
        ram(0, 0xC0000),
        ram(0xC0000, 0x8000),
        rom(0xC8000, 0x18000, offset=0x8000),
        ram(0xE0000, MIB),
    )
    shadow = view_of(ram(0, 0xE0000 + MIB))

    def test_the_ram_behind_an_address_is_swapped_in_one_batch(self) -> None:
        done = hole(self.closed, self.halfway)
        assert ops(done) == [
            BEGIN,
            ("set_hole", 1, 0xC0000, 0x8000),
            ("clear_hole", 0, 0xC0000, 0x8000),
            COMMIT,
        ]
        assert done.missing == ()
        assert done.vcpus_kicked
        assert "pc.rom" in done.notes[0]
        assert done.exposure.slot_ids_changed == ()

    def test_a_slot_of_which_nothing_shows_goes_and_comes_back(self) -> None:
        there = hole(self.closed, self.shadow)
        assert ops(there) == [
            BEGIN,
            ("delete", 1, 0xC0000, 0x20000),
            ("clear_hole", 0, 0xC0000, 0x20000),
            COMMIT,
        ]
        back = hole(self.shadow, self.closed, there.after)
        assert ops(back) == [
            BEGIN,
            ("set_hole", 0, 0xC0000, 0x20000),
            ("add", 1, 0xC0000, 0x20000),
            COMMIT,
        ]
        assert back.after == there.before

    def test_ram_that_turns_read_only_by_alias_is_no_change(self) -> None:
        locked = view_of(ram(0, 0xC0000), pam_rom(0xC0000, 0x20000), ram(0xE0000, MIB))
        assert hole(self.shadow, locked).ops == ()
        assert len(plan(self.shadow, locked).ops) == 4

    def test_a_region_that_turns_read_only_gets_a_new_slot_under_its_id(self) -> None:
        a = view_of(ram(0, 0x1000), ram(0x8000, 0x1000, "x", 0))
        b = view_of(
            ram(0, 0x1000), FlatRange(0x8000, 0x1000, Kind.ROM, "x", 0, region_kind=Kind.ROM)
        )
        done = hole(a, b)
        assert ops(done) == [
            BEGIN,
            ("delete", 1, 0x8000, 0x1000),
            ("add", 1, 0x8000, 0x1000),
            COMMIT,
        ]
        assert done.exposure.slot_ids_changed == (1,)
        assert hole(b, a, done.after).after == done.before


class TestComingAndGoing:
    main = ram(0, 0x10000)
    dimm = ram(1 << 32, MIB, "dimm", 0)
    nic = ram(0xFE000000, 0x1000, "rom", 0)

    def test_new_ram_takes_a_slot_and_nothing_else(self) -> None:
        done = hole(view_of(self.main), view_of(self.main, self.dimm))
        assert ops(done) == [("add", 1, 1 << 32, MIB)]
        assert not done.vcpus_kicked

    def test_ids_come_back_with_their_blocks(self) -> None:
        all_of_it = view_of(self.main, self.nic, self.dimm)
        table = SlotTable(
            [Slot(0, 4, 0, 0x10000), Slot(0, 2, 0xFE000000, 0x1000), Slot(0, 1, 1 << 32, MIB)]
        )
        gone = hole(all_of_it, view_of(self.main), table)
        assert ops(gone) == [("delete", 2, 0xFE000000, 0x1000), ("delete", 1, 1 << 32, MIB)]
        back = hole(view_of(self.main), all_of_it, gone.after)
        assert back.after == gone.before

    def test_a_new_slot_takes_no_id_that_goes_in_the_same_transition(self) -> None:
        done = hole(view_of(self.main, self.dimm), view_of(self.main, self.nic))
        assert ops(done) == [("delete", 1, 1 << 32, MIB), ("add", 2, 0xFE000000, 0x1000)]

    def test_an_id_that_somebody_took_is_not_taken_back(self) -> None:
        first = hole(view_of(self.main, self.dimm), view_of(self.main))
        second = hole(view_of(self.main), view_of(self.main, self.nic), first.after)
        assert ops(second) == [("add", 1, 0xFE000000, 0x1000)]
        third = hole(
            view_of(self.main, self.nic), view_of(self.main, self.nic, self.dimm), second.after
        )
        assert ops(third) == [("add", 2, 1 << 32, MIB)]

    def test_new_ram_with_holes_comes_in_one_batch(self) -> None:
        split = view_of(
            self.main, ram(0x20000, 0x1000, "dimm", 0), ram(0x22000, 0x1000, "dimm", 0x2000)
        )
        done = hole(view_of(self.main), split)
        assert ops(done) == [
            BEGIN,
            ("add", 1, 0x20000, 0x3000),
            ("set_hole", 1, 0x21000, 0x1000),
            COMMIT,
        ]

    def test_ram_beyond_the_extent_makes_a_longer_slot(self) -> None:
        first = hole(view_of(ram(0, 0x4000)), view_of(ram(0, 0x3000)))
        done = hole(view_of(ram(0, 0x3000)), view_of(ram(0, 0x8000)), first.after)
        assert ops(done) == [BEGIN, ("delete", 0, 0, 0x4000), ("add", 0, 0, 0x8000), COMMIT]
        assert "longer" in done.notes[0]
        assert done.missing == ()


class TestLimit:
    """A slot with more holes than allowed is plain slots again, changed in a batch."""

    one = view_of(ram(0, 0x1000), io(0x1000, 0x1000), ram(0x2000, 0x6000))
    two = view_of(
        ram(0, 0x1000),
        io(0x1000, 0x1000),
        ram(0x2000, 0x2000),
        io(0x4000, 0x1000),
        ram(0x5000, 0x3000),
    )

    def test_falls_back_and_comes_back(self) -> None:
        there = hole(self.one, self.two, max_holes=1)
        assert ops(there) == [
            BEGIN,
            ("delete", 0, 0, 0x8000),
            ("add", 0, 0, 0x1000),
            ("add", 1, 0x2000, 0x2000),
            ("add", 2, 0x5000, 0x3000),
            COMMIT,
        ]
        assert there.missing == ()
        assert there.vcpus_kicked
        assert "more than 1 holes" in there.notes[0]
        assert there.exposure.slot_ids_changed == (0,)
        back = hole(self.two, self.one, there.after, max_holes=1)
        assert back.after == there.before
        assert "one slot again" in back.notes[0]

    def test_others_are_not_touched(self) -> None:
        other = ram(1 << 32, 0x4000, "dimm", 0)
        less = ram(1 << 32, 0x3000, "dimm", 0)
        done = hole(view_of(*self.one, other), view_of(*self.two, less), max_holes=1)
        assert ops(done)[-1] == ("set_hole", 2, (1 << 32) + 0x3000, 0x1000)
        assert done.exposure.slot_ids_changed == (0,)

    def test_too_many_on_the_way_go_in_one_batch(self) -> None:
        """Two holes before and two after, but three in between, whichever goes first."""
        before = view_of(ram(0, 0x1000), ram(0x4000, 0x2000), ram(0x9000, 0x7000))
        after = view_of(ram(0x2000, 0x1000), ram(0x7000, 0x9000))
        tight = hole(before, after, max_holes=2)
        assert (ops(tight)[0], ops(tight)[-1]) == (BEGIN, COMMIT)
        assert "on the way" in tight.notes[0]
        assert tight.exposure.slot_ids_changed == ()
        loose = hole(before, after, max_holes=3)
        assert not loose.vcpus_kicked
        assert sorted(ops(tight)[1:-1]) == sorted(ops(loose))

    def test_no_limit(self) -> None:
        many = view_of(*(ram(i * 0x2000, 0x1000) for i in range(200)))
        done = hole(view_of(ram(0, 399 * 0x1000)), many, max_holes=None)
        assert len(done.ops) == 199
        assert {o.op.value for o in done.ops} == {"set_hole"}
        assert len(hole(view_of(ram(0, 399 * 0x1000)), many).ops) == 203


def test_a_log_starts_on_the_whole_slot() -> None:
    view = punched(0x4000, 0x1000)
    done = hole(view, view, log=LogChange(migration=True))
    assert ops(done) == [("flags", 0, 0, 0x10000)]
    assert [s.flags for s in done.after] == [1]


def test_follow_blocks_reaches_over_all_views_given() -> None:
    small, large = {0: view_of(ram(0, 0x1000))}, {0: view_of(ram(0, 0x8000))}
    table = follow_blocks(slot_table(small), [small, large], Rules(), 64)
    assert slots(table) == [(0, 0, 0x8000, ((0x1000, 0x8000),))]
    # such a table has room for all that is to come
    assert ops(hole(small[0], large[0], table)) == [("clear_hole", 0, 0x1000, 0x7000)]


def test_an_id_that_a_slot_of_unknown_place_has_is_not_given() -> None:
    table = SlotTable([], elsewhere={0: frozenset({0, 2})})
    two = view_of(ram(0, 0x10000), io(0x10000, 0x1000), ram(0x20000, 0x1000, "other"))
    done = hole(view_of(), two, table)
    assert sorted(slot for _, slot, _, _ in ops(done) if slot >= 0) == [1, 3]
