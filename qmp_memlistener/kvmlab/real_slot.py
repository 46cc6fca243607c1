"""One real slot of KVM: an arena, what the host maps behind it, and its dirty log.

An arena (see `arenas`) shows one or several slots of plans.  Punching and filling a hole, and
swapping one RAM block for another, change what is mapped there; KVM learns of it through its MMU
notifier, and no slot operation is made.  Which slots share an arena is decided in `real_slots`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import OperationFailed
from ..memslots import LOG_DIRTY_PAGES, READONLY, Slot
from ..memslots.intervals import Range, cut, intersect, put, subtract
from ..memslots.slots import AS_SHIFT
from . import system
from .arenas import Arena, Piece, shown
from .memory import PAGE, BlockName, Reservation
from .strategies import HoleKind
from .userfault import Userfault
from .vm import LabVm, SlotRefused

__all__ = ["LabContext", "RealSlot", "SlotCounts", "refused"]

_BOTH = system.PROT_READ | system.PROT_WRITE


@dataclass(slots=True)
class SlotCounts:
    """What was done so far.

    `ioctls` are KVM_SET_USER_MEMORY_REGION calls that succeeded, `mappings` changes of what the
    host maps behind a slot.  `placed` slots came by mapping alone, into an arena; `grown` arenas
    had to be deleted and added again for one.
    """

    ioctls: int = 0
    mappings: int = 0
    placed: int = 0
    grown: int = 0


@dataclass(slots=True)
class LabContext:
    """What real slots share: the VM they are in, its memory, how holes are made, the counts.

    `reach` gives the file of a RAM block, at least so many bytes long.  `userfault` is open for
    holes of that kind.
    """

    vm: LabVm
    reach: Callable[[BlockName, int], int]
    kind: HoleKind = HoleKind.MUNMAP
    userfault: Userfault | None = None
    counts: SlotCounts = field(default_factory=SlotCounts)


class RealSlot:
    """KVM's slot `number` over `arena`, once `set` was called; `members` are the slots it shows.

    What it shows is mapped before.  Raises OperationFailed when the host has no room; then and in
    `show` the cause is the OSError.
    """

    def __init__(
        self, context: LabContext, arena: Arena, members: Iterable[Slot], number: int, about: Slot
    ) -> None:
        self.arena = arena
        self.number = number
        self.flags = 0
        self.members = {s.slot: s for s in members}
        self.carried = 0  # dirty bits that were fetched and are still to be reported
        self._context = context
        self._room = Reservation(arena.size)
        self._placed: list[Piece] = []
        self._watched: list[Range] = []  # by userfaultfd
        try:
            for piece in shown(arena, self.members.values()):
                if piece.block is not None:
                    self.show(piece, about)
                elif context.kind is HoleKind.ATTRIBUTES:
                    self._hide(piece)
        except BaseException:
            self.close()
            raise

    @property
    def gpa(self) -> int:
        return self.arena.gpa

    @property
    def end(self) -> int:
        return self.arena.end

    @property
    def slot(self) -> Slot:
        """As KVM has it."""
        number = self.number & (1 << AS_SHIFT) - 1
        return Slot(self.arena.as_id, number, self.gpa, self.arena.size, self.flags)

    @property
    def logged(self) -> bool:
        return bool(self.flags & LOG_DIRTY_PAGES)

    @property
    def wanted_flags(self) -> int:
        """Those that all in it need."""
        log = LOG_DIRTY_PAGES if any(s.logged for s in self.members.values()) else 0
        return log | (READONLY if self.arena.readonly else 0)

    def fits(self, slot: Slot) -> bool:
        """It can come by mapping: a live slot stays READONLY."""
        return self.arena.holds(slot) and (not self.arena.readonly or bool(slot.flags & READONLY))

    # -- KVM -----------------------------------------------------------------------------------

    def set(self, flags: int, verb: str, about: Slot) -> None:
        """Make the slot, or change its flags.  Raises SlotRefused, which says `verb about`."""
        self._set(self._context.vm, flags, verb, about)
        self.flags = flags
        if not self.logged:
            self.carried = 0

    def set_log(self, about: Slot) -> None:
        """Log as long as one of the slots in it is logged.  Raises SlotRefused."""
        if (self.flags ^ self.wanted_flags) & LOG_DIRTY_PAGES:
            self.set(self.flags ^ LOG_DIRTY_PAGES, "log", about)

    def make_in(self, vm: LabVm) -> None:
        """Make the same slot in another VM.  Raises SlotRefused."""
        self._set(vm, self.flags, "move", next(iter(self.members.values())))

    def delete(self, about: Slot) -> None:
        """Delete the slot, and give back what is mapped there.  Raises SlotRefused."""
        result = self._context.vm.region(self.number, self.gpa, 0, self._room.hva)
        if result:
            raise refused("delete", about, -result)
        self._context.counts.ioctls += 1
        self.close()

    def _set(self, vm: LabVm, flags: int, verb: str, about: Slot) -> None:
        result = vm.region(self.number, self.gpa, self.arena.size, self._room.hva, flags)
        if result:
            raise refused(verb, about, -result)
        self._context.counts.ioctls += 1

    # -- what is mapped ------------------------------------------------------------------------

    def show(self, piece: Piece, about: Slot) -> None:
        """Change what is behind a part, in one step.  Raises OperationFailed."""
        try:
            if piece.block is None:
                self._hide(piece)
            elif self._is_placed(piece):
                self._uncover(piece)
            else:
                self._place(piece, piece.block)
        except OSError as exc:
            size = piece.end - piece.start
            raise OperationFailed(
                f"the host cannot map {piece.start:#x}+{size:#x} of {about}: {exc.strerror}",
                remedy="raise vm.max_map_count, or free memory on the host",
            ) from exc
        self._context.counts.mappings += 1

    def _hide(self, piece: Piece) -> None:
        at, size = piece.start - self.gpa, piece.end - piece.start
        context = self._context
        if context.kind is HoleKind.MPROTECT:
            system.mprotect(self._room.hva + at, size, system.PROT_NONE)
        elif context.kind is HoleKind.MUNMAP:
            self._room.clear(at, size)
            self._forget(piece)
        elif context.kind is HoleKind.ATTRIBUTES:
            context.vm.set_private(piece.start, size, True)
        else:
            assert context.userfault is not None, "open for this kind"
            context.userfault.punch(self._room.hva + at, size)
            put(self._watched, piece.start, piece.end)

    def _uncover(self, piece: Piece) -> None:
        """What lies there already can be reached again."""
        at, size = piece.start - self.gpa, piece.end - piece.start
        context = self._context
        if context.kind is HoleKind.ATTRIBUTES:
            context.vm.set_private(piece.start, size, False)
        elif context.kind is not HoleKind.USERFAULT:
            system.mprotect(self._room.hva + at, size, self._protection(piece))
        else:
            # a slot made anew shows other parts of it all the time
            assert context.userfault is not None, "open for this kind"
            for low, high in intersect(self._watched, piece.start, piece.end):
                context.userfault.fill(self._room.hva + low - self.gpa, high - low)
            cut(self._watched, piece.start, piece.end)

    def _place(self, piece: Piece, block: BlockName) -> None:
        cut(self._watched, piece.start, piece.end)
        at, size = piece.start - self.gpa, piece.end - piece.start
        file = self._context.reach(block, piece.offset + size)
        self._room.place(at, size, file, piece.offset, self._protection(piece))
        if self._context.kind is HoleKind.ATTRIBUTES:
            # attributes are the VM's: an earlier slot here may have left a hole
            self._context.vm.set_private(piece.start, size, False)
        self._forget(piece)
        self._placed.append(piece)

    def _protection(self, piece: Piece) -> int:
        """ROM in an arena with RAM: the slot is writable, its mapping is not."""
        return system.PROT_READ if piece.flags & READONLY and not self.arena.readonly else _BOTH

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

    def gpa_of(self, hva: int) -> int:
        """The guest's address of one of ours, -1 when it lies elsewhere."""
        inside = 0 <= hva - self._room.hva < self._room.size
        return hva - self._room.hva + self.gpa if inside else -1

    # -- the dirty log -------------------------------------------------------------------------

    def carry(self) -> None:
        """Fetch the dirty log, which clears it, and keep the bits.  Raises SlotRefused."""
        log = self._context.vm.dirty_log(self.number, self.arena.size)
        self.carried |= int.from_bytes(log, "little")

    def inherit(self, other: RealSlot) -> None:
        """Take over the bits that a slot in this one's place carried."""
        self.carried |= other.carried << (other.gpa - self.gpa) // PAGE

    def take_dirty(self) -> Iterator[int]:
        """gpas of dirty pages that logged slots in it show, each once.  Raises SlotRefused."""
        self.carry()
        bits, self.carried = self.carried, 0
        for slot in self.members.values():
            if slot.logged:
                for start, end in slot.mapped:
                    yield from _dirty_in(bits, self.gpa, start, end)

    def close(self) -> None:
        """Give back what is mapped; the slot must be gone, or the VM."""
        self._room.close()


def refused(verb: str, slot: Slot, number: int) -> SlotRefused:
    """KVM refused to `verb` the slot, with this errno."""
    return SlotRefused(f"to {verb} {slot}", number)


def _dirty_in(bits: int, gpa: int, start: int, end: int) -> Iterator[int]:
    """gpas of the pages in `[start, end)` whose bit is set; bit 0 is the page at `gpa`."""
    part = bits >> (start - gpa) // PAGE & (1 << (end - start) // PAGE) - 1
    for at, byte in enumerate(part.to_bytes((part.bit_length() + 7) // 8, "little")):
        while byte:
            low = byte & -byte
            yield start + (at * 8 + low.bit_length() - 1) * PAGE
            byte ^= low
