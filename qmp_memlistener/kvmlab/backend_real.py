"""One real slot of a mirror on the lab: KVM's slot, what the host maps behind it, its dirty log.

It is an arena (see `arenas`) that shows one or several slots of the plans.  Which slots share one
is decided in `backend_slots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..errors import OperationFailed
from ..memslots import LOG_DIRTY_PAGES, READONLY, Slot
from . import system
from .arenas import Arena, Piece, shown
from .backend_memory import Blocks
from .host_memory import PAGE, Reservation
from .vm import LabVm, SlotRefused

__all__ = ["Ground", "RealSlot", "SlotCounts", "refused"]

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
class Ground:
    """What real slots stand on: the VM they are in, the RAM blocks, the counts."""

    vm: LabVm
    blocks: Blocks = field(default_factory=Blocks)
    counts: SlotCounts = field(default_factory=SlotCounts)


class RealSlot:
    """KVM's slot `number` over `arena`, once `set` was called; `members` are the slots it shows.

    What it shows is mapped before.  Raises OperationFailed when the host has no room.
    """

    def __init__(
        self, ground: Ground, arena: Arena, members: Iterable[Slot], number: int, about: Slot
    ) -> None:
        self.arena = arena
        self.number = number
        self.flags = 0
        self.members = {s.slot: s for s in members}
        self.carried = 0  # dirty bits that were fetched and are still to be told
        self._ground = ground
        self._room = Reservation(arena.size)
        try:
            for piece in shown(arena, self.members.values()):
                if piece.block is not None:
                    self.show(piece, about)
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
    def logged(self) -> bool:
        return bool(self.flags & LOG_DIRTY_PAGES)

    @property
    def wanted_flags(self) -> int:
        """Those of a slot on its own, else what all in it need."""
        slots = list(self.members.values())
        if len(slots) == 1 and slots[0].size == self.arena.size:
            return slots[0].flags
        log = LOG_DIRTY_PAGES if any(s.logged for s in slots) else 0
        return log | (READONLY if self.arena.readonly else 0)

    def fits(self, slot: Slot) -> bool:
        """It can come by mapping: a live slot stays READONLY."""
        return self.arena.holds(slot) and (not self.arena.readonly or bool(slot.flags & READONLY))

    # -- KVM -----------------------------------------------------------------------------------

    def set(self, flags: int, verb: str, about: Slot) -> None:
        """Make the slot, or change its flags.  Raises SlotRefused, which says `verb about`."""
        self._set(self._ground.vm, flags, verb, about)
        self.flags = flags
        if not self.logged:
            self.carried = 0

    def set_log(self, about: Slot) -> None:
        """Log as long as one of the slots in it is logged.  Raises SlotRefused."""
        log = LOG_DIRTY_PAGES if any(s.logged for s in self.members.values()) else 0
        if self.flags & LOG_DIRTY_PAGES != log:
            self.set(self.flags ^ LOG_DIRTY_PAGES, "log", about)

    def make_in(self, vm: LabVm) -> None:
        """Make the same slot in another VM.  Raises SlotRefused."""
        self._set(vm, self.flags, "move", next(iter(self.members.values())))

    def delete(self, about: Slot) -> None:
        """Delete the slot, and give back what is mapped there.  Raises SlotRefused."""
        result = self._ground.vm.region(self.number, self.gpa, 0, self._room.hva)
        if result:
            raise refused("delete", about, -result)
        self._ground.counts.ioctls += 1
        self.close()

    def _set(self, vm: LabVm, flags: int, verb: str, about: Slot) -> None:
        result = vm.region(self.number, self.gpa, self.arena.size, self._room.hva, flags)
        if result:
            raise refused(verb, about, -result)
        self._ground.counts.ioctls += 1

    # -- what is mapped ------------------------------------------------------------------------

    def show(self, piece: Piece, about: Slot) -> None:
        """Change what is behind a part, in one step.  Raises OperationFailed."""
        at, size = piece.start - self.gpa, piece.end - piece.start
        try:
            if piece.block is None:
                self._room.clear(at, size)
            else:
                system.mmap(
                    size,
                    system.PROT_READ if piece.flags & READONLY else _BOTH,
                    system.MAP_SHARED | system.MAP_FIXED | system.MAP_NORESERVE,
                    self._ground.blocks.reach(piece.block, piece.offset + size),
                    piece.offset,
                    self._room.hva + at,
                )
        except OSError as exc:
            raise OperationFailed(
                f"the host cannot map {piece.start:#x}+{size:#x} of {about}: {exc.strerror}",
                remedy="raise vm.max_map_count, or free memory on the host",
            ) from exc
        self._ground.counts.mappings += 1

    # -- the dirty log -------------------------------------------------------------------------

    def carry(self) -> None:
        """Fetch the dirty log, which clears it, and keep the bits.  Raises SlotRefused."""
        log = self._ground.vm.dirty_log(self.number, self.arena.size)
        self.carried |= int.from_bytes(log, "little")

    def inherit(self, other: RealSlot) -> None:
        """Take over the bits that a slot in this one's place carried."""
        self.carried |= other.carried << (other.gpa - self.gpa) // PAGE

    def take_dirty(self) -> Iterator[int]:
        """gpas of dirty pages that logged slots in it show, each told once.  Raises SlotRefused."""
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
