"""Plans as text and as the document of `plan --json`.  Nothing is printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..memslots import Plan
from .terminal import flags_text, size_text

__all__ = ["COLUMNS", "plan_document", "plan_lines", "plan_rows"]

COLUMNS = ("strategy", "ops", "exposed", "atomic", "kicks all", "ids changed", "dirty bitmap")
"""Those of `plan_rows`."""


def plan_lines(plans: Iterable[Plan]) -> Iterator[str]:
    """The operations of each plan, what is missing between them, and its notes."""
    for p in plans:
        yield from ("", f"{p.strategy.value} (rules {p.rules.order.value})")
        for op in p.ops:
            if op.slot < 0:
                yield f"  {op.op.value}"
                continue
            space = f"as {op.as_id} " if op.as_id else ""
            yield (
                f"  {op.op.value:<10} {space}slot {op.slot}: {op.gpa:#x}+{size_text(op.size)} "
                f"{flags_text(op.flags)}".rstrip()
            )
        if not p.ops:
            yield "  nothing to do"
        for m in p.missing:
            states = "state" if m.steps == 1 else "states"
            yield f"  missing in between: {m.start:#x}+{size_text(m.size)} for {m.steps} {states}"
        for note in p.notes:
            yield f"  note: {note}"


def plan_rows(plans: Iterable[Plan]) -> list[tuple[str, ...]]:
    """Plans side by side: the cells of `COLUMNS` for each."""
    return [
        (
            p.strategy.value,
            str(len(p.ops)),
            size_text(sum(m.size for m in p.missing)) if p.missing else "nothing",
            "yes" if p.atomic else "no",
            "yes" if p.vcpus_kicked else "no",
            ", ".join(map(str, p.exposure.slot_ids_changed)) or "none",
            _bitmap_text(p),
        )
        for p in plans
    ]


def _bitmap_text(p: Plan) -> str:
    parts = [
        f"{size} B {word}"
        for size, word in (
            (p.dirty.kept, "kept"),
            (p.dirty.dropped, "dropped"),
            (p.dirty.reallocated, "new"),
            (p.dirty.handed_back, "handed back"),
        )
        if size
    ]
    return ", ".join(parts) or "not logged"


def plan_document(plans: Iterable[Plan]) -> dict[str, object]:
    """The document of `plan --json`; docs/json.md has its keys."""
    return {"schema": 1, "plans": [_plan(p) for p in plans]}


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
