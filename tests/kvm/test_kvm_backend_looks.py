"""A mirror's backend on a real KVM: large guests, its own slot and vCPUs, how it is looked at."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Awaitable
from pathlib import Path

import pytest

from qmp_memlistener.errors import InputError, OperationFailed
from qmp_memlistener.kvmlab import Kvm, LabVm
from qmp_memlistener.kvmlab import backend as backend_module
from qmp_memlistener.kvmlab.backend import KvmBackend
from qmp_memlistener.memslots import LOG_DIRTY_PAGES, Slot
from qmp_memlistener.memslots.slots import Backing
from tests.kvm.backend_support import (
    GIB,
    MAIN,
    MIB,
    PLAIN,
    RAM,
    SHADOW,
    WORD,
    is_shown,
    wait_until,
)
from tests.unit.memslots.memslots_model import PAGE

pytestmark = pytest.mark.kvm


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
    there = Slot(0, 1, lab.private()[0] + PAGE, MIB, LOG_DIRTY_PAGES, "bar", None, 0)
    lab.add_slot(there)
    assert lab.facts().moved == 1
    assert lab.private()[1] <= there.gpa
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
    lab.add_slot(Slot(0, 1, lab.private()[0], MIB, 0, "bar", None, 0))
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
    assert (facts.vcpus, facts.holds.count) == (2, 3)
    assert facts.holds.total_ns >= (facts.holds.longest_ns or 0) > 0


# -- looking at slots ------------------------------------------------------------------------------


def test_a_lie_is_found(lab: KvmBackend) -> None:
    """A slot that goes behind the backend's back, another one's memory, a log that is not there."""
    for slot in (MAIN, SHADOW, Slot(0, 4, GIB, MIB, 0, "m0", "/objects/m0", 0)):
        lab.add_slot(slot)
    assert lab.verify().good
    vm: LabVm = lab._slots.context.vm
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
    vm = lab._slots.context.vm
    vm.set_region(1, GIB, 0, 0)
    vm.set_region(1, GIB, MIB, lab._slots._reals[1]._room.hva)
    (first, *_) = lab.verify().misread
    assert (first.wanted, first.found) == (Backing("m1", None, 0), Backing("m2", None, 0))
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
    (example,) = [block for block in code if "KvmBackend" in block]
    names: dict[str, object] = {}
    exec(compile("\n".join(line[4:] for line in example.splitlines()), str(page), "exec"), names)
    assert callable(names["watch_both"])
