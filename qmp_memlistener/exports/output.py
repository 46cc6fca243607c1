"""Where an export goes: a new file or directory that is there whole, or not at all.

It is written beside its place under another name, which only its owner may read, and gets its
name when it is complete.  What is there already is never overwritten.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import OperationFailed, not_created

__all__ = ["new_directory", "new_file"]


@contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """A file to be written; it is at `path` when the block ends well.

    Raises InputError when something is there already or the directory is not,
    MissingPrerequisite when it may not be written, OperationFailed when there is no room.
    """
    with _errors(path):
        _refuse_existing(path)
        handle, name = tempfile.mkstemp(prefix=f".{Path(path).name}.", dir=Path(path).parent)
        try:
            with os.fdopen(handle, "wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _place(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


@contextmanager
def new_directory(path: str) -> Iterator[Path]:
    """A directory to be filled; it is at `path` when the block ends well.

    Raises as `new_file` does.
    """
    with _errors(path):
        _refuse_existing(path)
        name = tempfile.mkdtemp(prefix=f".{Path(path).name}.", dir=Path(path).parent)
        try:
            yield Path(name)
            os.mkdir(path, 0o700)  # fails if something is there by now
            os.rename(name, path)  # in place of the empty one
        finally:
            shutil.rmtree(name, ignore_errors=True)


def _place(name: str, path: str) -> None:
    """Give the file its name, unless something has it by now."""
    try:
        os.link(name, path)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        _refuse_existing(path)  # a file system without links
        os.rename(name, path)


def _refuse_existing(path: str) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OperationFailed(
                f"{path} cannot be written: {exc.strerror}",
                remedy="make room and export again; nothing was left behind",
            ) from exc
        raise not_created(
            path, exc, if_exists="name a new one: an export overwrites nothing"
        ) from exc
