"""One slot operation: what a plan is made of and what QEMU's trace shows.  Values only."""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = ["BATCH_BEGIN", "BATCH_COMMIT", "PARK", "UNPARK", "Op", "OpKind", "TracedOp"]


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


class TracedOp(msgspec.Struct, frozen=True, gc=False):
    """One line of QEMU's `kvm_set_user_memory` trace event.

    `slot` is the bare id, the address space is in `as_id` (7.2 prints both in one number).
    `size` is 0 for a delete.  `ret` is the ioctl's result, 0 when it went well.
    """

    as_id: int
    slot: int
    gpa: int
    size: int
    flags: int
    ret: int = 0


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

    @property
    def traced(self) -> TracedOp | None:
        """The line that QEMU's trace shows for it when it succeeds, None when there is none.

        A delete is traced with size 0 and flags 0 (`kvm_set_phys_mem` clears both before the
        ioctl, accel/kvm/kvm-all.c).
        """
        if self.op is OpKind.DELETE:
            return TracedOp(self.as_id, self.slot, self.gpa, 0, 0)
        if self.op is OpKind.ADD or self.op is OpKind.FLAGS:
            return TracedOp(self.as_id, self.slot, self.gpa, self.size, self.flags)
        return None


PARK = Op(OpKind.PARK)
UNPARK = Op(OpKind.UNPARK)
BATCH_BEGIN = Op(OpKind.BATCH_BEGIN)
BATCH_COMMIT = Op(OpKind.BATCH_COMMIT)
