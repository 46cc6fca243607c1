"""The real slots of one VM: which slot of KVM shows which slots of plans.

A slot that shares no address with another is a slot of KVM's own, with its flags.  One that lies in
another's hole (ROM in front of RAM) shares a real slot with it, an arena (see `arenas`).  A race or
replay has its plans beforehand, and so its arenas (`change`).  What a running guest will map is not
known, so for a mirror arenas are made, and made larger, as slots come (`add` to `clear_hole`).
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from msgspec.structs import replace

from ..errors import InputError, OperationFailed
from ..memslots import LOG_DIRTY_PAGES, READONLY, Slot, SlotTable
from ..memslots.slots import AS_SHIFT
from .arenas import Arena, Piece, piece_of, slots_by_arena
from .memory import PAGE, BlockName
from .real_slot import LabContext, RealSlot, refused
from .strategies import HoleKind
from .userfault import Userfault
from .vm import LabVm, SlotRefused

__all__ = ["RealSlots"]

_MEMORY = 0  # the address space that a mirror follows


class RealSlots:
    """Slots of `vm` that show the slots of plans.

    `reach` gives the file of a RAM block, at least so many bytes long; `kind` says how holes are
    made.  With `arenas` each is a slot while something is in it; without, ids stay below `last_id`,
    and `paused` makes a block in which no vCPU runs.  `table` is what a mirror holds, also after
    a call that raised: what KVM refused is not in it, what went on the way is not either.
    """

    def __init__(
        self,
        vm: LabVm,
        reach: Callable[[BlockName, int], int],
        *,
        kind: HoleKind = HoleKind.MUNMAP,
        userfault: Userfault | None = None,
        arenas: Sequence[Arena] = (),
        last_id: int = 0,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.table = SlotTable()
        self.context = LabContext(vm, reach, kind, userfault)
        self._arenas = {a: a.as_id << AS_SHIFT | i for i, a in enumerate(arenas)}
        self._last_id = last_id
        self._paused = paused
        self._reals: list[RealSlot] = []  # by address space and gpa
        self._numbers: set[int] = set()

    def change(self, pieces: Sequence[Piece], after: Iterable[Slot]) -> list[int]:
        """One step of a plan: show `pieces`, after which the slots `after` are there.

        Returns KVM's ids of the slots that were deleted.  Raises SlotRefused, OperationFailed.
        """
        deleted = []
        there = slots_by_arena(tuple(self._arenas), after)
        here = {real.arena: real for real in self._reals}
        for arena, number in self._arenas.items():
            slots, real = there.get(arena), here.get(arena)
            if slots is None:
                if real is not None:
                    deleted.append(number)
                    real.delete(real.slot)
                    self._leave(real)
            elif real is None:
                self._make(arena, slots, number, None)
            else:
                for piece in pieces:
                    if arena.gpa <= piece.start < arena.end:
                        real.show(piece, slots[0])
                real.members = {s.slot: s for s in slots}
                real.set_log(slots[0])
        return deleted

    def gpas_of(self, addresses: Iterable[int]) -> list[int]:
        """The guest's addresses of ours, of those that lie behind a slot."""
        return [gpa for a in addresses for real in self._reals if (gpa := real.gpa_of(a)) >= 0]

    # -- one operation of a mirror each --------------------------------------------------------

    def add(self, slot: Slot) -> None:
        """Raises SlotRefused, with KVM's errno; InputError for what no mirror has; and
        OperationFailed when the host has no room."""
        if slot.as_id != _MEMORY or slot.offset is None:
            raise InputError(
                f"the lab does not show {slot}: "
                + (
                    "the RAM block behind it is unknown" if slot.as_id == _MEMORY else "it is SMRAM"
                ),
                remedy="mirror the address space `memory`, from plans made of maps",
            )
        if self.table.get(slot.as_id, slot.slot) is not None:
            raise refused("add", slot, errno.EINVAL)
        if slot.size <= 0 or (slot.gpa | slot.size) % PAGE or self._clashes(slot):
            self._let_kvm_refuse(slot)
        touched = self._overlapping(slot.gpa, slot.end)
        if not touched:
            arena = Arena(_MEMORY, slot.gpa, slot.size, bool(slot.flags & READONLY))
            self._make(arena, [slot], self._free_number(slot.slot), slot.flags)
        elif len(touched) == 1 and touched[0].fits(slot):
            self._place(touched[0], slot)
        else:
            self._grow(touched, slot)
        self.table.add(slot)

    def delete(self, slot: Slot) -> Slot:
        """The slot that was held.  Raises SlotRefused."""
        held = self._held(slot, "delete")
        real = self._at(held.gpa)
        alone = len(real.members) == 1
        if alone:
            real.delete(slot)
            self._leave(real)
        else:
            for start, end in held.mapped:
                real.show(Piece(start, end), held)
            del real.members[held.slot]
        self.table.remove(held.as_id, held.slot)
        if not alone:
            real.set_log(held)
        return held

    def set_flags(self, slot: Slot) -> None:
        """Raises SlotRefused: EINVAL when anything but LOG_DIRTY_PAGES would change."""
        held = self._held(slot, "change")
        real = self._at(held.gpa)
        new = replace(held, flags=slot.flags)
        if held.size == real.arena.size and len(real.members) == 1:
            real.set(slot.flags, "change", new)
        elif (held.flags ^ slot.flags) & ~LOG_DIRTY_PAGES:
            raise refused("change", slot, errno.EINVAL)
        else:
            real.members[held.slot] = new
            try:
                real.set_log(new)
            except SlotRefused:
                real.members[held.slot] = held
                raise
        self._replace(real, new)

    def set_hole(self, slot: Slot, start: int, end: int) -> None:
        """Raises SlotRefused: EINVAL when not all of it is reached through the slot."""
        what = f"make a hole at {start:#x}+{end - start:#x} in"
        held = self._held(slot, what)
        if start >= end or not any(low <= start and end <= high for low, high in held.mapped):
            raise refused(what, slot, errno.EINVAL)
        real = self._at(held.gpa)
        real.show(Piece(start, end), held)
        self._replace(real, held.with_hole(start, end))

    def clear_hole(self, slot: Slot, start: int, end: int) -> None:
        """Raises SlotRefused: EINVAL when not all of it is a hole, EEXIST when a slot is there."""
        what = f"close the hole at {start:#x}+{end - start:#x} in"
        held = self._held(slot, what)
        if start >= end or not any(low <= start and end <= high for low, high in held.holes):
            raise refused(what, slot, errno.EINVAL)
        if self.table.overlapping(_MEMORY, start, end):
            raise refused(what, slot, errno.EEXIST)
        real = self._at(held.gpa)
        real.show(piece_of(held, (start, end)), held)
        self._replace(real, held.without_hole(start, end))

    # -- as a whole ----------------------------------------------------------------------------

    def real(self) -> list[Slot]:
        """The slots as KVM has them, by address."""
        return [real.slot for real in self._reals]

    def spans(self) -> list[tuple[int, int]]:
        """The addresses of KVM's slots, ascending."""
        return [(r.gpa, r.end) for r in self._reals]

    def move_to(self, vm: LabVm) -> None:
        """Make the same slots in another VM; the dirty bits come along.

        Raises SlotRefused; then the old VM is the one that counts.
        """
        for real in self._reals:
            real.make_in(vm)
        for real in self._reals:
            if real.logged:
                real.carry()
        self.context.vm = vm

    def dirty_pages(self) -> frozenset[int]:
        """gpas of pages written through logged slots, not reported before.  Raises SlotRefused."""
        logged = (real for real in self._reals if real.logged)
        return frozenset(page for real in logged for page in real.take_dirty())

    def wrong_logs(self) -> Iterator[str]:
        """Where KVM has a dirty log and should have none, or the other way round, in words.

        Logs are fetched by that, and their bits kept.  Raises SlotRefused.
        """
        for real in self._reals:
            try:
                real.carry()
                logged = True
            except SlotRefused as exc:
                if exc.errno != errno.ENOENT:
                    raise
                logged = False
            if logged != real.logged:
                has = "has a dirty log" if logged else "has no dirty log"
                yield f"KVM's slot {real.number} at {real.gpa:#x}+{real.arena.size:#x} {has}"

    def close(self) -> None:
        """Give host mappings back; the VM must be gone."""
        for real in self._reals:
            real.close()
        self._reals.clear()
        self._numbers.clear()
        self.table = SlotTable()

    # -- how a slot comes ----------------------------------------------------------------------

    def _make(self, arena: Arena, slots: Sequence[Slot], number: int, flags: int | None) -> None:
        """`flags` None: those that the slots need."""
        real = RealSlot(self.context, arena, slots, number, slots[0])
        try:
            real.set(real.wanted_flags if flags is None else flags, "add", slots[0])
        except BaseException:
            real.close()
            raise
        self._enter(real)

    def _place(self, real: RealSlot, slot: Slot) -> None:
        """Into an arena that holds it."""
        done: list[Piece] = []
        try:
            for r in slot.mapped:
                piece = piece_of(slot, r)
                real.show(piece, slot)
                done.append(piece)
            real.members[slot.slot] = slot
            real.set_log(slot)
        except OperationFailed:
            real.members.pop(slot.slot, None)
            for piece in done:
                real.show(Piece(piece.start, piece.end), slot)
            raise
        self.context.counts.placed += 1

    def _grow(self, touched: list[RealSlot], slot: Slot) -> None:
        """One arena in place of those, with room for `slot`; vCPUs are held meanwhile."""
        members = [s for real in touched for s in real.members.values()]
        start = min(slot.gpa, touched[0].gpa)
        end = max(slot.end, touched[-1].end)
        readonly = all(s.flags & READONLY for s in (*members, slot))
        arena = Arena(_MEMORY, start, end - start, readonly)
        number = max(touched, key=lambda real: real.arena.size).number
        new = RealSlot(self.context, arena, (*members, slot), number, slot)
        try:
            with self._paused():
                for old in touched:
                    if old.logged:
                        old.carry()
                        new.inherit(old)
                    old.delete(slot)
                    self._leave(old)
                    for s in old.members.values():
                        self.table.remove(s.as_id, s.slot)
                new.set(new.wanted_flags, "grow an arena for", slot)
        except BaseException:
            new.close()
            raise
        self._enter(new)
        for s in members:
            self.table.add(s)
        self.context.counts.grown += 1

    def _let_kvm_refuse(self, slot: Slot) -> None:
        """KVM's own answer to a slot that cannot be."""
        number = self._free_number(slot.slot)
        result = self.context.vm.region(number, slot.gpa, max(slot.size, 0), PAGE, slot.flags)
        assert result < 0, "KVM takes neither slots that overlap nor parts of pages"
        raise refused("add", slot, -result)

    def _enter(self, real: RealSlot) -> None:
        insort(self._reals, real, key=_place)
        self._numbers.add(real.number)

    def _leave(self, real: RealSlot) -> None:
        self._reals.remove(real)
        self._numbers.discard(real.number)

    # -- finding -------------------------------------------------------------------------------

    def _overlapping(self, start: int, end: int) -> list[RealSlot]:
        first = bisect_right(self._reals, (_MEMORY, start), key=_place) - 1
        if first < 0 or self._reals[first].end <= start:
            first += 1
        return self._reals[first : bisect_left(self._reals, (_MEMORY, end), key=_place)]

    def _at(self, gpa: int) -> RealSlot:
        return self._reals[bisect_right(self._reals, (_MEMORY, gpa), key=_place) - 1]

    def _clashes(self, slot: Slot) -> bool:
        return any(self.table.overlapping(_MEMORY, *r) for r in slot.mapped)

    def _free_number(self, wanted: int) -> int:
        """The id of the plan where it is free, so that KVM's slots have the ids of QEMU's."""
        if wanted not in self._numbers and 0 <= wanted < self._last_id:
            return wanted
        number = self._last_id - 1
        while number in self._numbers:
            number -= 1
        return number

    def _held(self, slot: Slot, verb: str) -> Slot:
        held = self.table.get(slot.as_id, slot.slot)
        if held is None or (held.gpa, held.size) != (slot.gpa, slot.size):
            raise refused(verb, slot, errno.EINVAL)
        return held

    def _replace(self, real: RealSlot, new: Slot) -> None:
        self.table.remove(new.as_id, new.slot)
        self.table.add(new)
        real.members[new.slot] = new


def _place(real: RealSlot) -> tuple[int, int]:
    return real.arena.as_id, real.gpa
