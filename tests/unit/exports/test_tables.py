"""CSV and Parquet agree with the JSON of the recording to the last value."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.exports import Format, export
from qmp_memlistener.exports.fields import FieldKind
from qmp_memlistener.exports.tables import TABLES
from tests.unit.exports.export_support import RECORDED, documents, exported, odd_recording

DOCS = Path(__file__).parents[3] / "docs" / "export.md"


def wanted(name: str, number: int, document: dict[str, Any]) -> object:
    """The value of a column, from the JSON."""
    cause = document.get("cause") or {}
    match name:
        case "line":
            return number
        case "cause_type":
            return cause.get("type")
        case "cause_device":
            return cause.get("device")
        case "cause_transition":
            return cause.get("ref") if cause.get("type") == "transition" else None
        case _:
            return document.get(name)


def read_cell(kind: FieldKind, cell: str) -> object:
    match kind:
        case FieldKind.INTEGER | FieldKind.ADDRESS:
            return int(cell)
        case FieldKind.BOOLEAN:
            return {"true": True, "false": False}[cell]
        case FieldKind.JSON:
            return json.loads(cell)
        case _:
            return cell


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_what_the_json_does(source: Path, tmp_path: Path) -> None:
    done = export(str(source), Format.CSV, str(tmp_path / "out"))
    docs = documents(source)
    assert {p.stem for p in (tmp_path / "out").iterdir()} == {d["type"] for d in docs.values()}
    assert done.records.total() == len(docs)
    for path in (tmp_path / "out").iterdir():
        columns = TABLES[path.stem].columns
        with path.open(newline="", encoding="utf-8") as file:
            heading, *rows = csv.reader(file)
        assert heading == [c.name for c in columns]
        assert set(heading) >= {k for d in exported(path.stem, docs).values() for k in d} - {
            "type",
            "new_key",
        }
        assert len(rows) == len(exported(path.stem, docs))
        for row, (number, document) in zip(rows, exported(path.stem, docs).items(), strict=True):
            for column, cell in zip(columns, row, strict=True):
                value = wanted(column.name, number, document)
                if value is None:
                    assert cell == "", column
                else:
                    assert cell == value == "" or read_cell(column.kind, cell) == value, column


def test_absent_is_empty_and_an_empty_text_is_in_quotes(tmp_path: Path) -> None:
    source = odd_recording(tmp_path / "odd.jsonl")
    export(str(source), Format.CSV, str(tmp_path / "stall.csv"), only="stall")
    text = (tmp_path / "stall.csv").read_text()
    assert text.splitlines()[0].startswith("line,schema,kind,start_ns,end_ns,")
    third = text.splitlines()[-1]
    assert third == (
        '6,,"commit",15,15,0,0,"p","[""p""]","",,'
        '"{""type"":""transition"",""ref"":7}",3,,,"transition",7'
    )
    assert '"a ""b"", c\nd é"' in text
    assert ',"null",,2,' in text  # a site of that name, and no cause


def test_what_an_old_recording_lacks_is_no_zero(tmp_path: Path) -> None:
    source = odd_recording(tmp_path / "odd.jsonl")
    export(str(source), Format.CSV, str(tmp_path / "out"))
    (row,) = csv_rows(tmp_path / "out" / "transition.csv")
    for name in ("merged", "slot_ops", "schema", "ram_appeared", "flips", "late_ns"):
        assert row[name] == "", name
    first, second = csv_rows(tmp_path / "out" / "slot_op.csv")
    assert (first["ret"], first["predicted"]) == ("", "")
    assert (second["ret"], second["predicted"], second["op"]) == ("-22", "true", "from the future")


def test_parquet_holds_what_the_json_does(source: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install pyarrow")
    export(str(source), Format.PARQUET, str(tmp_path / "out"))
    docs = documents(source)
    assert {p.stem for p in (tmp_path / "out").iterdir()} == {d["type"] for d in docs.values()}
    for path in (tmp_path / "out").iterdir():
        rows = parquet.read_table(path).to_pylist()
        found = exported(path.stem, docs)
        for row, (number, document) in zip(rows, found.items(), strict=True):
            for column in TABLES[path.stem].columns:
                value = wanted(column.name, number, document)
                got = row[column.name]
                if column.kind is FieldKind.JSON and got is not None:
                    got = json.loads(got)
                assert (got, type(got)) == (value, type(value)), column


def test_columns_of_parquet_have_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install pyarrow")
    target = tmp_path / "slot_op.parquet"
    export(str(RECORDED[0]), Format.PARQUET, str(target), only="slot_op")
    schema = parquet.read_schema(target)
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types["t_ns"] == types["transition"] == "int64"
    assert types["gpa"] == types["size"] == types["hva"] == "uint64"
    assert types["op"] == "string"
    assert types["predicted"] == "bool"


def test_duckdb_answers_over_many_recordings_as_we_do(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="needs pip install duckdb")
    pytest.importorskip("pyarrow", reason="needs pip install pyarrow")
    longest: dict[str, list[int]] = defaultdict(list)
    for source in RECORDED:
        name = f"{source.parent.name}-{source.name.removesuffix('.jsonl.gz')}"
        export(str(source), Format.PARQUET, str(tmp_path / name))
        docs = documents(source)
        machine = next(d["machine"] for d in docs.values() if d["type"] == "header")
        causes = {
            d["seq"]: d["cause"].get("type") for d in docs.values() if d["type"] == "transition"
        }
        for d in docs.values():
            if d["type"] == "stall" and (d["cause"] or {}).get("type") == "transition":
                key = f"{machine} {d['kind']} {causes[d['cause']['ref']]}"
                longest[key].append(d["at_least_ns"])
    (query,) = re.findall(r"```sql\n(-- DuckDB.*?)```", DOCS.read_text(), re.DOTALL)
    found = duckdb.execute(query.replace("runs/", f"{tmp_path}/")).fetchall()
    assert {f"{m} {k} {c}": [n, most] for m, k, c, n, most in found} == {
        key: [len(values), max(values)] for key, values in longest.items()
    }
    assert len(longest) > 3


def test_duckdb_reads_the_csv_as_we_wrote_it(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="needs pip install duckdb")
    source = RECORDED[0]
    export(str(source), Format.CSV, str(tmp_path / "out"))
    stalls = exported("stall", documents(source)).values()
    (found,) = duckdb.execute(
        f"select count(*), sum(at_most_ns), count(thread) from '{tmp_path}/out/stall.csv'"
    ).fetchall()
    most = sum(s["at_most_ns"] for s in stalls)
    assert found == (len(stalls), most, sum(s["thread"] is not None for s in stalls))
