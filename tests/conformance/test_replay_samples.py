"""Logs and recordings of real guests, read for replay.

`slots/README.md` and `replay/README.md` here tell how they were recorded.  The step-by-step
samples know the true slots at every moment; what is read from their log lines must be those.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.errors import InputError
from qmp_memlistener.kvmlab.replay.read import ReplayInput, read_replay
from qmp_memlistener.memslots import Order, Rules, Slot, SlotTable, slot_table
from qmp_memlistener.records import Recording, SlotOp
from qmp_memlistener.tracking import replay
from tests.unit.kvmlab.replay_rendering import check, check_apart, check_backing, planned
from tests.unit.memslots.memslots_model import as_traced, traced_op

HERE = Path(__file__).parent
STEPS = sorted((HERE / "slots").rglob("*.json.gz"))
FILES = sorted((HERE / "replay").rglob("*.gz"))
LOGS = [p for p in FILES if p.name.endswith(".log.gz")]
RECORDINGS = [p for p in FILES if p.name.endswith(".jsonl.gz")]
WAYS = {"plain", "stamped", "late", "marked", "traced", "paced", "polled", "tcg"}
MARKS = pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])

Step = dict[str, Any]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name.removesuffix('.gz').removesuffix('.json')}"


@cache
def steps_of(path: Path) -> list[Step]:
    with gzip.open(path) as file:
        steps: list[Step] = json.load(file)["steps"]
    return steps


def log_of(tmp_path: Path, steps: list[Step], *, marked: bool) -> str:
    lines = [line for s in steps for line in s["log"] if marked or "kvm_set_user_memory" in line]
    path = tmp_path / "log"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def unpacked(tmp_path: Path, sample: Path) -> str:
    path = tmp_path / "sample"
    path.write_bytes(gzip.decompress(sample.read_bytes()))
    return str(path)


def tables_by_op(found: ReplayInput) -> Iterator[tuple[int, SlotTable]]:
    """How many operations were done, and the slots then."""
    done = 0
    yield 0, found.initial
    for t in found.transitions:
        done += len(t.ops)
        yield done, t.after


def true_table(step: Step) -> SlotTable:
    keys = ("as_id", "slot", "gpa", "size", "flags")
    return SlotTable.from_json([{k: entry[k] for k in keys} for entry in step["table_before"]])


def truth_of(found: ReplayInput, steps: list[Step]) -> list[tuple[Slot, int]]:
    """Each operation's slot with the host address that the sample has for it."""
    slots = (slot for t in found.transitions for slot in t.slots)
    return list(zip(slots, (op["ua"] for s in steps for op in s["ops"]), strict=True))


def test_there_are_samples() -> None:
    assert len(STEPS) >= 75
    assert {p.parent.name for p in FILES} >= {"7.2", "10.0", "11.1"}
    for version in ("7.2", "10.0"):
        for machine in ("pc", "q35"):
            ways = {
                p.name.split(".")[0].removeprefix(f"{machine}-")
                for p in FILES
                if p.parent.name == version and p.name.startswith(machine)
            }
            assert ways == WAYS, (version, machine)


# -- step-by-step samples as logs ------------------------------------------------------------------


@MARKS
@pytest.mark.parametrize("path", STEPS, ids=name_of)
def test_the_log_of_a_whole_life(path: Path, marked: bool, tmp_path: Path) -> None:
    """Operations, tables and memory are the sample's; QEMU's plan has the recorded operations."""
    steps = steps_of(path)
    found = read_replay(log_of(tmp_path, steps, marked=marked))
    check(found)
    assert len(found.initial) == 0
    wanted = [
        traced_op(**{k: op[k] for k in ("as_id", "slot", "gpa", "size", "flags", "ret")})
        for s in steps
        for op in s["ops"]
    ]
    assert [as_traced(op) for t in found.transitions for op in t.ops] == wanted
    assert not any("missing and was put in" in note for note in found.notes)
    tables = dict(tables_by_op(found))
    done = 0
    for step in steps:
        if done in tables:
            assert tables[done] == true_table(step), step["name"]
        done += len(step["ops"])
    if marked:
        # at every step's end a commit has ended
        assert sum(len(s["ops"]) > 0 for s in steps) <= len(found.transitions)
    truth = truth_of(found, steps)
    check_backing(found, truth)
    check_apart(found, truth)
    order = Order.V7_2 if path.parent.name == "7.2" else Order.V8_0
    assert found.rules == Rules(order)
    for t in found.transitions:
        assert planned(found, t).ops == t.ops


@pytest.mark.parametrize("path", STEPS, ids=name_of)
def test_a_step_with_one_commit_is_one_transition(path: Path, tmp_path: Path) -> None:
    steps = steps_of(path)
    found = read_replay(log_of(tmp_path, steps, marked=True))
    by_start = {}
    done = 0
    for t in found.transitions:
        by_start[done] = t
        done += len(t.ops)
    at = 0
    for step in steps:
        if step["ops"] and step["commits"] == 1:
            t = by_start[at]
            assert len(t.ops) == len(step["ops"]), step["name"]
            assert t.before == true_table(step), step["name"]
        at += len(step["ops"])


@pytest.mark.parametrize("version", sorted({p.parent.name for p in STEPS}))
def test_logs_that_begin_in_a_guests_life(version: str, tmp_path: Path) -> None:
    """Slots from before are true ones; most of them, of their true size."""
    sizes: Counter[str] = Counter()
    for path in (p for p in STEPS if p.parent.name == version):
        steps = steps_of(path)
        for first in range(1, len(steps), 4):
            try:
                found = read_replay(log_of(tmp_path, steps[first:], marked=first % 2 == 0))
            except InputError:
                assert not any(s["ops"] for s in steps[first:])
                continue
            check(found)
            ops = [op for s in steps[first:] for op in s["ops"]]
            got = [op for t in found.transitions for op in t.ops]
            assert [(o.as_id, o.slot, o.gpa) for o in got] == [
                (o["as_id"], o["slot"], o["gpa"]) for o in ops
            ]
            true = true_table(steps[first])
            for slot in found.initial:
                was = true.get(slot.as_id, slot.slot)
                assert was is not None, (name_of(path), first, slot)
                assert was.gpa == slot.gpa
                sizes["exact" if was.size == slot.size else "other"] += 1
    assert sizes["exact"] > 0.85 * sizes.total()


# -- logs and recordings as users have them --------------------------------------------------------


@pytest.mark.parametrize("path", LOGS, ids=name_of)
def test_raw_logs(path: Path, tmp_path: Path) -> None:
    found = read_replay(unpacked(tmp_path, path))
    check(found)
    late = "-late." in path.name
    assert (found.kind, len(found.initial) > 0) == ("log", late)
    assert found.rules.queued is (path.parent.name != "7.2")
    assert all(ret == 0 for t in found.transitions for ret in t.rets)
    assert not any("missing and was put in" in note for note in found.notes)
    assert sum(len(t.ops) for t in found.transitions) > 60
    for t in found.transitions:
        assert planned(found, t).ops == t.ops
    if found.rules.queued and not late:
        assert found.notes == ()


@pytest.mark.parametrize("path", RECORDINGS, ids=name_of)
def test_recordings(path: Path, tmp_path: Path) -> None:
    """Operations are the recording's, and its maps have the slots that these leave."""
    sample = unpacked(tmp_path, path)
    found = read_replay(sample)
    check(found)
    assert found.kind == "recording"
    assert found.qemu_version is not None
    assert found.qemu_version.startswith(f"{path.parent.name}.")
    records = list(Recording(sample))
    told = [r for r in records if isinstance(r, SlotOp)]
    got = [(t.seq, o) for t in found.transitions for o in t.ops]
    assert [(seq, str(o.op), o.slot, o.gpa, o.flags) for seq, o in got] == [
        (r.transition or 0, r.op, r.slot, r.gpa, r.flags) for r in told
    ]
    assert [o.size for _, o in got] == [r.size for r in told]
    by_seq = {t.seq: t for t in found.transitions}
    seen = 0
    for step in replay(records):
        t = by_seq.get(step.seq)
        if t is None:
            continue
        wanted = {(s.gpa, s.size) for s in slot_table(step.after)}
        assert {(s.gpa, s.size) for s in t.after.slots(0)} == wanted, step.seq
        seen += 1
    assert seen > 0
    names = {block.name for block in found.blocks}
    assert {"pc.ram", "pc.bios", "vga.vram"} <= names
    if not any(r.predicted for r in told):
        slots = (slot for t in found.transitions for slot in t.slots)
        check_backing(found, ((s, r.hva or 0) for s, r in zip(slots, told, strict=True)))
