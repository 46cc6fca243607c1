"""One recording to one format, in one pass: what may be combined, and where it goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

import msgspec

from ..errors import InputError, RecordingError
from ..records import Recording
from .csv_files import write_csv_directory, write_csv_table
from .openmetrics import openmetrics_text
from .output import new_directory, new_file
from .parquet import Parquet
from .perfetto import Perfetto
from .tables import TABLES

__all__ = ["Exported", "Format", "export"]


class Format(StrEnum):
    """What a recording can be exported to."""

    PERFETTO = "perfetto"
    CSV = "csv"
    PARQUET = "parquet"
    OPENMETRICS = "openmetrics"


@dataclass(frozen=True, slots=True)
class Exported:
    """How many records of each type were exported, how many lines were of an unknown type, and
    whether the last line was cut off."""

    records: Counter[str]
    skipped: int
    truncated: bool


def export(
    path: str, to: Format, output: str, *, only: str | None = None, stdout: BinaryIO | None = None
) -> Exported:
    """Export the recording at `path` to `output`, which must not exist; `-` is `stdout`.

    Tables are a directory, and with `only` (a record type) one file.  Raises InputError,
    RecordingError, MissingPrerequisite (a package, or a privilege) and OperationFailed.
    """
    tables = to in (Format.CSV, Format.PARQUET)
    if only is not None and not tables:
        raise InputError(
            f"the format {to} has no tables to choose from",
            remedy="leave --type out, or export to csv or parquet",
        )
    if only is not None and only not in TABLES:
        raise InputError(
            f"there is no record type {only}", remedy=f"give one of {', '.join(sorted(TABLES))}"
        )
    if output == "-" and (to in (Format.PERFETTO, Format.PARQUET) or (tables and only is None)):
        raise InputError(
            "only text goes to standard output, and several tables do not go into one stream",
            remedy="name a file; or give --format csv with --type, or --format openmetrics",
        )
    recording = Recording(path)
    try:
        records = _write(recording, to, output, only, stdout)
    except (ValueError, OverflowError, msgspec.DecodeError) as exc:
        raise RecordingError(
            f"{path} holds a value that cannot be: {exc}",
            remedy="give a file that `qmp-memlistener record` wrote, unchanged",
        ) from None
    return Exported(records, recording.skipped, recording.truncated)


def _write(
    recording: Recording, to: Format, output: str, only: str | None, stdout: BinaryIO | None
) -> Counter[str]:
    if to is Format.OPENMETRICS:
        text, records = openmetrics_text(recording)
        if output == "-" and stdout is not None:
            stdout.write(text)
        else:
            with new_file(output) as file:
                file.write(text)
        return records
    if to is Format.PERFETTO:
        perfetto = Perfetto()
        with new_file(output) as file:
            return perfetto.write(recording, file)
    parquet = Parquet() if to is Format.PARQUET else None
    if only is None:
        with new_directory(output) as directory:
            if parquet is not None:
                return parquet.write_directory(recording, directory)
            return write_csv_directory(recording, directory)
    if output == "-" and stdout is not None:
        return write_csv_table(recording, only, stdout)
    with new_file(output) as file:
        if parquet is not None:
            return parquet.write_table(recording, only, file)
        return write_csv_table(recording, only, file)
