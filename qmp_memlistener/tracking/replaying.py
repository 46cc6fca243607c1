"""A recording's transitions as pairs of views.  Its slots are read by `kvmlab.replay_input`.

The recording says which sections went and came; the view is carried along from its `map` record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import RecordingError
from ..recording import MapRecord, Record, Section, TransitionRecord
from ..topology import FlatRange, FlatView, Kind

__all__ = ["ReplayStep", "replay"]


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """One transition: the views on both sides of it."""

    seq: int
    before: FlatView
    after: FlatView


def replay(records: Iterable[Record]) -> Iterator[ReplayStep]:
    """The transitions in order.

    Transitions of which nothing is known are left out.  Raises RecordingError when sections do not
    fit the view they are applied to.
    """
    view: FlatView | None = None
    for record in records:
        match record:
            case MapRecord():
                ranges = [_range(s) for s in record.ranges]
                view = _view(ranges, record.address_space, "the map")
            case TransitionRecord() if view is not None and (record.removed or record.added):
                after = _apply(view, record)
                yield ReplayStep(record.seq, view, after)
                view = after


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
