"""The JSON contract of `plan`, checked for every plan that a test asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.cli_support import check_types, run

__all__ = ["check_plan", "ops_of", "plans", "slots_file"]

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
