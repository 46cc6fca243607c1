"""A mirror's backend on /dev/kvm: real slots of a lab VM that follow a guest's.

    with Kvm() as kvm, KvmBackend(kvm) as backend:
        async with attach(target) as agent, mirroring(agent, backend, Strategy.HOLE): ...

`KvmBackend` has the methods of `mirror.backend.SlotBackend`.  How slots of a plan become
slots of KVM is in `real_slots`, how they are looked at in `backend_probe`.  The guest's memory is
not here: the lab has RAM blocks of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ..errors import InputError, MissingPrerequisite, OperationFailed
from ..host.bounded import in_thread
from ..memslots import Slot
from ..memslots.intervals import Range, join, subtract
from ..records import LabMirror, MirrorTimes
from .abi import Cap
from .backend_probe import GuestProbe, Verified, samples_of, verify_slots
from .machine import Machine
from .memory import Blocks
from .programs import GAP, MAX_VCPUS
from .real_slots import RealSlots
from .system import Closing
from .vm import Kvm, most_slots
from .x86 import GIB, MAX_GIB

__all__ = ["KvmBackend"]

T = TypeVar("T")

_ROOM = 16 << 20  # the private slot takes less, whatever its guest reaches
_ALIGN = 2 << 20  # where it may lie
_CHIPSET = (0xFE00_0000, 4 * GIB)  # devices and firmware, and pages that KVM has for itself
_REACHES = (MAX_GIB, 256, 64, 16)  # GiB; not every CPU has all address bits
_LARGE = 2 * GIB  # KVM makes or deletes such a slot in tens of ms
_SAMPLES = 256
_NOT_VERIFIED = Verified(0, 0, (), ())


class KvmBackend(Closing):
    """Keeps slots in a VM on /dev/kvm.  Close it, or use it as a context manager.

    `vcpus` of them run meanwhile, doing nothing but noticing how time goes by in memory of their
    own: then a slot operation costs what it costs with running vCPUs, and each takes a host CPU.
    Between `begin` and `end` they are held.  Methods are called in turn; those for large slots
    return an awaitable, because KVM takes its time for them, and work in a thread.

    What KVM refuses is raised as SlotRefused with KVM's errno, and names the slot.
    """

    def __init__(self, kvm: Kvm, *, vcpus: int = 0) -> None:
        """Raises InputError, OperationFailed; MissingPrerequisite without KVM_CAP_SYNC_MMU."""
        if not 0 <= vcpus <= MAX_VCPUS:
            raise InputError(
                f"the lab has room for 0 to {MAX_VCPUS} vCPUs, not {vcpus}",
                remedy=f"use at most {MAX_VCPUS}",
            )
        if not kvm.capability(Cap.SYNC_MMU):
            raise MissingPrerequisite(
                "this kernel's KVM does not notice changes of host mappings (KVM_CAP_SYNC_MMU)",
                remedy="use a host whose KVM has it: all of x86 do since Linux 2.6.28",
            )
        self._kvm = kvm
        self._vcpus = vcpus
        self._private_slot = most_slots(kvm) - 1
        self._lock = threading.Lock()
        self._moved = 0
        self._holds = MirrorTimes()
        self._machine, self._probe = self._build(())
        self._blocks = Blocks()
        self._slots = RealSlots(
            self._machine.vm,
            self._blocks.reach,
            last_id=self._private_slot,
            paused=self._paused,
        )

    # -- what a mirror calls -------------------------------------------------------------------

    def add_slot(self, slot: Slot) -> Awaitable[None] | None:
        """Raises SlotRefused; InputError for another address space than `memory`, and for a slot
        whose backing is unknown; OperationFailed when the host has no room."""
        return self._operate(slot, lambda: self._add(slot))

    def delete_slot(self, slot: Slot) -> Awaitable[None] | None:
        """Raises SlotRefused."""
        return self._operate(slot, lambda: self._delete(slot))

    def set_flags(self, slot: Slot) -> Awaitable[None] | None:
        """Raises SlotRefused: KVM changes nothing but LOG_DIRTY_PAGES in a live slot."""
        return self._operate(slot, lambda: self._slots.set_flags(slot))

    def set_hole(self, slot: Slot, start: int, end: int) -> None:
        """Nothing is mapped there any more; slot id and dirty bitmap stay.  Raises SlotRefused."""
        with self._lock:
            self._slots.set_hole(slot, start, end)

    def clear_hole(self, slot: Slot, start: int, end: int) -> None:
        """Raises SlotRefused."""
        with self._lock:
            self._slots.clear_hole(slot, start, end)

    def begin(self) -> None:
        """Hold the vCPUs.  Raises OperationFailed."""
        if self._vcpus and not self._machine.held:
            self._machine.hold()

    def end(self) -> None:
        """Let them go on."""
        if self._vcpus and self._machine.held:
            self._machine.release()
            self._holds = self._holds.plus(self._machine.stall_ns)

    def slots(self) -> tuple[Slot, ...]:
        """What it holds, from its own knowledge; `verify` asks KVM and a guest."""
        with self._lock:
            return tuple(self._slots.table)

    # -- looking at it -------------------------------------------------------------------------

    @property
    def memory(self) -> Blocks:
        """The lab's own memory of each RAM block."""
        return self._blocks

    def kvm_slots(self) -> list[Slot]:
        """The slots as KVM has them: one for each slot held, or for several that share it."""
        with self._lock:
            return self._slots.real()

    def read(self, gpa: int) -> bytes | None:
        """The word of 8 bytes that a guest of this VM reads at `gpa`; None: no memory there.

        Raises InputError for an address out of reach or not a multiple of 8, OperationFailed.
        """
        with self._lock:
            return self._probe.read(gpa)

    def write(self, gpa: int, word: bytes) -> bool:
        """A guest's store of 8 bytes: False when it reaches no memory that can be written.

        Raises as `read`.
        """
        with self._lock:
            return self._probe.write(gpa, word)

    def dirty_pages(self) -> frozenset[int]:
        """gpas of pages written through logged slots, not reported before: KVM's own dirty logs.

        Slots that a strategy deletes lose theirs.  Pages in holes are left out; what was dirty when
        a hole opened is reported when it closes.  On hardware KVM a guest's first read of a page
        may make it dirty, too.  Raises SlotRefused.
        """
        with self._lock:
            return self._slots.dirty_pages()

    def verify(self, most: int = _SAMPLES) -> Verified:
        """Have KVM and a guest confirm what `slots` says, at up to `most` pages.

        A guest reads at both ends and in the middle of what each slot shows, and beside it where no
        memory should be; KVM is asked which slots it has dirty logs of.  The lab's memory of these
        pages is written to.  Takes some 0.1 ms a page.  Raises OperationFailed.
        """
        with self._lock:
            slots, probe = self._slots, self._probe
            samples = samples_of(slots.table, _private(self._machine), most)
            try:
                misread = tuple(verify_slots(slots.table, self._blocks, probe, samples))
            except OSError as exc:
                raise OperationFailed(f"the lab cannot read its slots: {exc.strerror}") from exc
            unreached = sum(gpa >= probe.reach for gpa in samples)
            return Verified(len(samples) - unreached, unreached, misread, tuple(slots.wrong_logs()))

    def facts(self, verified: Verified = _NOT_VERIFIED) -> LabMirror:
        """What it did so far, and what was verified of it."""
        with self._lock:
            counts = self._slots.context.counts
            return LabMirror(
                vcpus=self._vcpus,
                slots=len(self._slots.spans()),
                slot_ioctls=counts.ioctls,
                mappings=counts.mappings,
                placed=counts.placed,
                grown=counts.grown,
                moved=self._moved,
                holds=self._holds,
                reads=verified.reads,
                differences=[m.difference for m in verified.misread],
                wrong_logs=list(verified.wrong_logs),
            )

    def private(self) -> Range:
        """Its own slot, which no guest sees."""
        with self._lock:
            return _private(self._machine)

    def beats(self) -> list[int]:
        """How often each running vCPU has gone round so far."""
        return self._machine.beats()[: self._vcpus]

    # -- inside --------------------------------------------------------------------------------

    def _operate(self, slot: Slot, call: Callable[[], None]) -> Awaitable[None] | None:
        def locked() -> None:
            with self._lock:
                call()

        if slot.size >= _LARGE:
            return in_thread(locked)
        locked()
        return None

    def _add(self, slot: Slot) -> None:
        start, end = _private(self._machine)
        if slot.as_id == 0 and slot.gpa < end and start < slot.end:
            self._move_out_of(slot)
        self._slots.add(slot)

    def _delete(self, slot: Slot) -> None:
        gone = self._slots.delete(slot)
        self._blocks.let_go((gone.block, gone.owner), self._slots.table)

    def _move_out_of(self, slot: Slot) -> None:
        """Another VM, with its private slot elsewhere and the same slots otherwise.

        A slot of a VM whose vCPUs have their code and page tables in it cannot be moved.
        """
        held = self._machine.held
        with self._paused():
            machine, probe = self._build((*self._slots.spans(), (slot.gpa, slot.end)))
            try:
                self._slots.move_to(machine.vm)
            except BaseException:
                machine.close()
                raise
            self._machine.close()
            self._machine, self._probe = machine, probe
            self._moved += 1
        if held and self._vcpus:
            self.begin()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """No vCPU runs in the block; they go on after it when they did before."""
        if self._machine.held:
            yield
            return
        self.begin()
        try:
            yield
        finally:
            self.end()

    def _build(self, taken: Sequence[Range]) -> tuple[Machine, GuestProbe]:
        """A machine whose private slot is not in the way, and whose guests run there."""
        why: OperationFailed | None = None
        for gibibytes in _REACHES:
            private_gpa = _place(gibibytes, taken)
            if private_gpa is None:
                continue
            try:
                return self._try(private_gpa, gibibytes)
            except OperationFailed as exc:
                why = exc
        raise why or OperationFailed(
            f"there is no room for the lab's own slot below {MAX_GIB} GiB",
            remedy="mirror a guest that leaves 16 MiB of addresses free",
        )

    def _try(self, private_gpa: int, gibibytes: int) -> tuple[Machine, GuestProbe]:
        machine = Machine(
            self._kvm,
            vcpus=max(self._vcpus, 1),
            private_slot=self._private_slot,
            private_gpa=private_gpa,
            reach=(gibibytes - 1) * GIB,
        )
        try:
            probe = GuestProbe(machine, gibibytes * GIB)
            code = machine.private.code_gpa
            at = code - private_gpa
            if probe.read(code) != bytes(machine.private.memory.bytes[at : at + 8]):
                raise OperationFailed(f"the lab's guest does not see its own slot at {code:#x}")
            machine.load(lambda i: (machine.entry(GAP), machine.private.cr3, machine.registers(i)))
            if self._vcpus:
                machine.release()
        except BaseException:
            machine.close()
            raise
        return machine, probe

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End VM and threads, give memory back; waits for an operation that is under way."""
        with self._lock:
            self._machine.close()
            self._slots.close()
            self._blocks.close()


def _private(machine: Machine) -> Range:
    return machine.private.gpa, machine.private.gpa + machine.private.size


def _place(gibibytes: int, taken: Sequence[Range]) -> int | None:
    """The highest free place for the private slot, a GiB below what its guest reaches."""
    used = join(sorted((*taken, _CHIPSET, (0, _ROOM))))
    for start, end in reversed(subtract([(0, (gibibytes - 1) * GIB)], used)):
        place = (end - _ROOM) // _ALIGN * _ALIGN
        if place >= start:
            return place
    return None
