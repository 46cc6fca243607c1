"""`plan` of a recording."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.memslots import OpKind
from qmp_memlistener.records import (
    MapRecord,
    Record,
    RecordingWriter,
    Section,
    SlotOp,
    TransitionRecord,
)
from qmp_memlistener.topology import FlatView, diff, read_map
from tests.support.records import HEADER, transition
from tests.unit.cli.cli_support import check_types, run
from tests.unit.cli.plan_support import check_plan, ops_of


def record(path: Path, *records: Record) -> Path:
    with RecordingWriter(str(path), HEADER) as writer:
        for r in records:
            writer.write(r)
    return path


def map_record(view: FlatView) -> MapRecord:
    return MapRecord(t_ns=1, address_space="memory", ranges=Section.list_of(view), ram_blocks=[])


def changed(seq: int, before: FlatView, after: FlatView) -> TransitionRecord:
    t = diff(before, after)
    return msgspec.structs.replace(
        transition(seq, seq), removed=Section.list_of(t.removed), added=Section.list_of(t.added)
    )


@pytest.fixture
def recording(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    """Slots become known, then a hole is punched and filled."""
    before, after = (read_map(p.read_text()).view for p in pair)
    op = SlotOp(
        t_ns=1, as_id=0, slot=4, op=OpKind.FLAGS, gpa=0, size=16 << 20, flags=0, ret=0,
        predicted=False, transition=None,
    )  # fmt: skip
    return record(
        tmp_path / "r.jsonl",
        map_record(before),
        op,
        changed(1, before, after),
        changed(2, after, before),
    )


def test_a_recording(capsys: pytest.CaptureFixture[str], recording: Path) -> None:
    document = run(capsys, "plan", recording, "--strategy", "qemu", "--json").document()
    check_types(document, {"schema": int, "transitions": list})
    assert [t["seq"] for t in document["transitions"]] == [1, 2]
    for t in document["transitions"]:
        check_types(t, {"seq": int, "schema": int, "plans": list})
        for plan in t["plans"]:
            check_plan(plan)
            assert plan["rules"] == "7.2", "of the recorded QEMU"
    first = ops_of(document["transitions"][0]["plans"][0])
    assert first[0] == ("delete", 4, 0, 16 << 20), "the id that was traced"


LOG = (
    "Jan 13 18:17:24 host1 qemu[71]: kvm_set_user_memory AddrSpace#0 Slot#{} flags=0x0 gpa=0x{:x} "
    "size=0x{:x} ua=0x{:x} ret=0\n"
)


def test_a_log_of_qemu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From its own slots, with the ids that were traced."""
    ua = 0x7F0000000000
    rows = [
        (5, 0, 0x100000, ua),
        (5, 0, 0, ua),
        (5, 0, 0x80000, ua),
        (7, 0x81000, 0x7F000, ua + 0x81000),
    ]
    path = tmp_path / "log"
    path.write_text("".join(LOG.format(*row) for row in rows))
    document = run(capsys, "plan", path, "--strategy", "qemu", "--json").document()
    (punch,) = [t["plans"][0] for t in document["transitions"] if len(t["plans"][0]["ops"]) == 3]
    assert ops_of(punch) == [
        ("delete", 5, 0, 0x100000),
        ("add", 5, 0, 0x80000),
        ("add", 7, 0x81000, 0x7F000),
    ]


def test_one_transition_of_a_recording(capsys: pytest.CaptureFixture[str], recording: Path) -> None:
    document = run(capsys, "plan", recording, "--transition", "2", "--json").document()
    assert [t["seq"] for t in document["transitions"]] == [2]
    err = run(capsys, "plan", recording, "--transition", "3").refused()
    assert "no transition 3" in err


def test_a_recording_whose_transitions_do_not_fit_its_map(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    before, after = (read_map(p.read_text()).view for p in pair)
    path = record(tmp_path / "r.jsonl", map_record(before), changed(1, FlatView(()), after))
    run(capsys, "plan", path, "--json").refused()


def test_a_recording_with_an_unknown_kind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recording: Path
) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(recording.read_text().replace('"kind":"ram"', '"kind":"cheese"'))
    run(capsys, "plan", path, "--json").refused()
