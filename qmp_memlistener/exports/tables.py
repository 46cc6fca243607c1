"""Records as tables: one a record type, a row a record, in batches of columns.

A column for each key of the type; before them `line`, the number of the line in the recording, and
behind them what is looked up most in a cause.  Lists and objects are JSON text in one cell.
What the recording does not hold is None in a column, as is null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgspec

from ..records import Recording
from .fields import DECODERS, FIELDS, CauseColumns, Field, FieldKind, cause_of

__all__ = ["TABLES", "RowBatch", "RecordTable", "batches"]

_ROWS = 512
"""Few, so that they are still in the CPU's caches when they are made columns."""
_BYTES = 16 << 20
"""Of lines that wait for their batch to be full, of all tables together."""


@dataclass(frozen=True, slots=True)
class _Extra:
    """A column that is taken out of the record's cause."""

    field: Field
    of: Callable[[CauseColumns], object]


_EXTRAS: dict[str, tuple[_Extra, ...]] = {
    "transition": (
        _Extra(Field("cause_type", FieldKind.TEXT), lambda c: c.type),
        _Extra(Field("cause_device", FieldKind.TEXT), lambda c: c.device),
    ),
    "stall": (
        _Extra(Field("cause_type", FieldKind.TEXT), lambda c: c.type),
        _Extra(
            Field("cause_transition", FieldKind.INTEGER),
            lambda c: c.ref if c.type == "transition" else None,
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class RecordTable:
    """The columns of one record type."""

    name: str
    columns: tuple[Field, ...]


TABLES: dict[str, RecordTable] = {
    tag: RecordTable(
        tag,
        (
            Field("line", FieldKind.INTEGER, required=True),
            *fields,
            *(extra.field for extra in _EXTRAS.get(tag, ())),
        ),
    )
    for tag, fields in FIELDS.items()
}
"""By record type."""

_VALUES: dict[str, Callable[[Any], tuple[object, ...]]] = {
    tag: attrgetter(*(f.name for f in fields)) for tag, fields in FIELDS.items()
}


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of one table: a list of values for each column, all equally long."""

    table: RecordTable
    columns: list[Sequence[object]]


@dataclass(slots=True)
class _Waiting:
    numbers: list[int] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    size: int = 0


def batches(recording: Recording, only: str | None = None) -> Iterator[RowBatch]:
    """The rows of all tables, or of one, in the order of the lines within each table.

    Raises RecordingError where a line is no record.
    """
    decoders = DECODERS if only is None else {only: DECODERS[only]}
    waiting: dict[str, _Waiting] = {}
    held = 0
    for number, line, record in recording.read_as(decoders):
        tag = record.__class__.__name__
        rows = waiting.get(tag)
        if rows is None:
            rows = waiting[tag] = _Waiting()
        rows.numbers.append(number)
        rows.records.append(record)
        rows.size += len(line)
        held += len(line)
        if held >= _BYTES:
            yield from (_batch(name, waiting.pop(name)) for name in list(waiting))
            held = 0
        elif len(rows.numbers) >= _ROWS:
            held -= rows.size
            yield _batch(tag, waiting.pop(tag))
    yield from (_batch(name, waiting.pop(name)) for name in list(waiting))


def _batch(tag: str, rows: _Waiting) -> RowBatch:
    columns: list[Sequence[object]] = [rows.numbers]
    values = zip(*map(_VALUES[tag], rows.records), strict=True)
    for known, column in zip(FIELDS[tag], values, strict=True):
        if known.kind is FieldKind.JSON:
            columns.append(_json(column))
        elif known.required:
            columns.append(column)
        else:
            columns.append([None if v is msgspec.UNSET else v for v in column])
    if extras := _EXTRAS.get(tag):
        causes = [cause_of(record.cause) for record in rows.records]
        columns += [[None if c is None else extra.of(c) for c in causes] for extra in extras]
    return RowBatch(TABLES[tag], columns)


def _json(column: Sequence[Any]) -> list[str | None]:
    texts = ["null" if v is msgspec.UNSET else str(v, "utf-8") for v in column]
    return [None if text == "null" else text for text in texts]
