"""Locks on open files, which the kernel drops with their holder, and a small file that we hold.

flock(2) for files that only their owner may open.  Locks of an open file description (fcntl(2),
F_OFD_SETLK) where others may look: a write lock needs a file that was opened for writing, so that a
stranger who may only read it can neither take it nor keep its owner from it.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from typing import Self

__all__ = ["LONGEST", "HeldFile", "is_write_locked", "set_lock", "try_lock", "write_all"]

LONGEST = 1 << 16
"""No note is longer, in bytes."""

_FLOCK = "@hhqqi0q"  # struct flock of 64-bit Linux


class HeldFile:
    """A small file that we hold: no other process holds it as long as this one is open.

    Used as a context manager it is closed at the end of the block, which leaves the file there.
    """

    def __init__(self, path: str, handle: int, unlink: Callable[[], None]) -> None:
        self.path = path
        self._handle = handle
        self._unlink = unlink

    def fileno(self) -> int:
        """A process that gets this descriptor holds the file, too."""
        return self._handle

    def read(self) -> bytes:
        """What it says; its writer may have been killed half-way.  Nothing if it is too long."""
        if os.fstat(self._handle).st_size > LONGEST:
            return b""
        return os.pread(self._handle, LONGEST, 0)

    def write(self, content: bytes) -> None:
        """Replace what it says; flushed to the file system when it returns.  Raises OSError."""
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        write_all(self._handle, content)
        os.fsync(self._handle)

    def remove(self) -> None:
        """Remove the file, then let go of it.  Idempotent."""
        if self._handle >= 0:
            self._unlink()
        self.close()

    def close(self) -> None:
        """Let go of it and leave it to whoever comes next.  Idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_all(handle: int, content: bytes) -> None:
    """Write to an open file; a full file system is an OSError."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file with flock(2), or say that somebody else has it locked.

    A `shared` lock is had beside others of its kind.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def set_lock(handle: int, kind: int, byte: int) -> bool:
    """Lock one byte with an open-file-description lock (fcntl(2)), or say that it is taken.

    A write lock needs a file that was opened for writing: a stranger who may read it gets none.
    """
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return False
    return True


def is_write_locked(handle: int, byte: int = 0, length: int = 0) -> bool:
    """Somebody has a write lock in this range (the whole file); read locks are not seen."""
    asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, length, 0)
    answer = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, asked)
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK
