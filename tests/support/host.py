"""How long tests wait on a busy host."""

from __future__ import annotations

import os

__all__ = ["patience"]


MOST = 5.0
"""On a host that is busier than that a test may fail: it would wait for minutes."""


def patience(seconds: float) -> float:
    """`seconds` on a host at rest; more as more processes want to run than there are CPUs.

    What is waited for longer than that hangs; what took longer than that was late.
    """
    return seconds * min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), MOST)
