"""A mirror's backend on a real KVM: what a guest of it reads is what the slots say."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from qmp_memlistener.errors import InputError
from qmp_memlistener.kvmlab import Kvm
from qmp_memlistener.kvmlab.backend import KvmBackend
from qmp_memlistener.memslots import LOG_DIRTY_PAGES, READONLY, Slot
from qmp_memlistener.mirror.backend import ModelBackend
from tests.kvm.backend_support import (
    GIB,
    MAIN,
    MIB,
    PLAIN,
    RAM,
    ROM,
    SHADOW,
    WORD,
    is_shown,
    refused_by_kvm,
)
from tests.unit.memslots.memslots_model import PAGE

pytestmark = pytest.mark.kvm


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


# -- what slots show -------------------------------------------------------------------------------


def test_a_guest_reads_what_the_host_wrote_behind_a_slot(lab: KvmBackend) -> None:
    high = Slot(0, 7, 5 * GIB, 2 * MIB, 0, "m0", "/objects/m0", 3 * MIB)
    for slot in (MAIN, SHADOW, high):
        lab.add_slot(slot)
    assert lab.slots() == (MAIN, SHADOW, high)
    assert is_shown(lab, 0, RAM, 0)
    assert is_shown(lab, 0xBFFF8, RAM, 0xBFFF8)
    assert is_shown(lab, 0xC0000, ROM, 0)
    assert is_shown(lab, 0xDFFF8, ROM, 0x1FFF8)
    assert is_shown(lab, 0xE0000, RAM, 0xE0000)
    assert is_shown(lab, 64 * MIB - 8, RAM, 64 * MIB - 8)
    assert is_shown(lab, 5 * GIB, ("m0", "/objects/m0"), 3 * MIB)
    assert not is_shown(lab, 5 * GIB, ("m0", None), 3 * MIB), "another owner's block"
    assert lab.read(64 * MIB) is None
    assert lab.read(5 * GIB - 8) is None
    assert lab.read(5 * GIB + 2 * MIB) is None

    lab.delete_slot(SHADOW)
    assert lab.read(0xC0000) is None
    lab.clear_hole(MAIN, 0xC0000, 0xD0000)
    assert is_shown(lab, 0xC0000, RAM, 0xC0000)
    assert lab.read(0xD0000) is None
    lab.set_hole(PLAIN, 32 * MIB, 48 * MIB)
    assert lab.read(32 * MIB) is None
    assert lab.read(48 * MIB - 8) is None
    assert is_shown(lab, 48 * MIB, RAM, 48 * MIB)
    (left, _) = lab.slots()
    assert left.holes == ((0xD0000, 0xE0000), (32 * MIB, 48 * MIB))


def test_a_guest_cannot_write_where_a_slot_is_readonly(lab: KvmBackend) -> None:
    """Neither in a slot of its own nor in the hole of a slot that can be written."""
    alone = Slot(0, 4, GIB, MIB, READONLY, *ROM, 0)
    for slot in (MAIN, SHADOW, alone):
        lab.add_slot(slot)
        start, _ = slot.mapped[0]
        writable = not slot.flags & READONLY
        assert lab.write(start, WORD) is writable
        assert lab.read(start) == (WORD if writable else bytes(8))
    assert lab.memory.read(RAM, 0, 8) == WORD
    assert not lab.write(2 * GIB, WORD)
    kvms = {s.gpa: s.flags for s in lab.kvm_slots()}
    assert kvms == {0: LOG_DIRTY_PAGES, GIB: READONLY}


def test_one_block_at_two_places_is_the_same_memory(lab: KvmBackend) -> None:
    lab.add_slot(Slot(0, 0, 0, MIB, 0, *RAM, 0))
    lab.add_slot(Slot(0, 1, GIB, MIB // 2, 0, *RAM, MIB // 2))
    assert lab.write(MIB // 2, WORD)
    assert lab.read(GIB) == WORD


def test_ids_of_kvms_slots_are_those_of_the_plan_where_they_are_free(lab: KvmBackend) -> None:
    lab.add_slot(replace(PLAIN, slot=5))
    lab.add_slot(Slot(0, 9, GIB, MIB, 0, *RAM, 0))
    assert [s.slot for s in lab.kvm_slots()] == [5, 9]
    lab.add_slot(Slot(0, 2, 4 * GIB, MIB, 0, "a", None, 0, ((4 * GIB, 4 * GIB + PAGE),)))
    inside = Slot(0, 3, 4 * GIB, PAGE, 0, "b", None, 0)
    lab.add_slot(inside)
    lab.delete_slot(lab.slots()[2])  # its arena stays, under id 2
    lab.add_slot(Slot(0, 2, 2 * GIB, MIB, 0, "c", None, 0))
    assert {s.gpa: s.slot for s in lab.kvm_slots()}[4 * GIB] == 2
    assert len({s.slot for s in lab.kvm_slots()}) == 4
    assert is_shown(lab, 2 * GIB, ("c", None), 0)
    assert is_shown(lab, 4 * GIB, ("b", None), 0)
    assert lab.read(4 * GIB + PAGE) is None


# -- what is refused -------------------------------------------------------------------------------


def test_what_the_model_refuses_kvm_refuses_with_the_same_errno(lab: KvmBackend) -> None:
    model = ModelBackend()
    for backend in (lab, model):
        backend.add_slot(MAIN)
        backend.add_slot(SHADOW)
    overlap = Slot(0, 5, 0, MIB, 0, *RAM, 0)
    unaligned = Slot(0, 5, GIB + 1, PAGE, 0, *RAM, 0)
    partial = Slot(0, 5, GIB, PAGE + 8, 0, *RAM, 0)
    unknown = Slot(0, 6, GIB, PAGE, 0, *RAM, 0)

    def calls(backend: KvmBackend | ModelBackend) -> list[tuple[Slot, Callable[[], object]]]:
        return [
            (MAIN, lambda: backend.add_slot(MAIN)),
            (overlap, lambda: backend.add_slot(overlap)),
            (unaligned, lambda: backend.add_slot(unaligned)),
            (partial, lambda: backend.add_slot(partial)),
            (unknown, lambda: backend.delete_slot(unknown)),
            (unknown, lambda: backend.set_flags(unknown)),
            (SHADOW, lambda: backend.set_flags(replace(SHADOW, flags=0))),
            (MAIN, lambda: backend.set_hole(MAIN, 0xB0000, 0xD0000)),
            (MAIN, lambda: backend.set_hole(MAIN, 63 * MIB, 65 * MIB)),
            (MAIN, lambda: backend.set_hole(MAIN, MIB, MIB)),
            (MAIN, lambda: backend.clear_hole(MAIN, 0xB0000, 0xD0000)),
            (MAIN, lambda: backend.clear_hole(MAIN, 0xC0000, 0xD0000)),
        ]

    for (slot, ours), (_, theirs) in zip(calls(lab), calls(model), strict=True):
        assert refused_by_kvm(slot, ours) == refused(theirs)
    assert lab.slots() == model.slots() == (MAIN, SHADOW)
    assert lab.verify().good


def test_flags_of_a_live_slot_are_kvms_to_refuse(lab: KvmBackend) -> None:
    lab.add_slot(PLAIN)
    for flags in (READONLY, LOG_DIRTY_PAGES | 8):
        assert refused_by_kvm(PLAIN, lambda: lab.set_flags(replace(PLAIN, flags=flags))) == (  # noqa: B023 - called at once
            errno.EINVAL
        )
    other = Slot(0, 2, GIB, MIB, 8, *RAM, 0)
    assert refused_by_kvm(other, lambda: lab.add_slot(other)) == errno.EINVAL
    assert lab.slots() == (PLAIN,)
    assert [s.flags for s in lab.kvm_slots()] == [LOG_DIRTY_PAGES]
    assert lab.verify().good


def test_what_no_mirror_has_is_refused_before_kvm_is_asked(lab: KvmBackend) -> None:
    with pytest.raises(InputError, match="SMRAM"):
        lab.add_slot(replace(PLAIN, as_id=1))
    with pytest.raises(InputError, match="the RAM block behind it is unknown"):
        lab.add_slot(Slot(0, 0, 0, MIB))
    assert lab.facts().slot_ioctls == 0


@pytest.mark.parametrize("gpa", [4, 1 << 39, -8])
def test_addresses_that_the_guest_does_not_reach(lab: KvmBackend, gpa: int) -> None:
    with pytest.raises(InputError, match="cannot get at"):
        lab.read(gpa)


def test_the_number_of_vcpus_is_limited(kvm: Kvm) -> None:
    with pytest.raises(InputError, match="0 to 16"):
        KvmBackend(kvm, vcpus=17)


# -- slots that share one --------------------------------------------------------------------------


def test_a_slot_that_does_not_fit_makes_a_larger_arena(running: KvmBackend) -> None:
    """ROM came first; RAM around it needs the ROM's place in a slot that can be written."""
    lab = running
    lab.add_slot(SHADOW)
    assert [(s.gpa, s.flags) for s in lab.kvm_slots()] == [(0xC0000, READONLY)]
    lab.add_slot(MAIN)
    assert [(s.gpa, s.size, s.flags) for s in lab.kvm_slots()] == [(0, 64 * MIB, LOG_DIRTY_PAGES)]
    facts = lab.facts()
    assert (facts.grown, facts.placed, facts.holds.count) == (1, 0, 1)
    assert not lab.write(0xC0000, WORD)
    assert lab.write(0x10000, WORD)
    assert lab.write(0xE0000, WORD)

    end = 64 * MIB
    longer = Slot(0, 2, end - PAGE, 4 * PAGE, 0, "tseg", None, 0)
    lab.set_hole(MAIN, end - PAGE, end)
    lab.add_slot(longer)
    assert lab.facts().grown == 2
    assert [(s.gpa, s.size) for s in lab.kvm_slots()] == [(0, end + 3 * PAGE)]
    assert is_shown(lab, end - PAGE, ("tseg", None), 0)
    assert is_shown(lab, end + 2 * PAGE, ("tseg", None), 3 * PAGE)
    assert lab.dirty_pages() == {0x10000, 0xE0000}, "fetched before the arena was deleted"
    assert lab.verify().good


def test_arenas_are_joined_by_a_slot_that_spans_them(lab: KvmBackend) -> None:
    parts = [Slot(0, n, n * MIB, PAGE, 0, f"b{n}", None, 0) for n in range(4)]
    for slot in parts:
        lab.add_slot(slot)
    holes = tuple((s.gpa, s.end) for s in parts[1:])
    lab.add_slot(Slot(0, 9, PAGE, 4 * MIB, 0, *RAM, 0, holes))
    assert [(s.gpa, s.size) for s in lab.kvm_slots()] == [(0, PAGE), (PAGE, 4 * MIB)]
    for slot in parts:
        assert is_shown(lab, slot.gpa, (slot.block, None), 0)  # type: ignore[arg-type]  # named
    assert is_shown(lab, 2 * MIB + PAGE, RAM, 2 * MIB)


def test_logging_of_an_arena_follows_the_slots_in_it(lab: KvmBackend) -> None:
    lab.add_slot(replace(MAIN, flags=0))
    inner = replace(SHADOW, flags=0)
    lab.add_slot(inner)
    assert [s.flags for s in lab.kvm_slots()] == [0]
    lab.set_flags(replace(inner, flags=LOG_DIRTY_PAGES))
    assert [s.flags for s in lab.kvm_slots()] == [LOG_DIRTY_PAGES]
    assert lab.write(0xC1000, WORD)
    assert lab.write(0x10000, WORD)
    assert lab.dirty_pages() == {0xC1000}, "RAM around it is not logged"
    assert lab.dirty_pages() == frozenset()
    lab.delete_slot(replace(inner, flags=LOG_DIRTY_PAGES))
    assert [s.flags for s in lab.kvm_slots()] == [0]
    assert lab.verify().wrong_logs == ()


# -- dirty pages -----------------------------------------------------------------------------------


def test_holes_keep_the_dirty_pages_around_them(lab: KvmBackend) -> None:
    lab.add_slot(PLAIN)
    written = {n * MIB for n in range(0, 64, 3)}
    assert all(lab.write(gpa, WORD) for gpa in written)
    before = lab.kvm_slots()
    lab.set_hole(PLAIN, 3 * MIB, 10 * MIB)
    lab.add_slot(Slot(0, 1, 3 * MIB, MIB, READONLY, *ROM, 0))
    assert lab.kvm_slots() == before
    assert lab.facts().slot_ioctls == 1
    assert lab.dirty_pages() == written - {3 * MIB, 6 * MIB, 9 * MIB}


def test_delete_and_add_lose_the_dirty_pages(lab: KvmBackend) -> None:
    lab.add_slot(PLAIN)
    assert lab.write(MIB, WORD)
    lab.delete_slot(PLAIN)
    lab.add_slot(replace(PLAIN, size=32 * MIB))
    lab.add_slot(Slot(0, 1, 33 * MIB, 31 * MIB, LOG_DIRTY_PAGES, *RAM, 33 * MIB))
    assert lab.read(MIB) == WORD, "the memory is what it was"
    assert lab.dirty_pages() == frozenset()


def test_a_look_at_the_slots_costs_no_dirty_page(lab: KvmBackend) -> None:
    lab.add_slot(PLAIN)
    assert lab.write(MIB, WORD)
    assert lab.verify().good
    assert lab.write(5 * MIB, WORD)
    assert lab.verify().good
    assert lab.dirty_pages() >= {MIB, 5 * MIB}
