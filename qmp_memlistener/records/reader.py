"""Reads recordings: finished ones, growing ones, and those of older schema versions.

Record types and keys that this version does not know are skipped; a last line that is cut off is
not an error (the writer may be in the middle of it, or was killed there).  A line is at most
LINE_LIMIT bytes long: the map of 100,000 ranges takes some 15 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from ..errors import InputError, RecordingError
from ..inputs import identify_file, open_input
from . import measured, mirrored, records
from .records import SCHEMA, Header, Record

__all__ = ["LINE_LIMIT", "Recording", "is_recording"]

LINE_LIMIT = 32 << 20

_TYPES: dict[str, type[Record]] = {
    str(cls.__struct_config__.tag): cls
    for module in (records, measured, mirrored)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, Record) and cls is not Record
}


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
        self._decoders = {t: msgspec.json.Decoder(cls) for t, cls in _TYPES.items()}
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
            yield from self._read(file)

    def _read(self, file: BinaryIO) -> Iterator[Record]:
        self.truncated = False
        while line := file.readline(LINE_LIMIT + 1):
            if len(line) > LINE_LIMIT:
                self._line_no += 1
                raise self._bad(f"longer than {LINE_LIMIT >> 20} MiB")
            if not line.endswith(b"\n"):
                self.truncated = True
                return
            self._line_no += 1
            self._position += len(line)
            record = self._decode(line)
            if record is not None:
                yield record

    def _decode(self, line: bytes) -> Record | None:
        try:
            tag = self._peek.decode(line).type
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise self._bad(f"not JSON ({exc})") from None
        decoder = self._decoders.get(tag) if tag is not None else None
        if decoder is None:
            if self._line_no == 1:
                raise self._bad("no record of a known type")
            self.skipped += 1
            return None
        try:
            return decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise self._bad(str(exc)) from None

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
