"""PURE: what a replay is made of: operations as KVM took them, transitions, all of a file.

`read` makes these values.  `back` finds the host memory behind each slot: RAM blocks by name, or
runs of host addresses.  A recording's map names the block of a range, an operation its host
address; an operation on a range that the map shows has both, and so where in QEMU the block lies.
What has an address alone belongs to the named block that is shown there then, else to the run of
addresses it is part of: memory that is freed leaves its address to other memory.  A log has nothing
but addresses.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...memslots import ADDRESS_SPACES, READONLY, LogChange, Op, OpKind, Rules, Slot, SlotTable
from ...memslots.slots import Backing
from ...topology import FlatRange, FlatView, Kind
from ...tracking.live_slots import LiveSlot
from ...tracking.replaying import BackedOp, FileKind

__all__ = ["AppliedOp", "HostBlock", "ReplayInput", "ReplayTransition", "back"]


_WIDEST_GAP = 4 << 30
"""Two runs with the same distance of host address and gpa are one block if they lie no further
apart: what firmware and chipset cover is below 4 GiB, and a lone coincidence is far away."""

_Key = tuple[str | None, str | None]


@dataclass(frozen=True, slots=True)
class HostBlock:
    """Host memory behind slots, `size` bytes: a RAM block, or a run of QEMU's host addresses.

    `name` is the RAM block's where it is known, with `#2` and so on behind it when several have
    that name, else `ram0`, `ram1`, …; no two blocks have the same.  Offsets of slots lie in
    `[0, size)`.
    """

    name: str
    owner: str | None
    size: int


@dataclass(slots=True, eq=False)
class _Block:
    """A block in the making.  `base` is QEMU's address of offset 0, None when not known."""

    name: str | None
    owner: str | None
    base: int | None
    size: int = 0
    parts: set[tuple[int | None, int]] = field(default_factory=set)

    def take(self, shown: _Shown, offset: int) -> None:
        shown.block, shown.offset = self, offset
        self.size = max(self.size, offset + shown.size)
        self.parts.add((shown.hva, shown.size))


@dataclass(slots=True, eq=False)
class _Shown:
    """What a slot shows; `slot` is its address space and id."""

    slot: tuple[int, int]
    gpa: int
    size: int
    hva: int | None
    named: Backing | None
    refused: bool = False
    block: _Block | None = None
    offset: int = 0


def back(
    slots: Sequence[LiveSlot],
    commits: Iterable[Iterable[BackedOp]],
    spans: Mapping[tuple[str, str | None], int],
) -> tuple[tuple[HostBlock, ...], list[Backing | None]]:
    """The blocks in the order in which slots show them; what is behind each of `slots`, then behind
    each operation of `commits`.

    `spans` says how large named blocks are, as far as the map shows them.  A delete has nothing
    behind it, what KVM refused only where others show all of it.  O(n log n).
    """
    everything = [_Shown((s.as_id, s.slot or 0), s.gpa, s.size, s.hva, _named(s)) for s in slots]
    for commit in commits:
        for op, named in commit:
            key = (op.as_id, op.slot)
            deletes = op.op == "delete"
            size = 0 if deletes and op.ret == 0 else op.size
            everything.append(_Shown(key, op.gpa, size, op.hva, named, op.ret != 0))
    there = [shown for shown in everything if shown.size and not shown.refused]
    _by_name(there)
    blocks = {shown.block: None for shown in there if shown.block is not None}
    places = _Places([b for b in blocks if b.base is not None], spans)
    _runs(_by_address(everything, places), places)
    final = _Places({s.block for s in there if s.block and s.block.base is not None}, {})
    for shown in everything:
        if shown.refused and (block := final.around(shown)) is not None:
            shown.block, shown.offset = block, (shown.hva or 0) - (block.base or 0)
    return _finish(everything)


def _named(s: LiveSlot) -> Backing | None:
    return Backing(s.block, s.owner, s.offset) if s.block is not None else None


def _by_name(there: Iterable[_Shown]) -> None:
    """Blocks that the map names; one that was freed and made again has another address then."""
    found: dict[_Key, dict[int | None, _Block]] = {}
    untold: list[tuple[_Shown, Backing]] = []
    for shown in there:
        if shown.named is None:
            continue
        if shown.hva is None:
            untold.append((shown, shown.named))
            continue
        name, owner, offset = shown.named
        base = shown.hva - offset
        blocks = found.setdefault((name, owner), {})
        blocks.setdefault(base, _Block(name, owner, base)).take(shown, offset)
    for shown, (name, owner, offset) in untold:
        blocks = found.setdefault((name, owner), {})
        # of several the oldest: what has no address was mostly there from the beginning
        block = next(iter(blocks.values()), None) or _Block(name, owner, None)
        blocks.setdefault(block.base, block).take(shown, offset)


class _Places:
    """Where blocks lie among QEMU's host addresses."""

    def __init__(
        self, blocks: Iterable[_Block], spans: Mapping[tuple[str, str | None], int]
    ) -> None:
        self._blocks = sorted(blocks, key=lambda b: b.base or 0)
        self._starts = [b.base or 0 for b in self._blocks]
        self._ends = [
            (b.base or 0) + max(b.size, spans.get((b.name or "", b.owner), 0)) for b in self._blocks
        ]

    def around(self, shown: _Shown) -> _Block | None:
        """The block that has all that is shown; of several, the one that begins last."""
        if shown.hva is None:
            return None
        i = bisect_right(self._starts, shown.hva) - 1
        return self._blocks[i] if i >= 0 and shown.hva + shown.size <= self._ends[i] else None

    def between(self, start: int, end: int) -> bool:
        """A block begins in `(start, end]`."""
        return bisect_right(self._starts, start) != bisect_right(self._starts, end)


def _by_address(everything: Iterable[_Shown], places: _Places) -> list[_Shown]:
    """Give named blocks those that show part of one while others do, or that very part ever.

    Returns what is left.
    """
    left: list[_Shown] = []
    nowhere: dict[int, _Block] = {}
    live: dict[tuple[int, int], _Block] = {}
    users: Counter[_Block] = Counter()
    for shown in everything:
        if shown.refused:
            continue
        old = live.pop(shown.slot, None)
        if old is not None:
            users[old] -= 1
        if not shown.size:
            continue
        if shown.block is None and shown.hva is None:
            # predicted, in an address space of which there is no map
            as_id = shown.slot[0]
            block = nowhere.setdefault(as_id, _Block(f"address space {as_id}", None, None))
            block.take(shown, shown.gpa)
        elif shown.block is None:
            found = places.around(shown)
            if found is None or not (users[found] or (shown.hva, shown.size) in found.parts):
                left.append(shown)
                continue
            found.take(shown, (shown.hva or 0) - (found.base or 0))
        if shown.block is not None:
            live[shown.slot] = shown.block
            users[shown.block] += 1
    return left


def _runs(left: Iterable[_Shown], places: _Places) -> None:
    """Blocks out of addresses that touch, or that are at the same distance from their gpas."""
    run: _Block | None = None
    apart: set[int] = set()  # distances of host address and gpa in the run
    end = 0
    for hva, shown in sorted(
        ((shown.hva, shown) for shown in left if shown.hva is not None), key=lambda pair: pair[0]
    ):
        near = hva <= end or (
            hva - shown.gpa in apart and hva - end <= _WIDEST_GAP and not places.between(end, hva)
        )
        if run is None or not near:
            run, apart, end = _Block(None, None, hva), set(), 0
        run.take(shown, hva - (run.base or 0))
        apart.add(hva - shown.gpa)
        end = max(end, hva + shown.size)


def _finish(
    everything: Sequence[_Shown],
) -> tuple[tuple[HostBlock, ...], list[Backing | None]]:
    """Names for all that nothing else has, in the order of first use."""
    first = {s.block: None for s in everything if s.block is not None and not s.refused}
    wanted = {b.name for b in first}
    names: dict[_Block, str] = {}
    given: set[str] = set()
    runs = 0
    for block in first:
        name = block.name
        number = 2
        while name is None or name in given:
            name = f"ram{runs}" if block.name is None else f"{block.name}#{number}"
            runs += block.name is None
            number += 1
            if name in wanted:
                name = None
        names[block] = name
        given.add(name)
    blocks = tuple(HostBlock(names[b], b.owner, b.size) for b in first)
    behind = [
        Backing(names[s.block], s.block.owner, s.offset) if s.block else None for s in everything
    ]
    return blocks, behind


# -- transitions -------------------------------------------------------------------------------


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
