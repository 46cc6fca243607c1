"""QEMU's rules: against what QEMU's trace showed, and against the rules' own words."""

from __future__ import annotations

import pytest

from qmp_memlistener.errors import InputError
from qmp_memlistener.memslots import (
    LogChange,
    Order,
    Plan,
    Rules,
    SlotTable,
    plan,
    slot_table,
)
from qmp_memlistener.topology.model import FlatRange, FlatView, Kind
from tests.unit.memslots.memslots_model import io, ops, pam_rom, ram, rom, table_of, traced, view_of

OLD, NEW = Rules(Order.V7_2), Rules(Order.V8_0)
GIB = 1 << 30


@pytest.mark.parametrize("rules", [OLD, NEW])
def test_tseg_as_the_thread_reported_it(rules: Rules) -> None:
    """The slot of all RAM above 1 MiB shrinks by 16 MiB: 2146435072 bytes, 0, 2129657856."""
    low = (ram(0, 0xC0000), pam_rom(0xC0000, 0x40000))
    before = view_of(*low, ram(0x100000, 2146435072))
    after = view_of(*low, ram(0x100000, 2129657856), io(2 * GIB - (16 << 20), 16 << 20, "tseg"))
    others = [(i, 0x1000 * i, 0x1000, 0) for i in range(6)]
    table = table_of(*others, (6, 0x100000, 2146435072, 0))
    done = plan(before, after, table=table, rules=rules)
    assert traced(done) == [(6, 0, 0x100000, 0), (6, 0, 0x100000, 2129657856)]
    assert ops(done)[0] == ("delete", 6, 0x100000, 2146435072, 0)
    (missing,) = done.missing
    assert (missing.start, missing.size, missing.steps) == (0x100000, 2129657856, 1)


class TestPam:
    """`-M pc -m 512`, writes to PAM register 0x59, as traced on 7.2.22 and 10.0.2."""

    top = rom(0xFFFC0000, 0x40000, "pc.bios")
    roms = rom(0xC0000, 0x20000)
    closed = view_of(
        ram(0, 0xC0000),
        roms,
        rom(0xE0000, 0x20000, "pc.bios", 0x20000),
        ram(0x100000, 0x1FF00000),
        top,
    )
    shadow = view_of(
        ram(0, 0xC0000),
        roms,
        rom(0xE0000, 0x10000, "pc.bios", 0x20000),
        ram(0xF0000, 0x1FF10000),
        top,
    )
    locked = view_of(
        ram(0, 0xC0000),
        roms,
        rom(0xE0000, 0x10000, "pc.bios", 0x20000),
        pam_rom(0xF0000, 0x10000),
        ram(0x100000, 0x1FF00000),
        top,
    )
    table_7_2 = table_of(
        (0, 0, 0xC0000, 0),
        (2, 0xC0000, 0x20000, 2),
        (3, 0xE0000, 0x20000, 2),
        (4, 0x100000, 0x1FF00000, 0),
        (1, 0xFFFC0000, 0x40000, 2),
    )
    table_10_0 = table_of(
        (0, 0, 0xC0000, 0),
        (4, 0xC0000, 0x20000, 2),
        (1, 0xE0000, 0x20000, 2),
        (2, 0x100000, 0x1FF00000, 0),
        (3, 0xFFFC0000, 0x40000, 2),
    )

    @pytest.mark.parametrize(
        ("rules", "table", "bios", "main"), [(OLD, table_7_2, 3, 4), (NEW, table_10_0, 1, 2)]
    )
    def test_three_writes(self, rules: Rules, table: SlotTable, bios: int, main: int) -> None:
        opened = plan(self.closed, self.shadow, table=table, rules=rules)
        assert traced(opened) == [
            (bios, 0, 0xE0000, 0),
            (main, 0, 0x100000, 0),
            (bios, 2, 0xE0000, 0x10000),
            (main, 0, 0xF0000, 0x1FF10000),
        ]
        locked = plan(self.shadow, self.locked, table=opened.after, rules=rules)
        assert traced(locked) == [
            (main, 0, 0xF0000, 0),
            (main, 0, 0xF0000, 0x10000),  # read-only through an alias: no READONLY slot
            (5, 0, 0x100000, 0x1FF00000),
        ]
        closed = plan(self.locked, self.closed, table=locked.after, rules=rules)
        assert traced(closed) == [
            (bios, 0, 0xE0000, 0),
            (main, 0, 0xF0000, 0),
            (bios, 2, 0xE0000, 0x20000),
        ]
        assert [d.inhibit for d in (opened, locked, closed)] == [rules.queued] * 3

    def test_ids_live_on_elsewhere(self) -> None:
        opened = plan(self.closed, self.shadow, table=self.table_7_2)
        assert opened.exposure.slot_ids_changed == (3, 4), "made anew under their old ids"
        locked = plan(self.shadow, self.locked, table=opened.after)
        assert locked.exposure.slot_ids_changed == (4,), "most of it is in slot 5 now"

    def test_a_table_of_another_time_is_refused(self) -> None:
        with pytest.raises(InputError, match="overlaps"):
            plan(self.shadow, self.locked, table=self.table_7_2)


def test_a_hole_in_ram_takes_two_slots() -> None:
    before = view_of(ram(0, GIB))
    after = view_of(ram(0, 0x4000), io(0x4000, 0x1000), ram(0x5000, GIB - 0x5000))
    for rules in (OLD, NEW):
        done = plan(before, after, rules=rules)
        assert ops(done) == [
            ("delete", 0, 0, GIB, 0),
            ("add", 0, 0, 0x4000, 0),
            ("add", 1, 0x5000, GIB - 0x5000, 0),
        ]
        assert [(m.start, m.size, m.steps) for m in done.missing] == [
            (0, 0x4000, 1),
            (0x5000, GIB - 0x5000, 2),
        ]
        assert done.exposure.slot_ids_changed == (0,)


@pytest.mark.parametrize(
    ("kind", "region_kind", "flags"),
    [
        (Kind.RAM, Kind.RAM, 0),
        (Kind.RAMD, Kind.RAMD, 0),
        (Kind.ROM, Kind.ROM, 2),
        (Kind.ROM, None, 2),
        (Kind.ROM, Kind.RAM, 0),
        (Kind.ROMD, Kind.ROMD, 2),
        (Kind.ROM, Kind.ROMD, 2),
        (Kind.IO, Kind.IO, None),
        (Kind.IO, Kind.ROMD, None),
        (Kind.ROM, Kind.IO, None),
    ],
)
def test_which_kinds_have_a_slot(kind: Kind, region_kind: Kind | None, flags: int | None) -> None:
    (r,) = view = view_of(FlatRange(0, 0x1000, kind, "x", region_kind=region_kind))
    slots = list(slot_table(view))
    assert [s.flags for s in slots] == ([] if flags is None else [flags])
    assert r.size == 0x1000


def test_rom_that_is_plain_ram_elsewhere_is_an_alias() -> None:
    """`info mtree -f` does not say what a region is; where it is also RAM, it is RAM."""
    view = view_of(
        FlatRange(0, 0x1000, Kind.RAM, "pc.ram", 0),
        FlatRange(0x1000, 0x1000, Kind.ROM, "pc.ram", 0x1000),
    )
    assert [s.flags for s in slot_table(view)] == [0, 0]


def test_without_readonly_memory_rom_is_writable_and_romd_has_no_slot() -> None:
    rules = Rules(readonly_mem=False)
    view = view_of(
        rom(0, 0x1000), FlatRange(0x1000, 0x1000, Kind.ROMD, "flash", region_kind=Kind.ROMD)
    )
    assert [(s.gpa, s.flags) for s in slot_table(view, rules)] == [(0, 0)]


def test_a_byte_of_mmio_costs_its_page() -> None:
    before = view_of(ram(0, 0x10000))
    after = view_of(ram(0, 0x4800), io(0x4800, 1), ram(0x4801, 0xB7FF))
    done = plan(before, after)
    assert ops(done) == [
        ("delete", 0, 0, 0x10000, 0),
        ("add", 0, 0, 0x4000, 0),
        ("add", 1, 0x5000, 0xB000, 0),
    ]
    assert [s.offset for s in done.after] == [0, 0x5000]


def test_alignment_follows_the_host_page() -> None:
    view = view_of(ram(0x1000, 0x1F000))
    assert [(s.gpa, s.size) for s in slot_table(view, Rules(page_size=0x10000))] == [
        (0x10000, 0x10000)
    ]
    assert list(slot_table(view_of(ram(0x800, 0x1000)))) == []
    assert list(slot_table(view_of(ram(0x801, 0x10)))) == []


def test_a_delete_without_its_exact_slot_is_silent() -> None:
    before = view_of(ram(0, 0x4000), ram(0x8000, 0x4000))
    done = plan(before, view_of(), table=table_of((3, 0, 0x3000, 0), (1, 0x8000, 0x4000, 0)))
    assert ops(done) == [("delete", 1, 0x8000, 0x4000, 0)]
    assert [s.slot for s in done.after] == [3]


def test_an_add_over_a_slot_that_no_view_knows_is_refused() -> None:
    with pytest.raises(InputError, match="overlaps"):
        plan(view_of(), view_of(ram(0, 0x4000)), table=table_of((3, 0x3000, 0x1000, 0)))


def test_rom_device_leaves_and_enters_romd_mode() -> None:
    romd = view_of(FlatRange(0, 0x1000, Kind.ROMD, "flash", region_kind=Kind.ROMD))
    trap = view_of(FlatRange(0, 0x1000, Kind.IO, "flash", region_kind=Kind.IO))
    assert ops(plan(romd, trap)) == [("delete", 0, 0, 0x1000, 0)]
    assert ops(plan(trap, romd)) == [("add", 0, 0, 0x1000, 2)]


class TestAddressSpaces:
    """SMRAM: the memory address space (0) and KVM-SMRAM (1)."""

    low, high = ram(0, 0xA0000), ram(0xC0000, 0x40000)
    whole = ram(0, 0x100000)
    window = io(0xA0000, 0x20000, "vga-lowmem")
    before = (
        FlatView((low, window, high), "memory"),
        FlatView((low, window, high), "KVM-SMRAM"),
        FlatView((window,), "I/O"),
    )
    after = (FlatView((whole,), "memory"), FlatView((whole,), "KVM-SMRAM"), FlatView((), "I/O"))

    @staticmethod
    def what(done: Plan) -> list[tuple[str, int, int]]:
        return [(o.op.value, o.as_id, o.slot) for o in done.ops]

    def test_ids_are_counted_in_each(self) -> None:
        table = slot_table(self.before)
        assert [(s.as_id, s.slot) for s in table] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert [s.kvm_slot for s in table] == [0, 1, 0x10000, 0x10001]

    @pytest.mark.parametrize("rules", [OLD, NEW])
    def test_memory_first(self, rules: Rules) -> None:
        done = plan(self.before, self.after, rules=rules)
        one = [("delete", 0, 0), ("delete", 0, 1), ("add", 0, 0)]
        assert self.what(done) == one + [(op, 1, slot) for op, _, slot in one]
        assert done.inhibited == ((0, 1) if rules.queued else ())
        assert done.exposure.slot_ids_changed == (0, 1, 0x10000, 0x10001)
        assert [(m.as_id, m.start) for m in done.missing] == [
            (0, 0),
            (1, 0),
            (0, 0xC0000),
            (1, 0xC0000),
        ]

    def test_8_0_issues_the_flags_of_all_first(self) -> None:
        extra = ram(0x100000, 0x1000, "dimm", 0)
        before = tuple(FlatView((*v, extra), v.address_space) for v in self.before)
        after = tuple(FlatView((*v, extra), v.address_space) for v in self.after)
        change = LogChange(migration=True)
        new = plan(before, after, rules=NEW, log=change)
        assert self.what(new)[:2] == [("flags", 0, 2), ("flags", 1, 2)]
        old = plan(before, after, rules=OLD, log=change)
        assert self.what(old)[:4] == [
            ("delete", 0, 0),
            ("delete", 0, 1),
            ("add", 0, 0),
            ("flags", 0, 2),
        ]

    def test_an_address_space_without_views_is_left_alone(self) -> None:
        table = slot_table(self.before)
        done = plan(self.before[:1], self.after[:1], table=table)
        assert {o.as_id for o in done.ops} == {0}
        assert done.after.slots(1) == table.slots(1)


class TestInhibit:
    """QEMU >= 8.0 stops the vCPUs when a removed section overlaps an added one, RAM or not."""

    def test_pure_adds_and_pure_dels_do_not(self) -> None:
        one, two = view_of(ram(0, 0x1000)), view_of(ram(0, 0x1000), ram(0x2000, 0x1000))
        assert not plan(one, two).inhibit
        assert not plan(two, one).inhibit

    def test_neighbours_do_not(self) -> None:
        a, b = view_of(ram(0, 0x1000, "a")), view_of(ram(0x1000, 0x1000, "b"))
        done = plan(a, b)
        assert len(done.ops) == 2
        assert not done.inhibit

    def test_an_mmio_reshape_does_without_any_ioctl(self) -> None:
        """PCIEXBAR from 256 to 128 MiB at 0xb0000000; seen on 10.0.2 and 11.1.3."""
        a = view_of(io(0xB0000000, 256 << 20, "pcie-mmcfg-mmio"))
        b = view_of(io(0xB0000000, 128 << 20, "pcie-mmcfg-mmio"))
        done = plan(a, b)
        assert done.ops == ()
        assert done.inhibit
        assert done.vcpus_kicked
        assert not plan(a, b, rules=OLD).inhibit

    def test_sections_are_tested_before_they_are_aligned(self) -> None:
        a = view_of(ram(0, 0x1800, "a"))
        b = view_of(ram(0x1400, 0x1C00, "b", 0))
        done = plan(a, b)
        assert [(o.gpa, o.size) for o in done.ops] == [(0, 0x1000), (0x2000, 0x1000)]
        assert done.inhibit
        assert done.missing == ()


def test_guest_memfd_stays_with_its_region() -> None:
    before = view_of(ram(0, 0x4000))
    after = view_of(ram(0, 0x2000))
    done = plan(before, after, table=table_of((0, 0, 0x4000, 4)))
    assert ops(done)[-1] == ("add", 0, 0, 0x2000, 4)


def test_rules_by_version() -> None:
    assert Rules.parse("7.2").order is Order.V7_2
    assert Rules.parse("7.2.22").order is Order.V7_2
    assert Rules.parse("8.0").order is Order.V8_0
    assert Rules.parse("11.1", page_size=65536) == Rules(Order.V8_0, 65536)
    with pytest.raises(InputError, match="names no rules"):
        Rules.parse("new")
