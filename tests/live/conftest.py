"""Fixtures of the live tests.  Guests are started inside the tests: booting one takes 0.1 s."""

from __future__ import annotations

import pytest

from tests.support.live import Seen


@pytest.fixture
def seen() -> Seen:
    """Takes the records of an attachment: `attach(..., on_record=seen)`."""
    return Seen()
