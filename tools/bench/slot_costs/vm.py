"""A lab VM of a given shape, and cycles of every slot operation in it, timed one by one.

tools/bench/lab_cost.c makes the same VM and goes through the same cycle: `Shape`, `Layout` and
`Op` are what both agree on.  What is measured with which shapes is in `costs`.

A cycle adds the slot, punches and fills a hole in its host mapping, turns dirty logging on and off,
moves the slot and deletes it.  Before each of these that takes memory away from the guest, the
first vCPU writes to the slot's first pages, so that KVM has something mapped to take away; then it
returns to the private slot, so that it meets no missing memory.  The other vCPUs only beat.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from qmp_memlistener.errors import InputError, OperationFailed
from qmp_memlistener.kvmlab import programs, system
from qmp_memlistener.kvmlab.abi import Cap
from qmp_memlistener.kvmlab.machine import Machine
from qmp_memlistener.kvmlab.memory import PAGE, HostMemory
from qmp_memlistener.kvmlab.system import Closing, Cpus
from qmp_memlistener.kvmlab.vm import Kvm
from qmp_memlistener.kvmlab.x86 import GIB, MAX_GIB
from qmp_memlistener.memslots import LOG_DIRTY_PAGES

__all__ = ["CostVm", "Layout", "Op", "Shape"]

PRIVATE_SLOT, SLOT, FIRST_OTHER = 0, 1, 2
PRIVATE_GPA = 16 << 20
OTHERS_GPA = GIB
OTHERS_PITCH = 2 * PAGE
SLOT_GPA = 4 * GIB  # above what KVM may need for itself below 4 GiB
MOST_SIZE = (MAX_GIB * GIB // 2 - SLOT_GPA) // 2
MOST_TOUCHED = 16

_LOOK_S = 50e-6  # a guest that runs has no way to wake us
_DEADLINE_S = 20.0


class Op(StrEnum):
    """What is timed, in the order of a cycle.

    `same` sets a slot to what it is: what an ioctl costs at least.  `punch` is mprotect(PROT_NONE)
    of the slot's first page, `fill` takes it back.
    """

    ADD = "add"
    SAME = "same"
    PUNCH = "punch"
    FILL = "fill"
    LOG_ON = "log_on"
    LOG_OFF = "log_off"
    MOVE = "move"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Shape:
    """`size` bytes in the slot under test; `slots` in all, the lab's own one among them;
    `vcpus` that run."""

    size: int
    slots: int
    vcpus: int

    def check(self) -> None:
        """Raises InputError for one that the lab cannot make."""
        if self.size < PAGE or self.size % PAGE:
            raise InputError(
                f"a slot of {self.size} bytes is not in whole pages", remedy="use multiples of 4096"
            )
        if self.size > MOST_SIZE:
            raise InputError(
                f"a slot of {self.size} bytes: the lab's guests do not reach so far",
                remedy=f"use at most {MOST_SIZE >> 30} GiB",
            )
        if self.slots < FIRST_OTHER:
            raise InputError(
                f"{self.slots} slots: the lab's own and the one under test are two",
                remedy="use at least 2",
            )
        if not 0 <= self.vcpus <= programs.MAX_VCPUS:
            raise InputError(
                f"{self.vcpus} vCPUs: the lab has room for {programs.MAX_VCPUS}",
                remedy=f"use 0 to {programs.MAX_VCPUS}",
            )

    @property
    def touched(self) -> int:
        """Pages that the guest writes to before memory is taken away."""
        return min(MOST_TOUCHED, self.size // PAGE) if self.vcpus else 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Guest addresses of a shape."""

    size: int

    @property
    def home(self) -> int:
        """Where the slot is added."""
        return SLOT_GPA

    @property
    def moved(self) -> int:
        """Where it is moved to."""
        return SLOT_GPA + self.size

    @property
    def reach(self) -> int:
        return SLOT_GPA + 2 * self.size

    @staticmethod
    def other(i: int) -> int:
        """One of the slots that are only there to be many, of one page."""
        return OTHERS_GPA + i * OTHERS_PITCH


class CostVm(Closing):
    """The VM; its vCPUs stand except in `cycles`.  Close it, or use it as a context manager."""

    def __init__(self, kvm: Kvm, shape: Shape) -> None:
        """Raises InputError, MissingPrerequisite, OperationFailed (SlotRefused)."""
        shape.check()
        most = kvm.capability(Cap.NR_MEMSLOTS)
        if shape.slots > most:
            raise InputError(
                f"{shape.slots} slots: this KVM takes {most}", remedy=f"use at most {most}"
            )
        self.shape = shape
        self.layout = Layout(shape.size)
        self._memory: list[HostMemory] = []
        self.cpus = Cpus.split()
        with self.cpus.on(self.cpus.vcpus):  # threads stay where they are begun
            self.machine = Machine(
                kvm,
                vcpus=max(1, shape.vcpus),
                private_slot=PRIVATE_SLOT,
                private_gpa=PRIVATE_GPA,
                reach=self.layout.reach,
            )
        try:
            self._hva = self._host_memory(shape.size)
            system.madvise(self._hva, PAGE, system.MADV_POPULATE_WRITE)
            others = shape.slots - FIRST_OTHER
            hva = self._host_memory(others * PAGE) if others else 0
            for i in range(others):
                self.machine.vm.set_region(
                    FIRST_OTHER + i, self.layout.other(i), PAGE, hva + i * PAGE
                )
            self.machine.private.set_table(0, [self._scratch])
            self.machine.load(self._program)
        except BaseException:
            self.close()
            raise

    def cycles(self, count: int) -> tuple[dict[Op, list[int]], int]:
        """Go through `count` cycles: what each operation took in each of them, ns.

        And how many of the touched pages the dirty log had in the last one.  Raises
        OperationFailed (SlotRefused), also when the guest met missing memory.
        """
        took: dict[Op, list[int]] = {op: [] for op in Op}
        logged = 0
        with self.cpus.on(self.cpus.own), self._running():
            for i in range(count):
                logged = self._cycle(took, fetch_log=i == count - 1)
        if self.machine.exits().harm:
            raise OperationFailed("a vCPU left the guest though it touched no memory that vanishes")
        return took, logged

    def close(self) -> None:
        """End threads and VM; may be called at any time."""
        self.machine.close()
        while self._memory:
            self._memory.pop().close()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The vCPUs run, if any are to."""
        if not self.shape.vcpus:
            yield
            return
        self.machine.release()
        try:
            self.machine.wait_beats(1)
            yield
        finally:
            self.machine.hold()

    @property
    def _scratch(self) -> int:
        return self.machine.private.scratch_gpa(0)

    def _host_memory(self, size: int) -> int:
        memory = HostMemory(size, "cost")
        self._memory.append(memory)
        return memory.hva

    def _program(self, vcpu: int) -> tuple[int, int, dict[str, int]]:
        program = programs.GAP if vcpu else programs.DATA
        machine = self.machine
        return machine.entry(program), machine.private.cr3, machine.registers(vcpu)

    def _cycle(self, took: dict[Op, list[int]], *, fetch_log: bool) -> int:
        home, size = self.layout.home, self.shape.size
        self._region(took, Op.ADD, home, size, 0)
        self._region(took, Op.SAME, home, size, 0)
        self._touch(home)
        self._protect(took, Op.PUNCH, system.PROT_NONE)
        self._protect(took, Op.FILL, system.PROT_READ | system.PROT_WRITE)
        self._touch(home)
        self._region(took, Op.LOG_ON, home, size, LOG_DIRTY_PAGES)
        self._touch(home)
        logged = 0
        if fetch_log:
            dirty = self.machine.vm.dirty_log(SLOT, size)
            logged = (int.from_bytes(dirty, "little") & ((1 << self.shape.touched) - 1)).bit_count()
        self._region(took, Op.LOG_OFF, home, size, 0)
        self._touch(home)
        self._region(took, Op.MOVE, self.layout.moved, size, 0)
        self._touch(self.layout.moved)
        self._region(took, Op.DELETE, self.layout.moved, 0, 0)
        return logged

    def _region(self, took: dict[Op, list[int]], op: Op, gpa: int, size: int, flags: int) -> None:
        vm, hva = self.machine.vm, self._hva
        start = time.monotonic_ns()
        vm.set_region(SLOT, gpa, size, hva, flags)
        took[op].append(time.monotonic_ns() - start)

    def _protect(self, took: dict[Op, list[int]], op: Op, protection: int) -> None:
        hva = self._hva
        start = time.monotonic_ns()
        system.mprotect(hva, PAGE, protection)
        took[op].append(time.monotonic_ns() - start)

    def _touch(self, gpa: int) -> None:
        """Let the first vCPU write to the slot's first pages and come back."""
        if self.shape.touched:
            self._visit([gpa + i * PAGE for i in range(self.shape.touched)])
            self._visit([self._scratch])

    def _visit(self, addresses: Sequence[int]) -> None:
        """From now on the first vCPU goes through these, over and over."""
        private = self.machine.private
        table = private.set_table(0, addresses)
        deadline = time.monotonic() + _DEADLINE_S
        while private.reports[0].table_in_use != table:
            self.machine.check()
            thread = self.machine.threads[0]
            if thread.death is not None:
                raise OperationFailed(f"the guest died: {thread.death}")
            if time.monotonic() > deadline:
                raise OperationFailed(
                    f"vCPU 0 does not get on within {_DEADLINE_S:g} s",
                    remedy="use fewer vCPUs, or a host with less load",
                )
            time.sleep(_LOOK_S)
