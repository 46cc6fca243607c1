"""`plan`: the JSON contract, the vector that started it all, recorded steps, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.recording import (
    Cause,
    Header,
    MapRecord,
    Record,
    RecordingWriter,
    Section,
    SlotOp,
    TransitionRecord,
)
from qmp_memlistener.topology import FlatView, diff, read_map
from tests.unit.cli.cli_support import CONFORMANCE, RamMap, check_types, load, run, tree

STRATEGIES = ["qemu", "pause", "batch-incremental", "batch-full", "hole"]
OPS = {
    "delete", "add", "flags", "set_hole", "clear_hole", "park", "unpark", "batch_begin",
    "batch_commit",
}  # fmt: skip
PLAN = {
    "strategy": str,
    "ops": list,
    "missing": list,
    "atomic": bool,
    "slot_ids_changed": list,
    "dirty_bitmap_bytes": dict,
    # beyond the bare contract
    "rules": str,
    "inhibit": bool,
    "vcpus_kicked": bool,
    "steps": list,
    "notes": list,
}
OP = {"op": str, "slot": int, "gpa": int, "size": int, "flags": int, "as_id": int}
MISSING = {"start": int, "size": int, "steps": int, "as_id": int}
DIRTY = {"kept": int, "dropped": int, "reallocated": int, "allocated": int, "handed_back": int}
STEP = {"first": int, "count": int, "missing": int, "atomic": bool}

# PAM, TSEG and MMCONFIG over RAM, devices, dirty logs: each is one change of the map a step.
SLOT_SAMPLES = [
    "7.2/pc-pam",
    "7.2/pc-dimm",
    "7.2/q35-tseg",
    "7.2/q35-pciexbar",
    "7.2/q35-rom",
    "10.0/pc-pam",
    "10.0/q35-pciexbar",
    "10.0/q35-dimm",
    "11.1/q35-pflash",
]


def check_plan(plan: dict[str, Any]) -> None:
    """Keys, types, and what holds for every plan."""
    check_types(plan, PLAN)
    for op in plan["ops"]:
        check_types(op, OP)
        assert op["op"] in OPS
        framing = op["op"] in {"park", "unpark", "batch_begin", "batch_commit"}
        assert (op["slot"] == -1) is framing
        assert (op["size"] == 0) is framing
    for missing in plan["missing"]:
        check_types(missing, MISSING)
        assert missing["size"] > 0
        assert missing["steps"] > 0
    check_types(plan["dirty_bitmap_bytes"], DIRTY)
    for step in plan["steps"]:
        check_types(step, STEP)
    assert sum(step["count"] for step in plan["steps"]) == len(plan["ops"])
    assert all(type(i) is int for i in plan["slot_ids_changed"])
    assert all(type(note) is str for note in plan["notes"])
    if not plan["missing"]:
        assert plan["atomic"] is True


def plans(
    capsys: pytest.CaptureFixture[str], before: Path, after: Path, *options: str | Path
) -> dict[str, dict[str, Any]]:
    """The plans of a document by strategy, once the document keeps the contract."""
    argv = ("plan", "--before", before, "--after", after, "--json", *options)
    document = run(capsys, *argv).document()
    check_types(document, {"schema": int, "plans": list})
    assert document["schema"] == 1
    for plan in document["plans"]:
        check_plan(plan)
    return {plan["strategy"]: plan for plan in document["plans"]}


def ops_of(plan: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    return [(op["op"], op["slot"], op["gpa"], op["size"]) for op in plan["ops"]]


def slots_file(path: Path, slots: list[dict[str, int]] | object) -> Path:
    path.write_text(json.dumps(slots))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """16 MiB of RAM, and the same with a page of MMIO in it."""
    before = RamMap(16 << 20).file(tmp_path / "before.txt")
    after = RamMap(16 << 20).cover(8 << 20, 4096, "hole").file(tmp_path / "after.txt")
    return before, after


# -- the golden vector ---------------------------------------------------------------------

SLOT = 6
GPA = 0x100000
OLD_SIZE = 2146435072
NEW_SIZE = 2129657856
TSEG = OLD_SIZE - NEW_SIZE


@pytest.fixture
def tseg(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The transition of the mailing-list thread: TSEG takes the top 16 MiB of a slot.

    Slot 6, gpa 0x100000, size 2146435072, then 0, then 2129657856.
    """
    low = [(i << 17, 1 << 17, f"low-{i}") for i in range(SLOT)] + [(SLOT << 17, 1 << 18, "bios")]

    def machine() -> RamMap:
        m = RamMap(GPA + OLD_SIZE)
        for start, size, name in low:
            m.cover(start, size, name, "i/o" if name == "bios" else "ram")
        return m

    before = machine().file(tmp_path / "before.txt")
    after = machine().cover(GPA + NEW_SIZE, TSEG, "tseg-window").file(tmp_path / "after.txt")
    table = [
        {"slot": i, "gpa": start, "size": size, "flags": 0}
        for i, (start, size, _) in enumerate(low[:SLOT])
    ]
    table.append({"slot": SLOT, "gpa": GPA, "size": OLD_SIZE, "flags": 0})
    return before, after, slots_file(tmp_path / "slots.json", table)


@pytest.mark.parametrize("rules", ["7.2", "8.0"])
def test_the_golden_vector(
    capsys: pytest.CaptureFixture[str], tseg: tuple[Path, Path, Path], rules: str
) -> None:
    before, after, slots = tseg
    by = plans(capsys, before, after, "--slots", slots, "--rules", rules)
    assert list(by) == STRATEGIES
    calls = [("delete", SLOT, GPA, OLD_SIZE), ("add", SLOT, GPA, NEW_SIZE)]

    qemu = by["qemu"]
    assert ops_of(qemu) == calls
    assert qemu["missing"] == [{"as_id": 0, "start": GPA, "size": NEW_SIZE, "steps": 1}]
    assert qemu["atomic"] is (rules == "8.0"), "from 8.0 QEMU keeps the vCPUs out meanwhile"
    assert qemu["vcpus_kicked"] is (rules == "8.0")

    assert ops_of(by["pause"]) == [("park", -1, 0, 0), *calls, ("unpark", -1, 0, 0)]
    assert ops_of(by["batch-incremental"]) == [
        ("batch_begin", -1, 0, 0), *calls, ("batch_commit", -1, 0, 0),
    ]  # fmt: skip
    full = ops_of(by["batch-full"])
    assert [op for op, *_ in full[1:-1]] == ["delete"] * 7 + ["add"] * 7
    assert ops_of(by["hole"]) == [("set_hole", SLOT, GPA + NEW_SIZE, TSEG)]
    for name in STRATEGIES[1:]:
        assert by[name]["missing"] == []
        assert by[name]["atomic"] is True
    assert by["hole"]["slot_ids_changed"] == []
    assert by["hole"]["vcpus_kicked"] is False


@pytest.mark.parametrize("rules", ["7.2", "8.0"])
def test_and_back(
    capsys: pytest.CaptureFixture[str], tseg: tuple[Path, Path, Path], tmp_path: Path, rules: str
) -> None:
    after, before, old = tseg
    table = json.loads(old.read_text())
    table[-1]["size"] = NEW_SIZE
    slots = slots_file(tmp_path / "back.json", table)
    by = plans(capsys, before, after, "--slots", slots, "--rules", rules)
    assert ops_of(by["qemu"]) == [("delete", SLOT, GPA, NEW_SIZE), ("add", SLOT, GPA, OLD_SIZE)]
    assert ops_of(by["hole"]) == [("clear_hole", SLOT, GPA + NEW_SIZE, TSEG)]


def test_dirty_bitmaps_of_the_golden_vector(
    capsys: pytest.CaptureFixture[str], tseg: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A bit a page in whole words: the slot is logged, the others are not."""
    before, after, old = tseg
    table = json.loads(old.read_text())
    table[-1]["flags"] = 1
    slots = slots_file(tmp_path / "logged.json", table)
    by = plans(capsys, before, after, "--slots", slots)
    whole, less = OLD_SIZE // 4096 // 8, NEW_SIZE // 4096 // 8
    assert by["qemu"]["dirty_bitmap_bytes"] == {
        "kept": 0, "dropped": whole, "reallocated": less, "allocated": 0, "handed_back": 0,
    }  # fmt: skip
    assert by["hole"]["dirty_bitmap_bytes"] == {
        "kept": less, "dropped": whole - less, "reallocated": 0, "allocated": 0, "handed_back": 0,
    }  # fmt: skip
    assert by["qemu"]["ops"][1]["flags"] == 1
    back = plans(capsys, before, after, "--slots", slots, "--bitmaps", "handed-back")
    assert back["batch-incremental"]["dirty_bitmap_bytes"]["handed_back"] == whole
    assert back["batch-incremental"]["dirty_bitmap_bytes"]["dropped"] == 0


# -- recorded steps ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLOT_SAMPLES)
def test_recorded_steps_through_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """QEMU's traced operations, in its order, from files as a user has them."""
    sample = load(CONFORMANCE / "slots" / f"{name}.json.gz")
    before, after, slots = (tmp_path / n for n in ("before", "after", "slots"))
    checked = 0
    for step in sample["steps"]:
        if not step["mtree_before"] or step["commits"] > 1:
            continue
        before.write_text(step["mtree_before"])
        after.write_text(step["mtree_after"])
        keys = ("as_id", "slot", "gpa", "size", "flags")
        slots_file(slots, [{k: s[k] for k in keys} for s in step["table_before"]])
        options = ("--slots", slots, "--rules", sample["version"], "--strategy", "qemu")
        by = plans(capsys, before, after, *options)
        assert list(by) == ["qemu"]
        planned = [
            (op["as_id"], op["slot"], op["gpa"], 0 if op["op"] == "delete" else op["size"],
             op["flags"])
            for op in by["qemu"]["ops"]
        ]  # fmt: skip
        traced = [tuple(op[k] for k in keys) for op in step["ops"]]
        assert planned == traced, step["name"]
        checked += bool(traced)
    assert checked


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_strategy_is_the_same_as_among_all(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], strategy: str
) -> None:
    by = plans(capsys, *pair)
    assert plans(capsys, *pair, "--strategy", strategy) == {strategy: by[strategy]}


def test_no_transition_no_ops(capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path]) -> None:
    for plan in plans(capsys, pair[0], pair[0]).values():
        assert plan["ops"] == []
        assert plan["steps"] == []
        assert plan["atomic"] is True
        assert plan["vcpus_kicked"] is False


def test_without_slots_ids_are_those_of_a_fresh_start(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path]
) -> None:
    ops = ops_of(plans(capsys, *pair)["qemu"])
    hole, end = 8 << 20, 16 << 20
    assert ops == [
        ("delete", 0, 0, end),
        ("add", 0, 0, hole),
        ("add", 1, hole + 4096, end - hole - 4096),
    ]


def test_dirty_logging_that_starts_and_stops(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path]
) -> None:
    start = plans(capsys, pair[0], pair[0], "--log-start", "all")["qemu"]
    assert [(op["op"], op["flags"]) for op in start["ops"]] == [("flags", 1)]
    assert start["dirty_bitmap_bytes"]["allocated"] == (16 << 20) // 4096 // 8


def test_a_limit_on_holes(capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path]) -> None:
    hole = plans(capsys, *pair, "--strategy", "hole", "--max-holes", "0")["hole"]
    assert {op["op"] for op in hole["ops"]} == {"batch_begin", "delete", "add", "batch_commit"}
    assert hole["missing"] == []
    assert hole["notes"]


def test_for_people(capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path]) -> None:
    before, after = pair
    done = run(capsys, "plan", "--before", before, "--after", after, "--rules", "7.2")
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "delete slot 0: 0x0+16 MiB" in lines
    assert "set_hole slot 0: 0x800000+4 KiB" in lines
    assert any(line.startswith("missing in between: 0x0+8 MiB") for line in lines)
    assert any(line.startswith("hole 1 nothing yes no none") for line in lines)


# -- recordings ----------------------------------------------------------------------------

HEADER = Header(
    tool_version="0",
    monotonic_ns=1,
    realtime_ns=2,
    host_kernel="6.1",
    target="unix:/x",
    qemu_version="7.2.22",
    machine="pc",
    accel="kvm",
    guest_name=None,
    pid=1,
    source="trace",
)


def record(path: Path, *records: Record) -> Path:
    with RecordingWriter(str(path), HEADER) as writer:
        for r in records:
            writer.write(r)
    return path


def map_record(view: FlatView) -> MapRecord:
    return MapRecord(t_ns=1, address_space="memory", ranges=Section.list_of(view), ram_blocks=[])


def transition(seq: int, before: FlatView, after: FlatView) -> TransitionRecord:
    t = diff(before, after)
    return TransitionRecord(
        seq=seq,
        t_ns=seq,
        cause=Cause("unknown"),
        removed=Section.list_of(t.removed),
        added=Section.list_of(t.added),
        holes_punched=[],
        holes_filled=[],
        detail="full",
    )


@pytest.fixture
def recording(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    """Slots become known, then a hole is punched and filled."""
    before, after = (read_map(p.read_text()).view for p in pair)
    op = SlotOp(
        t_ns=1, as_id=0, slot=4, op="add", gpa=0, size=16 << 20, flags=0, ret=0,
        predicted=False, transition=None,
    )  # fmt: skip
    return record(
        tmp_path / "r.jsonl",
        map_record(before),
        op,
        transition(1, before, after),
        transition(2, after, before),
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


def test_one_transition_of_a_recording(capsys: pytest.CaptureFixture[str], recording: Path) -> None:
    document = run(capsys, "plan", recording, "--transition", "2", "--json").document()
    assert [t["seq"] for t in document["transitions"]] == [2]
    err = run(capsys, "plan", recording, "--transition", "3").refused()
    assert "no transition 3" in err


def test_a_recording_whose_transitions_do_not_fit_its_map(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    before, after = (read_map(p.read_text()).view for p in pair)
    path = record(tmp_path / "r.jsonl", map_record(before), transition(1, FlatView(()), after))
    run(capsys, "plan", path, "--json").refused()


def test_a_recording_with_an_unknown_kind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recording: Path
) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(recording.read_text().replace('"kind":"ram"', '"kind":"cheese"'))
    run(capsys, "plan", path, "--json").refused()


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "memslots"),
        ("{", "memslots"),
        ("null", "memslots"),
        ('{"slot":0}', "memslots"),
        ('[{"slot":0,"gpa":0}]', "memslots"),
        ('[{"slot":"0","gpa":0,"size":4096}]', "memslots"),
        ('[{"slot":0.5,"gpa":0,"size":4096}]', "memslots"),
        ('[{"slot":0,"gpa":-4096,"size":4096}]', "memslot"),
        ('[{"slot":-1,"gpa":0,"size":4096}]', "memslot"),
        ('[{"slot":0,"gpa":0,"size":0}]', "memslot"),
        ('[{"slot":0,"gpa":0,"size":-4096}]', "memslot"),
        ('[{"slot":0,"gpa":0,"size":4096,"flags":-1}]', "memslot"),
        ('[{"slot":0,"gpa":99999999999999999999999,"size":4096}]', "memslot"),
        ('[{"slot":0,"gpa":18446744073709551615,"size":4096}]', "memslot"),
        ('[{"slot":70000,"as_id":0,"gpa":0,"size":4096}]', "memslot"),
        ('[{"slot":0,"gpa":0,"size":4096},{"slot":0,"gpa":8192,"size":4096}]', "same id"),
        ('[{"slot":0,"gpa":0,"size":8192},{"slot":1,"gpa":4096,"size":8192}]', "overlaps"),
    ],
)  # fmt: skip
def test_bad_slots(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pair: tuple[Path, Path],
    text: str,
    words: str,
) -> None:
    path = tmp_path / "slots.json"
    path.write_text(text)
    err = run(capsys, "plan", "--before", pair[0], "--after", pair[1], "--slots", path).refused()
    assert words in err


def test_slots_of_another_moment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    """What the slots added would overlap is not in the map before."""
    path = slots_file(tmp_path / "slots.json", [{"slot": 0, "gpa": 4096, "size": 16 << 20}])
    err = run(capsys, "plan", "--before", pair[0], "--after", pair[1], "--slots", path).refused()
    assert "overlaps" in err


@pytest.mark.parametrize("which", ["--before", "--after", "--slots"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\0", b"hello"])
def test_bad_files(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pair: tuple[Path, Path],
    which: str,
    content: bytes | None,
) -> None:
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    files = {"--before": pair[0], "--after": pair[1], which: bad}
    run(capsys, "plan", *(word for item in files.items() for word in item)).refused()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--before", "B"],
        ["--after", "A"],
        ["R", "--before", "B"],
        ["R", "--slots", "B"],
        ["--before", "B", "--after", "A", "--rules", "new"],
        ["--before", "B", "--after", "A", "--rules", ""],
        ["--before", "B", "--after", "A", "--log-start", "all", "--log-stop", "all"],
        ["--before", "B", "--after", "A", "--strategy", "nonsense"],
        ["--before", "B", "--after", "A", "--transition", "1"],
        ["/nonexistent/recording"],
        ["/"],
        ["B"],
        ["/dev/null"],
    ],
    ids=" ".join,
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], argv: list[str]
) -> None:
    files = {"B": str(pair[0]), "A": str(pair[1]), "R": "/nonexistent/recording"}
    run(capsys, "plan", *(files.get(word, word) for word in argv)).refused()


def test_a_map_without_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    other = tmp_path / "io.txt"
    other.write_text(tree("0000000000000000-0000000000000fff (prio 0, i/o): x", space="I/O"))
    err = run(capsys, "plan", "--before", other, "--after", pair[1]).refused()
    assert "memory" in err
