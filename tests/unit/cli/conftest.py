"""Fixtures of the tests of the verbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.cli_support import RamMap


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """16 MiB of RAM, and the same with a page of MMIO in it."""
    before = RamMap(16 << 20).file(tmp_path / "before.txt")
    after = RamMap(16 << 20).cover(8 << 20, 4096, "hole").file(tmp_path / "after.txt")
    return before, after
