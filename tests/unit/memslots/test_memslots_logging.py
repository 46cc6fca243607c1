"""QEMU's rules for dirty logging: changes of flags, and memory that is plugged meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmp_memlistener.memslots import (
    LogChange,
    Order,
    Rules,
    Slot,
    SlotTable,
    plan,
)
from qmp_memlistener.topology.model import FlatRange, FlatView, Kind, VirtioMemory
from tests.unit.memslots.memslots_model import ops, ram, rom, table_of, view_of

OLD, NEW = Rules(Order.V7_2), Rules(Order.V8_0)
GIB = 1 << 30


class TestFlags:
    """A migration starts while a hole is punched below RAM that stays."""

    before = view_of(ram(0, 0x8000), ram(0x10000, 0x4000, "a", 0), ram(0x20000, 0x4000, "b", 0))
    after = view_of(ram(0, 0x4000), ram(0x10000, 0x4000, "a", 0), ram(0x18000, 0x4000, "c", 0))
    start = LogChange(migration=True)

    def test_7_2_mixes_them_with_adds_by_address(self) -> None:
        assert ops(plan(self.before, self.after, rules=OLD, log=self.start)) == [
            ("delete", 0, 0, 0x8000, 0),
            ("delete", 2, 0x20000, 0x4000, 0),
            ("add", 0, 0, 0x4000, 1),
            ("flags", 1, 0x10000, 0x4000, 1),
            ("add", 2, 0x18000, 0x4000, 1),
        ]

    def test_8_0_issues_them_at_once(self) -> None:
        assert ops(plan(self.before, self.after, rules=NEW, log=self.start)) == [
            ("flags", 1, 0x10000, 0x4000, 1),
            ("delete", 0, 0, 0x8000, 0),
            ("delete", 2, 0x20000, 0x4000, 0),
            ("add", 0, 0, 0x4000, 1),
            ("add", 2, 0x18000, 0x4000, 1),
        ]

    @pytest.mark.parametrize("rules", [OLD, NEW])
    def test_start_and_stop_alone(self, rules: Rules) -> None:
        view = view_of(
            ram(0, 0x4000),
            rom(0x8000, 0x1000),
            FlatRange(0x10000, 0x1000, Kind.RAMD, "0000:01:00.0 BAR 0 mmaps[0]"),
        )
        on = plan(view, view, rules=rules, log=self.start)
        assert ops(on) == [("flags", 0, 0, 0x4000, 1), ("flags", 1, 0x8000, 0x1000, 3)]
        assert not on.missing
        assert not on.inhibit
        off = plan(view, view, table=on.after, rules=rules, log=LogChange(migration=False))
        assert ops(off) == [("flags", 0, 0, 0x4000, 0), ("flags", 1, 0x8000, 0x1000, 2)]
        assert off.after == on.before

    def test_a_dimm_that_comes_during_a_migration_is_logged(self) -> None:
        view = view_of(ram(0, 0x4000))
        more = view_of(ram(0, 0x4000), ram(0x10000, 0x4000, "/objects/mem1", 0))
        on = plan(view, view, log=self.start)
        assert ops(plan(view, more, table=on.after)) == [("add", 1, 0x10000, 0x4000, 1)]

    def test_video_ram_is_logged_from_birth(self) -> None:
        dark = view_of(ram(0, 0x4000))
        lit = view_of(ram(0, 0x4000), ram(0x10000, 0x4000, "vga.vram", 0))
        done = plan(dark, lit)
        assert ops(done) == [("add", 1, 0x10000, 0x4000, 1)]
        # a migration finds it logged already: no ioctl; it stays logged at the end
        on = plan(lit, lit, table=done.after, log=self.start)
        assert ops(on) == [("flags", 0, 0, 0x4000, 1)]
        off = plan(lit, lit, table=on.after, log=LogChange(migration=False))
        assert ops(off) == [("flags", 0, 0, 0x4000, 0)]

    def test_a_display_switches_the_log_of_a_named_region(self) -> None:
        lit = view_of(ram(0, 0x4000, "vga.vram"))
        off = plan(lit, lit, log=LogChange(stop=frozenset({"vga.vram"})))
        assert ops(off) == [("flags", 0, 0, 0x4000, 0)]
        assert ops(plan(lit, view_of(), table=off.after)) == [("delete", 0, 0, 0x4000, 0)]
        on = plan(lit, lit, table=off.after, log=LogChange(start=frozenset({"vga.vram"})))
        assert ops(on) == [("flags", 0, 0, 0x4000, 1)]

    def test_what_a_migration_leaves_out_stays_out(self) -> None:
        view = view_of(ram(0, 0x4000), ram(0x8000, 0x1000, "odd", 0))
        table = table_of((0, 0, 0x4000, 1), (1, 0x8000, 0x1000, 0))
        moved = view_of(ram(0, 0x4000), ram(0x9000, 0x1000, "odd", 0))
        assert ops(plan(view, moved, table=table))[-1] == ("add", 1, 0x9000, 0x1000, 0)

    def test_a_region_stays_as_its_slots_show_it(self) -> None:
        """Device RAM is no business of a migration, but a table that has it logged is right."""
        bar = FlatRange(0x8000, 0x1000, Kind.RAMD, "bar", region_kind=Kind.RAMD)
        moved = FlatRange(0x9000, 0x1000, Kind.RAMD, "bar", region_kind=Kind.RAMD)
        table = table_of((0, 0x8000, 0x1000, 1))
        assert ops(plan(view_of(bar), view_of(moved), table=table))[-1][-1] == 1
        assert ops(plan(view_of(bar), view_of(moved), log=self.start))[-1][-1] == 0

    def test_readonly_cannot_be_toggled_on_a_live_slot(self) -> None:
        """Seen only when the region changes behind a read-only alias while a log starts."""
        a = view_of(FlatRange(0, 0x1000, Kind.ROM, "x", region_kind=Kind.RAM))
        b = view_of(FlatRange(0, 0x1000, Kind.ROM, "x", region_kind=Kind.ROM))
        assert ops(plan(a, b)) == []
        done = plan(a, b, log=self.start)
        assert ops(done) == [("delete", 0, 0, 0x1000, 0), ("add", 0, 0, 0x1000, 3)]
        assert len(done.missing) == 1


class TestMemoryPluggedWhileLogging:
    """pc-dimm and nvdimm map their memory before it is migratable (`pc_dimm_plug`)."""

    MEMORY = ram(0, GIB, "pc.ram")
    TABLE = SlotTable([Slot(0, 0, 0, GIB, 1, "pc.ram", None, 0)])

    def plan(
        self, before: FlatView, after: FlatView, table: SlotTable = TABLE
    ) -> tuple[list[tuple[str, int, int]], SlotTable]:
        done = plan(before, after, table=table, rules=NEW)
        return [(o.op.value, o.gpa, o.flags) for o in done.ops], done.after

    def view(self, *blocks: FlatRange, mem: int = 0, pmem: int = 0) -> FlatView:
        return FlatView([self.MEMORY, *blocks], virtio_memory=VirtioMemory(mem, pmem))

    def device(
        self, at: int, *, nonvolatile: bool = False, device_memory: bool = True
    ) -> FlatRange:
        block = ram(at * GIB, GIB, f"m{at}")
        return replace(block, nonvolatile=nonvolatile, device_memory=device_memory)

    @pytest.mark.parametrize("nonvolatile", [False, True])
    def test_a_dimm_is_logged_one_commit_late(self, nonvolatile: bool) -> None:
        dimm = self.device(4, nonvolatile=nonvolatile)
        before, after = self.view(), self.view(dimm)
        ops, table = self.plan(before, after)
        assert ops == [("add", 4 * GIB, 0)]
        then = self.view(dimm, self.device(5, device_memory=False))
        ops, table = self.plan(after, then, table)
        assert ops == [("flags", 4 * GIB, 1), ("add", 5 * GIB, 1)]
        assert self.plan(then, then, table)[0] == []

    def test_virtio_mem_is_logged_at_once(self) -> None:
        ops, _ = self.plan(self.view(mem=1), self.view(self.device(4), mem=2))
        assert ops == [("add", 4 * GIB, 1)]

    def test_an_nvdimm_is_known_beside_virtio_mem(self) -> None:
        both = self.view(self.device(4), self.device(5, nonvolatile=True), mem=1)
        assert self.plan(self.view(), both)[0] == [("add", 4 * GIB, 1), ("add", 5 * GIB, 0)]

    def test_virtio_pmem_is_never_logged(self) -> None:
        after = self.view(self.device(4), pmem=1)
        ops, table = self.plan(self.view(), after)
        assert ops == [("add", 4 * GIB, 0)]
        assert self.plan(after, after, table)[0] == []

    def test_memory_outside_of_device_memory_is_logged_at_once(self) -> None:
        after = self.view(self.device(4, device_memory=False))
        assert self.plan(self.view(), after)[0] == [("add", 4 * GIB, 1)]

    def test_without_logging_nothing_follows(self) -> None:
        table = SlotTable([Slot(0, 0, 0, GIB, 0, "pc.ram", None, 0)])
        after = self.view(self.device(4))
        ops, table = self.plan(self.view(), after, table)
        assert ops == [("add", 4 * GIB, 0)]
        assert self.plan(after, after, table)[0] == []
