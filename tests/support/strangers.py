"""Other users of the host, and what they may put where a file of ours is to be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["SQUATS", "STRANGER", "acting_as", "needs_root"]

STRANGER = 65533
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users")


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """File operations of this thread are that user's."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def _directory(name: Path) -> None:
    name.mkdir(mode=0o777)


def _link(name: Path) -> None:
    name.symlink_to("/etc")


def _file(name: Path) -> None:
    name.write_text("x")


def _fifo(name: Path) -> None:
    os.mkfifo(name)


SQUATS = (_directory, _link, _file, _fifo)
"""Ways to take a name before we do."""
