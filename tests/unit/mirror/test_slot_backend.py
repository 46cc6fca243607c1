"""The model of a backend refuses what KVM refuses; slots compared with maps, to the range."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from msgspec.structs import replace

from qmp_memlistener.errors import InputError, OperationFailed
from qmp_memlistener.memslots import LOG_DIRTY_PAGES, READONLY, Op, OpKind, Slot, SlotTable
from qmp_memlistener.memslots import plan as make_plan
from qmp_memlistener.mirror.backend import ModelBackend, SlotWriter, map_differences
from qmp_memlistener.records import MemoryShown, MirrorDifference
from qmp_memlistener.topology import FlatView
from tests.unit.memslots.memslots_model import PAGE, content_of, io, pam_rom, ram, rom, views

RAM = Slot(0, 0, 0, 8 * PAGE, LOG_DIRTY_PAGES, "pc.ram", None, 0)
ROM = Slot(0, 1, 2 * PAGE, PAGE, READONLY, "pc.rom", None, 0)


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def test_what_kvm_refuses_is_refused_with_its_errno() -> None:
    backend = ModelBackend()
    backend.add_slot(RAM)
    assert refused(lambda: backend.add_slot(RAM)) == errno.EINVAL
    assert refused(lambda: backend.add_slot(ROM)) == errno.EEXIST
    assert refused(lambda: backend.add_slot(Slot(0, 5, 9 * PAGE + 1, PAGE))) == errno.EINVAL
    assert refused(lambda: backend.delete_slot(ROM)) == errno.EINVAL
    assert refused(lambda: backend.set_flags(replace(RAM, flags=READONLY))) == errno.EINVAL
    assert refused(lambda: backend.set_hole(RAM, 7 * PAGE, 9 * PAGE)) == errno.EINVAL
    assert refused(lambda: backend.clear_hole(RAM, 0, PAGE)) == errno.EINVAL
    assert backend.slots() == (RAM,)

    backend.set_hole(RAM, 2 * PAGE, 4 * PAGE)
    assert refused(lambda: backend.set_hole(RAM, 3 * PAGE, 5 * PAGE)) == errno.EINVAL
    backend.add_slot(ROM)
    assert refused(lambda: backend.clear_hole(RAM, 2 * PAGE, 4 * PAGE)) == errno.EEXIST
    backend.clear_hole(RAM, 3 * PAGE, 4 * PAGE)
    assert [s.holes for s in backend.slots()] == [((2 * PAGE, 3 * PAGE),), ()]


def test_users_find_memory_and_make_pages_dirty() -> None:
    backend = ModelBackend()
    backend.add_slot(RAM)
    backend.set_hole(RAM, 2 * PAGE, 4 * PAGE)
    backend.add_slot(ROM)
    assert backend.backing(PAGE + 5) == ("pc.ram", None, PAGE + 5)
    assert backend.backing(2 * PAGE + 7) == ("pc.rom", None, 7)
    assert backend.backing(3 * PAGE) is None
    assert [backend.write(p * PAGE + 9) for p in (0, 1, 2, 3, 4)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert backend.dirty(0) == {0, PAGE, 4 * PAGE}
    backend.set_hole(RAM, PAGE, 2 * PAGE)
    assert backend.dirty(0) == {0, 4 * PAGE}
    backend.set_flags(replace(RAM, flags=0))
    assert backend.dirty(0) == frozenset()
    assert backend.write(0)
    assert backend.dirty(0) == frozenset(), "nobody logs"
    backend.delete_slot(RAM)
    assert not backend.write(0)


def test_between_begin_and_end_users_see_the_state_before() -> None:
    backend = ModelBackend()
    backend.add_slot(RAM)
    backend.begin()
    backend.delete_slot(RAM)
    assert backend.backing(0) == ("pc.ram", None, 0)
    backend.end()
    assert backend.backing(0) is None


def test_a_slot_comes_with_its_holes() -> None:
    """So the slot that lies in a hole may be there first."""
    after = FlatView([ram(0, 2 * PAGE), rom(2 * PAGE, PAGE), ram(3 * PAGE, 5 * PAGE)])
    plan = make_plan(FlatView(()), after, "hole")
    assert [op.op for op in plan.ops if op.op is OpKind.SET_HOLE] == [OpKind.SET_HOLE]
    backend = ModelBackend()
    writer = SlotWriter(backend, 1.0)
    asyncio.run(writer.together(plan.ops, plan.after))
    assert writer.table == plan.after == SlotTable(backend.slots())
    assert writer.calls == {"begin": 1, "add_slot": 2, "end": 1}
    assert writer.operations == 2


class Async(ModelBackend):
    """Never comes back from adding a slot."""

    async def hang(self) -> None:
        await asyncio.Event().wait()

    def add_slot(self, slot: Slot) -> Awaitable[None] | None:  # type: ignore[override]  # it is async
        return self.hang() if slot.slot else super().add_slot(slot)


def test_a_backend_that_hangs_or_fails_is_named() -> None:
    async def run() -> None:
        writer = SlotWriter(Async(), 0.01)
        table = SlotTable([RAM, Slot(0, 1, 8 * PAGE, PAGE)])
        ops = [Op(OpKind.ADD, s.as_id, s.slot, s.gpa, s.size, s.flags) for s in table]
        with pytest.raises(OperationFailed, match=r"add_slot of slot 1 .*no answer within 0.01 s"):
            await writer.together(ops, table)
        assert list(writer.table) == [RAM]
        assert writer.calls["end"] == 1
        with pytest.raises(OperationFailed, match=r"add_slot of slot 0 .*Invalid argument"):
            await writer.run(ops[0], table)

    asyncio.run(run())


# -- comparison ------------------------------------------------------------------------------------

VIEW = FlatView([ram(0, 2 * PAGE), rom(2 * PAGE, PAGE), ram(3 * PAGE, 5 * PAGE), io(64 * PAGE, 9)])


def test_slots_that_show_the_map_do_not_differ() -> None:
    """However they are cut, whatever their ids; RAM behind a read-only alias is no difference."""
    backend = ModelBackend()
    for slot in (
        Slot(0, 7, 0, 8 * PAGE, LOG_DIRTY_PAGES, "pc.ram", None, 0, ((2 * PAGE, 3 * PAGE),)),
        Slot(0, 3, 2 * PAGE, PAGE, READONLY, "pc.rom", None, 0),
    ):
        backend.add_slot(slot)
    assert map_differences(VIEW, backend.slots()) == ()
    aliased = FlatView([ram(0, PAGE), pam_rom(PAGE, PAGE), *VIEW[1:]])
    assert map_differences(aliased, backend.slots()) == ()


def test_differences_say_which_range_has_what_instead_of_what() -> None:
    slots = (
        Slot(0, 0, 0, 4 * PAGE, 0, "pc.ram", None, 0),
        Slot(0, 1, 4 * PAGE, PAGE, 0, "pc.ram", None, 5 * PAGE),
        Slot(0, 3, 5 * PAGE, PAGE, 0, "pc.ram", None, 6 * PAGE),
        Slot(0, 2, 16 * PAGE, PAGE, READONLY, None),
    )
    found = map_differences(VIEW, slots)
    assert found == (
        MirrorDifference(
            2 * PAGE,
            3 * PAGE,
            MemoryShown("pc.rom", None, 0, True),
            MemoryShown("pc.ram", None, 2 * PAGE, False),
        ),
        MirrorDifference(
            4 * PAGE,
            6 * PAGE,
            MemoryShown("pc.ram", None, 4 * PAGE, False),
            MemoryShown("pc.ram", None, 5 * PAGE, False),
        ),
        MirrorDifference(6 * PAGE, 8 * PAGE, MemoryShown("pc.ram", None, 6 * PAGE, False), None),
        MirrorDifference(16 * PAGE, 17 * PAGE, None, MemoryShown(None, None, None, True)),
    )
    assert [str(d) for d in found] == [
        "0x2000-0x2fff has pc.ram @0x2000 instead of pc.rom @0x0 (read-only)",
        "0x4000-0x5fff has pc.ram @0x5000 instead of pc.ram @0x4000",
        "0x6000-0x7fff has no memory instead of pc.ram @0x6000",
        "0x10000-0x10fff has unknown memory (read-only) instead of no memory",
    ]


def test_slots_that_overlap_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="overlaps"):
        map_differences(VIEW, [RAM, ROM])


@given(views(), views())
def test_differences_are_found_to_the_page(one: FlatView, other: FlatView) -> None:
    """Between two maps: just the pages that show something else."""
    differing = {
        page
        for d in map_differences(one, make_plan(FlatView(()), other).after)
        for page in range(d.start // PAGE, d.end // PAGE)
        # a region that can be written in one map and not in the other differs in that alone
        if d.wanted is None
        or d.found is None
        or (d.wanted.block, d.wanted.offset) != (d.found.block, d.found.offset)
    }
    a, b = content_of(one), content_of(other)
    assert differing == {p for p in a.keys() | b.keys() if a.get(p) != b.get(p)}
