"""Writes a recording: one JSON document per line.

A reader may follow while the file grows; a crash costs at most what is being written: the records
that came at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ..errors import InputError, MissingPrerequisite, OperationFailed
from ..text import json_bytes
from .records import Header, Record

__all__ = ["RecordingWriter"]


class RecordingWriter:
    """Append records to a new file, which only its owner may read; a context manager.

    Raises InputError when the file exists or its directory does not, MissingPrerequisite when it
    may not be written, OperationFailed when the disk is full.
    """

    def __init__(self, path: str, header: Header) -> None:
        self.path = path
        self.count = 0
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        except FileExistsError:
            raise InputError(
                f"{path} exists already", remedy="name a new file: a recording is never overwritten"
            ) from None
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise InputError(
                f"{path} cannot be created", remedy="name a file in an existing directory"
            ) from None
        except OSError as exc:
            raise MissingPrerequisite(
                f"{path} cannot be created: {exc.strerror}", remedy="choose a writable directory"
            ) from exc
        self.write(header)

    def write(self, record: Record) -> None:
        """Append one record."""
        self.write_all((record,))

    def write_all(self, records: Sequence[Record]) -> None:
        """Append records, with one write."""
        lines = b"".join(part for record in records for part in (json_bytes(record), b"\n"))
        try:
            while lines:
                lines = lines[os.write(self._fd, lines) :]
        except OSError as exc:
            raise OperationFailed(
                f"{self.path} cannot be written: {exc.strerror}",
                remedy="make room and record again; what was written so far is readable",
            ) from exc
        self.count += len(records)

    def close(self) -> None:
        """Flush to disk and close; further calls do nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
