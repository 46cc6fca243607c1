"""Traced slot operations: fold them into a table, and tell how two tables differ."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from .ops import TracedOp
from .slots import Slot, SlotTable

__all__ = ["Difference", "DifferenceKind", "differences", "fold"]


class DifferenceKind(StrEnum):
    """How the table that was traced differs from the one predicted.

    `missing` was predicted and is not there, `extra` is there and was not predicted; the same
    range may have an `other-id` or `other-flags`.
    """

    MISSING = "missing"
    EXTRA = "extra"
    OTHER_ID = "other-id"
    OTHER_FLAGS = "other-flags"


class Difference(msgspec.Struct, frozen=True):
    """One range about which two tables disagree, with what each has there."""

    kind: DifferenceKind
    predicted: Slot | None
    traced: Slot | None

    def __str__(self) -> str:
        if self.predicted is None:
            return f"{self.traced} was not predicted"
        if self.traced is None:
            return f"{self.predicted} was predicted and is not there"
        if self.kind is DifferenceKind.OTHER_ID:
            return f"{self.predicted} has the id {self.traced.slot}"
        return f"{self.predicted} has flags {self.traced.flags}, not {self.predicted.flags}"


def fold(table: SlotTable, ops: Iterable[TracedOp]) -> SlotTable:
    """The table after `ops`, as KVM sees it; `table` itself is not touched.

    Size 0 deletes; a live id with another range or flags is set anew; an op that failed
    (`ret` not 0) changes nothing.  A delete of an id that is not there is passed over: the trace
    began too late for it.  A slot keeps the name of what backs it while its range stays.
    Raises InputError when a slot comes where another one is: lines of the trace are missing.

    O(table) to copy it, then O(log n) an op and a shift of the slots behind.
    """
    after = table.copy()
    for op in ops:
        if op.ret != 0:
            continue
        old = after.get(op.as_id, op.slot)
        if old is not None:
            after.remove(op.as_id, op.slot)
        if op.size == 0:
            continue
        if old is not None and (old.gpa, old.size) == (op.gpa, op.size):
            after.add(msgspec.structs.replace(old, flags=op.flags))
        else:
            after.add(Slot(op.as_id, op.slot, op.gpa, op.size, op.flags))
    return after


def differences(predicted: SlotTable, traced: SlotTable) -> tuple[Difference, ...]:
    """Where the tables disagree, by address space and address; empty when they agree.

    Slots are matched by their exact range.  One with another id and other flags gives two
    differences.
    """
    mine = {(s.as_id, s.gpa, s.size): s for s in predicted}
    theirs = {(s.as_id, s.gpa, s.size): s for s in traced}
    out: list[Difference] = []
    for place in sorted({*mine, *theirs}):
        a, b = mine.get(place), theirs.get(place)
        if a is None:
            out.append(Difference(DifferenceKind.EXTRA, None, b))
        elif b is None:
            out.append(Difference(DifferenceKind.MISSING, a, None))
        else:
            if a.slot != b.slot:
                out.append(Difference(DifferenceKind.OTHER_ID, a, b))
            if a.flags != b.flags:
                out.append(Difference(DifferenceKind.OTHER_FLAGS, a, b))
    return tuple(out)
