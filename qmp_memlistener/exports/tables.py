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
from .fields import DECODERS, FIELDS, Field, FieldKind, Recorded, cause_of

__all__ = ["TABLES", "RowBatch", "RecordTable", "batches"]

_ROWS = 512
"""Few, so that they are still in the CPU's caches when they are made columns."""
_BYTES = 16 << 20
"""Of lines between two moments at which nothing waits for its batch to be full."""
_SEQ = "transition"
"""The type of a cause whose `ref` is the seq of a transition."""


_EXTRAS: dict[str, tuple[Field, ...]] = {
    "transition": (Field("cause_type", FieldKind.TEXT), Field("cause_device", FieldKind.TEXT)),
    "stall": (Field("cause_type", FieldKind.TEXT), Field("cause_transition", FieldKind.INTEGER)),
}
"""Columns that are taken out of the record's cause."""


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
            *_EXTRAS.get(tag, ()),
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
    records: list[Recorded] = field(default_factory=list)


def batches(recording: Recording, only: str | None = None) -> Iterator[RowBatch]:
    """The rows of all tables, or of one, in the order of the lines within each table.

    Raises RecordingError where a line is no record.
    """
    decoders = DECODERS if only is None else {only: DECODERS[only]}
    waiting = {tag: _Waiting() for tag in decoders}
    held = 0
    for number, line, record in recording.read_as(decoders):
        tag = record.__class__.__name__
        rows = waiting[tag]
        rows.records.append(record)
        rows.numbers.append(number)
        held += len(line)
        if held >= _BYTES:
            held = 0
            full = list(waiting)
        elif len(rows.numbers) >= _ROWS:
            full = [tag]
        else:
            continue
        yield from _taken(waiting, full)
    yield from _taken(waiting, list(waiting))


def _taken(waiting: dict[str, _Waiting], tags: Sequence[str]) -> Iterator[RowBatch]:
    for tag in tags:
        rows = waiting[tag]
        if rows.numbers:
            waiting[tag] = _Waiting()
            yield _batch(tag, rows)


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
    if tag in _EXTRAS:
        causes = [cause_of(record.cause) for record in rows.records]
        columns.append([None if c is None else c.type for c in causes])
        if tag == "transition":
            columns.append([None if c is None else c.device for c in causes])
        else:
            columns.append([c.ref if c is not None and c.type == _SEQ else None for c in causes])
    return RowBatch(TABLES[tag], columns)


def _json(column: Sequence[Recorded]) -> list[str | None]:
    return [
        None if v is msgspec.UNSET or (text := str(v, "utf-8")) == "null" else text for v in column
    ]
