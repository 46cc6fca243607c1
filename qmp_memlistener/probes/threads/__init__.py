"""The `threads` probe: what QEMU's threads are doing, read in /proc from outside.

`states` (pure) knows what the kernel's lines mean, `folding` (pure) makes windows of samples,
`tasks` holds the open files, `probe` is the thread that reads them and the delivery.
"""

from __future__ import annotations

from .probe import ThreadsProbe

__all__ = ["ThreadsProbe"]
