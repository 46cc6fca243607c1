"""A file system that never answers: whoever touches it waits, as with a lost NFS server."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["silent"]

_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def silent(path: Path) -> Iterator[None]:
    """Mount one (FUSE) at a directory, for every user; skips the test where that cannot be."""
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        pytest.skip("needs /dev/fuse")
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
        if _libc.mount(b"silent", os.fsencode(path), b"fuse", 0, options.encode()):
            pytest.skip("a FUSE file system cannot be mounted here: needs root")
        try:
            yield
        finally:
            _libc.umount2(os.fsencode(path), _MNT_DETACH)
    finally:
        os.close(device)  # ends the waits of all who touched it
