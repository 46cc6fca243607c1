"""Plans as the JSON document of `qmp-memlistener plan --json`: plain dicts, lists and integers."""

from __future__ import annotations

from collections.abc import Iterable

from .planning import Plan

__all__ = ["plan_document"]

SCHEMA = 1


def plan_document(plans: Iterable[Plan]) -> dict[str, object]:
    """The document: `{"schema": 1, "plans": [...]}`.

    Keys beyond the bare contract: `as_id` in ops and missing ranges, `inhibit`, `vcpus_kicked`,
    `steps` (first op, number of ops, bytes missing after it, atomic), `notes`, and in
    `dirty_bitmap_bytes` what is `allocated` for logs that start and `handed_back`.
    """
    return {"schema": SCHEMA, "plans": [_plan(p) for p in plans]}


def _plan(p: Plan) -> dict[str, object]:
    return {
        "strategy": p.strategy.value,
        "rules": p.rules.order.value,
        "ops": [
            {
                "op": op.op.value,
                "as_id": op.as_id,
                "slot": op.slot,
                "gpa": op.gpa,
                "size": op.size,
                "flags": op.flags,
            }
            for op in p.ops
        ],
        "missing": [
            {"as_id": m.as_id, "start": m.start, "size": m.size, "steps": m.steps}
            for m in p.missing
        ],
        "atomic": p.atomic,
        "inhibit": p.inhibit,
        "vcpus_kicked": p.vcpus_kicked,
        "slot_ids_changed": list(p.exposure.slot_ids_changed),
        "dirty_bitmap_bytes": {
            "kept": p.dirty.kept,
            "dropped": p.dirty.dropped,
            "reallocated": p.dirty.reallocated,
            "allocated": p.dirty.allocated,
            "handed_back": p.dirty.handed_back,
        },
        "steps": [
            {"first": s.first, "count": s.count, "missing": s.missing, "atomic": s.atomic}
            for s in p.steps
        ],
        "notes": list(p.notes),
    }
