"""Which host memory is behind each slot: RAM blocks by name, or runs of host addresses.

A recording's map names the block of a range, an operation its host address; an operation on
a range that the map shows tells both, and so where in QEMU the block lies.  What has an address
alone belongs to the named block that lies there then, else to the run of addresses it is part of:
memory that is freed leaves its address to other memory.  A log has nothing but addresses.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..memslots.intervals import join
from .recorded_ops import Backing
from .replay_history import Life

__all__ = ["HostBlock", "back"]

_WIDEST_GAP = 4 << 30
"""Two runs with the same distance of host address and gpa are one block if they lie no further
apart: what firmware and chipset cover is below 4 GiB, and a lone coincidence is far away."""


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
    lives: list[tuple[Life, int]] = field(default_factory=list)

    def take(self, life: Life, offset: int) -> None:
        self.lives.append((life, offset))
        self.size = max(self.size, offset + life.end - life.gpa)


def back(
    lives: Sequence[Life], spans: Mapping[tuple[str, str | None], int]
) -> tuple[tuple[HostBlock, ...], dict[Life, Backing]]:
    """The blocks, in the order in which slots show them, and what is behind each slot.

    `spans` says how large named blocks are, as far as the map shows them.  A slot that KVM refused
    has something behind it only where others show all of it.  O(n log n).
    """
    there = [life for life in lives if not life.refused]
    named = _named(there)
    known = [b for blocks in named.values() for b in blocks if b.base is not None]
    places = _Places(known, spans)
    loose: list[Life] = []
    nowhere: dict[int, _Block] = {}
    for life in there:
        if life.shown is not None:
            continue
        if life.hva is None:  # predicted, in an address space of which there is no map
            name = f"address space {life.as_id}"
            block = nowhere.setdefault(life.as_id, _Block(name, None, None))
            block.take(life, life.gpa)
            continue
        found = places.of(life)
        if found is None:
            loose.append(life)
        else:
            found.take(life, life.hva - _base(found))
    blocks = [b for same in named.values() for b in same]
    blocks += [*nowhere.values(), *_runs(loose, places)]
    finished, behind = _finish(there, blocks)
    final = _Places([b for b in blocks if b.base is not None], {})
    for life in lives:
        shown = final.around(life) if life.refused else None
        if shown is not None and life.hva is not None:
            name, owner, _ = behind[shown.lives[0][0]]
            behind[life] = (name, owner, life.hva - _base(shown))
    return finished, behind


def _named(lives: Iterable[Life]) -> dict[tuple[str, str | None], list[_Block]]:
    """Blocks by name; one that was freed and made again has another address each time."""
    named: dict[tuple[str, str | None], dict[int | None, _Block]] = {}
    untold: list[tuple[Life, Backing]] = []
    for life in lives:
        if life.shown is None:
            continue
        if life.hva is None:
            untold.append((life, life.shown))
            continue
        name, owner, offset = life.shown
        base = life.hva - offset
        blocks = named.setdefault((name, owner), {})
        blocks.setdefault(base, _Block(name, owner, base)).take(life, offset)
    for life, (name, owner, offset) in untold:
        blocks = named.setdefault((name, owner), {})
        # of several the oldest: what is not told its address was mostly there from the beginning
        block = next(iter(blocks.values()), None) or _Block(name, owner, None)
        blocks.setdefault(block.base, block).take(life, offset)
    return {key: [*blocks.values()] for key, blocks in named.items()}


class _Places:
    """Where named blocks lie among QEMU's host addresses."""

    def __init__(
        self, blocks: Iterable[_Block], spans: Mapping[tuple[str, str | None], int]
    ) -> None:
        self._blocks: list[_Block] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        for block in sorted(blocks, key=_base):
            span = spans.get((block.name or "", block.owner), 0)
            self._blocks.append(block)
            self._starts.append(_base(block))
            self._ends.append(_base(block) + max(block.size, span))
        self._times = {b: _Times(life for life, _ in b.lives) for b in self._blocks}

    def around(self, life: Life) -> _Block | None:
        """The block that has all that the slot shows; of several, the one that begins last."""
        if life.hva is None:
            return None
        i = bisect_right(self._starts, life.hva) - 1
        fits = i >= 0 and life.hva + life.end - life.gpa <= self._ends[i]
        return self._blocks[i] if fits else None

    def of(self, life: Life) -> _Block | None:
        """The same, if others show the block at that time, or the very same part of it ever."""
        block = self.around(life)
        return block if block is not None and self._times[block].fit(life) else None

    def between(self, start: int, end: int) -> bool:
        """A block begins in `(start, end]`."""
        return bisect_right(self._starts, start) != bisect_right(self._starts, end)


class _Times:
    """When slots show a block, and which parts of it."""

    def __init__(self, lives: Iterable[Life]) -> None:
        known = sorted(lives, key=lambda life: life.since)
        self._parts = {(life.hva, life.size) for life in known}
        self._spans = join((life.since, life.until) for life in known)

    def fit(self, life: Life) -> bool:
        if (life.hva, life.size) in self._parts:
            return True
        i = bisect_right(self._spans, (life.until, 0)) - 1
        return i >= 0 and self._spans[i][1] >= life.since


def _runs(lives: Iterable[Life], places: _Places) -> list[_Block]:
    """Blocks out of addresses that touch, or that stand at the same distance from their gpas."""
    runs: list[_Block] = []
    apart: set[int] = set()  # distances of host address and gpa in the last run
    end = 0
    for hva, life in sorted(
        ((life.hva, life) for life in lives if life.hva is not None), key=lambda pair: pair[0]
    ):
        near = runs and (
            hva <= end
            or (
                hva - life.gpa in apart
                and hva - end <= _WIDEST_GAP
                and not places.between(end, hva)
            )
        )
        if not near:
            runs.append(_Block(None, None, hva))
            apart = set()
        runs[-1].take(life, hva - _base(runs[-1]))
        apart.add(hva - life.gpa)
        end = max(end if near else 0, hva + life.end - life.gpa)
    return runs


def _finish(
    lives: Sequence[Life], blocks: Iterable[_Block]
) -> tuple[tuple[HostBlock, ...], dict[Life, Backing]]:
    """Names for all, and the order of first use."""
    first = {life: i for i, life in enumerate(lives)}
    ordered = sorted(
        (b for b in blocks if b.lives), key=lambda b: min(first[life] for life, _ in b.lives)
    )
    names = _Names(b.name for b in ordered)
    out: list[HostBlock] = []
    behind: dict[Life, Backing] = {}
    for block in ordered:
        name = names.give(block.name)
        out.append(HostBlock(name, block.owner, block.size))
        for life, offset in block.lives:
            behind[life] = (name, block.owner, offset)
    return tuple(out), behind


class _Names:
    """Names that nothing else has."""

    def __init__(self, wanted: Iterable[str | None]) -> None:
        self._wanted = {name for name in wanted if name is not None}
        self._given: set[str] = set()
        self._runs = 0

    def give(self, name: str | None) -> str:
        if name is not None and name not in self._given:
            self._given.add(name)
            return name
        number = 2
        while True:
            other = f"ram{self._runs}" if name is None else f"{name}#{number}"
            self._runs += name is None
            number += 1
            if other not in self._wanted and other not in self._given:
                self._given.add(other)
                return other


def _base(block: _Block) -> int:
    assert block.base is not None
    return block.base
