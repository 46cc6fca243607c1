"""PURE: a recording or a raw QEMU log as transitions that can be replayed on a VM of our own.

`read_replay` is the way in: which operations were one transition, the slots before and after
each, and which host memory is behind every slot.  How a transition is carried out is no matter of
this module.  What a file tells is in `tracking` (`replaying`, `logs`; `beginning` for what was
there before the first operation), what is behind slots in `transitions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import msgspec

from ...errors import InputError, RecordingError
from ...inputs import refusal
from ...memslots import (
    DISPLAY_RAM,
    GUEST_MEMFD,
    LOG_DIRTY_PAGES,
    READONLY,
    LogChange,
    Op,
    OpKind,
    Rules,
    Slot,
    SlotTable,
)
from ...memslots.slots import Backing
from ...records import Recording, SlotOp, is_recording
from ...topology import FlatView
from ...tracking.beginning import beginning
from ...tracking.logs import read_log
from ...tracking.replaying import (
    BackedOp,
    FileKind,
    ReplayStep,
    Traced,
    possible,
    read_recording,
    replay,
)
from .transitions import AppliedOp, HostBlock, ReplayInput, ReplayTransition, back

__all__ = [
    "MOST_ENTRIES",
    "AppliedOp",
    "HostBlock",
    "PlanInput",
    "PlanInputs",
    "ReplayInput",
    "ReplayTransition",
    "read_plan_inputs",
    "read_replay",
]

MOST_ENTRIES = 8_000_000
"""Slots of all transitions together."""

_CHANGEABLE = LOG_DIRTY_PAGES | READONLY


def read_replay(path: str, *, page_size: int = 4096, most: int | None = None) -> ReplayInput:
    """Read a recording of ours, or a log of QEMU 7.2 to 11.1 with `kvm_set_user_memory` lines.

    `page_size` is that of the host that the guest ran on.  Only the first `most` transitions are
    returned.  Each has the slots before and after it: all together at most MOST_ENTRIES of them,
    some 100 bytes each.

    Raises InputError when the file cannot be read, has no slot operation or too many slots in too
    many transitions, RecordingError when it is a damaged recording.
    """
    rules = Rules(page_size=page_size)
    fold = _Fold(_read(path, rules))
    transitions: list[ReplayTransition] = []
    entries = 0
    for t in islice(fold.transitions(), most):
        entries += len(t.after)
        if entries > MOST_ENTRIES:
            number = len(transitions)
            raise InputError(
                f"{number + 1} transitions of up to {len(t.after)} slots are more than a replay "
                "can hold",
                remedy=f"replay fewer of them, with --first {number}",
            )
        transitions.append(t)
    if not transitions:
        raise _nothing_in(path, fold.traced)
    return ReplayInput(
        path,
        fold.traced.kind,
        fold.traced.qemu_version,
        replace(rules, order=fold.traced.order),
        fold.blocks,
        fold.initial,
        tuple(transitions),
        fold.notes(),
    )


@dataclass(frozen=True, slots=True)
class PlanInput:
    """A transition as `memslots.plan` takes it; `table` has the slots before it.

    `table` and `log` are None when the operations that were recorded do not lead to the slots of
    the map.
    """

    seq: int
    before: dict[int, FlatView]
    after: dict[int, FlatView]
    table: SlotTable | None
    log: LogChange | None


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """A file's transitions; `rules` are those of the QEMU that made the operations.

    `transitions` can be gone through once.
    """

    rules: Rules
    notes: tuple[str, ...]
    transitions: Iterator[PlanInput]


def read_plan_inputs(path: str) -> PlanInputs:
    """What `plan` needs of a recording, or of a log as `read_replay` takes it; raises as that."""
    if is_recording(path):
        recording = Recording(path)
        rules = Rules.parse(recording.header.qemu_version or "8.0")
        return PlanInputs(rules, (), _plan_inputs(path, replay(recording)))
    found = read_replay(path)
    inputs = (
        PlanInput(t.seq, t.view_before, t.view_after, t.before, t.log) for t in found.transitions
    )
    return PlanInputs(found.rules, found.notes, inputs)


def _plan_inputs(path: str, steps: Iterable[ReplayStep]) -> Iterator[PlanInput]:
    """Maps from the recording's transitions, slots from its operations."""
    tables = _slot_tables(path)
    now = next(tables, None)
    for step in steps:
        while now is not None and (now[0] is None or now[0] < step.seq):
            following = next(tables, None)
            if following is None:
                break  # the slots that remained
            now = following
        table = log = None
        if now is not None and _fits(now[1], step.before):
            table = now[1]
            log = now[2] if now[0] == step.seq else None
        yield PlanInput(step.seq, {0: step.before}, {0: step.after}, table, log)


def _fits(table: SlotTable, view: FlatView) -> bool:
    return all(table.exact(0, r.start, r.size) is not None for r in view if r.memslot)


def _slot_tables(path: str) -> Iterator[tuple[int | None, SlotTable, LogChange | None]]:
    """The slots before each commit of a recording, with its transition and what logs it starts or
    stops; at last those that remain.

    The transition is None for a commit that belongs to none, and at the end.  Ids are those that
    the operations tell; where none does, QEMU's rules.
    """
    after: SlotTable | None = None
    for t in _Fold(_read(path, Rules())).transitions():
        yield t.seq or None, t.before, t.log
        after = t.after
    if after is not None:
        yield None, after, None


def _read(path: str, rules: Rules) -> Traced:
    """What the file tells, without operations that no KVM accepts."""
    traced = read_recording(path, rules) if is_recording(path) else read_log(path)
    kept = []
    for commit in traced.commits:
        told = []
        for op, shown in commit:
            if op.ret == 0 and not possible(op):
                where = op.transition if traced.kind is FileKind.RECORDING else op.t_ns
                traced.remarks.add("an operation that no KVM accepts is left out", where)
            else:
                told.append((op, shown))
        if told:
            kept.append(told)
    return replace(traced, commits=kept)


class _Fold:
    """Carries out the operations of a file, as KVM does.

    - A delete takes the slot of that id, whatever gpa it names (`kvm_set_memory_region`, Linux,
      virt/kvm/kvm_main.c).
    - An operation on a live slot with the same gpa and size changes its flags.  READONLY cannot
      change on a live slot, so QEMU then deletes and sets it and traces the second ioctl alone
      (`kvm_set_user_memory_region`, accel/kvm/kvm-all.c): two operations here.
    - A slot that KVM took over others, or under an id in use: deletions are missing in the file.
      They are put in before it.
    """

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        first, elsewhere = beginning(traced)
        self.blocks, behind = back(first, traced.commits, traced.spans)
        self._behind = iter(behind[len(first) :])
        self._hvas = {(s.as_id, s.slot): s.hva for s in first}
        self._elsewhere = self._private = 0
        slots = []
        for s, backing in zip(first, behind, strict=False):
            assert s.slot is not None
            slots.append(_slot(s.as_id, s.slot, s.gpa, s.size, s.flags, backing))
            self._private += bool(s.flags & GUEST_MEMFD)
        self.initial = SlotTable(slots, elsewhere=elsewhere)

    def transitions(self) -> Iterator[ReplayTransition]:
        """Each commit that did something, in order."""
        before, number = self.initial, 0
        had_log = _has_log(before)
        is_log = self.traced.kind is FileKind.LOG
        for commit in self.traced.commits:
            for done, after in self._parts(commit, before, cut=is_log):
                number += 1
                has_log = _has_log(after)
                self._elsewhere += sum(a.op.as_id != 0 for a in done)
                yield ReplayTransition(
                    number if is_log else commit[0][0].transition or 0,
                    tuple(done),
                    before,
                    after,
                    _log_change(before, after) if had_log or has_log else None,
                )
                before, had_log = after, has_log

    def _parts(
        self, commit: Iterable[BackedOp], before: SlotTable, *, cut: bool
    ) -> Iterator[tuple[list[AppliedOp], SlotTable]]:
        """What a commit did, and the slots after it; `cut` in two where a deletion is missing that
        would go back."""
        after, done = before.copy(), list[AppliedOp]()
        for op, _ in commit:
            if cut and self._doomed(op, after) and any(a.op.op is OpKind.ADD for a in done):
                yield done, after
                after, done = after.copy(), []
            done += self._apply(op, next(self._behind), after)
        if done:
            yield done, after

    def _doomed(self, op: SlotOp, table: SlotTable) -> tuple[Slot, ...]:
        """Slots whose deletion is missing, since KVM took the operation."""
        old = table.get(op.as_id, op.slot)
        if op.ret != 0 or op.op == OpKind.DELETE or (old is not None and self._changes(op, old)):
            return ()
        doomed = table.overlapping(op.as_id, op.gpa, op.gpa + op.size)
        return doomed if old is None or old in doomed else (*doomed, old)

    def _changes(self, op: SlotOp, old: Slot) -> bool:
        """The operation changes flags of the slot as it is, such as can change."""
        hva = self._hvas.get((op.as_id, op.slot))
        here = (op.gpa, op.size) == (old.gpa, old.size) and (None in (hva, op.hva) or hva == op.hva)
        return here and not (op.flags ^ old.flags) & ~_CHANGEABLE

    def notes(self) -> tuple[str, ...]:
        """In words what was guessed, put in or left out so far."""
        notes = list(self.traced.remarks.texts())
        if self._elsewhere:
            notes.append(
                "operations on another address space than `memory` (SMM's, mostly): "
                f"{self._elsewhere}"
            )
        if self._private:
            notes.append(
                f"slots with a guest_memfd, whose memory is not the host's: {self._private}"
            )
        return tuple(notes)

    def _remark(self, text: str, op: SlotOp) -> None:
        where = op.t_ns if self.traced.kind is FileKind.LOG else op.transition
        self.traced.remarks.add(text, where)

    def _apply(self, op: SlotOp, backing: Backing | None, table: SlotTable) -> list[AppliedOp]:
        """Change `table` as the operation did; what it was, with the slot that it is about."""
        old = table.get(op.as_id, op.slot)
        new = _slot(op.as_id, op.slot, op.gpa, op.size, op.flags, backing)
        if op.ret != 0:
            return [self._refused(op, old, new)]
        if op.op == OpKind.DELETE:
            if old is None:
                self._remark("a slot is deleted that cannot be there: left out", op)
                return []
            if old.gpa != op.gpa:
                self._remark("a slot is deleted elsewhere than it is: lines are missing", op)
            return [self._delete(old, table)]
        doomed = self._doomed(op, table)
        changes = old is not None and self._changes(op, old)
        self._hvas[op.as_id, op.slot] = op.hva
        if old is not None and changes and not (old.flags ^ op.flags) & READONLY:
            table.remove(old.as_id, old.slot)
            new = msgspec.structs.replace(old, flags=op.flags)
            table.add(new)
            return [_applied(OpKind.FLAGS, new)]
        done = []
        if old is not None and changes:
            done.append(self._delete(old, table))
        for slot in doomed:
            self._remark("the deletion of a slot is missing and was put in", op)
            done.append(self._delete(slot, table))
        table.add(new)
        self._private += bool(op.flags & GUEST_MEMFD)
        return [*done, _applied(OpKind.ADD, new)]

    def _refused(self, op: SlotOp, old: Slot | None, new: Slot) -> AppliedOp:
        """It changed nothing; what it asked for is kept."""
        self._remark("KVM refused an operation", op)
        if op.op == OpKind.DELETE:
            return _applied(OpKind.DELETE, old or msgspec.structs.replace(new, size=0), op.ret)
        if old is not None and self._changes(op, old):
            return _applied(OpKind.FLAGS, msgspec.structs.replace(old, flags=op.flags), op.ret)
        return _applied(OpKind.ADD, new, op.ret)

    def _delete(self, slot: Slot, table: SlotTable) -> AppliedOp:
        table.remove(slot.as_id, slot.slot)
        return _applied(OpKind.DELETE, slot)


def _applied(kind: OpKind, slot: Slot, ret: int = 0) -> AppliedOp:
    flags = 0 if kind is OpKind.DELETE else slot.flags
    op = Op(kind, slot.as_id, slot.slot, slot.gpa, slot.size, flags)
    return AppliedOp(op, slot, ret)


def _slot(as_id: int, slot: int, gpa: int, size: int, flags: int, backing: Backing | None) -> Slot:
    return Slot(as_id, slot, gpa, size, flags, *(backing or (None, None, None)))


def _has_log(table: SlotTable) -> bool:
    """Something is logged, or is a display's."""
    return any(s.flags & LOG_DIRTY_PAGES or s.block in DISPLAY_RAM for s in table)


def _log_change(before: SlotTable, after: SlotTable) -> LogChange:
    """What is logged afterwards and what is not, said of every block.

    Left to itself `DirtyLog` takes logged RAM that is no display's for a migration; here display
    RAM may have any name.
    """
    start = frozenset(s.block for s in after if s.logged and s.block is not None)
    names = frozenset(s.block for table in (before, after) for s in table if s.block is not None)
    return LogChange(start, names - start, False)


def _nothing_in(path: str, traced: Traced) -> InputError:
    if traced.kind is FileKind.RECORDING:
        return RecordingError(
            f"{path} has no slot operations: nothing happened to the guest's memory map",
            remedy="record a guest while its memory map changes, or give another recording",
        )
    return refusal(
        path,
        "a recording",
        "a trace log of QEMU",
        otherwise=InputError(
            f"{path} is no recording and has no usable `kvm_set_user_memory` lines",
            remedy="record a guest with `qmp-memlistener record TARGET -o FILE`, or run QEMU under "
            "KVM with `-trace kvm_set_user_memory -D FILE`",
        ),
    )
