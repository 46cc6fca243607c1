"""A recording is readable while it grows, after a crash, and by older and newer readers."""

from __future__ import annotations

import json
import os
import stat
import tracemalloc
from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.errors import InputError, RecordingError
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.records import (
    RECORD_TYPES,
    Cause,
    CauseType,
    Detail,
    GuestState,
    Note,
    Recording,
    RecordingWriter,
    SlotOp,
    TransitionRecord,
    is_recording,
)
from qmp_memlistener.topology import Hole
from tests.support.records import HEADER

RECORDS = [
    TransitionRecord(
        seq=1,
        t_ns=10,
        cause=Cause(CauseType.REGION, regions=["regs"]),
        removed=[],
        added=[],
        holes_punched=[Hole("pc.ram", 1 << 63, 4096, 1 << 62, None, "dev")],
        holes_filled=[],
        detail=Detail.FULL,
    ),
    SlotOp(
        t_ns=11, as_id=0, slot=3, op=OpKind.DELETE, gpa=0, size=1 << 40, flags=0, ret=-22,
        predicted=False, transition=1,
    ),
    GuestState(t_ns=12, status="paused", running=False),
]  # fmt: skip


def write(path: Path) -> None:
    with RecordingWriter(str(path), HEADER) as writer:
        for record in RECORDS:
            writer.write(record)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    recording = Recording(str(path))
    assert recording.header == HEADER
    assert list(recording) == RECORDS
    assert is_recording(str(path))


def test_the_contract_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    header, transition, op, _ = map(json.loads, path.read_text().splitlines())
    assert header["schema"] == 1
    assert {"schema", "type", "seq", "t_ns", "cause", "removed", "added"} <= transition.keys()
    assert {"holes_punched", "holes_filled"} <= transition.keys()
    assert transition["type"] == "transition"
    assert op == {
        "type": "slot_op", "schema": 1, "t_ns": 11, "as_id": 0, "slot": 3, "op": "delete",
        "gpa": 0, "size": 1 << 40, "flags": 0, "ret": -22, "predicted": False, "transition": 1,
        "hva": None, "late_ns": None,
    }  # fmt: skip


def test_a_growing_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordingWriter(str(path), HEADER) as writer:
        recording = Recording(str(path))
        assert list(recording) == []
        writer.write(RECORDS[0])
        assert list(recording) == RECORDS[:1]
        writer.write(RECORDS[1])
        assert list(recording) == RECORDS[1:2]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_last_line_that_is_cut_off_is_no_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    path.write_bytes(path.read_bytes()[:-cut])
    recording = Recording(str(path))
    assert list(recording) == RECORDS[:-1]
    assert recording.truncated


def test_unknown_types_and_keys_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    with path.open("a") as file:
        file.write('{"type":"from_the_future","schema":1,"x":{"y":[1]}}\n')
        file.write('{"type":"note","schema":1,"t_ns":1,"text":"hi","mood":"good"}\n')
    recording = Recording(str(path))
    assert list(recording)[-1] == Note(t_ns=1, text="hi")
    assert recording.skipped == 1


def test_a_newer_schema_is_refused_and_an_older_one_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    text = path.read_text()
    path.write_text(text.replace('"schema":1', '"schema":99', 1))
    with pytest.raises(RecordingError, match="schema 99"):
        Recording(str(path))
    path.write_text(text.replace('"schema":1', '"schema":0', 1))
    assert list(Recording(str(path))) == RECORDS


@pytest.mark.parametrize("content", [b"", b"hello\n", b"{}\n", b'{"type":"note"}\n', b"\xff\xfe\n"])
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordingError):
        Recording(str(path))
    assert not is_recording(str(path))


def test_garbage_in_the_middle_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[2:]]))
    with pytest.raises(RecordingError, match="line 3"):
        list(Recording(str(path)))


def test_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    with pytest.raises(InputError, match="exists already"):
        RecordingWriter(str(path), HEADER)
    with pytest.raises(InputError, match="cannot be created"):
        RecordingWriter(str(tmp_path / "no" / "r.jsonl"), HEADER)


def test_a_line_without_end_is_refused_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(RecordingError, match="line 5: longer than 32 MiB"):
            list(Recording(str(path)))
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


def test_values_that_nobody_wants_are_not_made(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    with path.open("ab") as file:
        file.write(b'{"type":"future","x":[' + b"[]," * 2_000_000 + b"0]}\n")
    tracemalloc.start()
    try:
        recording = Recording(str(path))
        assert len(list(recording)) == len(RECORDS)
        assert recording.skipped == 1
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_recording_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "r.jsonl")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r.jsonl").stat().st_mode) == 0o600


def test_lines_are_read_by_decoders_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    with path.open("ab") as file:
        file.write(b'{"schema":1,"type":"note","t_ns":13,"text":"the type is not first"}\n')
        file.write(b'{"type":"of the future","t_ns":14}\n{"type":"note","t_')
    lines = path.read_bytes().splitlines(keepends=True)
    recording = Recording(str(path))
    decoders: dict[str, msgspec.json.Decoder[object]] = {
        tag: msgspec.json.Decoder(RECORD_TYPES[tag]) for tag in ("header", "slot_op", "note")
    }
    found = list(recording.read_as(decoders))
    assert [(number, line) for number, line, _ in found] == [(n, lines[n - 1]) for n in (1, 3, 5)]
    assert [record for *_, record in found][:2] == [HEADER, RECORDS[1]]
    assert (recording.skipped, recording.truncated) == (1, True)
    assert list(recording.read_as(decoders)) == found  # from the first line on again
    assert list(recording)[:3] == RECORDS  # which goes on where it was


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"type":"note","t_ns":', "not JSON"),
        (b'{"type":"note","t_ns":"x","text":""}', "Expected `int`"),
        (b'{"type":"note","t_ns":1,"text":"\xff"}', "line 5"),
        (b"\xff", "not JSON"),
    ],
)
def test_a_line_that_its_decoder_refuses_is_named(line: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    with path.open("ab") as file:
        file.write(line + b"\n")
    decoders = {tag: msgspec.json.Decoder(cls) for tag, cls in RECORD_TYPES.items()}
    for read in (lambda r: list(r.read_as(decoders)), list):
        with pytest.raises(RecordingError, match=why) as found:
            read(Recording(str(path)))
        assert "line 5" in found.value.message
