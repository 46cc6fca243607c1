"""What a slot look-up and an update of the slots take, in steps that do not depend on the machine.

The structures that are counted are in `lookup_array` and `lookup_tree`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Found", "Interval", "UpdateWork", "holds"]


class Interval(NamedTuple):
    """What a slot covers, in pages, half-open; `slot` is its id."""

    start: int
    end: int
    slot: int


class Found(NamedTuple):
    """A look-up: the slot's id or None, and its steps.

    `comparisons` are those of the address with a bound of a slot, `slots_read` how often a slot
    was looked into: each is a cache line that may have to come from memory.
    """

    slot: int | None
    comparisons: int
    slots_read: int


@dataclass(frozen=True, slots=True)
class UpdateWork:
    """What adding or removing one slot does to the structures.

    `bytes_copied` is the set copied as a whole, `bytes_shifted` what then moves by one place within
    it; `comparisons` are of addresses on the way to the place, `rotations` those of trees.
    """

    bytes_copied: int = 0
    bytes_shifted: int = 0
    comparisons: int = 0
    rotations: int = 0

    def __add__(self, other: UpdateWork) -> UpdateWork:
        return UpdateWork(
            self.bytes_copied + other.bytes_copied,
            self.bytes_shifted + other.bytes_shifted,
            self.comparisons + other.comparisons,
            self.rotations + other.rotations,
        )


def holds(slot: Interval, page: int) -> tuple[bool, int]:
    """Whether the page is in it, and the comparisons to tell: the second only where needed."""
    if page < slot.start:
        return False, 1
    return page < slot.end, 2
