"""Folds trace lines and snapshots of one guest into transitions with their slot operations.

No sockets, no clocks: the agent feeds `Tracker` what it sees, with times, and takes records and
changes back.  Two kinds of evidence meet here.  Trace lines tell *that* and in which order the map
changed (`commits`); snapshots tell *what* the map is.

A snapshot has its place among the lines: QEMU logs the command that asks for it, and holds the BQL
from that line until the text is whole.  `mark` is called at that line, `snapshot` when the text is
there; lines in between belong to what comes after.

A commit with a snapshot right before and right after it is known in full.  Of several commits
between two snapshots each keeps its own operations, which give RAM and ROM exactly; what covers a
hole stays open until the next snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from ..memslots import DirtyLog, LogChange, Op, OpKind, Rules, SlotTable, qemu_ops, slot_table
from ..recording import (
    BlockInfo,
    Cause,
    FlipInfo,
    HoleInfo,
    MapRecord,
    MoveInfo,
    RamInfo,
    Reconciled,
    Record,
    Section,
    SlotOp,
    TransitionRecord,
)
from ..topology import (
    Extent,
    FlatView,
    Hole,
    MemoryMap,
    Transition,
    diff,
    ram_blocks,
    shared_extents,
)
from .changes import Change
from .commits import Commit, CommitGrouper
from .live_slots import UNKNOWN_BLOCK, LiveSlots

__all__ = ["Maps", "Tracker"]

MEMORY = 0  # KVM's address-space id of `memory`

Maps = Mapping[int, MemoryMap]


class Tracker:
    """The state of one guest's memory map and what is known of its slots.

    `has_slots`: the accelerator is KVM; `traced`: trace lines are seen (slot operations too under
    KVM), otherwise operations are predicted.  Results collect until `take` fetches them.
    """

    def __init__(
        self, maps: Maps, t_ns: int, *, has_slots: bool, traced: bool, rules: Rules
    ) -> None:
        self.maps = dict(maps)
        self.seq = 0
        self.elsewhere = 0  # commits that changed other address spaces only
        self.has_slots = has_slots
        self.traced = traced
        self.rules = rules
        self._live = LiveSlots(maps, rules)
        self.commits = CommitGrouper(self._live)
        self._predicted = slot_table(_views(maps), rules)
        self._marked: tuple[list[Commit], LiveSlots] | None = None
        self._reported: list[str] = []
        self._records: list[Record] = []
        self._changes: list[Change] = []
        self._records.append(_map_record(self.map, t_ns))

    @property
    def map(self) -> MemoryMap:
        """The `memory` address space at the last snapshot."""
        return self.maps[MEMORY]

    @property
    def slots(self) -> SlotTable:
        """The slots: as traced where operations are seen, predicted otherwise."""
        return self._live.table() if self._sees_slots else self._predicted

    @property
    def pending(self) -> int:
        """Commits that no snapshot covers yet, asked for or not."""
        return self.commits.count

    @property
    def is_reported(self) -> bool:
        """Nothing that was seen waits for a snapshot, not even for one that is on its way."""
        return not self.pending and self._marked is None

    def take(self) -> tuple[list[Record], list[Change]]:
        """The records and changes since the last call, in order."""
        out = self._records, self._changes
        self._records, self._changes = [], []
        return out

    def mark(self) -> None:
        """The snapshot that is on its way belongs here, behind the lines seen so far."""
        pending, _ = self._marked or ([], None)
        self._marked = ([*pending, *self.commits.take()], self._live.copy())

    def snapshot(self, maps: Maps, t_ns: int) -> None:
        """The whole map at the place that was marked, or now when none was."""
        if self._marked is None:
            self.mark()
        assert self._marked is not None
        (pending, live), self._marked = self._marked, None
        live.learn(maps)
        if not self.traced:
            self._untraced(maps, t_ns)
        elif not self.has_slots:
            self._without_slots(maps, pending, t_ns)
        else:
            self._with_slots(maps, pending, live, t_ns)
        self.maps = dict(maps)
        self._live.take_names(live)  # it is ahead of the map that was marked

    def flush(self) -> None:
        """No snapshot will come (the guest is gone): report what the lines alone tell."""
        before: Maps = self.maps
        self.mark()
        assert self._marked is not None
        (pending, _), self._marked = self._marked, None
        for commit in pending:
            if not self.has_slots:
                self._report(_nothing(before[MEMORY]), commit, "none")
            elif commit.changes_slots:
                before = self._report_by_slots(before, commit)
            elif commit.moves_bar:
                self._report(_nothing(before[MEMORY]), commit, "none")
            elif commit.ops:
                self._report_ops(commit, None)
        self.maps = dict(before)

    def resync(self, maps: Maps, t_ns: int) -> None:
        """Lines were lost: start again from a snapshot, as one transition of unknown length."""
        self.mark()
        assert self._marked is not None
        (pending, _), self._marked = self._marked, None
        transition = _diff(self.maps[MEMORY], maps[MEMORY])
        if transition or any(c.changes_slots for c in pending):
            commit = Commit(pending[0].t_ns if pending else t_ns)
            for c in pending:
                commit.ops.extend(c.ops)
            self._report(transition, commit, "net", merged=max(len(pending), 1))
        self._live.adopt(maps)
        self.maps = dict(maps)

    # -- the three ways to a transition --------------------------------------------------------

    @property
    def _sees_slots(self) -> bool:
        return self.has_slots and self.traced

    def _untraced(self, maps: Maps, t_ns: int) -> None:
        """Two snapshots and nothing in between: what happened in the meantime is not known."""
        transition = _diff(self.map, maps[MEMORY])
        predicted = self._predict(maps)
        if transition or predicted:
            self._report(transition, Commit(t_ns), "full", predicted=predicted)

    def _without_slots(self, maps: Maps, pending: Sequence[Commit], t_ns: int) -> None:
        """TCG: the lines say that QEMU rebuilt its views, not in which address space."""
        transition = _diff(self.map, maps[MEMORY])
        predicted = self._predict(maps)
        if len(pending) <= 1 and not transition:
            self.elsewhere += len(pending)
            return
        for commit in pending[:-1]:
            self._report(_nothing(self.map), commit, "none")
        last = pending[-1] if pending else Commit(t_ns)
        detail = "full" if len(pending) <= 1 else "net" if transition else "none"
        self._report(transition, last, detail, predicted=predicted, merged=max(len(pending), 1))

    def _with_slots(
        self, maps: Maps, pending: Sequence[Commit], live: LiveSlots, t_ns: int
    ) -> None:
        alone = len(pending) == 1
        told = [c for c in pending if c.changes_slots or c.moves_bar]
        silent = [c for c in pending if not c.changes_slots and not c.moves_bar]
        before: Maps = self.maps
        for commit in pending:
            if told and commit is told[-1]:
                transition = _diff(before[MEMORY], maps[MEMORY])
                if alone and not transition and not commit.changes_slots:
                    self.elsewhere += 1  # a BAR behind a closed bridge window
                    continue
                detail = "full" if alone else "net" if transition else "none"
                commit.causes += [cause for c in silent for cause in c.causes]
                self._report(transition, commit, detail, merged=1 + len(silent))
            elif commit.changes_slots:
                before = self._report_by_slots(before, commit)
            elif commit.moves_bar:
                self._report(_nothing(before[MEMORY]), commit, "none")
            elif commit.ops:
                self._report_ops(commit, None)
        if not told:
            transition = _diff(before[MEMORY], maps[MEMORY])
            if transition:
                last = pending[-1] if pending else Commit(t_ns)
                quiet = Commit(last.t_ns, causes=[cause for c in pending for cause in c.causes])
                detail = "full" if alone else "net"
                self._report(transition, quiet, detail, merged=max(len(pending), 1))
            else:
                self.elsewhere += sum(not c.ops for c in pending)
        if pending:
            self._reconcile(maps, pending, live, t_ns)

    def _report_by_slots(self, before: Maps, commit: Commit) -> dict[int, MemoryMap]:
        """Report a commit by its operations alone; returns the maps after it."""
        old = before[MEMORY]
        view = self._live.view(commit.slots_after, old.view)
        extents = [
            Extent(m.start, m.size, b.name, b.owner, m.offset)
            for b in old.ram_blocks
            for m in b.mapped
        ]
        known = {(e.name, e.owner, e.start - e.offset) for e in extents}
        extents += [
            e for e in shared_extents(view) if (e.name, e.owner, e.start - e.offset) not in known
        ]
        new = MemoryMap(view, ram_blocks(view, extents), rendered=True)
        self._report(_diff(old, new), commit, "slots")
        return {**before, MEMORY: new}

    # -- prediction and comparison -------------------------------------------------------------

    def _predict(self, maps: Maps) -> tuple[Op, ...]:
        """The operations QEMU would issue; the predicted table moves on."""
        done = qemu_ops(
            _views(self.maps),
            _views(maps),
            self._predicted,
            self.rules,
            DirtyLog(self._predicted, LogChange()),
        )
        self._predicted = done.after
        return done.ops

    def _reconcile(self, maps: Maps, pending: Sequence[Commit], live: LiveSlots, t_ns: int) -> None:
        """Compare what QEMU's rules give with what was traced, and say so when it differs."""
        found = live.compare(maps)
        if len(pending) == 1 and pending[0].changes_slots:
            found += self._compare_order(maps, pending[0], live.ids_known)
        if found != self._reported:
            self._records.append(
                Reconciled(t_ns=t_ns, slots=len(live), equal=not found, differences=found)
            )
            self._reported = found
        self._predicted = live.table()

    def _compare_order(self, maps: Maps, commit: Commit, with_ids: bool) -> list[str]:
        """The operations of one commit against the planned ones, ids where they are known."""
        log = DirtyLog(self._predicted)
        planned = qemu_ops(_views(self.maps), _views(maps), self._predicted, self.rules, log).ops

        def shape(what: str, as_id: int, gpa: int, size: int, slot: int) -> tuple[object, ...]:
            return (what, as_id, gpa, size, slot if with_ids and what == "delete" else None)

        wanted = [
            shape(str(op.op), op.as_id, op.gpa, op.size, op.slot)
            for op in planned
            if op.op is not OpKind.FLAGS
        ]
        traced = [
            shape(o.what, o.raw.as_id, o.raw.gpa, o.size, o.raw.slot)
            for o in commit.ops
            if o.what != "flags"
        ]
        if wanted == traced:
            return []
        return [
            f"order: predicted {_words(wanted)}; traced {_words(traced)}",
        ]

    # -- reporting -----------------------------------------------------------------------------

    def _report(
        self,
        transition: Transition,
        commit: Commit,
        detail: str,
        *,
        predicted: Sequence[Op] = (),
        merged: int = 1,
    ) -> None:
        self.seq += 1
        filled = [*transition.holes_filled]
        punched = [*transition.holes_punched]
        for change in (*transition.holes_moved, *transition.holes_resized):
            filled.append(change.before)
            punched.append(change.after)
        self._records.append(
            TransitionRecord(
                seq=self.seq,
                t_ns=commit.t_ns,
                cause=_cause(transition, commit.causes, filled, punched),
                removed=Section.list_of(transition.removed),
                added=Section.list_of(transition.added),
                holes_punched=[_hole_info(h) for h in sorted(punched, key=_start)],
                holes_filled=[_hole_info(h) for h in sorted(filled, key=_start)],
                ram_appeared=[RamInfo(**asdict(c)) for c in transition.ram_appeared],
                ram_vanished=[RamInfo(**asdict(c)) for c in transition.ram_vanished],
                flips=[
                    FlipInfo(f.start, f.size, f.name, f.owner, str(f.before), str(f.after))
                    for f in transition.flips
                ],
                mmio_moved=[MoveInfo(**asdict(m)) for m in transition.mmio_moved],
                detail=detail,
                merged=merged,
                slot_ops=len(commit.ops) or len(predicted),
            )
        )
        ops = self._traced_ops(commit, self.seq) + [
            SlotOp(
                t_ns=commit.t_ns,
                as_id=op.as_id,
                slot=op.slot,
                op=str(op.op),
                gpa=op.gpa,
                size=op.size,
                flags=op.flags,
                ret=0,
                predicted=True,
                transition=self.seq,
            )
            for op in predicted
        ]
        self._records.extend(ops)
        self._changes.append(Change(transition.after, transition, tuple(ops)))

    def _report_ops(self, commit: Commit, seq: int | None) -> None:
        """Operations without a transition: dirty logging switched on or off."""
        ops = self._traced_ops(commit, seq)
        self._records.extend(ops)
        self._changes.append(Change(self.map.view, None, tuple(ops)))

    def _traced_ops(self, commit: Commit, seq: int | None) -> list[SlotOp]:
        return [
            SlotOp(
                t_ns=op.raw.t_ns,
                as_id=op.raw.as_id,
                slot=op.raw.slot,
                op=op.what,
                gpa=op.raw.gpa,
                size=op.size,
                flags=op.raw.flags,
                ret=op.raw.ret,
                predicted=False,
                transition=seq,
                hva=op.raw.hva,
            )
            for op in commit.ops
        ]


def _views(maps: Maps) -> dict[int, FlatView]:
    return {as_id: m.view for as_id, m in maps.items()}


def _diff(before: MemoryMap, after: MemoryMap) -> Transition:
    return diff(before.view, after.view, before.ram_blocks, after.ram_blocks)


def _nothing(m: MemoryMap) -> Transition:
    return Transition(m.view, m.view, (), (), tuple(m.view))


def _map_record(m: MemoryMap, t_ns: int) -> MapRecord:
    return MapRecord(
        t_ns=t_ns,
        address_space=m.view.address_space,
        ranges=Section.list_of(m.view),
        ram_blocks=[BlockInfo.of(b) for b in m.ram_blocks],
    )


def _cause(
    transition: Transition, seen: Sequence[Cause], filled: Sequence[Hole], punched: Sequence[Hole]
) -> Cause:
    """What was seen to cause it; else the regions that came or went, which is all there is."""
    if len(seen) > 1:
        return Cause("several", causes=list(seen))
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
        return Cause("unknown")
    owners = {owner for _, owner in regions}
    owner = owners.pop() if len(owners) == 1 else None
    return Cause("region", owner=owner, regions=list(dict.fromkeys(name for name, _ in regions)))


def _hole_info(hole: Hole) -> HoleInfo:
    """For a record; RAM of a block that is not known covers as something not known."""
    if hole.covered_by is not None and hole.covered_by.startswith(UNKNOWN_BLOCK):
        hole = replace(hole, covered_by=None)
    return HoleInfo.of(hole)


def _start(hole: Hole) -> int:
    return hole.start


def _words(ops: Sequence[tuple[object, ...]]) -> str:
    return ", ".join(f"{what} {gpa:#x}+{size:#x}" for what, _, gpa, size, _ in ops) or "nothing"
