"""A lab machine: a VM, its private slot, and vCPU threads that run one of the guest programs.

Strategies are not its business; they change slots (`vm`) or host mappings and hold vCPUs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ..errors import MissingPrerequisite, OperationFailed
from ..text import count_text
from .abi import Cap
from .programs import GAP, Private
from .system import Closing
from .vcpu_thread import Exits, VcpuThread
from .vm import DirtyRings, Kvm, LabVm, ring_capability
from .x86 import GIB, MAX_GIB, address_bits, tsc_khz

__all__ = ["Machine", "Program"]

_LOOK_S = 50e-6  # a guest that runs has no way to wake us
_DEADLINE_S = 20.0

Program = Callable[[int], tuple[int, int, dict[str, int]]]
"""For a vCPU's index: where its code lies (gpa), where its page tables lie, its registers."""


class Machine(Closing):
    """A VM with `vcpus` vCPUs that are held until `release`.

    `private_slot` and `private_gpa` must be free in whatever the machine is to show.  Close it, or
    use it as a context manager: then threads, VM and memory are gone.
    """

    def __init__(
        self,
        kvm: Kvm,
        *,
        vcpus: int,
        private_slot: int,
        private_gpa: int,
        reach: int,
        vm_type: int = 0,
        rings: bool = False,
    ) -> None:
        """`reach` is the first address that no vCPU will touch; the attribute is what they can.

        `rings`: dirty rings of the vCPUs instead of the slots' bitmaps.  Raises InputError,
        MissingPrerequisite, OperationFailed.
        """
        self.hole = (0, 0)
        self.touched = False
        self.changes = 0
        self.bql = threading.Lock()
        self.threads: list[VcpuThread] = []
        self.held = True
        self.stall_ns = 0
        self._asked_ns = 0
        self._through_bql = False
        self._closers: list[Callable[[], None]] = []
        self._programs: Program = self._beat_only
        try:
            gibibytes = -(-max(reach, private_gpa + Private.size_for(1)) // GIB) + 1
            gibibytes = min(gibibytes, MAX_GIB, 1 << max(address_bits(kvm.ioctl) - 30, 0))
            self.reach = gibibytes * GIB
            self.private = Private(private_gpa, vcpus, gibibytes)
            self._closers.append(self.private.close)
            self.vm = LabVm(kvm, vm_type)
            self._closers.append(self.vm.close)
            memory = self.private.memory
            self.private_slot = private_slot
            self.vm.set_region(private_slot, private_gpa, self.private.size, memory.hva)
            self.rings = self._make_rings() if rings else None
            for _ in range(vcpus):
                vcpu = self.vm.add_vcpu()
                if self.rings is not None:
                    self.rings.add(vcpu)
                self.threads.append(VcpuThread(vcpu, self))
            self._khz = self._tsc_khz()
            for thread in self.threads:
                self._closers.append(thread.stop)
                thread.begin()
        except BaseException:
            self.close()
            raise

    def _make_rings(self) -> DirtyRings:
        cap = ring_capability(self.vm)
        if cap is None:
            raise MissingPrerequisite(
                "this kernel's KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING)",
                remedy="use dirty bitmaps, or a kernel that has them (x86: Linux 5.11)",
            )
        rings = DirtyRings(self.vm, cap)
        self._closers.append(rings.close)
        return rings

    # -- programs ------------------------------------------------------------------------------

    def _beat_only(self, vcpu: int) -> tuple[int, int, dict[str, int]]:
        return self.private.code_gpa + GAP, self.private.cr3, self.registers(vcpu)

    def registers(self, vcpu: int, **more: int) -> dict[str, int]:
        """What every program wants, and `more`."""
        return {"rdi": self.private.report_gpa(vcpu), **more}

    def entry(self, program: int) -> int:
        """The gpa at which DATA, WRITER or GAP begins in the private slot."""
        return self.private.code_gpa + program

    def load(self, programs: Program) -> None:
        """The vCPUs, which must be held, begin anew with these.  Raises OperationFailed."""
        self._programs = programs
        for i in range(len(self.threads)):
            self._load(i)

    def _load(self, vcpu: int) -> None:
        rip, cr3, registers = self._programs(vcpu)
        self.threads[vcpu].vcpu.start(rip, cr3, registers)

    # -- holding -------------------------------------------------------------------------------

    def hold(self, *, through_bql: bool = False) -> None:
        """Kick all vCPUs out of the guest and wait until they are out.

        `through_bql`: each takes the machine's `bql` on its way out and in, as QEMU's do when it
        pauses them, and the caller has it meanwhile.  Raises OperationFailed.
        """
        self._asked_ns = time.monotonic_ns()
        for thread in self.threads:
            thread.ask_to_pause(through_bql)
        for thread in self.threads:
            thread.wait_paused()
        self.held = True
        if through_bql:
            self.bql.acquire()
        self._through_bql = through_bql
        self.check()

    def release(self) -> None:
        """Let them go on; returns when all are about to enter the guest, or are dead.

        Then `stall_ns` says how long the slowest of those that live was kept out.
        """
        self.held = False
        for thread in self.threads:
            thread.resume()
        if self._through_bql:
            self._through_bql = False
            self.bql.release()
        for thread in self.threads:
            thread.wait_running()
        entered = [t.entered_ns for t in self.threads if t.death is None]
        self.stall_ns = max(entered) - self._asked_ns if entered else 0

    def memory_changed(self) -> None:
        """Host mappings are other ones now."""
        self.changes += 1
        for thread in self.threads:
            thread.memory_changed()

    def revive(self) -> int:
        """Start vCPUs whose guest died again; how many they were.  Raises OperationFailed."""
        dead = [i for i, t in enumerate(self.threads) if t.death is not None]
        if not dead:
            return 0
        self.hold()
        try:
            for i in dead:
                self._load(i)
                self.threads[i].revive()
        finally:
            self.release()
        return len(dead)

    def check(self) -> None:
        """Raises OperationFailed when KVM_RUN failed."""
        for thread in self.threads:
            if thread.failure is not None:
                raise OperationFailed(
                    f"vCPU {thread.vcpu.index} cannot go on: {thread.failure.strerror}"
                ) from thread.failure

    # -- what the guest says ---------------------------------------------------------------------

    def exits(self) -> Exits:
        """All vCPUs' exits together."""
        total = Exits()
        for thread in self.threads:
            for name in Exits.__slots__:
                setattr(total, name, getattr(total, name) + getattr(thread.exits, name))
        return total

    def beats(self) -> list[int]:
        """Each vCPU's heartbeats so far."""
        return [report.count for report in self.private.reports]

    def wait_beats(
        self, beats: int, *, unless: Callable[[int], bool] = lambda _vcpu: False
    ) -> None:
        """Until every vCPU that lives has made `beats` more heartbeats, or `unless` is true of it.

        Raises OperationFailed when that takes longer than any reasonable time.
        """
        since = self.beats()
        deadline = time.monotonic() + _DEADLINE_S
        waiting = list(range(len(since)))
        while waiting:
            waiting = [
                i
                for i in waiting
                if self.private.reports[i].count < since[i] + beats
                and self.threads[i].death is None
                and not unless(i)
            ]
            self.check()
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise OperationFailed(
                    f"vCPU {waiting[0]} did not make {count_text(beats, 'heartbeat')} within "
                    f"{_DEADLINE_S:g} s",
                    remedy="use fewer vCPUs, or a host with less load",
                )
            time.sleep(_LOOK_S)

    def set_tables(self, addresses: Sequence[Sequence[int]]) -> None:
        """Give each vCPU the addresses it goes through; returns when all have begun.

        Held vCPUs begin when they are released.
        """
        tables = [self.private.set_table(i, a) for i, a in enumerate(addresses)]
        deadline = time.monotonic() + _DEADLINE_S
        for report, thread, table in zip(self.private.reports, self.threads, tables, strict=True):
            while not self.held and report.table_in_use != table and thread.death is None:
                self.check()
                if time.monotonic() > deadline:
                    raise OperationFailed(f"vCPU {thread.vcpu.index} does not go on")
                time.sleep(_LOOK_S)

    def forget_gaps(self) -> None:
        """The longest gap is counted from now on."""
        for report in self.private.reports:
            report.max_gap = 0

    def longest_gap_ns(self) -> int:
        """The longest time between two heartbeats of a vCPU since `forget_gaps`, of all vCPUs."""
        ticks = max(report.max_gap for report in self.private.reports)
        return ticks * 1_000_000 // self._khz

    def _tsc_khz(self) -> int:
        """Of the guest's clock.  Raises OperationFailed where KVM does not report it."""
        if self.vm.capability(Cap.TSC_KHZ):
            try:
                khz = tsc_khz(self.vm.vcpus[0].ioctl)
            except OSError:
                khz = 0
            if khz:
                return khz
        raise OperationFailed(
            "this KVM does not report the frequency of the guest's clock (KVM_GET_TSC_KHZ)",
            remedy="use a host with a stable TSC",
        )

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End threads and VM; may be called at any time."""
        while self._closers:
            self._closers.pop()()
