"""The ways to carry out a transition: each turns one `Change` into ops and the table they leave."""

from .base import Change, Outcome
from .batch import batch_full, batch_incremental
from .hole import DEFAULT_MAX_HOLES, follow_blocks, hole
from .qemu import pause, qemu

__all__ = [
    "DEFAULT_MAX_HOLES",
    "Change",
    "Outcome",
    "batch_full",
    "batch_incremental",
    "follow_blocks",
    "hole",
    "pause",
    "qemu",
]
