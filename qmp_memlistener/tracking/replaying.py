"""A recording's transitions as pairs of views, with the slots before each.

The recording says which sections went and came; the view is carried along from its `map` record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import RecordingError
from ..memslots import Slot, SlotTable
from ..recording import MapRecord, Record, Section, SlotOp, TransitionRecord
from ..topology import FlatRange, FlatView, Kind

__all__ = ["ReplayStep", "replay"]


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """One transition: the views on both sides, the slots before it where all ids are known."""

    seq: int
    before: FlatView
    after: FlatView
    table: SlotTable | None
    ops: tuple[SlotOp, ...]


def replay(records: Iterable[Record]) -> Iterator[ReplayStep]:
    """The transitions in order.

    Transitions of which nothing is known are left out.  Raises RecordingError when sections do not
    fit the view they are applied to.
    """
    view: FlatView | None = None
    slots: dict[int, Slot] = {}
    pending: TransitionRecord | None = None
    ops: list[SlotOp] = []

    def finish() -> Iterator[ReplayStep]:
        nonlocal view, pending, ops
        if pending is not None and view is not None and (pending.removed or pending.added):
            after = _apply(view, pending)
            yield ReplayStep(pending.seq, view, after, _table(slots, view), tuple(ops))
            view = after
        for op in ops:
            _fold(slots, op)
        pending, ops = None, []

    for record in records:
        match record:
            case MapRecord():
                yield from finish()
                ranges = [_range(s) for s in record.ranges]
                view = _view(ranges, record.address_space, "the map")
            case TransitionRecord():
                yield from finish()
                pending = record
            case SlotOp(as_id=0, predicted=False):
                ops.append(record)
    yield from finish()


def _apply(view: FlatView, t: TransitionRecord) -> FlatView:
    gone = {(s.start, s.size) for s in t.removed}
    ranges = [r for r in view if (r.start, r.size) not in gone]
    ranges += [_range(s) for s in t.added]
    ranges.sort(key=lambda r: r.start)
    return _view(ranges, view.address_space, f"transition {t.seq}")


def _view(ranges: list[FlatRange], address_space: str, where: str) -> FlatView:
    try:
        return FlatView(ranges, address_space)
    except ValueError as exc:
        raise _unfit(f"{where} does not fit the map before it: {exc}") from None


def _range(s: Section) -> FlatRange:
    try:
        kind = Kind(s.kind)
    except ValueError:
        raise _unfit(f"a section of unknown kind {s.kind!r}") from None
    return FlatRange(s.start, s.size, kind, s.name, s.offset, s.owner, memslot=s.memslot)


def _unfit(why: str) -> RecordingError:
    return RecordingError(why, remedy="give a file that `qmp-memlistener record` wrote, unchanged")


def _fold(slots: dict[int, Slot], op: SlotOp) -> None:
    if op.ret:
        return
    if op.op == "delete":
        slots.pop(op.slot, None)
    else:
        slots[op.slot] = Slot(op.as_id, op.slot, op.gpa, op.size, op.flags)


def _table(slots: dict[int, Slot], view: FlatView) -> SlotTable | None:
    """The slots before a transition if operations have told them all, else None."""
    backed = {r.start for r in view if r.memslot}
    known = {s.gpa for s in slots.values()}
    return SlotTable(slots.values()) if backed and backed <= known else None
