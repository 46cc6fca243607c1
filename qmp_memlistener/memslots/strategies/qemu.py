"""`qemu`: what QEMU does.  `pause`: the same while no vCPU runs."""

from __future__ import annotations

from ..ops import PARK, UNPARK
from .base import Change, Outcome

__all__ = ["pause", "qemu"]


def qemu(change: Change) -> Outcome:
    """QEMU's own ioctls; every vCPU is kicked only where QEMU inhibits ioctls."""
    done = change.qemu
    return Outcome(done.ops, change.table, done.after, bool(done.inhibited), done.inhibited)


def pause(change: Change) -> Outcome:
    """QEMU's own ioctls between park and unpark; nothing at all when there are none."""
    done = change.qemu
    if not done.ops:
        return Outcome((), change.table, done.after, False)
    ops = (PARK, *done.ops, UNPARK)
    return Outcome(ops, change.table, done.after, True, done.inhibited)
