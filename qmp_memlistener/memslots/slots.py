"""A memslot and the table of them: lookups by id, by exact range and by address.

A slot has what KVM has (id, range, flags) and, where that is known, the RAM block that backs it.
How QEMU fills and changes a table is in `rules`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappop, heappush, heapreplace
from itertools import count, pairwise
from typing import NamedTuple

import msgspec

from ..errors import InputError
from .intervals import complement, cut, join, put

__all__ = [
    "GUEST_MEMFD",
    "LOG_DIRTY_PAGES",
    "READONLY",
    "Backing",
    "BlockKey",
    "Slot",
    "SlotTable",
    "bitmap_bytes",
]

LOG_DIRTY_PAGES = 1
READONLY = 2
GUEST_MEMFD = 4

AS_SHIFT = 16
"""`kvm_userspace_memory_region.slot` carries the address space from this bit on (api.rst)."""
LAST_SLOT = (1 << AS_SHIFT) - 1

MOST_PAGES = (1 << 31) - 1
"""Of a slot: KVM_MEM_MAX_NR_PAGES (Linux, include/linux/kvm_host.h)."""

BlockKey = tuple[str, str | None, int, int]
"""What a slot that follows its RAM block stands for: the block's name and owner, gpa minus offset
in the block, and the flags that no live slot can change (READONLY, GUEST_MEMFD)."""


class Backing(NamedTuple):
    """What is behind a slot or a page: RAM block, its owner, the offset of the first byte in it."""

    block: str | None
    owner: str | None
    offset: int

    def __str__(self) -> str:
        return f"{self.block} @{self.offset:#x}"


class Slot(msgspec.Struct, frozen=True, gc=False):
    """`[gpa, gpa + size)` of address space `as_id`, backed by host memory.

    `block`, `owner` and `offset` (of the first byte, in the memory region) name what backs it
    when that is known.  `follows_block` marks a slot of the `hole` strategy: it spans the whole
    extent at which its block may be mapped, less `holes`, which are half-open gpa ranges in
    ascending order.
    """

    as_id: int
    slot: int
    gpa: int
    size: int
    flags: int = 0
    block: str | None = None
    owner: str | None = None
    offset: int | None = None
    holes: tuple[tuple[int, int], ...] = ()
    follows_block: bool = False

    @property
    def end(self) -> int:
        """First address behind the slot."""
        return self.gpa + self.size

    @property
    def kvm_slot(self) -> int:
        """The number the ioctl takes: the address space in the upper 16 bits."""
        return self.as_id << AS_SHIFT | self.slot

    @property
    def logged(self) -> bool:
        """KVM keeps a dirty bitmap for it."""
        return bool(self.flags & LOG_DIRTY_PAGES)

    @property
    def key(self) -> BlockKey | None:
        """Its RAM block and place, None when what backs it is not known."""
        if self.block is None or self.offset is None:
            return None
        return (self.block, self.owner, self.gpa - self.offset, self.flags & ~LOG_DIRTY_PAGES)

    @property
    def mapped(self) -> tuple[tuple[int, int], ...]:
        """The ranges the guest reaches through it: all of it, less the holes."""
        if not self.holes:
            return ((self.gpa, self.gpa + self.size),)
        return tuple(complement(self.gpa, self.end, self.holes))

    def with_hole(self, start: int, end: int) -> Slot:
        """The same slot with a hole at `[start, end)`, joined with those that it touches."""
        holes = list(self.holes)
        put(holes, start, end)
        return msgspec.structs.replace(self, holes=tuple(holes))

    def without_hole(self, start: int, end: int) -> Slot:
        """The same slot reached at `[start, end)`."""
        holes = list(self.holes)
        cut(holes, start, end)
        return msgspec.structs.replace(self, holes=tuple(holes))

    def __str__(self) -> str:
        return f"slot {self.slot} of address space {self.as_id} ({self.gpa:#x}+{self.size:#x})"


def bitmap_bytes(size: int, page_size: int = 4096) -> int:
    """Bytes of the dirty bitmap of a slot of `size` bytes: a bit a page, in whole 64-bit words.

    That is what KVM_GET_DIRTY_LOG transfers (Linux, Documentation/virt/kvm/api.rst 4.8) and what
    `kvm_slot_init_dirty_bitmap` (QEMU, accel/kvm/kvm-all.c) allocates.
    """
    return (size // page_size + 63) // 64 * 8


class _Entry(msgspec.Struct, forbid_unknown_fields=False):
    """A slot in a file of ours."""

    slot: int
    gpa: int
    size: int
    flags: int = 0
    as_id: int | None = None


def _slot_of(e: _Entry) -> Slot:
    as_id = e.slot >> AS_SHIFT if e.as_id is None else e.as_id
    slot_id = e.slot & LAST_SLOT if e.as_id is None else e.slot
    fits = 0 <= slot_id <= LAST_SLOT and 0 <= as_id <= LAST_SLOT and 0 <= e.flags < 1 << 32
    if not fits or e.slot < 0 or e.gpa < 0 or e.size <= 0 or e.gpa + e.size > 1 << 64:
        raise InputError(
            f"not a memslot: {msgspec.to_builtins(e)}",
            remedy="an id has 16 bits, flags 32, and a range lies within 64 bits",
        )
    return Slot(as_id, slot_id, e.gpa, e.size, e.flags)


_Piece = tuple[int, int, int]  # start, end, slot id


class _Space:
    """The slots of one address space."""

    __slots__ = ("by_id", "free", "pieces", "top")

    def __init__(self) -> None:
        self.by_id: dict[int, Slot] = {}
        self.pieces: list[_Piece] = []  # what is mapped, ascending, disjoint
        # heap of runs of ids below `top`, first and last; may hold ids used since
        self.free: list[tuple[int, int]] = []
        self.top = 0  # every id from here on is free

    def copy(self) -> _Space:
        new = _Space()
        new.by_id = self.by_id.copy()
        new.pieces = self.pieces.copy()
        new.free = self.free.copy()
        new.top = self.top
        if len(new.free) > 2 * len(new.by_id) + 16:
            new.free = new.gaps()  # a table may be copied for ever
        return new

    def gaps(self) -> list[tuple[int, int]]:
        """The free ids below `top` as runs, ascending, which is a heap too."""
        used = [-1, *sorted(self.by_id), self.top]
        return [(a + 1, b - 1) for a, b in pairwise(used) if b - a > 1]

    def use(self, slot_id: int) -> None:
        if slot_id > self.top:
            heappush(self.free, (self.top, slot_id - 1))
        self.top = max(self.top, slot_id + 1)

    def lowest_free(self) -> int:
        while self.free:
            first, last = self.free[0]
            if first not in self.by_id:
                return first
            if first == last:
                heappop(self.free)
            else:
                heapreplace(self.free, (first + 1, last))
        return self.top


class SlotTable:
    """The memslots of a VM, by address space.

    What is mapped never overlaps within an address space (with `hole` slots, a slot may lie in
    another one's hole).  `retired` remembers, by what it stood for, the last form of each `hole`
    slot that is gone, so that it comes back under its old id.  `elsewhere` has, by address space,
    ids in use by slots whose place is unknown.  `qemu` are the slots that QEMU has where KVM has
    pieces of them (`hole-split`); None: the same.  These three take no part in comparisons.

    `add` and `remove` shift a flat list, so they cost O(log n) and a move of a few bytes for each
    slot behind; the constructor is O(n log n) for all.  Raises InputError for an id used twice
    or for ranges that overlap.
    """

    __slots__ = ("_spaces", "elsewhere", "qemu", "retired")

    def __init__(
        self,
        slots: Iterable[Slot] = (),
        *,
        retired: Mapping[tuple[object, ...], Slot] | None = None,
        elsewhere: Mapping[int, frozenset[int]] | None = None,
        qemu: SlotTable | None = None,
    ) -> None:
        self._spaces: dict[int, _Space] = {}
        self.qemu = qemu
        self.elsewhere: dict[int, frozenset[int]] = dict(elsewhere or {})
        self.retired: dict[tuple[object, ...], Slot] = dict(retired or {})
        for slot in slots:
            space = self._space(slot.as_id)
            _check(slot, space)
            space.by_id[slot.slot] = slot
            if slot.slot >= space.top:
                space.use(slot.slot)
            if slot.holes:
                space.pieces.extend((start, end, slot.slot) for start, end in slot.mapped)
            else:
                space.pieces.append((slot.gpa, slot.gpa + slot.size, slot.slot))
        for space in self._spaces.values():
            space.pieces.sort()
            last_end, last_id = 0, -1
            for start, end, slot_id in space.pieces:
                if start < last_end:
                    raise _overlap(space.by_id[slot_id], space.by_id[last_id])
                last_end, last_id = end, slot_id

    @classmethod
    def from_json(cls, data: bytes | str | list[object]) -> SlotTable:
        """The table from a list `[{"slot":…,"gpa":…,"size":…,"flags":…}]`, as JSON or decoded.

        `slot` may carry the address space in its upper 16 bits, as the ioctl and QEMU <= 9.0's
        trace do, or there is an `as_id`.  Raises InputError.
        """
        try:
            if isinstance(data, bytes | str):
                entries = msgspec.json.decode(data, type=list[_Entry])
            else:
                entries = msgspec.convert(data, type=list[_Entry])
        except msgspec.MsgspecError as exc:
            raise InputError(
                f"not a list of memslots: {exc}",
                remedy='give [{"slot": 0, "gpa": 0, "size": 4096, "flags": 0}, ...] '
                "with integers only",
            ) from exc
        return cls(_slot_of(e) for e in entries)

    def copy(self) -> SlotTable:
        """A table of its own with the same slots."""
        new = SlotTable(retired=self.retired, elsewhere=self.elsewhere, qemu=self.qemu)
        new._spaces = {as_id: space.copy() for as_id, space in self._spaces.items()}
        return new

    def add(self, slot: Slot) -> None:
        """Put a slot in.  Raises InputError when its id is in use or its range overlaps."""
        space = self._space(slot.as_id)
        _check(slot, space)
        pieces = space.pieces
        for start, end in slot.mapped:
            i = bisect_left(pieces, (end,))
            if i and pieces[i - 1][1] > start:
                raise _overlap(slot, space.by_id[pieces[i - 1][2]])
        space.by_id[slot.slot] = slot
        space.use(slot.slot)
        for start, end in slot.mapped:
            insort(pieces, (start, end, slot.slot))

    def remove(self, as_id: int, slot_id: int) -> Slot:
        """Take a slot out and return it.  Raises InputError when there is none."""
        space = self._space(as_id)
        slot = space.by_id.pop(slot_id, None)
        if slot is None:
            raise InputError(f"address space {as_id} has no slot {slot_id}")
        for start, end in slot.mapped:
            del space.pieces[bisect_left(space.pieces, (start, end, slot_id))]
        heappush(space.free, (slot_id, slot_id))
        return slot

    def get(self, as_id: int, slot_id: int) -> Slot | None:
        """The slot with this id."""
        space = self._spaces.get(as_id)
        return space.by_id.get(slot_id) if space else None

    def exact(self, as_id: int, gpa: int, size: int) -> Slot | None:
        """The slot with exactly this range: `kvm_lookup_matching_slot` (kvm-all.c).  O(log n)."""
        slot = self.at(as_id, gpa)
        return slot if slot is not None and (slot.gpa, slot.size) == (gpa, size) else None

    def at(self, as_id: int, addr: int) -> Slot | None:
        """The slot through which the guest reaches `addr`; None in a hole.  O(log n)."""
        space = self._spaces.get(as_id)
        if space is None:
            return None
        i = bisect_right(space.pieces, (addr, 1 << 65)) - 1
        if i >= 0 and addr < space.pieces[i][1]:
            return space.by_id[space.pieces[i][2]]
        return None

    def overlapping(self, as_id: int, start: int, end: int) -> tuple[Slot, ...]:
        """The slots with anything mapped in `[start, end)`, in address order, each once."""
        space = self._spaces.get(as_id)
        if space is None:
            return ()
        first = max(bisect_right(space.pieces, (start, 1 << 65)) - 1, 0)
        found: dict[int, Slot] = {}
        for piece_start, piece_end, slot_id in space.pieces[first:]:
            if piece_start >= end:
                break
            if piece_end > start:
                found[slot_id] = space.by_id[slot_id]
        return tuple(found.values())

    def lowest_free(self, as_id: int) -> int:
        """The id QEMU gives to the next slot: the lowest free one (`kvm_get_free_slot`)."""
        space = self._space(as_id)
        elsewhere = self.elsewhere.get(as_id)
        if not elsewhere:
            return space.lowest_free()
        return next(i for i in count() if i not in elsewhere and i not in space.by_id)

    def as_ids(self) -> tuple[int, ...]:
        """The address spaces that have slots, ascending."""
        return tuple(sorted(a for a, space in self._spaces.items() if space.by_id))

    def mapped(self, as_id: int) -> tuple[tuple[int, int], ...]:
        """The memory the guest reaches: ascending half-open ranges, joined where they touch."""
        space = self._spaces.get(as_id)
        return tuple(join((start, end) for start, end, _ in space.pieces)) if space else ()

    def slots(self, as_id: int) -> list[Slot]:
        """The slots of one address space by gpa (then id)."""
        space = self._spaces.get(as_id)
        return sorted(space.by_id.values(), key=lambda s: (s.gpa, s.slot)) if space else []

    def __iter__(self) -> Iterator[Slot]:
        for as_id in sorted(self._spaces):
            yield from self.slots(as_id)

    def __len__(self) -> int:
        return sum(len(space.by_id) for space in self._spaces.values())

    def __eq__(self, other: object) -> bool:
        """Same ids, ranges, flags and holes; names of what backs them do not count."""
        if not isinstance(other, SlotTable):
            return NotImplemented
        return self._facts() == other._facts()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"SlotTable({list(self)!r})"

    def _facts(self) -> set[tuple[int, int, int, int, int, tuple[tuple[int, int], ...]]]:
        return {
            (s.as_id, s.slot, s.gpa, s.size, s.flags, s.holes)
            for space in self._spaces.values()
            for s in space.by_id.values()
        }

    def _space(self, as_id: int) -> _Space:
        space = self._spaces.get(as_id)
        if space is None:
            space = self._spaces[as_id] = _Space()
        return space


def _check(slot: Slot, space: _Space) -> None:
    if slot.slot in space.by_id:
        raise InputError(
            f"{slot} and {space.by_id[slot.slot]} have the same id",
            remedy="give each slot of an address space an id of its own",
        )
    if slot.size <= 0 or not 0 <= slot.slot <= LAST_SLOT:
        raise InputError(f"{slot} is not a memslot")


def _overlap(a: Slot, b: Slot) -> InputError:
    return InputError(
        f"{a} overlaps {b}",
        remedy="give the slots of the same moment as the map that goes with them",
    )
