"""What files hold of a guest's transitions: a recording as pairs of views, and as commits.

`replay` gives the views on both sides of each transition; `read_recording` the slot operations,
commit by commit, with the RAM block that the map has at each.  `logs` gives the same of a raw log.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..errors import InputError, RecordingError
from ..memslots import OpKind, Order, Rules, slot_table
from ..memslots.slots import LAST_SLOT, MOST_PAGES, Backing
from ..records import Lost, MapRecord, Record, Recording, Section, SlotOp, TransitionRecord
from ..topology import FlatRange, FlatView
from .commits import Upwards
from .live_slots import UNKNOWN_BLOCK, LiveSlot

__all__ = [
    "PAGE",
    "FileKind",
    "Remarks",
    "ReplayStep",
    "BackedOp",
    "Traced",
    "possible",
    "read_recording",
    "replay",
]

PAGE = 4096
"""What gpa, size and host address of a slot are multiples of: the smallest page KVM knows."""

BackedOp = tuple[SlotOp, Backing | None]
"""An operation, and what the map has at its range."""


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """One transition: the views on both sides of it."""

    seq: int
    before: FlatView
    after: FlatView


@dataclass(slots=True)
class Remarks:
    """What a user should know of a file, each said once, with its first place and a count."""

    place: str
    seen: dict[str, tuple[int | None, int]] = field(default_factory=dict)

    def add(self, text: str, where: int | None = None) -> None:
        first, count = self.seen.get(text, (where, 0))
        self.seen[text] = (first, count + 1)

    def texts(self) -> tuple[str, ...]:
        return tuple(self._text(*entry) for entry in self.seen.items())

    def _text(self, text: str, seen: tuple[int | None, int]) -> str:
        first, count = seen
        if first is None:
            return text
        where = f"{self.place} {first}"
        return f"{text} ({where})" if count == 1 else f"{text} ({count} times, first at {where})"


class FileKind(StrEnum):
    """A recording of ours, or a raw log of QEMU."""

    RECORDING = "recording"
    LOG = "log"


@dataclass(frozen=True, slots=True)
class Traced:
    """A file's operations, commit by commit.

    `slots` are those that a recording's first map implies; the ids
    are unknown.  `spans` has the size of RAM blocks by name and owner, as far as a map shows them.
    """

    kind: FileKind
    qemu_version: str | None
    order: Order
    commits: list[list[BackedOp]]
    slots: tuple[LiveSlot, ...]
    spans: Mapping[tuple[str, str | None], int]
    remarks: Remarks


def possible(op: SlotOp) -> bool:
    """KVM may have carried it out: whole pages, not too many, inside 64 bits.

    `kvm_set_memory_region` (Linux, virt/kvm/kvm_main.c) refuses anything else.
    """
    hva = op.hva or 0
    return (
        op.as_id <= LAST_SLOT
        and op.size <= MOST_PAGES * PAGE
        and not (op.gpa | op.size | hva) & (PAGE - 1)
        and max(op.gpa, hva) + op.size <= 1 << 64
    )


def replay(records: Iterable[Record]) -> Iterator[ReplayStep]:
    """The transitions in order.

    Transitions of which nothing is known are left out.  Raises RecordingError when sections do not
    fit the view they are applied to.
    """
    view: FlatView | None = None
    for record in records:
        match record:
            case MapRecord():
                view = _of_map(record)
            case TransitionRecord() if view is not None and (record.removed or record.added):
                after = _apply(view, record)
                yield ReplayStep(record.seq, view, after)
                view = after


def read_recording(path: str, rules: Rules) -> Traced:
    """The operations of a recording: those that were seen, and where none were, the predicted.

    `rules` say which ranges of the map have slots.  Raises InputError when the file cannot be read,
    RecordingError when it is no recording or holds what no guest has.
    """
    recording = Recording(path)
    version, remarks = recording.header.qemu_version, Remarks("transition")
    order = _order(version)
    reader = _Reader(rules, order or Order.V8_0, remarks)
    for record in recording:
        reader.take(record)
    if recording.truncated:
        remarks.add("the last line is cut off")
    if order is None:
        remarks.add("it does not name QEMU's version; 8.0 or later is assumed")
    return Traced(
        FileKind.RECORDING,
        version,
        order or Order.V8_0,
        reader.commits,
        reader.slots or (),
        reader.spans,
        remarks,
    )


class _Reader:
    """Records to commits; carries the map, to know which RAM block is behind a slot.

    Operations of a transition are one commit; those without one (dirty logging) are told apart by
    their order.
    """

    def __init__(self, rules: Rules, order: Order, remarks: Remarks) -> None:
        self.commits: list[list[BackedOp]] = []
        self.slots: tuple[LiveSlot, ...] | None = None
        self.spans: dict[tuple[str, str | None], int] = {}
        self._rules = rules
        self._remarks = remarks
        self._view = FlatView(())
        self._upwards = Upwards(order)
        self._transition: int | None = None
        self._open = False  # the next operation may be of the last commit

    def take(self, record: Record) -> None:
        match record:
            case MapRecord(address_space="memory"):
                self._map(record)
            case TransitionRecord():
                if record.removed or record.added:
                    self._view = _apply(self._view, record)
                self._span(record.added)
                self._open = False
            case SlotOp():
                self._operation(record)
            case Lost():
                self._remarks.add("operations may be missing: the recorder lost something")

    def _map(self, record: MapRecord) -> None:
        for block in record.ram_blocks:
            for extent in block.mapped:
                key = (block.name, block.owner)
                self.spans[key] = max(extent.offset + extent.size, self.spans.get(key, 0))
        self._view = _of_map(record)
        self._span(record.ranges)
        if self.slots is not None:
            self._remarks.add("the recorder started again: what happened before that is unknown")
            return
        slots = []
        for s in slot_table(self._view, self._rules):
            if s.block is None or s.offset is None or s.offset % self._rules.page_size:
                raise _unfit(f"no slot can show what the map has at {s.gpa:#x}")
            slots.append(
                LiveSlot(s.as_id, None, s.gpa, s.size, s.flags, None, s.block, s.owner, s.offset)
            )
        self.slots = tuple(slots)

    def _span(self, sections: Iterable[Section]) -> None:
        for s in sections:
            if s.kind.backed:
                key = (s.name, s.owner)
                self.spans[key] = max(s.offset + s.size, self.spans.get(key, 0))

    def _operation(self, op: SlotOp) -> None:
        limits = (
            (op.as_id, LAST_SLOT),
            (op.slot, LAST_SLOT),
            (op.gpa, (1 << 64) - 1),
            (op.size, (1 << 64) - 1),
            (op.flags, (1 << 32) - 1),
            (op.hva or 0, (1 << 64) - 1),
        )
        known = op.op is OpKind.DELETE or (op.op in (OpKind.ADD, OpKind.FLAGS) and op.size > 0)
        if not known or any(not 0 <= n <= limit for n, limit in limits):
            raise _unfit(f"an operation of transition {op.transition} is none of KVM's")
        if op.predicted:
            self._remarks.add("the operations are predicted: the guest's own were not seen")
        same = self._open and op.transition == self._transition
        if not same:
            self._upwards.begin()
        goes_on = self._upwards.goes_on(op)
        if not (same and (op.transition is not None or goes_on)):
            self.commits.append([])
        self._open, self._transition = True, op.transition
        self.commits[-1].append((op, self._shown(op)))

    def _shown(self, op: SlotOp) -> Backing | None:
        """What the map has at exactly that range, less what alignment takes from it.

        There is a map of `memory` only.  SMRAM mostly shows the same, which is good enough where no
        host address tells.
        """
        r = self._view.lookup(op.gpa)
        if r is None or not r.kind.backed or (op.as_id != 0 and op.hva is not None):
            return None
        mask = self._rules.page_size - 1
        start, end = (r.start + mask) & ~mask, r.end & ~mask
        offset = r.offset + op.gpa - r.start
        exact = (start, end) == (op.gpa, op.gpa + op.size) and not offset & mask
        known = exact and not r.name.startswith(UNKNOWN_BLOCK)
        return Backing(r.name, r.owner, offset) if known else None


def _order(version: str | None) -> Order | None:
    try:
        return Rules.parse(version).order if version is not None else None
    except InputError:
        return None


def _of_map(record: MapRecord) -> FlatView:
    return _view([_range(s) for s in record.ranges], record.address_space, "the map")


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
    if s.offset < 0:
        raise _unfit(f"{s.name} at {s.start:#x}+{s.size:#x} is no range of a guest")
    return FlatRange(s.start, s.size, s.kind, s.name, s.offset, s.owner, memslot=s.memslot)


def _unfit(why: str) -> RecordingError:
    return RecordingError(why, remedy="give a file that `qmp-memlistener record` wrote, unchanged")
