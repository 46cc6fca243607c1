"""`plan`: the vector that started it all, recorded steps, options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.cli_support import CONFORMANCE, RamMap, load, run
from tests.unit.cli.plan_support import ops_of, plans, slots_file

STRATEGIES = ["qemu", "pause", "batch-incremental", "batch-full", "hole", "hole-split"]
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
    assert ops_of(by["hole-split"]) == [("park", -1, 0, 0), *calls, ("unpark", -1, 0, 0)]


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
    highest = 32763
    assert ops_of(by["hole-split"]) == [("add", highest, GPA + NEW_SIZE, TSEG)]


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
