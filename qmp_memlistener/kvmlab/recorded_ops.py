"""Slot operations as a file tells them, whatever the file: one value type and what surrounds it.

`recorded_log` and `recorded_records` make these values from a QEMU log and from a recording;
`replay_history` finds out what they mean.  Nothing here reads or decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ..memslots import OpKind, Order
from ..memslots.slots import LAST_SLOT, MOST_PAGES

__all__ = ["Backing", "Recorded", "RecordedOp", "RecordedSlot", "Remarks"]

PAGE = 4096
"""What gpa, size and host address of a slot are multiples of: the smallest page KVM knows."""

_MOST_BYTES = MOST_PAGES * PAGE

Backing = tuple[str, str | None, int]
"""RAM block, its owner, and the offset in it of a slot's first byte."""


class RecordedOp(msgspec.Struct, frozen=True, gc=False):
    """One KVM_SET_USER_MEMORY_REGION; `size` 0 deletes.

    `where` is the line of a log or the transition of a recording.  `mark` goes up where the file
    shows that a new commit begins; operations of one commit have the same.  `seq` is the
    recording's transition, None in a log and for what belongs to none.  A recording tells `told`,
    what the operation was, and `gone`, the size of the slot that a delete took away (0: it did not
    know); `shown` is what its map had at the range.  `hva` is None when the operation is predicted.
    """

    where: int
    as_id: int
    slot: int
    gpa: int
    size: int
    flags: int
    ret: int
    hva: int | None = None
    mark: int = 0
    seq: int | None = None
    told: OpKind | None = None
    gone: int = 0
    shown: Backing | None = None

    @property
    def possible(self) -> bool:
        """KVM may have carried it out: whole pages, not too many, inside 64 bits.

        `kvm_set_memory_region` (Linux, virt/kvm/kvm_main.c) refuses anything else.
        """
        return (
            self.as_id <= LAST_SLOT
            and self.size <= _MOST_BYTES
            and not (self.gpa | self.size | (self.hva or 0)) & (PAGE - 1)
            and max(self.gpa, self.hva or 0) + self.size <= 1 << 64
        )


class RecordedSlot(msgspec.Struct, frozen=True, gc=False):
    """A slot that a recording's first map implies; its id is not told."""

    as_id: int
    gpa: int
    size: int
    flags: int
    shown: Backing


@dataclass(slots=True)
class Remarks:
    """What a user should know of a file, each said once, with its first place and a count."""

    place: str
    seen: dict[str, tuple[int | None, int]] = field(default_factory=dict)

    def add(self, text: str, where: int | None = None) -> None:
        first, count = self.seen.get(text, (where, 0))
        self.seen[text] = (first, count + 1)

    def take(self, others: Remarks) -> None:
        """Put the remarks of `others` behind these."""
        self.seen.update(others.seen)

    def texts(self) -> tuple[str, ...]:
        return tuple(self._text(*entry) for entry in self.seen.items())

    def _text(self, text: str, seen: tuple[int | None, int]) -> str:
        first, count = seen
        if first is None:
            return text
        where = f"{self.place} {first}"
        return f"{text} ({where})" if count == 1 else f"{text} ({count} times, first at {where})"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file's operations in order.

    `initial` are slots that were there before the first one, as far as the file has a map.
    `marked`: a mark stands at the beginning of every commit, not only of some.
    `spans` has the size of RAM blocks by name and owner.  `order` is None when the file does not
    tell which QEMU wrote it.
    """

    kind: str
    qemu_version: str | None
    order: Order | None
    marked: bool
    ops: tuple[RecordedOp, ...]
    initial: tuple[RecordedSlot, ...]
    spans: Mapping[tuple[str, str | None], int]
    remarks: Remarks
