"""PURE: a recording or a raw QEMU log as transitions that can be replayed on a VM of our own.

`read_replay` is the way in: which operations were one transition, the slots before and after each,
and which host memory is behind every slot.  How a transition is carried out is no matter of this
module.  `recorded_log` and `recorded_records` read the files, `replay_history` says what the
operations did, `replay_guesses` what nothing tells, `replay_blocks` what is behind slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import InputError, RecordingError
from ..inputs import refusal
from ..memslots import (
    ADDRESS_SPACES,
    DISPLAY_RAM,
    GUEST_MEMFD,
    READONLY,
    LogChange,
    Op,
    OpKind,
    Rules,
    Slot,
    SlotTable,
)
from ..recording import is_recording
from ..topology import FlatRange, FlatView, Kind
from .recorded_log import read_log
from .recorded_ops import Backing, Recorded
from .recorded_records import read_recording
from .replay_blocks import HostBlock, back
from .replay_guesses import complete
from .replay_history import Commit, Done, History, Life, fold_history

__all__ = [
    "MOST_ENTRIES",
    "HostBlock",
    "ReplayInput",
    "ReplayTransition",
    "read_replay",
    "read_slot_tables",
]

MOST_ENTRIES = 8_000_000
"""Slots of all transitions together."""

_NAMES = {as_id: name for name, as_id in ADDRESS_SPACES.items()}


@dataclass(frozen=True, slots=True)
class ReplayTransition:
    """One transition: `ops` in the order in which the guest's QEMU made them.

    `seq` is the recording's number of it, 0 for what a recording does not number (dirty logging
    switched without a transition); transitions of a log are counted from 1.  Op by op: `rets` is
    the return code, 0 or a negative errno; `slots` the slot that the op adds, changes or deletes,
    as it is when the op succeeds (of a delete: as it was), with what backs it; `missing` that
    the file lacks it and it was put in.  A delete that was refused may name no slot: size 0.

    `before` and `after` are the slots on both sides, each with its backing; neither may be changed.
    Ops with a return code other than 0 have no part in `after`.  `log` says what starts
    and stops being logged, for `plan`; None when nothing is logged.
    """

    seq: int
    ops: tuple[Op, ...]
    rets: tuple[int, ...]
    slots: tuple[Slot, ...]
    missing: tuple[bool, ...]
    before: SlotTable
    after: SlotTable
    log: LogChange | None

    @property
    def view_before(self) -> dict[int, FlatView]:
        """`before` as FlatViews by address space: `memslots.plan` takes them with `before`."""
        return {as_id: _view(self.before, as_id) for as_id in self._as_ids}

    @property
    def view_after(self) -> dict[int, FlatView]:
        """`after` as FlatViews by address space.

        A slot that went and came again as it was stands for a range that changed in a way which
        its slot does not show (RAM behind a read-only alias, PAM); it differs from the one in
        `view_before` by `unmergeable` alone, so that QEMU's plan has its ops as well.
        """
        again = {
            (op.as_id, op.gpa)
            for op, ret in zip(self.ops, self.rets, strict=True)
            if op.op is OpKind.ADD and ret == 0
        }
        out: dict[int, FlatView] = {}
        for as_id, view in self.view_before.items():
            old = {r.start: r for r in view}
            new = _view(self.after, as_id)
            ranges = [
                replace(r, unmergeable=True)
                if (as_id, r.start) in again and old.get(r.start) == r
                else r
                for r in new
            ]
            out[as_id] = FlatView(ranges, new.address_space)
        return out

    @property
    def _as_ids(self) -> tuple[int, ...]:
        return tuple(sorted({*self.before.as_ids(), *self.after.as_ids()}))


@dataclass(frozen=True, slots=True)
class ReplayInput:
    """A file's transitions in order.

    `kind` is `recording` or `log`.  `rules` are those of the QEMU that made the ops, as far as
    the file tells.  `initial` are the slots before the first transition.  `notes` say in words
    what was guessed, put in or left out.
    """

    source: str
    kind: str
    qemu_version: str | None
    rules: Rules
    blocks: tuple[HostBlock, ...]
    initial: SlotTable
    transitions: tuple[ReplayTransition, ...]
    notes: tuple[str, ...]


def read_replay(path: str, *, page_size: int = 4096, most: int | None = None) -> ReplayInput:
    """Read a recording of ours, or a log of QEMU 7.2 to 11.1 with `kvm_set_user_memory` lines.

    `page_size` is that of the host that the guest ran on.  Only the first `most` transitions are
    returned.  Each has the slots before and after it: all together at most MOST_ENTRIES of them,
    some 100 bytes each.

    Raises InputError when the file cannot be read, has no slot operation or too many slots in too
    many transitions, RecordingError when it is a damaged recording.
    """
    rules = Rules(page_size=page_size)
    recorded, history = _read(path, rules)
    if history is None:
        raise _nothing_in(path, recorded)
    blocks, behind = back(history.lives, recorded.spans)
    initial = _initial(history, behind)
    _remark(history, recorded)
    return ReplayInput(
        path,
        recorded.kind,
        recorded.qemu_version,
        replace(rules, order=history.order),
        blocks,
        initial,
        _transitions(history.commits[:most], behind, initial, recorded.kind),
        recorded.remarks.texts(),
    )


def read_slot_tables(path: str) -> Iterator[tuple[int | None, SlotTable, LogChange | None]]:
    """The slots before each commit of a recording, with its transition and what logs it starts or
    stops; at last those that remain.

    The transition is None for a commit that belongs to none, and at the end.  Ids are those that
    the operations tell; where none does, QEMU's rules.  Raises as `read_replay`; nothing comes
    when no operation was recorded.
    """
    recorded, history = _read(path, Rules())
    if history is None:
        return
    _, behind = back(history.lives, recorded.spans)
    table = _initial(history, behind)
    for commit in history.commits:
        before, table = table, table.copy()
        for done in commit.done:
            _carry_out(done, table, behind)
        yield commit.seq, before, _log_change(before, table)
    yield None, table, None


def _read(path: str, rules: Rules) -> tuple[Recorded, History | None]:
    recorded = read_recording(path, rules) if is_recording(path) else read_log(path)
    history = fold_history(recorded) if recorded.ops else None
    if history is None or not history.commits:
        return recorded, None
    complete(history, recorded.remarks)
    return recorded, history


def _initial(history: History, behind: Mapping[Life, Backing]) -> SlotTable:
    slots = [_slot(life, behind, life.first_flags) for life in history.lives if life.initial]
    placed = {(s.as_id, s.slot) for s in slots}
    elsewhere = {
        as_id: frozenset(i for i in ids if (as_id, i) not in placed)
        for as_id, ids in history.taken.items()
    }
    return SlotTable(slots, elsewhere=elsewhere)


def _transitions(
    commits: Iterable[Commit], behind: Mapping[Life, Backing], initial: SlotTable, kind: str
) -> tuple[ReplayTransition, ...]:
    out: list[ReplayTransition] = []
    before = initial
    entries = 0
    for number, commit in enumerate(commits, 1):
        after = before.copy()
        slots = [_carry_out(done, after, behind) for done in commit.done]
        entries += len(after)
        if entries > MOST_ENTRIES:
            raise InputError(
                f"{number} transitions of up to {len(after)} slots are more than a replay can hold",
                remedy=f"replay fewer of them, with --first {number - 1}",
            )
        out.append(
            ReplayTransition(
                (commit.seq or 0) if kind == "recording" else number,
                tuple(
                    Op(done.kind, slot.as_id, slot.slot, slot.gpa, slot.size, done.flags)
                    for done, slot in zip(commit.done, slots, strict=True)
                ),
                tuple(done.ret for done in commit.done),
                tuple(slots),
                tuple(done.missing for done in commit.done),
                before,
                after,
                _log_change(before, after),
            )
        )
        before = after
    return tuple(out)


def _carry_out(done: Done, table: SlotTable, behind: Mapping[Life, Backing]) -> Slot:
    """Change `table` as the operation did; the slot it is about."""
    slot = _slot(done.life, behind, done.flags)
    old = table.get(slot.as_id, slot.slot)
    if done.kind is OpKind.DELETE:
        slot = old or slot
    if done.ret == 0:
        if old is not None:
            table.remove(old.as_id, old.slot)
        if done.kind is not OpKind.DELETE:
            table.add(slot)
    return slot


def _slot(life: Life, behind: Mapping[Life, Backing], flags: int) -> Slot:
    assert life.slot is not None
    assert life.size is not None
    block, owner, offset = behind.get(life, (None, None, None))
    return Slot(life.as_id, life.slot, life.gpa, life.size, flags, block, owner, offset)


def _log_change(before: SlotTable, after: SlotTable) -> LogChange | None:
    """What is logged afterwards and what is not, said of every block.

    Left to itself `DirtyLog` takes logged RAM that is no display's for a migration; here display
    RAM may have any name.
    """
    if not any(s.logged or s.block in DISPLAY_RAM for table in (before, after) for s in table):
        return None
    start = frozenset(s.block for s in after if s.logged and s.block is not None)
    names = frozenset(s.block for table in (before, after) for s in table if s.block is not None)
    return LogChange(start, names - start, False)


def _view(table: SlotTable, as_id: int) -> FlatView:
    ranges = []
    for s in table.slots(as_id):
        kind = Kind.ROM if s.flags & READONLY else Kind.RAM
        name = s.block or ""
        ranges.append(
            FlatRange(s.gpa, s.size, kind, name, s.offset or 0, s.owner, kind, memslot=True)
        )
    return FlatView(ranges, _NAMES.get(as_id, f"address space {as_id}"))


def _remark(history: History, recorded: Recorded) -> None:
    lives = [life for life in history.lives if not life.refused]
    elsewhere = sum(1 for commit in history.commits for done in commit.done if done.life.as_id != 0)
    if elsewhere:
        recorded.remarks.add(
            f"operations on another address space than `memory` (SMM's, mostly): {elsewhere}"
        )
    private = sum(1 for life in lives if (life.flags | life.first_flags) & GUEST_MEMFD)
    if private:
        recorded.remarks.add(f"slots with a guest_memfd, whose memory is not the host's: {private}")


def _nothing_in(path: str, recorded: Recorded) -> InputError:
    if recorded.kind == "recording":
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
