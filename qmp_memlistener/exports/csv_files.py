"""Tables as CSV: text in quotes, numbers and booleans bare, nothing at all for what is absent.

RFC 4180 in UTF-8, lines end in a line feed, the first one has the names.  Integers are decimal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from ..records import Recording
from .fields import Field, FieldKind
from .tables import TABLES, RowBatch, batches

__all__ = ["write_csv_directory", "write_csv_table"]

_QUOTE, _TWO = '"', '""'


def write_csv_directory(recording: Recording, directory: Path) -> Counter[str]:
    """A file `TYPE.csv` for each type that the recording has; how many rows each has got."""
    rows: Counter[str] = Counter()
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for batch in batches(recording):
            name = batch.table.name
            if name not in files:
                path = directory / f"{name}.csv"
                files[name] = stack.enter_context(path.open("wb", buffering=1 << 20))
                files[name].write(_heading(name))
            files[name].write(_text(batch))
            rows[name] += len(batch.columns[0])
    return rows


def write_csv_table(recording: Recording, name: str, file: BinaryIO) -> Counter[str]:
    """The table of one type."""
    rows: Counter[str] = Counter({name: 0})
    file.write(_heading(name))
    for batch in batches(recording, name):
        file.write(_text(batch))
        rows[name] += len(batch.columns[0])
    return rows


def _heading(name: str) -> bytes:
    return (",".join(column.name for column in TABLES[name].columns) + "\n").encode()


def _text(batch: RowBatch) -> bytes:
    """By columns, which Python does faster than rows; its csv module does not tell an empty text
    from none."""
    columns = map(_cells, batch.table.columns, batch.columns)
    return ("\n".join(map(",".join, zip(*columns, strict=True))) + "\n").encode()


def _cells(column: Field, values: Sequence[Any]) -> Iterable[str]:
    if column.kind in (FieldKind.INTEGER, FieldKind.ADDRESS):
        return (
            map(str, values) if column.required else ["" if v is None else str(v) for v in values]
        )
    if column.kind is FieldKind.BOOLEAN:
        return ["" if v is None else "true" if v else "false" for v in values]
    return ["" if v is None else f'"{v.replace(_QUOTE, _TWO)}"' for v in values]
