"""Planned operations against those that QEMU really made, recorded step by step under KVM.

`tests/conformance/slots/README.md` tells how the steps were recorded.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.memslots import (
    ADDRESS_SPACES,
    LogChange,
    PlanStrategy,
    Rules,
    SlotTable,
    plan,
    plan_all,
)
from qmp_memlistener.records import SlotOp
from qmp_memlistener.topology import FlatView, read_maps
from tests.unit.memslots.memslots_model import as_traced, fold, traced_op

SAMPLES = sorted((Path(__file__).parent / "slots").rglob("*.json.gz"))

# A migration or dirty-rate measurement logs all migratable RAM; the map does not show that.
MIGRATION = {
    "start-running": True,
    "start-stopped": True,
    "complete": True,  # of the migration that began in the same step
    "cancel-running": False,
    "cont-again": False,  # what was cancelled while stopped ends here
    "measure": True,
    "measured": False,
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name.removesuffix('.json.gz')}"


def load(path: Path) -> dict[str, Any]:
    with gzip.open(path) as file:
        sample: dict[str, Any] = json.load(file)
    return sample


def views(text: str) -> dict[int, FlatView]:
    return {ADDRESS_SPACES[n]: m.view for n, m in read_maps(text, list(ADDRESS_SPACES)).items()}


def table_of(step: dict[str, Any]) -> SlotTable:
    keys = ("as_id", "slot", "gpa", "size", "flags")
    return SlotTable.from_json([{k: entry[k] for k in keys} for entry in step["table_before"]])


def recorded(step: dict[str, Any]) -> list[SlotOp]:
    keys = ("as_id", "slot", "gpa", "size", "flags", "ret")
    return [traced_op(**{k: op[k] for k in keys}) for op in step["ops"]]


def single_commits(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Steps whose two maps show all there is: no commit, or one.

    A device that is plugged makes other commits for its own address spaces.
    """
    for step in sample["steps"]:
        alone = step["commits"] <= 1
        if sample["name"] == "pc-logged" and step["name"].startswith("plug"):
            alone = len(step["ops"]) <= 1
        if step["mtree_before"] and alone:
            yield step


def log_change(path: Path, step: dict[str, Any]) -> LogChange | None:
    if path.name.endswith(("-migration.json.gz", "-logged.json.gz")) and step["name"] in MIGRATION:
        return LogChange(migration=MIGRATION[step["name"]])
    return None


def test_there_are_samples() -> None:
    assert {p.parent.name for p in SAMPLES} >= {"7.2", "10.0", "11.1"}
    scenarios = " ".join(p.name for p in SAMPLES)
    for what in (
        "pam",
        "smram",
        "tseg",
        "pciexbar",
        "dimm",
        "ivshmem",
        "reset",
        "vga",
        "migration",
        "logged",
    ):
        assert what in scenarios, what
    steps = [s for p in SAMPLES for s in single_commits(load(p))]
    assert len(steps) > 800
    assert sum(bool(s["ops"]) for s in steps) > 400


@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_planned_operations_equal_the_traced_ones(path: Path) -> None:
    """Every operation, its slot id and flags, in order."""
    sample = load(path)
    rules = Rules.parse(sample["version"], sample["page_size"])
    for step in single_commits(sample):
        planned = plan(
            views(step["mtree_before"]),
            views(step["mtree_after"]),
            PlanStrategy.QEMU,
            table=table_of(step),
            rules=rules,
            log=log_change(path, step),
        )
        assert [as_traced(op) for op in planned.ops] == recorded(step), step["name"]


@pytest.mark.parametrize("path", [p for p in SAMPLES if "-logged" in p.name], ids=name_of)
def test_what_is_plugged_while_ram_is_logged(path: Path) -> None:
    """DIMMs are logged one commit late, virtio-pmem never, virtio-mem and ivshmem at once."""
    flags: dict[str, list[int]] = {}
    slot_of: dict[str, int] = {}
    for step in load(path)["steps"]:
        for op in step["ops"]:
            if step["name"].startswith(("plug", "bar2")):
                slot_of[step["name"]] = op["slot"]
        for name, slot in slot_of.items():
            told = [op["flags"] for op in step["ops"] if op["slot"] == slot]
            if step["name"] != "measured":
                flags.setdefault(name, []).extend(told)
    assert flags == {
        "plug0-pc-dimm": [0, 1],
        "plug1-nvdimm": [0, 1],
        "plug2-nvdimm": [0, 1],
        "plug3-virtio-mem-pci": [1],
        "plug4-pc-dimm": [0, 1],
        "plug5-virtio-pmem-pci": [0],
        "bar2-map6": [1],
    }


def kept_memory(before: FlatView, after: FlatView, start: int, end: int) -> list[str]:
    """What shows the same memory there before and after."""
    return [
        a.name
        for a in before.between(start, end)
        for b in after.between(start, end)
        if a.start < b.end
        and b.start < a.end
        and (a.region, a.kind, a.start - a.offset) == (b.region, b.kind, b.start - b.offset)
    ]


@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_every_strategy_ends_in_the_same_reachable_memory(path: Path) -> None:
    """On real transitions; and `hole` and the batches expose nothing.

    `hole-split` exposes what one block takes the place of another in, and nothing else.
    """
    sample = load(path)
    rules = Rules.parse(sample["version"], sample["page_size"])
    for step in single_commits(sample):
        before, after = views(step["mtree_before"]), views(step["mtree_after"])
        plans = plan_all(
            before,
            after,
            table=table_of(step),
            rules=rules,
            log=log_change(path, step),
        )
        reachable = fold(table_of(step), recorded(step)).mapped(0)
        for p in plans:
            assert p.after.mapped(0) == reachable, (step["name"], p.strategy)
            if p.strategy is PlanStrategy.HOLE_SPLIT:
                for m in p.missing:
                    same = kept_memory(before[m.as_id], after[m.as_id], m.start, m.start + m.size)
                    assert not same, (step["name"], m)
            elif p.strategy is not PlanStrategy.QEMU:
                assert p.missing == (), (step["name"], p.strategy)
                assert p.atomic
