"""Tables as Parquet, by pyarrow: typed columns."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

from ..records import Recording
from .extras import Package, needed
from .fields import FieldKind
from .tables import TABLES, RowBatch, batches

__all__ = ["Parquet"]

_ROWS = 1 << 16
_BYTES = 16 << 20


class Parquet:
    """Writes tables; raises MissingPrerequisite where pyarrow is not installed."""

    def __init__(self) -> None:
        self.arrow = needed("pyarrow", "the format parquet", "tables")
        self.files = needed("pyarrow.parquet", "the format parquet", "tables")
        types = {
            FieldKind.INTEGER: self.arrow.int64(),
            FieldKind.ADDRESS: self.arrow.uint64(),
            FieldKind.BOOLEAN: self.arrow.bool_(),
            FieldKind.TEXT: self.arrow.string(),
            FieldKind.JSON: self.arrow.string(),
        }
        self.schemas = {
            name: self.arrow.schema([(c.name, types[c.kind]) for c in table.columns])
            for name, table in TABLES.items()
        }

    def write_directory(self, recording: Recording, directory: Path) -> Counter[str]:
        """A file `TYPE.parquet` for each type that the recording has; how many rows each has."""
        rows: Counter[str] = Counter()
        with ExitStack() as stack:
            files: dict[str, _File] = {}
            for batch in batches(recording):
                name = batch.table.name
                if name not in files:
                    path = str(directory / f"{name}.parquet")
                    files[name] = stack.enter_context(_File(self, path, name))
                files[name].add(batch)
                rows[name] += len(batch.columns[0])
        return rows

    def write_table(self, recording: Recording, name: str, file: BinaryIO) -> Counter[str]:
        """The table of one type."""
        rows: Counter[str] = Counter({name: 0})
        with _File(self, file, name) as table:
            for batch in batches(recording, name):
                table.add(batch)
                rows[name] += len(batch.columns[0])
        return rows


class _File:
    """One table that is being written; what is put aside becomes a row group."""

    def __init__(self, parquet: Parquet, where: str | BinaryIO, name: str) -> None:
        self._pa = parquet.arrow
        self._schema = parquet.schemas[name]
        self._writer = parquet.files.ParquetWriter(where, self._schema, compression="zstd")
        self._batches: list[Package] = []
        self._rows = self._size = 0

    def add(self, batch: RowBatch) -> None:
        arrays = [
            self._pa.array(values, field.type)
            for values, field in zip(batch.columns, self._schema, strict=True)
        ]
        made = self._pa.record_batch(arrays, schema=self._schema)
        self._batches.append(made)
        self._rows += made.num_rows
        self._size += made.nbytes
        if self._rows >= _ROWS or self._size >= _BYTES:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._batches:
            self._writer.write_table(self._pa.Table.from_batches(self._batches))
        self._batches = []
        self._rows = self._size = 0
