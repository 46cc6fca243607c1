"""The lab's machine: vCPUs run, stand, die, go on, and end; whatever comes in between."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from qmp_memlistener.errors import InputError, OperationFailed
from qmp_memlistener.kvmlab import Kvm, Machine, SlotRefused
from qmp_memlistener.kvmlab.memory import HostMemory
from qmp_memlistener.kvmlab.programs import DATA, MAX_VCPUS

pytestmark = pytest.mark.kvm

SLOT = 0
START = 1 << 20
SIZE = 4 << 20


class Rig:
    """A machine with one slot whose vCPUs go through a word each."""

    def __init__(self, kvm: Kvm, vcpus: int) -> None:
        self.ram = HostMemory(SIZE)
        self.machine = Machine(kvm, vcpus=vcpus, private_slot=9, private_gpa=1 << 30, reach=1 << 30)
        self.set(SIZE)
        machine = self.machine
        machine.set_tables([[START + 64 * i] for i in range(vcpus)])
        machine.load(lambda i: (machine.entry(DATA), machine.private.cr3, machine.registers(i)))

    def set(self, size: int) -> None:
        self.machine.vm.set_region(SLOT, START, size, self.ram.hva)

    def close(self) -> None:
        self.machine.close()
        self.ram.close()


@pytest.fixture(params=[1, 3])
def rig(kvm: Kvm, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(kvm, request.param)
    yield made
    made.close()


def test_vcpus_beat_and_their_words_grow(rig: Rig) -> None:
    rig.machine.release()
    rig.machine.wait_beats(100)
    rig.machine.hold()
    for i in range(len(rig.machine.threads)):
        assert rig.ram.words[8 * i] >= 99


def test_vcpus_that_are_held_do_not_beat(rig: Rig) -> None:
    machine = rig.machine
    for through_bql in (False, True):
        machine.release()
        machine.wait_beats(10)
        machine.hold(through_bql=through_bql)
        assert machine.bql.locked() == through_bql
        before = machine.beats()
        # many beats' time, in which nothing may happen
        deadline = time.monotonic() + 0.05
        while time.monotonic() < deadline:
            assert machine.beats() == before
    machine.release()
    assert machine.stall_ns > 0
    assert not machine.bql.locked()


def test_ram_that_is_missing_is_seen_as_spurious_exits(rig: Rig) -> None:
    machine = rig.machine
    machine.release()
    machine.wait_beats(10)
    rig.set(0)
    machine.wait_beats(10)
    rig.set(SIZE)
    machine.wait_beats(10)
    assert machine.exits().spurious > 0
    assert machine.exits().hole == 0


def test_accesses_to_the_hole_are_told_apart(rig: Rig) -> None:
    machine = rig.machine
    machine.hole = (START, START + 4096)
    machine.release()
    machine.wait_beats(10)
    rig.set(0)
    machine.wait_beats(10)
    rig.set(SIZE)
    assert machine.exits().hole > 0
    assert machine.exits().spurious == 0


def test_a_guest_that_dies_stands_and_can_begin_anew(rig: Rig) -> None:
    """Nothing at all is where its page tables should be."""
    machine = rig.machine
    good = machine.private.cr3
    machine.load(lambda i: (machine.entry(DATA), START + 2 * SIZE, machine.registers(i)))
    machine.release()
    machine.wait_beats(1)  # of those that live: none
    assert all(t.death is not None for t in machine.threads)
    met = machine.exits()
    assert met.internal_errors + met.shutdowns == len(machine.threads)
    machine.hold()
    machine.load(lambda i: (machine.entry(DATA), good, machine.registers(i)))
    machine.release()
    assert machine.revive() == len(machine.threads)
    machine.wait_beats(10)


def test_a_table_can_be_changed_while_the_guest_runs(rig: Rig) -> None:
    machine = rig.machine
    machine.release()
    machine.wait_beats(5)
    n = len(machine.threads)
    machine.set_tables([[START + 8192 + 64 * i, (START + 4096) | 1] for i in range(n)])
    machine.wait_beats(20)
    machine.hold()
    for i in range(n):
        assert rig.ram.words[(8192 + 64 * i) // 8] >= 9
    assert rig.ram.words[4096 // 8] == 0, "an odd address is only read"


def test_a_storm_of_signals_disturbs_nobody(rig: Rig) -> None:
    """Signals to the process, and kicks that nobody asked for."""
    machine = rig.machine
    caught = 0

    def count(*_: object) -> None:
        nonlocal caught
        caught += 1

    before = signal.signal(signal.SIGUSR1, count)
    try:
        machine.release()
        machine.wait_beats(5)
        for _ in range(200):
            os.kill(os.getpid(), signal.SIGUSR1)
            for thread in machine.threads:
                thread._kick()
        machine.wait_beats(20)
        machine.hold()
        machine.release()
        machine.wait_beats(5)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caught > 0
    assert machine.exits().harm == 0


def test_closing_in_the_middle_ends_all_threads(kvm: Kvm) -> None:
    for held in (False, True):
        rig = Rig(kvm, 2)
        rig.machine.release()
        rig.machine.wait_beats(5)
        if held:
            rig.machine.hold(through_bql=True)
        rig.close()
        assert not any(t.name.startswith("vcpu-") for t in threading.enumerate())


def test_what_kvm_refuses_is_said(rig: Rig) -> None:
    vm = rig.machine.vm
    with pytest.raises(SlotRefused, match="slot 5 at 0x100000"):
        vm.set_region(5, START, SIZE, rig.ram.hva)  # overlaps slot 0
    with pytest.raises(SlotRefused, match="slot 0"):
        vm.set_region(SLOT, START, SIZE // 2, rig.ram.hva)  # cannot shrink in place
    with pytest.raises(SlotRefused, match="dirty log of slot 0"):
        vm.dirty_log(SLOT, SIZE)  # is not logged
    with pytest.raises(SlotRefused, match="1000000"):
        vm.set_region(1_000_000, 1 << 31, 4096, rig.ram.hva)  # no such id
    rig.machine.release()
    rig.machine.wait_beats(5)


def test_more_vcpus_than_there_is_room_for(kvm: Kvm) -> None:
    with pytest.raises(InputError, match="vCPUs"):
        Machine(kvm, vcpus=MAX_VCPUS + 1, private_slot=9, private_gpa=1 << 30, reach=1 << 30)


def test_memory_that_no_host_has(kvm: Kvm) -> None:
    del kvm
    with pytest.raises(OperationFailed, match="no room for"):
        HostMemory(1 << 62)
