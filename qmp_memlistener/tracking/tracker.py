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

from collections.abc import Iterable, Mapping, Sequence

from ..memslots import DirtyLog, Op, OpKind, QemuOps, Rules, SlotTable, qemu_ops, slot_table
from ..records import (
    Detail,
    Reconciled,
    Record,
    SlotOp,
    TransitionRecord,
)
from ..topology import (
    FlatView,
    MemoryMap,
    Transition,
    diff,
)
from .commits import (
    Change,
    Commit,
    CommitGrouper,
    map_record,
    predicted_records,
    repeated_record,
    traced_records,
    transition_record,
)
from .live_slots import LiveSlots, SlotMaps

__all__ = ["Maps", "Tracker"]

MEMORY = 0  # KVM's address-space id of `memory`
_KNOWN = 16  # transitions reported before
_CAUSES = 32  # of commits that are reported as one

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
        self.commits = CommitGrouper(self._live, rules.order)
        self._predicted = slot_table(_views(maps), rules)
        self._marked: tuple[list[Commit], LiveSlots] | None = None
        self._relieved = False
        self._slot_maps = SlotMaps(self._live)
        self._earlier: dict[tuple[int, Detail], tuple[Transition, TransitionRecord]] = {}
        self._reported: list[str] | None = None  # nothing was compared yet
        self._records: list[Record] = []
        self._changes: list[Change] = []
        self._records.append(map_record(self.map, t_ns))

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
    def unreported_ns(self) -> int | None:
        """When the earliest commit was that waits for a snapshot; None when there is none."""
        marked = self._marked[0] if self._marked is not None else []
        first = marked[0] if marked else self.commits.first
        return first.t_ns if first is not None else None

    @property
    def has_news(self) -> bool:
        """There is something to take."""
        return bool(self._records or self._changes)

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
        self._slot_maps.forget()  # it knows more now
        relieved, self._relieved = self._relieved, False
        if not self.traced:
            self._untraced(maps, t_ns)
        elif not self.has_slots:
            self._without_slots(maps, pending, t_ns, relieved=relieved)
        else:
            self._with_slots(maps, pending, live, t_ns, alone=_count(pending) == 1 and not relieved)
        self.maps = dict(maps)
        self._slot_maps.forget()
        self._live.take_names(live)  # it is ahead of the map that was marked

    def flush(self) -> None:
        """No snapshot will come (the guest is gone): report what the lines alone tell."""
        self.mark()
        assert self._marked is not None
        (pending, _), self._marked = self._marked, None
        for commit in pending:
            self._report_lines(commit)

    def relieve(self, limit: int) -> None:
        """When more than `limit` commits wait for a snapshot: report what the lines tell of most.

        What is reported of a commit is then as if it were one of several between two snapshots.
        """
        if self.commits.count <= limit or self._marked is not None:
            return
        last: Commit | None = None
        for commit in self.commits.take_first(self.commits.count - limit // 2):
            if self._is_silent(commit):
                if last is None:
                    last = commit
                else:
                    last.merged += commit.merged
                    last.causes += commit.causes
                    del last.causes[_CAUSES:]
            else:
                self._report_lines(commit)
        first = self.commits.first
        if last is not None and first is not None:
            first.merged += last.merged
            first.causes[:0] = last.causes
            del first.causes[_CAUSES:]
        self._relieved = True

    def _is_silent(self, commit: Commit) -> bool:
        """What came of it only the next snapshot tells, if anything did."""
        return self.has_slots and not (commit.changes_slots or commit.moves_bar or commit.ops)

    def _report_lines(self, commit: Commit) -> None:
        """Report what its lines alone tell."""
        if not self.has_slots:
            self._report(_nothing(self.map), commit, Detail.NONE)
        elif commit.changes_slots:
            self._report_by_slots(commit)
        elif commit.moves_bar:
            self._report(_nothing(self.map), commit, Detail.NONE)
        elif commit.ops:
            self._report_ops(commit, None)

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
            self._report(transition, commit, Detail.NET, merged=max(len(pending), 1))
        self._live.adopt(maps)
        self.maps = dict(maps)
        self._slot_maps.forget()

    # -- the three ways to a transition --------------------------------------------------------

    @property
    def _sees_slots(self) -> bool:
        return self.has_slots and self.traced

    def _untraced(self, maps: Maps, t_ns: int) -> None:
        """Two snapshots and nothing in between: what happened in the meantime is not known."""
        transition = _diff(self.map, maps[MEMORY])
        predicted = self._predict(maps)
        if transition or predicted:
            self._report(transition, Commit(t_ns), Detail.FULL, predicted=predicted)

    def _without_slots(
        self, maps: Maps, pending: Sequence[Commit], t_ns: int, *, relieved: bool
    ) -> None:
        """TCG: the lines say that QEMU rebuilt its views, not in which address space."""
        transition = _diff(self.map, maps[MEMORY])
        predicted = self._predict(maps)
        alone = len(pending) <= 1 and not relieved
        if alone and not transition:
            self.elsewhere += len(pending)
            return
        for commit in pending[:-1]:
            self._report(_nothing(self.map), commit, Detail.NONE)
        last = pending[-1] if pending else Commit(t_ns)
        detail = Detail.FULL if alone else Detail.NET if transition else Detail.NONE
        self._report(transition, last, detail, predicted=predicted, merged=max(len(pending), 1))

    def _with_slots(
        self,
        maps: Maps,
        pending: Sequence[Commit],
        live: LiveSlots,
        t_ns: int,
        *,
        alone: bool,
    ) -> None:
        shown = [c for c in pending if c.changes_slots or c.moves_bar]
        silent = [c for c in pending if not c.changes_slots and not c.moves_bar]
        for commit in pending:
            if shown and commit is shown[-1]:
                transition = _diff(self.map, maps[MEMORY])
                if alone and not transition and not commit.changes_slots:
                    self.elsewhere += 1  # a BAR behind a closed bridge window
                    continue
                detail = Detail.FULL if alone else Detail.NET if transition else Detail.NONE
                commit.causes += [cause for c in silent for cause in c.causes]
                merged = commit.merged + _count(silent)
                self._report(transition, commit, detail, merged=merged)
            else:
                self._report_lines(commit)
        if not shown:
            transition = _diff(self.map, maps[MEMORY])
            if transition:
                last = pending[-1] if pending else Commit(t_ns)
                quiet = Commit(last.t_ns, causes=[cause for c in pending for cause in c.causes])
                detail = Detail.FULL if alone else Detail.NET
                self._report(transition, quiet, detail, merged=max(_count(pending), 1))
            else:
                self.elsewhere += _count([c for c in pending if not c.ops])
        if pending:
            self._reconcile(maps, pending, live, t_ns, alone=alone)

    def _report_by_slots(self, commit: Commit) -> None:
        """Report a commit by its operations alone; the map is then the one after it."""
        new, transition = self._slot_maps.of(self.map, commit.slots_after)
        self._report(transition, commit, Detail.SLOTS)
        self.maps[MEMORY] = new

    # -- prediction and comparison -------------------------------------------------------------

    def _predict(self, maps: Maps) -> tuple[Op, ...]:
        """The operations QEMU would issue; the predicted table moves on."""
        done = self._planned(maps)
        self._predicted = done.after
        return done.ops

    def _planned(self, maps: Maps) -> QemuOps:
        """What QEMU's rules give for the way from the last snapshot to `maps`."""
        before, after = _views(self.maps), _views(maps)
        log = DirtyLog(self._predicted, None, before.values(), after.values())
        return qemu_ops(before, after, self._predicted, self.rules, log)

    def _reconcile(
        self,
        maps: Maps,
        pending: Sequence[Commit],
        live: LiveSlots,
        t_ns: int,
        *,
        alone: bool,
    ) -> None:
        """Compare what QEMU's rules give with what was traced; say so the first time, and when what
        is found changes."""
        found = live.compare(maps)
        if alone and pending[0].changes_slots:
            found += self._compare_order(maps, pending[0], live.ids_known)
        # without an operation the slots are what was predicted: that compares nothing
        first = self._reported is None and (found or any(c.ops for c in pending))
        if first or (self._reported is not None and found != self._reported):
            self._records.append(
                Reconciled(t_ns=t_ns, slots=len(live), equal=not found, differences=found)
            )
            self._reported = found
        self._predicted = live.table()

    def _compare_order(self, maps: Maps, commit: Commit, with_ids: bool) -> list[str]:
        """The operations of one commit against the planned ones, ids where they are known."""
        planned = self._planned(maps).ops

        def shapes(ops: Iterable[Op | SlotOp]) -> list[tuple[object, ...]]:
            return [
                (
                    op.op,
                    op.as_id,
                    op.gpa,
                    op.size,
                    op.slot if with_ids and op.op is OpKind.DELETE else None,
                )
                for op in ops
                if op.op is not OpKind.FLAGS
            ]

        wanted, traced = shapes(planned), shapes(commit.ops)
        if wanted == traced:
            return []
        return [f"order: predicted {_words(wanted)}; traced {_words(traced)}"]

    # -- reporting -----------------------------------------------------------------------------

    def _report(
        self,
        transition: Transition,
        commit: Commit,
        detail: Detail,
        *,
        predicted: Sequence[Op] = (),
        merged: int = 1,
    ) -> None:
        self.seq += 1
        ops_count = len(commit.ops) or len(predicted)
        self._records.append(self._transition(transition, commit, detail, merged, ops_count))
        ops = [
            *traced_records(commit, self.seq),
            *predicted_records(predicted, commit.t_ns, self.seq),
        ]
        self._records.extend(ops)
        self._changes.append(Change(transition.after, transition, tuple(ops)))

    def _transition(
        self, transition: Transition, commit: Commit, detail: Detail, merged: int, ops: int
    ) -> TransitionRecord:
        known = self._earlier.get((id(transition), detail))  # which is kept for its id
        if known is not None and not commit.causes:
            return repeated_record(known[1], self.seq, commit, merged=merged, slot_ops=ops)
        record = transition_record(
            self.seq, transition, commit, detail, merged=merged, slot_ops=ops
        )
        if not commit.causes:
            if len(self._earlier) >= _KNOWN:
                self._earlier.clear()
            self._earlier[id(transition), detail] = (transition, record)
        return record

    def _report_ops(self, commit: Commit, seq: int | None) -> None:
        """Operations without a transition: dirty logging switched on or off."""
        ops = traced_records(commit, seq)
        self._records.extend(ops)
        self._changes.append(Change(self.map.view, None, tuple(ops)))


def _count(commits: Iterable[Commit]) -> int:
    return sum(commit.merged for commit in commits)


def _views(maps: Maps) -> dict[int, FlatView]:
    return {as_id: m.view for as_id, m in maps.items()}


def _diff(before: MemoryMap, after: MemoryMap) -> Transition:
    return diff(before.view, after.view, before.ram_blocks, after.ram_blocks)


def _nothing(m: MemoryMap) -> Transition:
    return Transition(m.view, m.view, (), (), tuple(m.view))


def _words(ops: Sequence[tuple[object, ...]]) -> str:
    return ", ".join(f"{what} {gpa:#x}+{size:#x}" for what, _, gpa, size, _ in ops) or "nothing"
