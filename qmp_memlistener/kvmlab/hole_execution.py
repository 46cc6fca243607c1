"""Carries out `hole` plans: holes in live slots by what the host maps behind them.

Each arena is one real slot over a reservation of address space.  Punching and filling a hole, and
swapping one RAM block for another, change what is mapped there; KVM is told by its MMU notifier,
and no slot operation is made.  Slot operations remain for arenas that come and go.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence

from ..errors import OperationFailed
from ..memslots import LOG_DIRTY_PAGES, READONLY, Op, Plan, Slot, SlotTable
from ..memslots.intervals import Range, cut, intersect, put, subtract
from ..memslots.slots import AS_SHIFT
from . import system
from .arenas import Arena, Piece, Step, shown, slots_by_arena, steps_of
from .execution import Backing, Carried, FetchedLog, Log, ring_log
from .host_memory import Reservation
from .machine import Machine
from .strategies import HoleKind
from .userfault import Userfault
from .vm import SlotRefused

__all__ = ["HoleExecutor"]

_BOTH = system.PROT_READ | system.PROT_WRITE


class HoleExecutor:
    """Slots of the `hole` strategy on a machine; `arenas` must hold all that will ever be."""

    def __init__(
        self, machine: Machine, backing: Backing, kind: HoleKind, arenas: Sequence[Arena]
    ) -> None:
        """Raises OperationFailed when the host has no room, OSError without userfaultfd."""
        self._machine = machine
        self._arenas = tuple(arenas)
        self._mapped: dict[Arena, _Mapped] = {}
        self._closers: list[Callable[[], None]] = []
        self.table = SlotTable()
        self._userfault = Userfault() if kind is HoleKind.USERFAULT else None
        if self._userfault is not None:
            self._closers.append(self._userfault.close)
        try:
            for i, arena in enumerate(self._arenas):
                mapped = _Mapped(machine, backing, kind, arena, i, self._userfault)
                self._mapped[arena] = mapped
                self._closers.append(mapped.close)
        except BaseException:
            self.close()
            raise

    def install(self, table: SlotTable) -> None:
        for arena, slots in slots_by_arena(self._arenas, table).items():
            self._mapped[arena].come(slots)
        self.table = table

    def slots(self) -> list[Slot]:
        return [slot for m in self._mapped.values() if (slot := m.slot) is not None]

    def fetch_logs(self) -> list[Log]:
        vm = self._machine.vm
        if self._machine.rings is not None:
            return [ring_log(self._machine.rings, self.slots())]
        return [
            FetchedLog(s.gpa, s.size, vm.dirty_log(s.kvm_slot, s.size))
            for s in self.slots()
            if s.logged
        ]

    def waiting_at(self) -> list[int]:
        """gpas in holes at which a vCPU waits (`hole-userfault`), not told before."""
        if self._userfault is None:
            return []
        addresses = self._userfault.addresses()
        return [gpa for a in addresses for m in self._mapped.values() if (gpa := m.gpa_of(a)) >= 0]

    def carry_out(self, plan: Plan) -> Carried:
        if plan.before != self.table:
            raise OperationFailed("the plan is for other slots than the machine has")
        groups = [(step.first, step.count) for step in plan.steps]
        steps = steps_of(plan.ops, groups, plan.before, plan.after)
        done = Carried()
        done.begin_ns = time.monotonic_ns()
        for step in steps:
            self._take(step, plan.ops, done)
        done.end_ns = time.monotonic_ns()
        if not done.failure():
            self.table = plan.after
        return done

    def _take(self, step: Step, ops: Sequence[Op], done: Carried) -> None:
        if not step.ops:
            return
        since = time.monotonic_ns()
        result = 0
        try:
            self._change(step, done)
        except SlotRefused as exc:
            result = -exc.errno
        except OSError as exc:
            result = -(exc.errno or errno.EIO)
        done.calls_ns += time.monotonic_ns() - since
        self._machine.memory_changed()
        for i in step.ops:
            if ops[i].slot >= 0:
                done.results[i] = result

    def _change(self, step: Step, done: Carried) -> None:
        there = slots_by_arena(self._arenas, step.after)
        for arena, mapped in self._mapped.items():
            slots = there.get(arena)
            if slots is None:
                if mapped.slot is not None:
                    done.deleted.append(mapped.slot.kvm_slot)
                    mapped.go()
            elif mapped.slot is None:
                mapped.come(slots)
            else:
                mapped.show([p for p in step.pieces if arena.gpa <= p.start < arena.end])
                mapped.set_log(any(s.logged for s in slots))

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()


class _Mapped:
    """An arena's reservation, what lies in it, and its slot while there is one."""

    def __init__(
        self,
        machine: Machine,
        backing: Backing,
        kind: HoleKind,
        arena: Arena,
        index: int,
        userfault: Userfault | None,
    ) -> None:
        self._vm = machine.vm
        self._backing = backing
        self._kind = kind
        self._arena = arena
        self._index = index
        self._userfault = userfault
        self._room = Reservation(arena.size)
        self._placed: list[Piece] = []
        self._watched: list[Range] = []  # by userfaultfd
        self.slot: Slot | None = None

    # -- the slot ------------------------------------------------------------------------------

    def come(self, slots: Sequence[Slot]) -> None:
        """Map what `slots` show and make the slot.  Raises SlotRefused, OSError."""
        self._room.clear(0, self._room.size)
        self._placed, self._watched = [], []
        pieces = shown(self._arena, slots)
        for piece in pieces:
            if piece.block is not None:
                self._place(piece)
        flags = LOG_DIRTY_PAGES if any(s.logged for s in slots) else 0
        self._set(flags | (READONLY if self._arena.readonly else 0))
        for piece in pieces:
            if piece.block is None and self._kind is HoleKind.ATTRIBUTES:
                self._vm.set_private(piece.start, piece.end - piece.start, True)

    def go(self) -> None:
        """Delete the slot.  Raises SlotRefused."""
        assert self.slot is not None, "what goes is there"
        self._vm.set_region(self.slot.kvm_slot, self.slot.gpa, 0, self._room.hva)
        self.slot = None

    def set_log(self, logged: bool) -> None:
        """Switch the dirty log.  Raises SlotRefused."""
        assert self.slot is not None, "a log is of a slot that is there"
        if self.slot.logged != logged:
            self._set(self.slot.flags ^ LOG_DIRTY_PAGES)

    def _set(self, flags: int) -> None:
        a = self._arena
        number = a.as_id << AS_SHIFT | self._index
        self._vm.set_region(number, a.gpa, a.size, self._room.hva, flags)
        self.slot = Slot(a.as_id, self._index, a.gpa, a.size, flags)

    # -- what is mapped --------------------------------------------------------------------------

    def show(self, pieces: Sequence[Piece]) -> None:
        """Change what is behind these parts.  Raises OSError."""
        for piece in pieces:
            if piece.block is None:
                self._hide(piece)
            elif self._is_placed(piece):
                self._uncover(piece)
            else:
                self._place(piece)

    def _hide(self, piece: Piece) -> None:
        at, size = self._at(piece)
        if self._kind is HoleKind.MPROTECT:
            system.mprotect(self._room.hva + at, size, system.PROT_NONE)
        elif self._kind is HoleKind.MUNMAP:
            self._room.clear(at, size)
            self._forget(piece)
        elif self._kind is HoleKind.USERFAULT:
            assert self._userfault is not None, "opened with the executor"
            self._userfault.punch(self._room.hva + at, size)
            put(self._watched, piece.start, piece.end)
        else:
            self._vm.set_private(piece.start, size, True)

    def _uncover(self, piece: Piece) -> None:
        """What lies there already can be reached again."""
        at, size = self._at(piece)
        if self._kind is HoleKind.USERFAULT:
            self._unwatch(piece)
        elif self._kind is HoleKind.ATTRIBUTES:
            self._vm.set_private(piece.start, size, False)
        else:
            system.mprotect(self._room.hva + at, size, self._protection(piece))

    def _unwatch(self, piece: Piece) -> None:
        """Fill what of it is a hole: a slot made anew shows other parts of it all the time."""
        assert self._userfault is not None, "opened with the executor"
        for low, high in intersect(self._watched, piece.start, piece.end):
            self._userfault.fill(self._room.hva + low - self._arena.gpa, high - low)
        cut(self._watched, piece.start, piece.end)

    def _place(self, piece: Piece) -> None:
        assert piece.block is not None, "there is something to place"
        cut(self._watched, piece.start, piece.end)
        at, size = self._at(piece)
        memory = self._backing[piece.block]
        self._room.place(at, size, memory, piece.offset, self._protection(piece))
        if self._kind is HoleKind.ATTRIBUTES:
            # attributes are the VM's: an earlier slot here may have left a hole
            self._vm.set_private(piece.start, size, False)
        self._forget(piece)
        self._placed.append(piece)

    def _protection(self, piece: Piece) -> int:
        """ROM in an arena with RAM: the slot is writable, its mapping is not."""
        return system.PROT_READ if piece.flags & READONLY and not self._arena.readonly else _BOTH

    def _is_placed(self, piece: Piece) -> bool:
        left = [(piece.start, piece.end)]
        for p in self._placed:
            same = p.block == piece.block and p.offset - p.start == piece.offset - piece.start
            if same and (p.flags ^ piece.flags) & READONLY == 0:
                left = subtract(left, [(p.start, p.end)])
        return not left

    def _forget(self, piece: Piece) -> None:
        out = []
        for p in self._placed:
            for start, end in subtract([(p.start, p.end)], [(piece.start, piece.end)]):
                out.append(Piece(start, end, p.block, p.offset + start - p.start, p.flags))
        self._placed = out

    def _at(self, piece: Piece) -> tuple[int, int]:
        return piece.start - self._arena.gpa, piece.end - piece.start

    def gpa_of(self, hva: int) -> int:
        """The guest's address of one of ours, -1 when it lies elsewhere."""
        inside = 0 <= hva - self._room.hva < self._room.size
        return hva - self._room.hva + self._arena.gpa if inside else -1

    def close(self) -> None:
        self._room.close()
