"""A lab VM with many slots and a guest that reads pages: of as many slots as it can, or of one.

Both times as many pages, in random order, so that what differs is the slots.  Where the guest's
accesses are emulated, KVM looks up the slot for each; with hardware it does so for the first access
to a page only, and both cost the same.
"""

from __future__ import annotations

import random
import time

from qmp_memlistener.errors import InputError, OperationFailed
from qmp_memlistener.kvmlab import programs
from qmp_memlistener.kvmlab.abi import Cap
from qmp_memlistener.kvmlab.machine import Machine
from qmp_memlistener.kvmlab.memory import PAGE, HostMemory
from qmp_memlistener.kvmlab.system import Closing
from qmp_memlistener.kvmlab.vm import Kvm
from qmp_memlistener.kvmlab.x86 import GIB

__all__ = ["AccessVm"]

_PRIVATE_SLOT, _ONE_SLOT, _FIRST_OTHER = 0, 1, 2
_PRIVATE_GPA = 16 << 20
_OTHERS_GPA = GIB
_ONE_GPA = 4 * GIB
_PAGES = 1024
_LOOK_S = 200e-6
_DEADLINE_S = 60.0


class AccessVm(Closing):
    """`slots` in all, one vCPU, which stands except in `access_ns`.

    Close it, or use it as a context manager.

    `pages` are read, `spread` is how many slots they lie in when they lie in many.
    """

    def __init__(self, kvm: Kvm, slots: int, seed: int = 1) -> None:
        """Raises InputError, MissingPrerequisite, OperationFailed."""
        most = kvm.capability(Cap.NR_MEMSLOTS)
        if not _FIRST_OTHER < slots <= most:
            raise InputError(
                f"reading in {slots} slots: this KVM takes {most}, and two are the lab's own",
                remedy=f"use {_FIRST_OTHER + 1} to {most}",
            )
        others = slots - _FIRST_OTHER
        self.pages = _PAGES
        self.spread = min(others, _PAGES)
        pages_each = -(-_PAGES // others)
        pitch = (pages_each + 1) * PAGE
        self._memory: list[HostMemory] = []
        self.machine = Machine(
            kvm,
            vcpus=1,
            private_slot=_PRIVATE_SLOT,
            private_gpa=_PRIVATE_GPA,
            reach=_ONE_GPA + _PAGES * PAGE,
        )
        try:
            vm = self.machine.vm
            vm.set_region(_ONE_SLOT, _ONE_GPA, _PAGES * PAGE, self._host_memory(_PAGES))
            hva = self._host_memory(others * pages_each)
            size = pages_each * PAGE
            for i in range(others):
                vm.set_region(_FIRST_OTHER + i, _OTHERS_GPA + i * pitch, size, hva + i * size)
            chance = random.Random(seed)
            slots_read = chance.sample(range(others), self.spread)
            in_many = [
                _OTHERS_GPA + slots_read[i % self.spread] * pitch + i // self.spread * PAGE
                for i in range(_PAGES)
            ]
            in_one = [_ONE_GPA + i * PAGE for i in range(_PAGES)]
            self._tables = []
            for addresses in (in_one, in_many):
                chance.shuffle(addresses)
                self._tables.append(
                    self.machine.private.set_table(0, [gpa + 1 for gpa in addresses])
                )
            self.machine.load(self._program)
        except BaseException:
            self.close()
            raise

    def access_ns(self, passes: int = 1) -> tuple[int, int]:
        """What one read takes, in one slot and in many: means over `passes` through all pages.

        The vCPU runs meanwhile only.  Raises OperationFailed when it does not get on.
        """
        self.machine.release()
        try:
            return self._pass_ns(self._tables[0], passes), self._pass_ns(self._tables[1], passes)
        finally:
            self.machine.hold()

    def close(self) -> None:
        """End thread and VM; may be called at any time."""
        self.machine.close()
        while self._memory:
            self._memory.pop().close()

    def _host_memory(self, pages: int) -> int:
        memory = HostMemory(pages * PAGE, "cost")
        self._memory.append(memory)
        return memory.hva

    def _program(self, vcpu: int) -> tuple[int, int, dict[str, int]]:
        machine = self.machine
        return machine.entry(programs.DATA), machine.private.cr3, machine.registers(vcpu)

    def _pass_ns(self, table: int, passes: int) -> int:
        report = self.machine.private.reports[0]
        report.table = table
        deadline = time.monotonic() + _DEADLINE_S
        while report.table_in_use != table:
            self._wait(deadline)
        self._beats(self.pages, deadline)  # what is read for the first time costs more
        start, first = time.monotonic_ns(), report.count
        self._beats(self.pages * passes, deadline)
        return (time.monotonic_ns() - start) // (report.count - first)

    def _beats(self, count: int, deadline: float) -> None:
        report = self.machine.private.reports[0]
        first = report.count
        while report.count < first + count:
            self._wait(deadline)

    def _wait(self, deadline: float) -> None:
        self.machine.check()
        exits, death = self.machine.exits(), self.machine.threads[0].death
        if exits.harm:
            raise OperationFailed(f"the guest left for memory that is there ({death or 'MMIO'})")
        if time.monotonic() > deadline:
            raise OperationFailed(
                f"vCPU 0 does not get on within {_DEADLINE_S:g} s",
                remedy="use a host with less load",
            )
        time.sleep(_LOOK_S)
