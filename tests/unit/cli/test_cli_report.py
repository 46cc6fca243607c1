"""`report`: the JSON contract, what people read, and files that are not what they should be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmp_memlistener.kvmlab.race import race_document
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.records import (
    CommandRecord,
    GuestFailure,
    GuestState,
    Lost,
    MeasurementRecord,
    ProbesRecord,
    ProbeState,
    Record,
    RecordingWriter,
    SlotOp,
    StallCause,
    StallCauseType,
    StallKind,
    StallRecord,
    Violation,
)
from qmp_memlistener.text import json_bytes
from tests.support.records import HEADER as PLAIN_HEADER
from tests.support.records import transition
from tests.unit.cli.cli_support import check_types, process, run
from tests.unit.page.page_support import comparison, race

START = 7_000_000_000
DOCUMENT = {
    "schema": int, "recording": str, "header": dict, "truncated": bool, "transitions": int,
    "slot_ops": int, "strategies": dict, "lost": int, "probes": list, "compared": bool,
    "differences": (int, type(None)), "failures": list, "resets": list,
    "violations": list, "possible_violations": list, "summary": dict,
}  # fmt: skip
SUMMARY = {
    "type": str, "schema": int, "start_ns": int, "end_ns": int, "transitions": int, "stalls": int,
    "statistics": list, "probes": list,
}  # fmt: skip
STATISTICS = {
    "kind": str, "cause": str, "count": int, "total_ns": int, "p50_ns": int, "p90_ns": int,
    "p99_ns": int, "max_ns": int, "bounds_ns": list, "histogram": list,
    "total_min_ns": int, "p50_min_ns": int, "p90_min_ns": int, "p99_min_ns": int,
    "max_min_ns": int, "bounds_min_ns": list, "histogram_min": list,
}  # fmt: skip
HEADER = msgspec.structs.replace(PLAIN_HEADER, monotonic_ns=START)


def slot_op(t_ns: int, seq: int) -> SlotOp:
    return SlotOp(
        t_ns=t_ns, as_id=0, slot=3, op=OpKind.DELETE, gpa=0, size=4096, flags=0, ret=0,
        predicted=False, transition=seq,
    )  # fmt: skip


def stall(
    kind: str, start_ns: int, at_most_ns: int, cause: StallCause | None = None, **more: object
) -> StallRecord:
    values: dict[str, Any] = {
        "kind": kind, "start_ns": start_ns, "end_ns": start_ns + at_most_ns,
        "at_least_ns": at_most_ns, "at_most_ns": at_most_ns, "probe": "uprobes",
        "witnesses": ["uprobes"], "thread": None, "site": None, "cause": cause, "incident": 1,
    }  # fmt: skip
    return StallRecord(**(values | more))


def probe(name: str, reason: str | None = None) -> ProbeState:
    return ProbeState(name, [StallKind.COMMIT], reason is None, reason, None, 1, "little")


def recording(path: Path, records: Iterable[Record] = ()) -> Path:
    with RecordingWriter(str(path), HEADER) as writer:
        for record in records:
            writer.write(record)
    return path


EVERYTHING: list[Record] = [
    ProbesRecord(t_ns=START + 1, probes=[probe("ping"), probe("pulse", "the guest has none")]),
    transition(1, START + 1_000_000, 1),
    slot_op(START + 1_000_100, 1),
    slot_op(START + 1_000_200, 1),
    stall("commit", START + 900_000, 300_000, StallCause(StallCauseType.TRANSITION, 1)),
    stall("commit", START + 2_900_000, 700_000, StallCause(StallCauseType.TRANSITION, 2)),
    stall("main_loop", START + 5_000_000, 12_000_000),
    CommandRecord(
        name="object-add", start_ns=START, busy_until_ns=START, end_ns=START + 5, probe="ping"
    ),
    MeasurementRecord(probe="kvmstats", start_ns=START, end_ns=START + 9, values={"exits": 3}),
    Violation(
        t_ns=START + 17_000_000, kind="main_loop", what="main loop stalled", ref=1,
        limit_ns=5_000_000, found_ns=12_000_000,
    ),
    Lost(t_ns=START + 18_000_000, what="uprobe records", count=1200),
    GuestState(t_ns=START + 20_000_000, status="internal-error", running=False),
    GuestFailure(
        t_ns=START + 20_000_000, status="internal-error", what="KVM gave up on a vCPU",
        proven=True, transition=1, cpu=0, ip=0x7C00, gpa=0x100000,
    ),
]  # fmt: skip


def test_the_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = recording(tmp_path / "r.jsonl", EVERYTHING)
    document = run(capsys, "report", path, "--json").document()
    check_types(document, DOCUMENT)
    assert document["schema"] == 1
    assert document["recording"] == str(path)
    assert document["header"] == msgspec.to_builtins(HEADER)
    assert (document["transitions"], document["slot_ops"], document["lost"]) == (1, 2, 1)
    assert document["truncated"] is False
    for key, kind in (("failures", GuestFailure), ("violations", Violation)):
        assert document[key] == [msgspec.to_builtins(r) for r in EVERYTHING if isinstance(r, kind)]
    assert [p["name"] for p in document["probes"]] == ["ping", "pulse"]
    summary = document["summary"]
    check_types(summary, SUMMARY)
    assert summary["type"] == "summary"
    assert (summary["start_ns"], summary["end_ns"]) == (START, START + 20_000_000)
    assert (summary["transitions"], summary["stalls"]) == (1, 3)
    for entry in summary["statistics"]:
        check_types(entry, STATISTICS)
        assert sum(entry["histogram"]) == entry["count"]
    commit, main_loop = summary["statistics"]
    assert (commit["kind"], commit["cause"], commit["count"]) == ("commit", "transition", 2)
    assert (commit["total_ns"], commit["p50_ns"], commit["max_ns"]) == (1_000_000, 300_000, 700_000)
    assert (commit["bounds_ns"], commit["histogram"]) == ([200_000, 500_000], [1, 1])
    assert (main_loop["kind"], main_loop["cause"]) == ("main_loop", "unknown")


def test_what_people_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = recording(tmp_path / "r.jsonl", EVERYTHING)
    done = run(capsys, "report", path)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "QEMU 7.2.22, machine pc, accelerator kvm, pid 1",
        "source: trace",
        f"{path}: 20.0 ms, 1 transition, 2 slot operations, 1 loss",
        "probes: ping",
        "without pulse: the guest has none",
        "traced slots were not compared with those that QEMU's rules predict",
        "",
        "guest failures",
        "  0.020000  GUEST FAILED (internal-error): KVM gave up on a vCPU",
        "            CPU 0 at instruction 0x7c00 could not reach guest-physical 0x100000",
        "            that RAM had no slot during transition #1",
        "",
        "violations",
        "  0.017000  VIOLATION: main loop stalled: 12.0 ms, allowed 5 ms",
        "",
        "losses",
        "  0.018000  uprobe records (1,200)",
        "",
        "3 stalls, 1 transition in 20.0 ms",
        "",
        "kind       cause       count    total      p50      p90      p99      max",
        "main loop  unknown         1  12.0 ms  12.0 ms  12.0 ms  12.0 ms  12.0 ms",
        "commit     transition      2  1.00 ms  0.30 ms  0.70 ms  0.70 ms  0.70 ms",
        "",
        "how long                       1 ms        10 ms",
        "main loop  unknown                         ████",
        "commit     transition  ████████",
        "",
        "longest stalls",
        "  0.005000  stall: main loop           12.0 ms  unknown [uprobes]",
        "  0.002900  stall: commit              0.70 ms  transition #2 [uprobes]",
        "  0.000900  stall: commit              0.30 ms  transition #1 [uprobes]",
    ]


@pytest.mark.parametrize(("longest", "shown"), [("0", 0), ("2", 2), ("99", 3)])
def test_the_longest_stalls(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, longest: str, shown: int
) -> None:
    path = recording(tmp_path / "r.jsonl", EVERYTHING)
    lines = run(capsys, "report", path, "--longest", longest).out.splitlines()
    assert sum("stall: " in line for line in lines) == shown
    assert ("longest stalls" in lines) == bool(shown)


def test_the_longest_of_many(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lengths = [(i * 7919) % 100_003 for i in range(3000)]
    path = recording(
        tmp_path / "r.jsonl", [stall("commit", START + i, n) for i, n in enumerate(lengths)]
    )
    out = run(capsys, "report", path, "--longest", "3").out
    stamps = re.findall(r"^ +(\d\.\d+)  stall", out, re.MULTILINE)
    longest = sorted(range(3000), key=lambda i: lengths[i], reverse=True)[:3]
    assert stamps == [f"{i / 1e9:.6f}" for i in longest]
    document = run(capsys, "report", path, "--json").document()
    (entry,) = document["summary"]["statistics"]
    assert (entry["count"], entry["max_ns"], entry["total_ns"]) == (
        3000, max(lengths), sum(lengths),
    )  # fmt: skip


def test_histograms(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = recording(tmp_path / "r.jsonl", EVERYTHING)
    assert "from this length" not in run(capsys, "report", path).out
    out = run(capsys, "report", path, "--histograms").out
    assert "commit, from this length up to the next\n   200 us  1  ██" in out


def test_a_recording_without_stalls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = recording(tmp_path / "r.jsonl", [transition(1, START + 5_000, 1)])
    out = run(capsys, "report", path).out
    assert "no probe was active: stalls were not measured" in out
    assert "no stall, 1 transition in 5.0 us" in out
    summary = run(capsys, "report", path, "--json").document()["summary"]
    assert (summary["stalls"], summary["statistics"]) == (0, [])


def test_a_recording_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = recording(tmp_path / "r.jsonl")
    assert "0 ns, 0 transitions, 0 slot operations, nothing lost" in run(capsys, "report", path).out
    document = run(capsys, "report", path, "--json").document()
    assert document["summary"]["start_ns"] == document["summary"]["end_ns"] == START


def test_a_growing_recording(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordingWriter(str(path), HEADER) as writer:
        for n in (1, 2, 3):
            writer.write(stall("commit", START, n))
            document = run(capsys, "report", path, "--json").document()
            assert document["summary"]["stalls"] == n
            assert document["truncated"] is False


def test_a_last_line_that_is_cut_off_is_noted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = recording(tmp_path / "r.jsonl", EVERYTHING)
    path.write_bytes(path.read_bytes()[:-20])
    done = run(capsys, "report", path)
    assert done.code == 0
    assert "the last line is cut off" in done.out
    assert "GUEST FAILED" not in done.out
    document = run(capsys, "report", path, "--json").document()
    assert document["truncated"] is True
    assert document["failures"] == []


def test_records_from_the_future_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = recording(tmp_path / "r.jsonl", EVERYTHING)
    with path.open("a") as file:
        file.write('{"type":"from_the_future","schema":1}\n')
        file.write(
            msgspec.json.encode(
                stall("new_kind", START, 5_000, StallCause(StallCauseType("new"), 1))
            ).decode()
            + "\n"
        )
    out = run(capsys, "report", path).out
    assert "1 record of a type that this version does not know" in out
    assert re.search(r"^new_kind +new +1 ", out, re.MULTILINE)


def test_a_probe_that_worked_for_a_while_was_at_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    states = [probe("ping", "not yet"), probe("ping"), probe("ping", "its monitor was closed")]
    path = recording(
        tmp_path / "r.jsonl", [ProbesRecord(t_ns=START, probes=[state]) for state in states]
    )
    assert "probes: ping\n" in run(capsys, "report", path).out


def test_many_violations_are_cut_for_people_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    violations = [
        Violation(t_ns=START, kind="transition", what=f"#{i}", ref=i, limit_ns=None, found_ns=None)
        for i in range(50)
    ]
    path = recording(tmp_path / "r.jsonl", violations)
    out = run(capsys, "report", path).out
    assert out.count("VIOLATION") == 20
    assert "            and 30 more\n" in out
    assert len(run(capsys, "report", path, "--json").document()["violations"]) == 50


def test_names_that_a_guest_chose_do_no_harm(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    evil = stall(
        "commit", START, 5, StallCause(StallCauseType.COMMAND, "\x1b[2J\nx"), thread="\x07"
    )
    out = run(capsys, "report", recording(tmp_path / "r.jsonl", [evil])).out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "command \\x1b[2J\\nx" in out


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"hello\n", b"{}\n", b"\xff\xfe\n", b'{"type":"note"}\n'])
def test_what_is_no_recording(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    assert "remedy: " in run(capsys, "report", path).refused()


def test_what_is_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "cannot be read" in run(capsys, "report", tmp_path / "none").refused()
    assert "cannot be read" in run(capsys, "report", tmp_path).refused()


def test_garbage_in_the_middle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = recording(tmp_path / "r.jsonl", EVERYTHING)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"garbage\n", *lines[4:]]))
    assert "line 5" in run(capsys, "report", path, "--json").refused()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *product(["start_ns", "end_ns", "at_most_ns", "at_least_ns"], [-1, 10**400]),
        ("at_least_ns", 6),  # of a stall that was at most 5 long
    ],
)
def test_times_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, value: int
) -> None:
    path = recording(tmp_path / "r.jsonl", [stall("commit", START, 5)])
    header, line = path.read_text().splitlines()
    path.write_text(f"{header}\n{json.dumps(json.loads(line) | {key: value})}\n")
    run(capsys, "report", path).refused()
    run(capsys, "report", path, "--json").refused()


# -- outputs -------------------------------------------------------------------------------------


def test_an_output_without_block_characters_has_none(tmp_path: Path) -> None:
    path = recording(tmp_path / "r.jsonl", EVERYTHING)
    done = process("report", path, "--histograms", env={"PYTHONIOENCODING": "ascii"})
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii()
    assert "99999999" in done.out
    assert "\\u" not in done.out
    assert "█" in process("report", path, env={"PYTHONIOENCODING": "utf-8"}).out


def test_a_pipe_is_eighty_columns_wide(tmp_path: Path) -> None:
    records = [
        stall(kind, START, 10**power, StallCause(StallCauseType.TRANSITION, 1))
        for kind in ("main_loop", "vcpu_inhibit")
        for power in range(2, 12)
    ]
    path = recording(tmp_path / "r.jsonl", records)
    done = process("report", path, "--longest", "0", env={"COLUMNS": "200"})
    assert max(len(line) for line in done.out.splitlines()[4:]) <= 80


def test_a_page_is_a_new_file_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = recording(tmp_path / "r.jsonl", EVERYTHING), tmp_path / "r.html"
    done = run(capsys, "report", str(path), "-o", str(page))
    assert (done.code, done.out) == (0, "")
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert page.stat().st_mode & 0o777 == 0o600
    again = run(capsys, "report", str(path), "-o", str(page))
    assert f"error: {page} exists already" in again.refused()
    assert (
        "cannot be created"
        in run(capsys, "report", str(path), "-o", str(tmp_path / "no" / "x")).err
    )


def test_a_page_of_what_is_no_recording_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "x", tmp_path / "x.html"
    path.write_text("what is this\n")
    assert run(capsys, "report", str(path), "-o", str(page)).code != 0
    assert not page.exists()


def test_a_comparison_and_a_race_are_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared, raced = tmp_path / "c.json", tmp_path / "r.json"
    compared.write_bytes(json_bytes(comparison()))
    raced.write_bytes(json_bytes(race_document(race())))
    assert "pause lost more than direct" in run(capsys, "report", str(compared)).out
    assert "p50" in run(capsys, "report", str(compared), "--full").out
    assert "The guest died of missing RAM under naive" in run(capsys, "report", str(raced)).out
    assert run(capsys, "report", str(compared), "--json").document()["seed"] == 3
    for path in (compared, raced):
        page = path.with_suffix(".html")
        assert run(capsys, "report", str(path), "-o", str(page)).code == 0
        assert "Strategies" in page.read_text()


def test_a_damaged_comparison_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"schema":1,"rounds":7,"differences":[]}')
    done = run(capsys, "report", str(path))
    assert "is not what `compare` or `lab race` prints with --json" in done.refused()
