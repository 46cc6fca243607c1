"""Damaged recordings: every record before the damage is read, then RecordingError or InputError."""

from __future__ import annotations

import functools
import gzip
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.cli.main import main
from qmp_memlistener.errors import InputError, RecordingError
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.records import (
    Cause,
    CauseType,
    Detail,
    GuestState,
    Header,
    Lost,
    MapRecord,
    Note,
    QmpEvent,
    Reconciled,
    Record,
    Recording,
    RecordingWriter,
    Section,
    SlotOp,
    TransitionRecord,
    is_recording,
)
from qmp_memlistener.topology import diff, read_map
from qmp_memlistener.tracking import replay

SLOTS = Path(__file__).parents[1] / "conformance" / "slots"
ROUNDS = 2000
HEADER = Header(
    tool_version="0.1.0",
    monotonic_ns=1,
    realtime_ns=2,
    host_kernel="6.1.0",
    target="unix:/run/vm.qmp",
    qemu_version="7.2.22",
    machine="pc",
    accel="kvm",
    guest_name="größe",
    pid=4711,
    source="trace events",
    stamp_bound_ns=200_000,
)


@functools.cache
def records() -> list[Record]:
    """What an agent would have written about a recorded guest."""
    with gzip.open(SLOTS / "7.2" / "pc-pam.json.gz") as file:
        steps: list[dict[str, Any]] = json.load(file)["steps"][1:8]
    views = [read_map(s["mtree_before"]).view for s in steps]
    out: list[Record] = [
        MapRecord(t_ns=1, address_space="memory", ranges=Section.list_of(views[0]), ram_blocks=[]),
        GuestState(t_ns=2, status="running", running=True),
        QmpEvent(t_ns=3, event="DEVICE_DELETED", data={"device": "d0", "path": "/machine/x"}),
    ]
    for seq, (step, before, after) in enumerate(zip(steps, views, views[1:], strict=False), 1):
        t = diff(before, after)
        out.append(
            TransitionRecord(
                seq=seq,
                t_ns=seq * 10,
                cause=Cause(CauseType.PCI_BAR, device="d0", detail="BAR 2"),
                removed=Section.list_of(t.removed),
                added=Section.list_of(t.added),
                holes_punched=list(t.holes_punched),
                holes_filled=list(t.holes_filled),
                detail=Detail.FULL,
                slot_ops=len(step["ops"]),
            )
        )
        out += [
            SlotOp(
                t_ns=seq * 10,
                as_id=op["as_id"],
                slot=op["slot"],
                op=OpKind.ADD if op["size"] else OpKind.DELETE,
                gpa=op["gpa"],
                size=op["size"] or 4096,
                flags=op["flags"],
                ret=op["ret"],
                predicted=False,
                transition=seq,
                hva=op["ua"],
            )
            for op in step["ops"]
        ]
    out += [
        Reconciled(t_ns=90, slots=9, equal=False, differences=["slot 1"]),
        Lost(t_ns=91, what="lines", count=3),
        Note(t_ns=92, text="the end"),
    ]
    return out


@functools.cache
def good() -> bytes:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "r.jsonl"
        with RecordingWriter(str(path), HEADER) as writer:
            for record in records():
                writer.write(record)
        return path.read_bytes()


PIECES = [
    b"\0", b"\n", b"\r\n", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\xff", b"\xc3",
    b"null", b"1e999", b"-1", b"99999999999999999999999999", b"0.5", b"true", b"NaN",
    b'"type":"note",', b'"schema":9,', b"\\ud800", b"\xf0\x9f\x98\x80",
    b'{"type":"header"}\n', b"[" * 3000,
]  # fmt: skip


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The recording with one to three accidents."""
    for _ in range(rng.randint(1, 3)):
        lines = data.split(b"\n")
        at = rng.randrange(len(data) + 1)
        line = rng.randrange(len(lines))
        match rng.randrange(10):
            case 0:
                data = data[:at]
            case 1:
                other = rng.randrange(len(lines))
                lines[line], lines[other] = lines[other], lines[line]
                data = b"\n".join(lines)
            case 2:
                data = data[:at] + rng.choice(PIECES) + data[at:]
            case 3:
                data = data[:at] + rng.randbytes(rng.randint(1, 4)) + data[at:]
            case 4:
                data = data[:at] + data[at + rng.randint(1, 80) :]
            case 5:
                digits = [i for i, c in enumerate(data) if 48 <= c < 58]
                for i in rng.sample(digits, min(len(digits), rng.randint(1, 6))):
                    data = data[:i] + b"%d" % rng.randrange(10) + data[i + 1 :]
            case 6:
                del lines[line]
                data = b"\n".join(lines)
            case 7:
                lines[line] = value_changed(rng, lines[line])
                data = b"\n".join(lines)
            case 8:
                lines[line:line] = lines[line : line + rng.randint(1, 4)]
                data = b"\n".join(lines)
            case _:
                data = data[:at] + rng.randbytes(rng.randint(1, 400))
    return data


VALUES: list[object] = [
    None, True, -1, 0, 0.5, 1 << 63, 1 << 64, -(1 << 63), "", "x", "ram", [], [1], {}, {"a": 1},
    [[[[]]]], "\ud800", "\0", "x" * 5000,
]  # fmt: skip


def value_changed(rng: random.Random, line: bytes) -> bytes:
    """Still JSON, but one value of the record, at any depth, is another one or gone."""
    try:
        record = json.loads(line)
    except ValueError:
        return line
    at = record
    while isinstance(at, dict | list) and at:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key: Any = rng.choice(keys)
        inner = at[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            at = inner
            continue
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice(VALUES)
        break
    return json.dumps(record).encode()


def read(path: Path) -> int:
    """How many records could be read; the error, if any, is one of ours and names the file."""
    count = 0
    refused: InputError | None = None
    try:
        for record in Recording(str(path)):
            assert isinstance(record, Record)
            count += 1
    except InputError as exc:
        refused = exc
    assert refused is None or str(path) in refused.message
    return count


@pytest.mark.timeout(60)
def test_recordings_with_accidents(tmp_path: Path) -> None:
    rng = random.Random(11)
    path = tmp_path / "r.jsonl"
    whole = len(records())
    counts = set()
    for n in range(ROUNDS):
        data = mutated(rng, good())
        path.write_bytes(data)
        try:
            counts.add(read(path))
            is_recording(str(path))
        except Exception as exc:
            exc.add_note(f"round {n}, recording:\n{data[:20_000]!r}")
            raise
    assert whole in counts
    assert 0 in counts


@pytest.mark.timeout(60)
def test_a_recording_with_accidents_is_planned_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `plan RECORDING` does with it: exit code 2, or a document."""
    rng = random.Random(12)
    path = tmp_path / "r.jsonl"
    codes = set()
    for n in range(ROUNDS // 4):
        lines = good().split(b"\n")
        at = rng.randrange(1, len(lines) - 1)
        lines[at] = value_changed(rng, lines[at])
        path.write_bytes(b"\n".join(lines))
        try:
            codes.add(main(["plan", str(path), "--json"]))
        except Exception as exc:
            exc.add_note(f"round {n}, line {at + 1}: {lines[at][:5000]!r}")
            raise
        out, err = capsys.readouterr()
        assert bool(out) is not err.startswith("error: ")
    assert codes == {0, 2}


def test_a_good_one_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(good())
    steps = list(replay(Recording(str(path))))
    assert [s.seq for s in steps] == [
        r.seq for r in records() if isinstance(r, TransitionRecord) and (r.removed or r.added)
    ]


def test_every_cut(tmp_path: Path) -> None:
    """Wherever a crash cut it off: all whole lines are read, and no complaint."""
    path = tmp_path / "r.jsonl"
    data = good()
    first = data.index(b"\n") + 1
    for at in range(first, len(data), 97):
        path.write_bytes(data[:at])
        recording = Recording(str(path))
        assert len(list(recording)) == data.count(b"\n", 0, at) - 1
        assert recording.truncated is (data[at - 1 : at] != b"\n")
    for at in range(0, first, 7):
        path.write_bytes(data[:at])
        with pytest.raises(RecordingError):
            Recording(str(path))


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_any_bytes(data: bytes) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "r.jsonl"
        path.write_bytes(data)
        read(path)
        header = good()[: good().index(b"\n") + 1]
        path.write_bytes(header + data + b"\n")
        read(path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"note","t_ns":1,"text":"a","x":' + b"[" * 100_000 + b"\n",
        b'{"type":"note","t_ns":1,"text":"a","x":' + b"[" * 5000 + b"]" * 5000 + b"}\n",
        b'{"type":"note","t_ns":1,"text":"\xff\xfe"}\n',
        b'{"ty\xffpe":"note","t_ns":1,"text":"a"}\n',
        b'{"type":"note","t_ns":1' + b"0" * 5000 + b',"text":"a"}\n',
        b'{"type":"note","t_ns":1e400,"text":"a"}\n',
        b'{"type":{},"t_ns":1}\n',
        b"\n",
        b"\0" * 1000 + b"\n",
        b"[]\n",
        b'"note"\n',
        b"1\n",
    ],
    ids=["deep", "deep-closed", "utf-8", "utf-8-key", "huge", "float", "type", "empty", "zeros",
         "list", "string", "number"],
)  # fmt: skip
def test_hostile_lines(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "r.jsonl"
    header = good()[: good().index(b"\n") + 1]
    for data in (header + line, line):
        path.write_bytes(data)
        read(path)


@pytest.mark.parametrize("name", ["/", "/proc/self/mem", "/nonexistent/r.jsonl", "/dev/null"])
def test_what_is_no_file(name: str) -> None:
    with pytest.raises(InputError):
        Recording(name)
    assert is_recording(name) is False
