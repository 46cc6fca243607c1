"""The sorted array in which KVM kept its slots up to Linux 5.16, counted.  Pure.

It is the shape of Linux' `struct kvm_memslots`, not its code.  Slots lie by descending guest frame
and `search_memslots` halves them.  The set is under SRCU, so each update copies it (`memcpy` in
`kvm_dup_memslots`; since 5.7, commit 36947254e5f9, only the slots in use) and shifts slots by one
place in the copy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from .lookup_steps import Found, Interval, UpdateWork, holds

__all__ = ["ARRAY_5_7", "ARRAY_5_14", "SLOT_BYTES", "ArrayLayout", "SlotArray"]

SLOT_BYTES = 88
"""`struct kvm_memory_slot` of x86-64 in 5.7 to 5.16."""


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """The array of one span of Linux versions, x86-64.

    `header_bytes` precede the slots and are copied with them: most of it is a table from slot id to
    place, two bytes for each id there can be.  `copies_to_remove` counts the slot's invalidation,
    which vCPUs must see before it goes.
    """

    name: str
    header_bytes: int
    most_slots: int
    copies_to_remove: int


ARRAY_5_7 = ArrayLayout("array_5_7", 8 + 2 * 512 + 8, 509, 1)
"""5.7 to 5.11: 509 slots of the user's, three of KVM's own."""

ARRAY_5_14 = ArrayLayout("array_5_14", 8 + 2 * 32_767 + 2 + 8, 32_764, 2)
"""5.14 to 5.16: many more slots (commit 4fc096a99e01 of 5.12), and fields of the architecture that
may change while the slot is invalid (b10a038e84d1), so the set is copied again after that."""


class SlotArray:
    """Slots by descending start; they must not overlap.

    `find` is `search_memslots`, `find_cached` goes through the slot found last, as
    `last_used_slot` (5.15, before that `lru_slot`) does.
    """

    def __init__(self, slots: Iterable[Interval], layout: ArrayLayout = ARRAY_5_14) -> None:
        self._slots = sorted(slots, reverse=True)
        self._layout = layout
        self._last_used = 0

    def forget(self) -> None:
        """As if nothing had been found yet: KVM begins with the first place."""
        self._last_used = 0

    def find(self, page: int) -> Found:
        """Halve until one slot is left, then ask whether it holds the page."""
        slots = self._slots
        low, high = 0, len(slots)
        steps = 0
        while low < high:
            middle = (low + high) // 2
            steps += 1
            if page >= slots[middle].start:
                high = middle
            else:
                low = middle + 1
        if low == len(slots):
            return Found(None, steps, steps)
        held, compared = holds(slots[low], page)
        if held:
            self._last_used = low
        return Found(slots[low].slot if held else None, steps + compared, steps + 1)

    def find_cached(self, page: int) -> Found:
        """First the place where something was found last; a miss leaves that as it was."""
        if not self._slots:
            return Found(None, 0, 0)
        last = self._slots[self._last_used]
        held, compared = holds(last, page)
        if held:
            return Found(last.slot, compared, 1)
        found = self.find(page)
        return Found(found.slot, compared + found.comparisons, 1 + found.slots_read)

    def scan(self, page: int) -> Found:
        """Ask every slot, as up to 5.16 for a host address that the kernel takes away.

        What that costs is worked out, not gone through: one comparison where the slot starts behind
        the page, two where it does not.
        """
        used = len(self._slots)
        behind = self._place(page)
        found = self.find(page)
        return Found(found.slot, used + used - behind, used)

    def add(self, slot: Interval) -> UpdateWork:
        """Copied, appended, and moved forward past all slots that start lower, one by one."""
        used = len(self._slots)
        at = self._place(slot.start)
        self._slots.insert(at, slot)
        return UpdateWork(
            bytes_copied=self._set_bytes(used),
            bytes_shifted=(used - at) * SLOT_BYTES,
            comparisons=used - at + (at > 0),
        )

    def remove(self, slot: Interval) -> UpdateWork:
        """Copied as often as the layout says; the slots behind it close the gap.

        The table of ids tells where it is, so nothing is compared.
        """
        used = len(self._slots)
        at = self._place(slot.start)
        del self._slots[at]
        if self._last_used >= len(self._slots):
            self._last_used = 0
        return UpdateWork(
            bytes_copied=self._set_bytes(used) * self._layout.copies_to_remove,
            bytes_shifted=(used - 1 - at) * SLOT_BYTES,
        )

    def _place(self, start: int) -> int:
        """How many slots start behind it.  Finding that is not counted: see `add`."""
        return bisect_left(self._slots, -start, key=lambda s: -s.start)

    def _set_bytes(self, used: int) -> int:
        return self._layout.header_bytes + used * SLOT_BYTES
