"""One operation of a plan.  One that was carried out is a `records.SlotOp`.  Values only."""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = ["BATCH_BEGIN", "BATCH_COMMIT", "PARK", "UNPARK", "Op", "OpKind"]


class OpKind(StrEnum):
    """`delete`, `add` and `flags` are KVM_SET_USER_MEMORY_REGION; the rest are the cures.

    `set_hole` and `clear_hole` take a range out of a live slot and give it back (no kernel has
    them); `park` and `unpark` stop and continue all vCPUs; what lies between `batch_begin` and
    `batch_commit` is one multi-region ioctl (no kernel has it).
    """

    DELETE = "delete"
    ADD = "add"
    FLAGS = "flags"
    SET_HOLE = "set_hole"
    CLEAR_HOLE = "clear_hole"
    PARK = "park"
    UNPARK = "unpark"
    BATCH_BEGIN = "batch_begin"
    BATCH_COMMIT = "batch_commit"


class Op(msgspec.Struct, frozen=True, gc=False):
    """One step of a plan.

    `[gpa, gpa + size)` is the slot that comes, goes or changes, or the hole.  A `delete` carries
    the range of the slot that goes away, with flags 0.  `flags` are KVM_MEM_* bits.  `park`,
    `unpark`, `batch_begin` and `batch_commit` have slot -1 and the rest 0.
    """

    op: OpKind
    as_id: int = 0
    slot: int = -1
    gpa: int = 0
    size: int = 0
    flags: int = 0

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.gpa + self.size


PARK = Op(OpKind.PARK)
UNPARK = Op(OpKind.UNPARK)
BATCH_BEGIN = Op(OpKind.BATCH_BEGIN)
BATCH_COMMIT = Op(OpKind.BATCH_COMMIT)
