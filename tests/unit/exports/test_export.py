"""`export`: where it goes, what is refused, and that nothing half-made stays."""

from __future__ import annotations

import gzip
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.errors import InputError, MissingPrerequisite, RecordingError
from qmp_memlistener.exports import Format, export, tables
from qmp_memlistener.records import Recording
from tests.unit.cli.cli_support import process, run
from tests.unit.exports.export_support import RECORDED, documents, odd_recording, unpacked

FORMATS = list(Format)
NEEDS = {
    Format.PERFETTO: ("perfetto.protos.perfetto.trace.perfetto_trace_pb2", "perfetto"),
    Format.PARQUET: ("pyarrow", "tables"),
}


def need(to: Format) -> None:
    if to in NEEDS:
        module, _ = NEEDS[to]
        pytest.importorskip(module, reason=f"needs pip install {module.partition('.')[0]}")


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_is_cut_off_is_exported_up_to_there(to: Format, tmp_path: Path) -> None:
    need(to)
    whole = b"".join(unpacked(RECORDED[0]))
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole[: len(whole) // 2])
    lines = cut.read_bytes().count(b"\n")
    done = export(str(cut), to, str(tmp_path / "out"))
    assert done.truncated
    assert done.records.total() == lines


@pytest.mark.parametrize("to", FORMATS)
def test_packed_and_plain_give_the_same(to: Format, tmp_path: Path) -> None:
    need(to)
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(gzip.decompress(RECORDED[0].read_bytes()))
    for name, path in (("a", RECORDED[0]), ("b", plain)):
        done = export(str(path), to, str(tmp_path / name))
        assert (done.truncated, done.skipped) == (False, 0)
    a, b = tmp_path / "a", tmp_path / "b"
    if a.is_dir():
        assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
        for path in a.iterdir():
            assert path.read_bytes() == (b / path.name).read_bytes()
    else:
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_there_is_not_overwritten(to: Format, tmp_path: Path) -> None:
    need(to)
    for name in ("file", "directory", "link"):
        target = tmp_path / name
        if name == "file":
            target.write_text("mine")
        elif name == "directory":
            target.mkdir()
        else:
            target.symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match="exists already"):
            export(str(RECORDED[0]), to, str(target))
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file", "link"]


@pytest.mark.parametrize("to", FORMATS)
def test_what_comes_meanwhile_is_not_overwritten(
    to: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(to)
    original: Any = Recording.read_as

    def made_meanwhile(self: Recording, decoders: object) -> object:
        yield from original(self, decoders)
        (tmp_path / "out").write_text("another's")

    monkeypatch.setattr(Recording, "read_as", made_meanwhile)
    with pytest.raises(InputError, match="exists already"):
        export(str(RECORDED[0]), to, str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "another's"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to", FORMATS)
def test_an_interruption_leaves_nothing(
    to: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(to)
    original: Any = Recording.read_as

    def interrupted(self: Recording, decoders: object) -> object:
        for at, found in enumerate(original(self, decoders)):
            if at == 100:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Recording, "read_as", interrupted)
    monkeypatch.setattr(tables, "_ROWS", 10)
    with pytest.raises(KeyboardInterrupt):
        export(str(RECORDED[0]), to, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_only_its_owner_may_read_it(to: Format, tmp_path: Path) -> None:
    need(to)
    export(str(RECORDED[0]), to, str(tmp_path / "out"))
    mode = stat.S_IMODE((tmp_path / "out").stat().st_mode)
    assert mode == (0o700 if (tmp_path / "out").is_dir() else 0o600)


@pytest.mark.parametrize("to", list(NEEDS))
def test_without_its_package_a_format_says_what_to_install(
    to: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, extra = NEEDS[to]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPrerequisite) as found:
        export(str(RECORDED[0]), to, str(tmp_path / "out"))
    assert found.value.remedy == f"pip install 'qmp-memlistener[{extra}]'"
    ran = run(capsys, "export", RECORDED[0], "--format", to, "-o", tmp_path / "out")
    assert f"needs the Python package {module.partition('.')[0]}" in ran.refused(4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"stall"}',
        b'{"type":"slot_op",',
        b'{"type":"note","t_ns":1,"text":"\xff"}',
        b'{"type":"qmp_event","t_ns":1,"event":"x","data":{"a":"\xff"}}',
    ],
)
def test_a_damaged_line_is_refused(to: Format, line: bytes, tmp_path: Path) -> None:
    need(to)
    path = odd_recording(tmp_path / "r.jsonl")
    with path.open("ab") as file:
        file.write(line + b"\n")
    if to is Format.OPENMETRICS and b'"data"' in line:
        return  # it looks at no such text
    with pytest.raises(RecordingError):
        export(str(path), to, str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize("to", [Format.PERFETTO, Format.PARQUET])
def test_a_number_that_cannot_be_is_refused(to: Format, tmp_path: Path) -> None:
    need(to)
    path = odd_recording(tmp_path / "r.jsonl")
    with path.open("ab") as file:
        file.write(b'{"type":"note","t_ns":%d,"text":""}\n' % (1 << 80))
    with pytest.raises(RecordingError, match="cannot be"):
        export(str(path), to, str(tmp_path / "out"))


def test_a_table_goes_to_standard_output(tmp_path: Path) -> None:
    ran = process("export", RECORDED[0], "--format", "csv", "--type", "slot_op", "-o", "-")
    export(str(RECORDED[0]), Format.CSV, str(tmp_path / "s.csv"), only="slot_op")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == (tmp_path / "s.csv").read_text()
    ran = process("export", RECORDED[0], "--format", "openmetrics", "-o", "-")
    assert ran.out.endswith("# EOF\n")


def test_a_type_that_the_recording_has_not_is_an_empty_table(tmp_path: Path) -> None:
    done = export(str(RECORDED[2]), Format.CSV, str(tmp_path / "s.csv"), only="stall")
    assert done.records == {"stall": 0}
    assert (tmp_path / "s.csv").read_text().count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "perfetto", "-o", "-"),
        ("--format", "parquet", "--type", "stall", "-o", "-"),
        ("--format", "csv", "-o", "-"),
        ("--format", "csv", "--type", "stalls", "-o", "x"),
        ("--format", "openmetrics", "--type", "stall", "-o", "x"),
        ("--format", "openmetrics", "--json", "-o", "-"),
        ("--format", "csv", "-o", "no/such/directory"),
        ("--format", "csv", "-o", ""),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "export", RECORDED[0], *options).refused(2)


def test_what_is_said_of_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = odd_recording(tmp_path / "odd.jsonl")
    ran = run(capsys, "export", source, "--format", "csv", "-o", tmp_path / "a")
    records = len(documents(source))
    assert ran.out.splitlines() == [
        f"{tmp_path / 'a'}: {records} records of 8 types",
        "1 record of a type that this version does not know: left out",
    ]
    ran = run(capsys, "export", source, "--format", "csv", "-o", tmp_path / "b", "--json")
    document = json.loads(ran.out)
    assert document.pop("records")["stall"] == 3
    assert document == {
        "schema": 1, "recording": str(source), "format": "csv", "output": str(tmp_path / "b"),
        "skipped": 1, "truncated": False,
    }  # fmt: skip


def test_what_is_no_recording_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("QEMU\n")
    with pytest.raises(RecordingError):
        export(str(path), Format.CSV, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [path]
