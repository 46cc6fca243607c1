"""Our state on disk, in a place of the test's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_memlistener.host.directory import (
    StateDirectory,
)
from qmp_memlistener.host.state import own_directory
from tests.support.own_state import keep_state_in


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands for /dev/shm, and another beside it for /tmp; other users may go there."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        shm, fallback = Path(name, "shm"), Path(name, "tmp")
        for path in (shm, fallback):
            path.mkdir()
            path.chmod(0o1777)
        keep_state_in(shm, monkeypatch, fallback=fallback)
        yield shm


@pytest.fixture
def fallback(shm: Path) -> Path:
    return shm.parent / "tmp"


@pytest.fixture
def place() -> StateDirectory:
    return own_directory()
