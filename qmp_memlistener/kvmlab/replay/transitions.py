"""PURE: what a replay is made of: operations as KVM took them, transitions, all of a file.

`read` makes these values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...memslots import ADDRESS_SPACES, READONLY, LogChange, Op, OpKind, Rules, Slot, SlotTable
from ...topology import FlatRange, FlatView, Kind
from ...tracking.replaying import FileKind
from .blocks import HostBlock

__all__ = ["AppliedOp", "ReplayInput", "ReplayTransition"]

_NAMES = {as_id: name for name, as_id in ADDRESS_SPACES.items()}


@dataclass(frozen=True, slots=True)
class AppliedOp:
    """One operation of a transition, as KVM took it.

    `ret` is the return code, 0 or a negative errno; `slot` the one that the op adds, changes or
    deletes, as it is when the op succeeds (of a delete: as it was), with what backs it.  A delete
    that was refused may name no slot: size 0.
    """

    op: Op
    slot: Slot
    ret: int = 0


@dataclass(frozen=True, slots=True)
class ReplayTransition:
    """One transition: its operations in the order in which the guest's QEMU made them.

    `seq` is the recording's number of it, 0 for what a recording does not number (dirty logging
    switched without a transition); transitions of a log are counted from 1.

    `before` and `after` are the slots on both sides, each with its backing; neither may be changed.
    Ops with a return code other than 0 have no part in `after`.  `log` says what starts
    and stops being logged, for `plan`; None when nothing is logged.
    """

    seq: int
    applied: tuple[AppliedOp, ...]
    before: SlotTable
    after: SlotTable
    log: LogChange | None

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(a.op for a in self.applied)

    @property
    def rets(self) -> tuple[int, ...]:
        return tuple(a.ret for a in self.applied)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(a.slot for a in self.applied)

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
            (a.op.as_id, a.op.gpa) for a in self.applied if a.op.op is OpKind.ADD and a.ret == 0
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

    `rules` are those of the QEMU that made the ops, as far as
    the file tells.  `initial` are the slots before the first transition.  `notes` have in words
    what was guessed, put in or left out.
    """

    source: str
    kind: FileKind
    qemu_version: str | None
    rules: Rules
    blocks: tuple[HostBlock, ...]
    initial: SlotTable
    transitions: tuple[ReplayTransition, ...]
    notes: tuple[str, ...]


def _view(table: SlotTable, as_id: int) -> FlatView:
    ranges = []
    for s in table.slots(as_id):
        kind = Kind.ROM if s.flags & READONLY else Kind.RAM
        name = s.block or ""
        ranges.append(
            FlatRange(s.gpa, s.size, kind, name, s.offset or 0, s.owner, kind, memslot=True)
        )
    return FlatView(ranges, _NAMES.get(as_id, f"address space {as_id}"))
