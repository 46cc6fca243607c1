"""What recorded operations did: the life of each slot, and which operations were one commit.

QEMU's trace shows less than KVM was told: a delete has no size, a change of flags looks like an
add, and a file may begin when slots are already there.  Here the operations are folded once, with
KVM's rules; sizes and ids that no operation tells are in `replay_guesses`.

- A delete takes the slot of that id, whatever gpa it names (`kvm_set_memory_region`, Linux,
  virt/kvm/kvm_main.c).
- An operation on a live slot with the same gpa and size changes its flags.  READONLY cannot change
  on a live slot, so QEMU then deletes and sets it and traces the second ioctl alone
  (`kvm_set_user_memory_region`, accel/kvm/kvm-all.c): two operations here.
- A slot that KVM took over others, or under an id in use: deletions are missing in the file.  They
  are put in before it.
- A delete of an id never seen: the slot was there before the file began.  A change of flags of
  such a slot is told from an add by QEMU's choice of ids: the lowest free one
  (`kvm_get_free_slot`), so those below it are in use; and by its range, where no slot may have
  been.
- Within a commit QEMU goes upwards in address and changes a slot's flags or deletes it, not both;
  so an operation that goes back begins another (`_place_in_commit`).  Time says nothing about it:
  a commit may be preempted.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field

from ..memslots import LOG_DIRTY_PAGES, READONLY, OpKind, Order
from ..memslots.intervals import Range, put
from ..topology.model import ADDRESS_SPACE_SIZE
from .recorded_ops import PAGE, Backing, Recorded, RecordedOp, Remarks
from .replay_clues import counts_from_zero, log_switches

_CHANGEABLE = LOG_DIRTY_PAGES | READONLY

__all__ = ["Commit", "Done", "History", "Life", "fold_history"]


@dataclass(slots=True, eq=False)
class Life:
    """One slot from when it is set to when it goes.

    `flags` are those it has at the end of what was folded, `first_flags` those at its beginning.
    `slot`, `size` and `hva` are None as long as nothing told them.  An `initial` slot was there
    before the file began, and ends at `bound` at the latest.  A `refused` one never was.
    `since` and `until` count operations.
    """

    as_id: int
    slot: int | None
    gpa: int
    size: int | None
    flags: int
    hva: int | None = None
    shown: Backing | None = None
    initial: bool = False
    refused: bool = False
    bound: int = ADDRESS_SPACE_SIZE
    since: int = 0
    until: int = sys.maxsize
    first_flags: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_flags = self.flags

    @property
    def end(self) -> int:
        """First address behind it, as far as that is known: the first page is."""
        return self.gpa + (self.size or PAGE)


@dataclass(frozen=True, slots=True)
class Done:
    """One operation on a slot; `flags` are those it asks for.  `missing`: not in the file."""

    kind: OpKind
    life: Life
    flags: int = 0
    ret: int = 0
    missing: bool = False


@dataclass(slots=True)
class Commit:
    """Operations that belong together; `mark` and `seq` as in `RecordedOp`."""

    mark: int
    seq: int | None
    done: list[Done] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class History:
    """Lives in the order in which they were met, commits in order.

    `taken` has, by address space, ids that were in use by slots no operation tells of, `named`
    those of operations.
    """

    lives: tuple[Life, ...]
    commits: tuple[Commit, ...]
    order: Order
    taken: dict[int, set[int]]
    named: dict[int, set[int]]


def fold_history(recorded: Recorded) -> History:
    """Fold a file's operations; remarks go to those of `recorded`.

    Where a log does not say which QEMU wrote it, that is taken for 7.2 unless a marked commit goes
    back in address after it has changed flags, as from 8.0 on.  O(n log n) in operations, plus a
    shift of the live slots for each.
    """
    if recorded.order is not None:
        fold = _Fold(recorded, recorded.order)
    elif recorded.kind == "recording":
        fold = _Fold(recorded, Order.V8_0)
        fold.remarks.add("it does not tell QEMU's version; taken for 8.0 or later")
    else:
        fold = _Fold(recorded, Order.V7_2)
        if fold.looks_queued:
            fold = _Fold(recorded, Order.V8_0)
        else:
            fold.remarks.add("its lines are those of QEMU 7.2 to 9.0; taken for 7.2")
    recorded.remarks.take(fold.remarks)
    return History(
        tuple(fold.lives),
        tuple(fold.commits),
        fold.order,
        {as_id: space.taken for as_id, space in fold.spaces.items()},
        {as_id: space.named for as_id, space in fold.spaces.items()},
    )


@dataclass(slots=True)
class _Space:
    """One address space."""

    by_id: dict[int, Life] = field(default_factory=dict)
    placed: list[Life] = field(default_factory=list)  # live, by gpa
    unnumbered: dict[int, Life] = field(default_factory=dict)  # live, by gpa; not in by_id
    ever: list[Range] = field(default_factory=list)  # where a slot has been
    used: set[int] = field(default_factory=set)  # ids of operations that KVM carried out
    named: set[int] = field(default_factory=set)  # ids of all operations
    taken: set[int] = field(default_factory=set)  # ids in use by slots never seen
    top: int = 0  # ids from here on have not been looked at

    def live_in(self, start: int, end: int) -> list[Life]:
        first = max(bisect_right(self.placed, start, key=_gpa) - 1, 0)
        last = bisect_left(self.placed, end, key=_gpa)
        return [life for life in self.placed[first:last] if life.end > start]

    def has_been(self, start: int, end: int) -> bool:
        """A slot has been in `[start, end)`."""
        i = bisect_left(self.ever, end, key=_first) - 1
        return i >= 0 and self.ever[i][1] > start

    def next_above(self, gpa: int) -> int:
        """Where above `gpa` the next slot has been."""
        i = bisect_right(self.ever, gpa, key=_first)
        return self.ever[i][0] if i < len(self.ever) else ADDRESS_SPACE_SIZE

    def put(self, life: Life) -> None:
        if life.slot is None:
            self.unnumbered[life.gpa] = life
        else:
            self.by_id[life.slot] = life
        insort(self.placed, life, key=_gpa)
        put(self.ever, life.gpa, life.end)

    def take(self, life: Life) -> None:
        i = bisect_left(self.placed, life.gpa, key=_gpa)
        del self.placed[i]
        if life.slot is None:
            del self.unnumbered[life.gpa]
        else:
            del self.by_id[life.slot]


class _Fold:
    """Folds the operations of a file; the module's text has the rules."""

    def __init__(self, recorded: Recorded, order: Order) -> None:
        self.lives: list[Life] = []
        self.commits: list[Commit] = []
        self.order = order
        self.remarks = Remarks(recorded.remarks.place)
        self.looks_queued = False
        self.spaces: dict[int, _Space] = {}
        self._marked = recorded.marked
        is_log = recorded.kind == "log"
        self._from_start = is_log and counts_from_zero(recorded.ops)
        late = is_log and not self._from_start
        self._switches = log_switches(recorded.ops) if late else set()
        self._now = 0
        self._place: tuple[int, ...] = ()
        self._flagged: set[Life] = set()  # in the last commit
        for s in recorded.initial:
            life = Life(s.as_id, None, s.gpa, s.size, s.flags, None, s.shown, initial=True)
            self.lives.append(life)
            self._space(s.as_id).put(life)
        for op in recorded.ops:
            self._apply(op)

    def _space(self, as_id: int) -> _Space:
        return self.spaces.setdefault(as_id, _Space())

    def _apply(self, op: RecordedOp) -> None:
        if op.ret == 0 and not op.possible:
            self.remarks.add("an operation that no KVM accepts is left out", op.where)
            return
        self._now += 1
        space = self._space(op.as_id)
        space.named.add(op.slot)
        if op.ret != 0:
            self._refused(op, space)
            return
        if op.size == 0:
            self._delete(op, space)
        else:
            self._set(op, space)
        space.used.add(op.slot)
        space.taken.discard(op.slot)

    def _refused(self, op: RecordedOp, space: _Space) -> None:
        """It changed nothing; what it asked for is kept."""
        self.remarks.add("KVM refused an operation", op.where)
        life = space.by_id.get(op.slot)
        same = life is not None and _same(life, op)
        if life is None or (op.size and not same):
            life = Life(op.as_id, op.slot, op.gpa, op.size, op.flags, op.hva, refused=True)
            self.lives.append(life)
        kind = OpKind.DELETE if not op.size else OpKind.FLAGS if same else OpKind.ADD
        self._note(op, kind, Done(kind, life, op.flags if op.size else 0, op.ret))

    def _delete(self, op: RecordedOp, space: _Space) -> None:
        life = space.by_id.get(op.slot)
        if life is None:
            life = self._number(op, space) or self._found(op, space, op.gone or None, 0)
        elif life.gpa != op.gpa:
            self.remarks.add("a slot is deleted elsewhere than it is: lines are missing", op.where)
        if life is None:
            self.remarks.add("a slot is deleted that cannot be there: left out", op.where)
            return
        if life.hva is None and life.gpa == op.gpa:
            life.hva = op.hva
        self._end(life, space)
        self._note(op, OpKind.DELETE, Done(OpKind.DELETE, life))

    def _set(self, op: RecordedOp, space: _Space) -> None:
        life = space.by_id.get(op.slot) or self._relogged(op, space)
        if life is None or not _same(life, op) or (life.flags ^ op.flags) & ~_CHANGEABLE:
            self._add(op, space)
            return
        if life.hva is None:
            life.hva = op.hva
        if (life.flags ^ op.flags) & READONLY:
            self._end(life, space)
            new = self._begin(op, space)
            both = (Done(OpKind.DELETE, life), Done(OpKind.ADD, new, op.flags))
            self._note(op, OpKind.FLAGS, *both)
            return
        life.flags = op.flags
        self._note(op, OpKind.FLAGS, Done(OpKind.FLAGS, life, op.flags))

    def _add(self, op: RecordedOp, space: _Space) -> None:
        doomed = space.live_in(op.gpa, op.gpa + op.size)
        holder = space.by_id.get(op.slot)
        if holder is not None and holder not in doomed:
            doomed.append(holder)
        for life in doomed:
            self.remarks.add("the deletion of a slot is missing and was put in", op.where)
            self._end(life, space)
            self._note(op, OpKind.DELETE, Done(OpKind.DELETE, life, missing=True))
        if not self._from_start:
            ids = range(space.top, op.slot)
            space.taken.update(i for i in ids if i not in space.used)
        space.top = max(space.top, op.slot + 1)
        self._note(op, OpKind.ADD, Done(OpKind.ADD, self._begin(op, space), op.flags))

    def _begin(self, op: RecordedOp, space: _Space) -> Life:
        life = Life(op.as_id, op.slot, op.gpa, op.size, op.flags, op.hva, op.shown)
        life.since = self._now
        self.lives.append(life)
        space.put(life)
        return life

    def _end(self, life: Life, space: _Space) -> None:
        space.take(life)
        life.until = self._now

    # -- slots that were there before the file began -------------------------------------------

    def _number(self, op: RecordedOp, space: _Space) -> Life | None:
        """The slot of the first map that has turned out to have the operation's id."""
        life = space.unnumbered.get(op.gpa)
        if life is None or op.slot in space.used or (op.size and not _same(life, op)):
            return None
        del space.unnumbered[op.gpa]
        life.slot = op.slot
        space.by_id[op.slot] = life
        return life

    def _relogged(self, op: RecordedOp, space: _Space) -> Life | None:
        """The slot from before whose logging the operation switches, when it is no add.

        QEMU makes no call when the flags stay, so they were others before.
        """
        if op.told is OpKind.ADD:
            return None
        life = self._number(op, space)
        if life is not None:
            life.flags = life.first_flags = op.flags ^ LOG_DIRTY_PAGES
            return life
        if op.told is OpKind.FLAGS or op.where in self._switches or op.slot in space.taken:
            life = self._found(op, space, op.size, op.flags ^ LOG_DIRTY_PAGES)
        return life

    def _found(self, op: RecordedOp, space: _Space, size: int | None, flags: int) -> Life | None:
        """A slot from before the file, if there can have been one."""
        if op.slot in space.used or op.gpa & (PAGE - 1) or (size or 0) & (PAGE - 1):
            return None
        if space.has_been(op.gpa, op.gpa + (op.size or PAGE)):
            return None
        bound = space.next_above(op.gpa)
        life = Life(op.as_id, op.slot, op.gpa, size, flags, op.hva, op.shown, True, bound=bound)
        if size is not None:
            life.size = min(size, bound - op.gpa)
        self.lives.append(life)
        space.put(life)
        return life

    # -- commits ---------------------------------------------------------------------------------

    def _note(self, op: RecordedOp, kind: OpKind, *done: Done) -> None:
        """Put what an operation did into its commit: the last one, or a new one behind it."""
        last = self.commits[-1] if self.commits else None
        place = self._place_in_commit(kind, done[0].life)
        if last is None or last.mark != op.mark or last.seq != op.seq:
            last = None
        elif op.seq is None and (place <= self._place or done[0].life in self._flagged):
            after_flags = last.done[-1].kind is OpKind.FLAGS and kind is not OpKind.FLAGS
            self.looks_queued |= self._marked and after_flags
            last = None
        if last is None:
            last = Commit(op.mark, op.seq)
            self.commits.append(last)
            self._flagged.clear()
        last.done.extend(done)
        self._place = place
        if kind is OpKind.FLAGS:
            self._flagged.add(done[-1].life)

    def _place_in_commit(self, kind: OpKind, life: Life) -> tuple[int, ...]:
        """Grows from operation to operation of one commit.

        Up to 7.2 one address space after the other: deletes, then adds and changes of flags as
        their ranges come.  From 8.0 (commit f39b7d2b96) changes of flags go out first, of all
        address spaces, then each one's deletes and adds (`address_space_update_topology_pass`,
        system/memory.c; `kvm_region_commit`, accel/kvm/kvm-all.c).
        """
        if self.order is Order.V7_2:
            return (life.as_id, kind is not OpKind.DELETE, life.gpa)
        return (kind is not OpKind.FLAGS, life.as_id, kind is OpKind.ADD, life.gpa)


def _same(life: Life, op: RecordedOp) -> bool:
    """The operation is about the slot as it is, flags apart."""
    if (life.gpa, life.size) != (op.gpa, op.size):
        return False
    return life.hva is None or op.hva is None or life.hva == op.hva


def _gpa(life: Life) -> int:
    return life.gpa


def _first(r: Range) -> int:
    return r[0]
