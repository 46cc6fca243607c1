"""Our state on disk in a directory of the test's, in the place of /dev/shm and all others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmp_memlistener.host import state

__all__ = ["SCRIPT", "keep_state_in"]

SCRIPT = """
import os
from qmp_memlistener.host import state
state.SHM = state.FALLBACK = os.environ["STATE_OF_TEST"]
"""
"""How a child of the test begins, to see the same."""


def keep_state_in(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, fallback: Path | None = None
) -> None:
    """`fallback` stands for /tmp; the same directory, unless it is given."""
    monkeypatch.setattr(state, "SHM", str(path))
    monkeypatch.setattr(state, "FALLBACK", str(fallback or path))
    monkeypatch.setitem(os.environ, "STATE_OF_TEST", str(path))
