"""Slot operations from a recording, with the slots that its first map implies.

The map is carried along only to know which RAM block is behind a slot.  What the operations mean
is in `replay_history`.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable

from ..errors import InputError, RecordingError
from ..memslots import OpKind, Order, Rules, slot_table
from ..memslots.slots import LAST_SLOT
from ..recording import (
    Lost,
    MapRecord,
    Recording,
    Section,
    SlotOp,
    TransitionRecord,
)
from ..topology import FlatRange, FlatView, Kind
from ..tracking.live_slots import UNKNOWN_BLOCK
from .recorded_ops import Backing, Recorded, RecordedOp, RecordedSlot, Remarks

__all__ = ["read_recording"]

MEMORY = "memory"


def read_recording(path: str, rules: Rules) -> Recorded:
    """The operations of a recording: those that were seen, and where none were, the predicted.

    Operations of one transition have one `mark`; those without a transition (dirty logging)
    follow the order of their own.  `rules` say which ranges of the map have slots.
    Raises InputError when the file cannot be read, RecordingError when it is no recording or
    holds what no guest has.
    """
    recording = Recording(path)
    reader = _Reader(rules)
    for record in recording:
        match record:
            case MapRecord(address_space="memory"):
                reader.map(record)
            case TransitionRecord():
                reader.transition(record)
            case SlotOp():
                reader.operation(record)
            case Lost():
                reader.remarks.add("operations may be missing: the recorder lost something")
    if recording.truncated:
        reader.remarks.add("the last line is cut off")
    version = recording.header.qemu_version
    return Recorded(
        "recording",
        version,
        _order(version),
        True,
        tuple(reader.ops),
        tuple(reader.initial),
        reader.spans,
        reader.remarks,
    )


class _Reader:
    """Records to operations; carries the map."""

    def __init__(self, rules: Rules) -> None:
        self.ops: list[RecordedOp] = []
        self.initial: list[RecordedSlot] = []
        self.spans: dict[tuple[str, str | None], int] = {}
        self.remarks = Remarks("transition")
        self._rules = rules
        self._sections: dict[int, Section] = {}
        self._starts: list[int] = []
        self._mapped = False
        self._mark = 0
        self._seq = 0
        self._of: int | None = None

    def map(self, record: MapRecord) -> None:
        for block in record.ram_blocks:
            for extent in block.mapped:
                self._span(block.name, block.owner, extent.offset + extent.size)
        self._sections.clear()
        self._starts.clear()
        self._put(record.ranges)
        if self._mapped:
            self.remarks.add("the recorder began anew: what happened before that is not told")
            return
        self._mapped = True
        try:
            view = FlatView([_range(self._sections[start]) for start in self._starts], MEMORY)
        except ValueError as exc:
            raise _unfit(f"the map holds what no guest has: {exc}") from None
        for s in slot_table(view, self._rules):
            if s.block is None or s.offset is None or s.offset % self._rules.page_size:
                raise _unfit(f"no slot can show what the map has at {s.gpa:#x}")
            shown = (s.block, s.owner, s.offset)
            self.initial.append(RecordedSlot(s.as_id, s.gpa, s.size, s.flags, shown))

    def transition(self, record: TransitionRecord) -> None:
        self._mark += 1
        self._seq = record.seq
        for s in record.removed:
            if self._sections.pop(s.start, None) is not None:
                del self._starts[bisect_right(self._starts, s.start) - 1]
        self._put(record.added)

    def operation(self, record: SlotOp) -> None:
        if record.transition != self._of:
            self._of = record.transition
            self._mark += 1
        try:
            told = OpKind(record.op)
        except ValueError:
            told = None
        limits = (
            (record.as_id, LAST_SLOT),
            (record.slot, LAST_SLOT),
            (record.gpa, (1 << 64) - 1),
            (record.size, (1 << 64) - 1),
            (record.flags, (1 << 32) - 1),
            (record.hva or 0, (1 << 64) - 1),
        )
        deletes = told is OpKind.DELETE
        usable = (told in (OpKind.ADD, OpKind.FLAGS) and record.size > 0) or deletes
        if not usable or any(not 0 <= n <= limit for n, limit in limits):
            raise _unfit(f"an operation of transition {record.transition} is none of KVM's")
        self.ops.append(
            RecordedOp(
                self._seq,
                record.as_id,
                record.slot,
                record.gpa,
                0 if deletes else record.size,
                record.flags,
                record.ret,
                record.hva,
                self._mark,
                record.transition,
                told,
                record.size if deletes else 0,
                self._shown(record),
            )
        )
        if record.predicted:
            self.remarks.add("the operations are predicted: nobody saw the guest's own")

    def _put(self, sections: Iterable[Section]) -> None:
        for s in sections:
            if s.start < 0 or s.size <= 0 or s.start + s.size > 1 << 64 or s.offset < 0:
                raise _unfit(f"{s.name} at {s.start:#x}+{s.size:#x} is no range of a guest")
            if s.start not in self._sections:
                insort(self._starts, s.start)
            self._sections[s.start] = s
            if s.kind != Kind.IO:
                self._span(s.name, s.owner, s.offset + s.size)

    def _span(self, name: str, owner: str | None, end: int) -> None:
        self.spans[name, owner] = max(end, self.spans.get((name, owner), 0))

    def _shown(self, op: SlotOp) -> Backing | None:
        """What the map has at exactly that range, less what alignment takes from it.

        There is a map of `memory` only.  SMRAM mostly shows the same, which is good enough where no
        host address tells.
        """
        i = bisect_right(self._starts, op.gpa) - 1
        if i < 0 or (op.as_id != 0 and op.hva is not None):
            return None
        s = self._sections[self._starts[i]]
        mask = self._rules.page_size - 1
        start, end = (s.start + mask) & ~mask, (s.start + s.size) & ~mask
        if s.kind == Kind.IO or (start, end) != (op.gpa, op.gpa + op.size):
            return None
        offset = s.offset + op.gpa - s.start
        if s.name.startswith(UNKNOWN_BLOCK) or offset & mask:
            return None
        return (s.name, s.owner, offset)


def _order(version: str | None) -> Order | None:
    try:
        return Rules.parse(version).order if version is not None else None
    except InputError:
        return None


def _range(s: Section) -> FlatRange:
    return FlatRange(s.start, s.size, Kind(s.kind), s.name, s.offset, s.owner, memslot=s.memslot)


def _unfit(why: str) -> RecordingError:
    return RecordingError(why, remedy="give a file that `qmp-memlistener record` wrote, unchanged")
