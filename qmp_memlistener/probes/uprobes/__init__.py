"""Seeing stalls through uprobes on a running QEMU: the kernel's perf events, nothing in QEMU.

`probe` is the probe, `reader` what it reads with; see there.
"""

from __future__ import annotations

from .calls import CommandSpan, Site, Window
from .probe import UprobesProbe
from .reader import Batch, Loss, UprobeReader
from .release import wait_released

__all__ = [
    "Batch",
    "CommandSpan",
    "Loss",
    "Site",
    "UprobeReader",
    "UprobesProbe",
    "Window",
    "wait_released",
]
