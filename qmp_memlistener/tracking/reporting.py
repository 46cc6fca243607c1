"""Reports of a map, a commit and its operations: records, and changes for listeners.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from ..memslots import Op
from ..records import (
    Cause,
    CauseType,
    Detail,
    MapRecord,
    Section,
    SlotOp,
    TransitionRecord,
)
from ..topology import FlatView, Hole, MemoryMap, Transition
from .commits import Commit
from .live_slots import UNKNOWN_BLOCK

__all__ = [
    "Change",
    "map_record",
    "predicted_records",
    "told_again",
    "traced_records",
    "transition_record",
]


@dataclass(frozen=True, slots=True)
class Change:
    """What listeners get at once: a transition, slot operations, or both.

    `view` is the map after it.
    """

    view: FlatView
    transition: Transition | None
    slot_ops: tuple[SlotOp, ...] = ()


def transition_record(
    seq: int, transition: Transition, commit: Commit, detail: Detail, *, merged: int, slot_ops: int
) -> TransitionRecord:
    """The record of a transition that a commit made."""
    filled = [*transition.holes_filled]
    punched = [*transition.holes_punched]
    for change in (*transition.holes_moved, *transition.holes_resized):
        filled.append(change.before)
        punched.append(change.after)
    return TransitionRecord(
        seq=seq,
        t_ns=commit.t_ns,
        cause=_cause(transition, commit.causes, filled, punched),
        removed=Section.list_of(transition.removed),
        added=Section.list_of(transition.added),
        holes_punched=[_known(h) for h in sorted(punched, key=_start)],
        holes_filled=[_known(h) for h in sorted(filled, key=_start)],
        ram_appeared=list(transition.ram_appeared),
        ram_vanished=list(transition.ram_vanished),
        flips=list(transition.flips),
        mmio_moved=list(transition.mmio_moved),
        detail=detail,
        merged=merged,
        slot_ops=slot_ops,
        late_ns=commit.late_ns,
    )


def told_again(
    told: TransitionRecord, seq: int, commit: Commit, *, merged: int, slot_ops: int
) -> TransitionRecord:
    """The same transition as one before it, and nothing else is known of its cause."""
    return replace(
        told,
        seq=seq,
        t_ns=commit.t_ns,
        late_ns=commit.late_ns,
        merged=merged,
        slot_ops=slot_ops,
    )


def traced_records(commit: Commit, seq: int | None) -> list[SlotOp]:
    """The operations of a commit, with the transition that they are of."""
    return commit.ops if seq is None else [replace(op, transition=seq) for op in commit.ops]


def predicted_records(ops: Iterable[Op], t_ns: int, seq: int) -> list[SlotOp]:
    """Operations that were not seen, as QEMU's rules give them."""
    return [
        SlotOp(
            t_ns=t_ns,
            as_id=op.as_id,
            slot=op.slot,
            op=op.op,
            gpa=op.gpa,
            size=op.size,
            flags=op.flags,
            predicted=True,
            transition=seq,
        )
        for op in ops
    ]


def map_record(m: MemoryMap, t_ns: int) -> MapRecord:
    return MapRecord(
        t_ns=t_ns,
        address_space=m.view.address_space,
        ranges=Section.list_of(m.view),
        ram_blocks=list(m.ram_blocks),
    )


def _cause(
    transition: Transition, seen: Sequence[Cause], filled: Sequence[Hole], punched: Sequence[Hole]
) -> Cause:
    """What was seen to cause it; else the regions that came or went, which is all there is."""
    if len(seen) > 1:
        return Cause(CauseType.SEVERAL, causes=list(seen))
    if seen:
        return seen[0]
    regions: dict[tuple[str, str | None], None] = {
        (h.covered_by, h.owner): None for h in (*punched, *filled) if h.covered_by is not None
    }
    if not regions:
        before = {r.region for r in transition.before}
        after = {r.region for r in transition.after}
        changed = (*transition.removed, *transition.added)
        regions = {r.region: None for r in changed if (r.region in before) != (r.region in after)}
    if not regions:
        return Cause(CauseType.UNKNOWN)
    owners = {owner for _, owner in regions}
    owner = owners.pop() if len(owners) == 1 else None
    return Cause(
        CauseType.REGION, owner=owner, regions=list(dict.fromkeys(name for name, _ in regions))
    )


def _known(hole: Hole) -> Hole:
    """RAM of a block that is not known covers as something not known."""
    if hole.covered_by is not None and hole.covered_by.startswith(UNKNOWN_BLOCK):
        return replace(hole, covered_by=None)
    return hole


def _start(hole: Hole) -> int:
    return hole.start
