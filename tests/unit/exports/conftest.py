"""Fixtures of the tests of exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.exports.export_support import RECORDED, odd_recording


@pytest.fixture(params=[*RECORDED, None], ids=lambda p: f"{p.parent.name}-{p.stem}" if p else "odd")
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A recording, of a real guest or of what none did."""
    path: Path | None = request.param
    return path or odd_recording(tmp_path / "odd.jsonl")
