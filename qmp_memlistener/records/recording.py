"""Recordings on disk: one JSON document a line.

A writer appends; a crash costs at most what is being written, the records that came at once.
Finished recordings are read, growing ones, and those of older schema versions.

Record types and keys that this version does not know are skipped; a last line that is cut off is
not an error (the writer may be in the middle of it, or was killed there).  A line is at most
LINE_LIMIT bytes long: the map of 100,000 ranges takes some 15 MB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, Self, TypeVar

import msgspec

from ..errors import InputError, OperationFailed, RecordingError, not_created
from ..inputs import identify_file, open_input
from ..text import json_bytes
from . import measured, mirrored, records
from .records import SCHEMA, Header, Record

__all__ = ["LINE_LIMIT", "RECORD_TYPES", "Recording", "RecordingWriter", "is_recording"]

LINE_LIMIT = 32 << 20

T = TypeVar("T")

RECORD_TYPES: dict[str, type[Record]] = {
    str(cls.__struct_config__.tag): cls
    for module in (records, measured, mirrored)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Record) and cls is not Record
}


_TAG_FIRST = b'{"type":"'
"""How every line begins that we write."""


class _Tag(msgspec.Struct):
    """All that is read of a line before its type is known."""

    type: str | None = None


class Recording:
    """A recording on disk: its `header`, and its records by iterating.

    Iterating again goes on where the last time ended, so a growing file can be followed.
    `skipped` counts records of unknown types; `truncated`: the last line is cut off.

    Raises InputError when the file cannot be read, RecordingError when it is not a recording or of
    a newer schema than this version reads.
    """

    def __init__(self, path: str) -> None:
        if not is_recording(path):
            _refuse(path)
        self.path = path
        self.skipped = 0
        self.truncated = False
        self._line_no = 0
        self._position = 0
        self._decoders = {t: msgspec.json.Decoder(cls) for t, cls in RECORD_TYPES.items()}
        self._peek = msgspec.json.Decoder(_Tag)
        first = next(iter(self), None)
        if not isinstance(first, Header):
            raise RecordingError(
                f"{path} is not a recording: it does not begin with a header",
                remedy="make one with `qmp-memlistener record TARGET -o FILE`",
            )
        if first.schema > SCHEMA:
            raise RecordingError(
                f"{path} has schema {first.schema}, this version reads up to {SCHEMA}",
                remedy="update qmp-memlistener",
            )
        self.header = first

    def __iter__(self) -> Iterator[Record]:
        with open_input(self.path, skip=self._position) as file:
            for line in self._lines(file):
                self._position += len(line)
                record = self._decode(line, self._decoders)
                if record is not None:
                    yield record

    def read_as(
        self, decoders: Mapping[str, msgspec.json.Decoder[T]]
    ) -> Iterator[tuple[int, bytes, T]]:
        """Records of some types from the first line on, each by a decoder of one's own.

        Yields the number of the line, the line, and what the decoder of its type makes of it.
        Each call begins anew.
        """
        self._line_no = self.skipped = 0
        known = {_TAG_FIRST + tag.encode(): decoder for tag, decoder in decoders.items()}
        with open_input(self.path) as file:
            for line in self._lines(file):
                decoder = known.get(line[: line.find(b'"', len(_TAG_FIRST))])
                try:
                    found = decoder.decode(line) if decoder else self._decode(line, decoders)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    found = self._decode(line, decoders)  # says what is wrong
                if found is not None:
                    yield self._line_no, line, found

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        self.truncated = False
        while line := file.readline(LINE_LIMIT + 1):
            if len(line) > LINE_LIMIT:
                self._line_no += 1
                raise self._bad(f"longer than {LINE_LIMIT >> 20} MiB")
            if not line.endswith(b"\n"):
                self.truncated = True
                return
            self._line_no += 1
            yield line

    def _decode(self, line: bytes, decoders: Mapping[str, msgspec.json.Decoder[T]]) -> T | None:
        tag: str | None = None
        if line.startswith(_TAG_FIRST):
            end = line.find(b'"', len(_TAG_FIRST))
            tag = line[len(_TAG_FIRST) : end].decode("utf-8", "replace")
        if tag not in RECORD_TYPES:  # not as we write it: the whole line is looked through
            try:
                tag = self._peek.decode(line).type
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
                raise self._bad(f"not JSON ({exc})") from None
        if tag not in RECORD_TYPES:
            if self._line_no == 1:
                raise self._bad("no record of a known type")
            self.skipped += 1
            return None
        decoder = decoders.get(tag)
        if decoder is None:
            return None
        try:
            return decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            why = str(exc)
        try:
            self._peek.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            why = f"not JSON ({exc})"
        raise self._bad(why)

    def _bad(self, why: str) -> RecordingError:
        return RecordingError(
            f"{self.path}, line {self._line_no}: {why}",
            remedy="give a file that `qmp-memlistener record` wrote, unchanged",
        )


def _refuse(path: str) -> None:
    """Say what the file is, if that is known; what is nothing else is a damaged recording."""
    identity = identify_file(path)
    if identity is not None:
        raise RecordingError(f"{path} is {identity.what}, not a recording", remedy=identity.remedy)


def is_recording(path: str) -> bool:
    """The file begins like one of our recordings (false when it cannot be read)."""
    try:
        with open_input(path) as file:
            return b'"type":"header"' in file.readline(4096)
    except InputError:
        return False


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
        except OSError as exc:
            raise not_created(
                path, exc, if_exists="name a new file: a recording is never overwritten"
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

    def __exit__(self, *exc: object) -> None:
        self.close()
