"""A mirror's backend on a real KVM: what a guest of it reads is what the plans say, at any time."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from qmp_memlistener.errors import InputError, OperationFailed
from qmp_memlistener.kvmlab import Kvm, LabVm, SlotRefused
from qmp_memlistener.kvmlab import backend as backend_module
from qmp_memlistener.kvmlab.backend import KvmBackend
from qmp_memlistener.kvmlab.backend_memory import Behind
from qmp_memlistener.memslots import LOG_DIRTY_PAGES, READONLY, Slot
from qmp_memlistener.topology import FlatView
from qmp_memlistener.updates.mirror import Mirror
from qmp_memlistener.updates.model import Strategy
from qmp_memlistener.updates.slot_backend import ModelBackend
from tests.unit.memslots.memslots_model import PAGE, PAGES, Content, content_of, views
from tests.unit.updates.mirror_model import Pausing, Told

pytestmark = pytest.mark.kvm

MIB, GIB = 1 << 20, 1 << 30
RAM, ROM = ("pc.ram", None), ("pc.rom", None)
MAIN = Slot(0, 0, 0, 64 * MIB, LOG_DIRTY_PAGES, *RAM, 0, ((0xC0000, 0xE0000),))
SHADOW = Slot(0, 1, 0xC0000, 0x20000, READONLY, *ROM, 0)
PLAIN = replace(MAIN, holes=())
WORD = b"mirrored"
LIVES = st.lists(views(), min_size=1, max_size=6)
slow = settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def lab(kvm: Kvm) -> Iterator[KvmBackend]:
    """A backend without running vCPUs."""
    with KvmBackend(kvm) as backend:
        yield backend


@pytest.fixture
def running(kvm: Kvm) -> Iterator[KvmBackend]:
    """One with two vCPUs that beat."""
    with KvmBackend(kvm, vcpus=2) as backend:
        yield backend


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def refused_by_kvm(slot: Slot, call: Callable[[], object]) -> int:
    """The errno; the message names the slot."""
    with pytest.raises(SlotRefused) as caught:
        call()
    assert f"slot {slot.slot} of address space 0 ({slot.gpa:#x}+{slot.size:#x})" in str(
        caught.value
    )
    return caught.value.errno


def is_shown(lab: KvmBackend, gpa: int, name: tuple[str, str | None], offset: int) -> bool:
    """The word that the host writes into the block is what a guest reads at the address."""
    word = os.urandom(8)
    lab.memory.write(name, offset, word)
    return lab.read(gpa) == word


def content(lab: KvmBackend) -> dict[int, Content]:
    """What a guest of the lab finds in each page, by page number."""
    found: dict[int, Content] = {}
    for slot in lab.slots():
        for start, end in slot.mapped:
            for gpa in range(start, end, PAGE):
                lab.memory.stamp((slot.block, slot.owner), (slot.offset or 0) + gpa - slot.gpa)
    for page in range(PAGES):
        word = lab.read(page * PAGE)
        behind = lab.memory.stamped(word) if word is not None else None
        assert (behind is None) == (word is None), "memory that nobody stamped"
        if behind is not None:
            assert behind.block is not None
            found[page] = (behind.block, behind.offset)
    return found


def emptied(lab: KvmBackend) -> KvmBackend:
    """For the next example: making a VM anew for each would take longer than the example."""
    for slot in lab.slots():
        assert lab.delete_slot(slot) is None
    assert lab.kvm_slots() == []
    return lab


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
    with pytest.raises(InputError, match="nothing says what is behind it"):
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
    assert (facts.grown, facts.placed, facts.holds) == (1, 0, 1)
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


# -- large guests ----------------------------------------------------------------------------------


def test_a_huge_guest_costs_no_memory(lab: KvmBackend) -> None:
    """And what KVM needs its time for is done in a thread."""
    low = Slot(0, 0, 0, 3 * GIB, 0, *RAM, 0)
    high = Slot(0, 1, 4 * GIB, 61 * GIB, 0, *RAM, 3 * GIB)

    async def come() -> None:
        for slot in (low, high):
            waiting = lab.add_slot(slot)
            assert isinstance(waiting, Awaitable)
            await waiting

    asyncio.run(come())
    assert is_shown(lab, 65 * GIB - PAGE, RAM, 64 * GIB - PAGE)
    assert is_shown(lab, 4 * GIB, RAM, 3 * GIB)
    assert lab.verify().good
    held = os.fstat(lab.memory.reach(RAM, 0))
    assert held.st_size == 64 * GIB
    assert held.st_blocks * 512 < MIB


def test_a_block_grows_as_slots_show_more_of_it(lab: KvmBackend) -> None:
    lab.add_slot(Slot(0, 0, 0, MIB, 0, *RAM, 0))
    assert lab.write(PAGE, WORD)
    lab.add_slot(Slot(0, 1, GIB, MIB, 0, *RAM, 7 * GIB))
    assert is_shown(lab, GIB + PAGE, RAM, 7 * GIB + PAGE)
    assert lab.read(PAGE) == WORD


def test_slots_out_of_the_guests_reach_are_kept_all_the_same(lab: KvmBackend) -> None:
    far = Slot(0, 3, 1 << 44, MIB, 0, "bar", None, 0)
    lab.add_slot(far)
    lab.add_slot(PLAIN)
    assert lab.slots() == (PLAIN, far)
    assert [s.gpa for s in lab.kvm_slots()] == [0, 1 << 44]
    verified = lab.verify()
    assert verified.good
    assert verified.unreached > 0
    assert verified.reads > 0
    with pytest.raises(InputError, match="cannot get at"):
        lab.read(far.gpa)


def test_blocks_that_nobody_shows_any_more_are_given_back(lab: KvmBackend) -> None:
    lab.add_slot(PLAIN)
    assert lab.write(MIB, WORD)
    fds = len(os.listdir("/proc/self/fd"))
    for n in range(200):
        dimm = Slot(0, 3, GIB, MIB, 0, f"d{n}", f"/objects/d{n}", 0)
        lab.add_slot(dimm)
        lab.delete_slot(dimm)
    assert len(os.listdir("/proc/self/fd")) < fds + 70
    lab.delete_slot(PLAIN)
    lab.add_slot(PLAIN)
    assert lab.read(MIB) == WORD, "what is gone for a moment is not given back"


# -- the private slot, and vCPUs -------------------------------------------------------------------


def test_the_labs_own_slot_gives_way(running: KvmBackend) -> None:
    lab = running
    lab.add_slot(PLAIN)
    assert lab.write(MIB, WORD)
    before = lab.facts()
    there = Slot(0, 1, before.private_start + PAGE, MIB, LOG_DIRTY_PAGES, "bar", None, 0)
    lab.add_slot(there)
    after = lab.facts()
    assert after.moved == 1
    assert after.private_end <= there.gpa
    assert is_shown(lab, there.gpa, ("bar", None), 0)
    assert lab.read(MIB) == WORD
    assert MIB in lab.dirty_pages(), "it was dirty in the old VM"
    assert lab.slots() == (PLAIN, there)
    assert lab.verify().good
    beats = lab.beats()
    wait_until(lambda: all(b > a for a, b in zip(beats, lab.beats(), strict=True)))


def test_the_labs_own_slot_gives_way_in_the_middle_of_a_change(running: KvmBackend) -> None:
    lab = running
    lab.begin()
    lab.add_slot(Slot(0, 1, lab.facts().private_start, MIB, 0, "bar", None, 0))
    stand = lab.beats()
    lab.add_slot(PLAIN)
    assert all(lab.read(0) == bytes(8) for _ in range(500)), "that takes its time"
    assert lab.beats() == stand, "they are still held"
    lab.end()
    wait_until(lambda: all(b > a for a, b in zip(stand, lab.beats(), strict=True)))


def test_a_guest_that_leaves_no_room_is_refused(lab: KvmBackend) -> None:
    """All that the lab's guest reaches is RAM."""

    async def come() -> None:
        waiting = lab.add_slot(Slot(0, 0, 0, 0xFE00_0000, 0, *RAM, 0))
        assert waiting is not None
        await waiting
        waiting = lab.add_slot(Slot(0, 1, 4 * GIB, 600 * GIB, 0, *RAM, 4 * GIB))
        assert waiting is not None
        with pytest.raises(OperationFailed, match="no room for the lab's own slot") as caught:
            await waiting
        assert caught.value.remedy

    asyncio.run(come())
    assert [s.slot for s in lab.slots()] == [0]
    assert lab.verify().good


def test_vcpus_run_but_between_begin_and_end(running: KvmBackend) -> None:
    lab = running
    lab.add_slot(PLAIN)
    for _ in range(3):
        beats = lab.beats()
        wait_until(lambda: all(b > a for a, b in zip(beats, lab.beats(), strict=True)))  # noqa: B023 - called at once
        lab.begin()
        stand = lab.beats()
        lab.delete_slot(PLAIN)
        lab.add_slot(PLAIN)
        assert lab.read(0) == bytes(8), "the probe is a vCPU of its own"
        assert lab.beats() == stand
        lab.end()
    facts = lab.facts()
    assert (facts.vcpus, facts.holds) == (2, 3)
    assert facts.held_ns >= facts.longest_hold_ns > 0


def wait_until(true: Callable[[], bool]) -> None:
    """vCPUs beat all the time, so this is over soon."""
    over = threading.Event()
    for _ in range(10_000):
        if true():
            return
        over.wait(0.001)
    raise AssertionError("the vCPUs do not go on")


# -- looking at slots ------------------------------------------------------------------------------


def test_a_lie_is_found(lab: KvmBackend) -> None:
    """A slot that goes behind the backend's back, another one's memory, a log that is not there."""
    for slot in (MAIN, SHADOW, Slot(0, 4, GIB, MIB, 0, "m0", "/objects/m0", 0)):
        lab.add_slot(slot)
    assert lab.verify().good
    vm: LabVm = lab._slots.ground.vm
    vm.set_region(4, GIB, 0, 0)
    found = lab.verify()
    assert {m.gpa for m in found.misread} >= {GIB, GIB + MIB - PAGE}
    text = f"at {GIB:#x} the lab's guest finds no memory instead of m0 @0x0"
    assert text in map(str, found.misread)
    assert not found.good
    real = lab._slots._reals[0]
    hva = real._room.hva
    vm.set_region(0, 0, 0, 0)
    vm.set_region(0, 0, 64 * MIB, hva + PAGE, 0)
    found = lab.verify()
    wrong = {m.gpa: m for m in found.misread}
    assert str(wrong[0]) == "at 0x0 the lab's guest finds unknown memory instead of pc.ram @0x0"
    assert found.wrong_logs == ("KVM's slot 0 at 0x0+0x4000000 has no dirty log",)
    vm.set_region(0, 0, 0, 0)
    vm.set_region(0, 0, 64 * MIB, hva, LOG_DIRTY_PAGES)
    vm.set_region(4, GIB, MIB, lab._slots._reals[1]._room.hva)
    assert lab.verify().good


def test_memory_of_another_block_is_named(lab: KvmBackend) -> None:
    one, other = (Slot(0, n, n * GIB, MIB, 0, f"m{n}", None, 0) for n in (1, 2))
    lab.add_slot(one)
    lab.add_slot(other)
    vm = lab._slots.ground.vm
    vm.set_region(1, GIB, 0, 0)
    vm.set_region(1, GIB, MIB, lab._slots._reals[1]._room.hva)
    (first, *_) = lab.verify().misread
    assert (first.wanted, first.found) == (Behind("m1", None, 0), Behind("m2", None, 0))
    assert str(first) == f"at {GIB:#x} the lab's guest finds m2 @0x0 instead of m1 @0x0"


def test_looking_takes_a_limited_number_of_words(lab: KvmBackend) -> None:
    for n in range(60):
        lab.add_slot(Slot(0, n, n * MIB, PAGE * 8, 0, f"b{n}", None, 0))
    whole = lab.verify(10_000)
    assert whole.reads == 60 * 5 - 1  # both ends, the middle, both sides; nothing lies below 0
    few = lab.verify(20)
    assert 10 <= few.reads <= 20
    assert whole.good
    assert few.good


# -- any sequence of maps --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_guest_finds_each_map_that_was_told(running: KvmBackend, strategy: Strategy) -> None:
    """Page by page, and as the model has it."""
    lab = running

    @slow
    @given(LIVES, st.sampled_from([None, 0, 1, 64]))
    def lives(maps: list[FlatView], max_holes: int | None) -> None:
        async def run() -> None:
            model = ModelBackend()
            told = [
                Told(Mirror(backend, strategy, pause=Pausing(), max_holes=max_holes))
                for backend in (emptied(lab), model)
            ]
            for view in maps:
                for tell in told:
                    await tell(view)
                assert lab.slots() == model.slots()
                assert content(lab) == content_of(view)
                assert await told[0].mirror.check(view) == ()
            assert lab.verify().good

        asyncio.run(run())

    lives()


def test_dirty_pages_after_any_sequence_of_maps(lab: KvmBackend) -> None:
    """Under `hole`: none that the model has is lost, and none is told that nobody wrote."""

    @slow
    @given(LIVES, st.randoms(use_true_random=False))
    def lives(maps: list[FlatView], random: object) -> None:
        async def run() -> None:
            choose = random.random  # type: ignore[attr-defined]  # a Random
            model = ModelBackend()
            told = [
                Told(Mirror(backend, Strategy.HOLE, max_holes=None))
                for backend in (emptied(lab), model)
            ]
            written: set[int] = set()
            for view in maps:
                for tell in told:
                    await tell(view)
                    for r in view:
                        await tell.mirror.log_start(r)
                for gpa in range(0, PAGES * PAGE, PAGE):
                    if choose() < 0.5 and model.write(gpa):
                        assert lab.write(gpa, WORD)
                        written.add(gpa)
            dirty = {p for s in model.slots() for p in model.dirty(s.slot) if s.logged}
            mapped = {p * PAGE for p in content_of(maps[-1])}
            assert dirty <= lab.dirty_pages() <= written & mapped

        asyncio.run(run())

    lives()


class Failing:
    """Makes KVM's nth slot ioctl from now on fail, as it does when memory is short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        real = LabVm.region

        def region(vm: LabVm, *args: int) -> int:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    return -errno.ENOMEM
            return real(vm, *args)

        monkeypatch.setattr(LabVm, "region", region)

    @contextmanager
    def after(self, calls: int) -> Iterator[None]:
        self.left = calls
        try:
            yield
        finally:
            self.left = None


@pytest.mark.parametrize("strategy", list(Strategy))
def test_after_a_failure_anywhere_a_resync_puts_it_right(
    running: KvmBackend, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = running
    failing = Failing(monkeypatch)
    failed: list[str] = []

    @slow
    @given(LIVES, st.integers(0, 12), st.sampled_from([None, 1]))
    def lives(maps: list[FlatView], calls: int, max_holes: int | None) -> None:
        async def run() -> None:
            mirror = Mirror(emptied(lab), strategy, pause=Pausing(), max_holes=max_holes)
            told = Told(mirror)
            with failing.after(calls):
                for view in maps:
                    try:
                        await told(view)
                    except OperationFailed as exc:
                        failed.append(exc.message)
                        assert not mirror.in_step
            if not mirror.in_step:
                assert lab.verify().good, "what is held is what is shown, also in between"
                await mirror.resync()
            assert content(lab) == content_of(maps[-1])
            assert lab.verify().good
            beats = lab.beats()
            wait_until(lambda: all(b > a for a, b in zip(beats, lab.beats(), strict=True)))

        asyncio.run(run())

    lives()
    assert failed
    assert all("Cannot allocate memory" in text for text in failed)


# -- the end ---------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_backend_that_could_not_be_made(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_guest(*_: object) -> None:
        raise OperationFailed("no guest today")

    monkeypatch.setattr(backend_module, "GuestProbe", no_guest)
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with pytest.raises(OperationFailed, match="no guest today"):
        KvmBackend(kvm, vcpus=2)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (fds, threads)


def test_closing_gives_all_back(kvm: Kvm) -> None:
    """Also between `begin` and `end`, and twice."""
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(3):
        lab = KvmBackend(kvm, vcpus=2)
        lab.add_slot(MAIN)
        lab.add_slot(SHADOW)
        lab.begin()
        lab.set_hole(MAIN, MIB, 2 * MIB)
        lab.close()
        lab.close()
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (fds, threads)
    left = Path("/proc/self/maps").read_text()
    assert "qmp-memlistener" not in left
    assert len(left.splitlines()) < maps + 20


def test_the_example_of_the_page_compiles_and_imports() -> None:
    page = Path(__file__).parents[2] / "docs" / "mirror.md"
    section = page.read_text().split("## On the lab", 1)[1].split("\n## ", 1)[0]
    code = re.findall(r"(?:^    .*\n|^\n)+", section, re.MULTILINE)
    (example,) = [block for block in code if "import KvmBackend" in block]
    names: dict[str, object] = {}
    exec(compile("\n".join(line[4:] for line in example.splitlines()), str(page), "exec"), names)
    assert callable(names["watch_both"])
