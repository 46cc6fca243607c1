"""The two forms of a multi-region ioctl that the kernel applies in one go.

No kernel has it (KVM_SET_USER_MEMORY_REGION_LIST stayed an RFC); as proposed, all vCPUs are
kicked out while it works, for a shorter time than from user space.
"""

from __future__ import annotations

from ..ops import BATCH_BEGIN, BATCH_COMMIT, Op, OpKind
from .base import Change, Outcome

__all__ = ["batch_full", "batch_incremental"]


def batch_incremental(change: Change) -> Outcome:
    """ "Add this, remove that": QEMU's own ioctls as one."""
    return _batch(change, change.qemu.ops)


def batch_full(change: Change) -> Outcome:
    """The whole new map: the kernel drops every slot and starts again.

    Nothing when QEMU has nothing to do.
    """
    if not change.qemu.ops:
        return _batch(change, ())
    ops = [Op(OpKind.DELETE, s.as_id, s.slot, s.gpa, s.size) for s in change.table]
    ops += [Op(OpKind.ADD, s.as_id, s.slot, s.gpa, s.size, s.flags) for s in change.qemu.after]
    return _batch(change, tuple(ops))


def _batch(change: Change, ops: tuple[Op, ...]) -> Outcome:
    after = change.qemu.after
    if not ops:
        return Outcome((), change.table, after, False)
    return Outcome((BATCH_BEGIN, *ops, BATCH_COMMIT), change.table, after, True)
