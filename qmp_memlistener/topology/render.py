"""Renders a region tree into the FlatView that QEMU itself would build.

The rules are those of `render_memory_region` and `flatview_simplify` (system/memory.c; 7.2:
softmmu/memory.c): children before their parent, higher priority first, read-only and non-volatile
inherited through aliases, what was rendered first obscures what comes later, neighbours merge
when they continue each other.  Instead of inserting into a growing list, every visible piece gets
its rank in that order and one sweep over the addresses keeps the piece of lowest rank: O(n log n).

`info mtree` leaves three things out; the rules for them are in this module, each with its source:

- whether an i/o region answers by itself or only holds others (`containers`);
- which aliases are read-only (`_is_readonly_alias`);
- the order of siblings of equal priority that overlap at different addresses
  (`_render_order`).

Where what is visible hangs on a guess about the first or the third, `Rendering.ambiguous` says so.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from ..errors import MtreeError
from .containers import answers
from .model import ADDRESS_SPACE_SIZE, FlatRange, FlatView, Kind, Region, VirtioMemory

__all__ = ["NOTHING", "Extent", "Rendering", "render"]

NOTHING = "nothing"

HOST_PAGE = 4096
_MAX_DEPTH = 64  # nesting of real machines stays below 20
# Aliases of aliases may multiply: 32 root ports take a thousand visits, 100,000 regions that many.
_MAX_VISITS = 1_000_000
# Pairs of overlapping siblings, and steps in finding out what they hide: real machines have some
# ten.  What is beyond is named without a closer look.
_MAX_PAIRS = 256
_MAX_LOOKS = 200_000

DEVICE_MEMORY = "device-memory"  # machine_memory_devices_init, and boards before 8.2

# virtio-mem and hv-balloon slots must not merge (QEMU 8.2, commit 533f5d6679)
_UNMERGEABLE_ALIAS = re.compile(r"memslot-\d+")


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a backed region would be visible if nothing were in front of it."""

    start: int
    size: int
    name: str
    owner: str | None
    offset: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered view, the extents of its backed regions, and what the tree left open.

    `ambiguous` holds pairs of names: at some address both could be visible, the tree does not tell
    which is, and the first is taken for it.  They are overlapping siblings whose order QEMU does
    not print, or a region of which nobody knows whether it answers and what is behind it (NOTHING
    when there is nothing).  `unresolved` holds names of alias targets that the text does not
    describe (rendered as they are).
    """

    view: FlatView
    extents: tuple[Extent, ...]
    ambiguous: tuple[tuple[str, str], ...]
    unresolved: tuple[str, ...]


class _Inherited(NamedTuple):
    """What a region passes on to everything below it and, as an alias, behind it."""

    readonly: bool = False
    nonvolatile: bool = False
    unmergeable: bool = False
    device_memory: bool = False


@dataclass(slots=True)
class _Piece:
    """A region clipped to where it could be seen; its index is its rank."""

    start: int
    end: int
    region: Region
    offset: int
    flags: _Inherited


def render(
    root: Region | None,
    address_space: str = "memory",
    virtio_memory: VirtioMemory | None = None,
) -> Rendering:
    """Render the linked tree below `root` (None: an address space with nothing in it).

    Raises MtreeError when an alias contains itself or aliases multiply without an end.
    """
    collector = _Collector()
    root = _flatview_root(root)
    if root is not None:
        collector.visit(root, 0, 0, ADDRESS_SPACE_SIZE, _Inherited(), 0)
    visible = list(_sweep(collector.pieces))
    view = FlatView(list(_simplify(iter(visible))), address_space, virtio_memory)
    extents = tuple(
        Extent(p.start, p.end - p.start, p.region.name, p.region.owner, p.offset)
        for p in collector.pieces
        if p.region.kind.backed
    )
    return Rendering(
        view,
        extents,
        tuple(sorted(_Doubts(collector, visible).pairs())),
        tuple(sorted(collector.unresolved)),
    )


def _flatview_root(region: Region | None) -> Region | None:
    """The region that QEMU renders for an address space (`memory_region_get_flatview_root`).

    It skips whole aliases and containers with one child at 0, to share views between address
    spaces; the place of what it skips in *its* container is lost with it.
    """
    for _ in range(_MAX_DEPTH):
        if region is None or not region.enabled:
            return None
        if region.target is not None:
            target = region.resolved
            if target is None or region.offset or region.size < target.size:
                return region
            region = target
            continue
        answer = answers(region)
        if answer.yes:
            return region
        enabled = [c for c in region.children if c.enabled]
        if not enabled:
            return None if answer.certain else region
        only = enabled[0]
        if len(enabled) > 1 or only.addr or region.size < only.size:
            return region
        region = only
    return region


@dataclass(frozen=True, slots=True)
class _Overlap:
    """`[start, end)` is of two siblings; `front` and `behind` are the ranks of their pieces."""

    start: int
    end: int
    front: range
    behind: range
    names: tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Ghost:
    """A region that is taken for a container, where it would be visible if it answered.

    It would have a place among the pieces in front of `rank`.
    """

    start: int
    end: int
    rank: int
    name: str


class _Collector:
    """Walks the tree in QEMU's rendering order and notes every piece that could be visible."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.unresolved: set[str] = set()
        self.ambiguous: set[tuple[str, str]] = set()  # beyond all limits
        self.overlaps: list[_Overlap] = []
        self.ghosts: list[_Ghost] = []
        self.guessed: set[int] = set()  # ranks of regions that may be containers
        self._order: dict[int, tuple[list[Region], list[tuple[int, int]]]] = {}
        self._visits = 0

    def visit(
        self, region: Region, base: int, lo: int, hi: int, flags: _Inherited, depth: int
    ) -> None:
        """`base` is where the parent's offset 0 lies; `[lo, hi)` is what the parent shows."""
        if not region.enabled:
            return
        self._visits += 1
        if depth > _MAX_DEPTH:
            raise MtreeError(region.line_no, region.name, "nested too deep, or contains itself")
        if self._visits > _MAX_VISITS:
            raise MtreeError(region.line_no, region.name, "aliases of aliases without an end")
        base += region.addr
        lo = max(lo, base)
        hi = min(hi, base + region.size)
        if lo >= hi:
            return
        if region.nonvolatile and not flags.nonvolatile:
            flags = flags._replace(nonvolatile=True)
        if region.target is not None:
            if _is_readonly_alias(region):
                flags = flags._replace(readonly=True)
            if _UNMERGEABLE_ALIAS.fullmatch(region.name):
                flags = flags._replace(unmergeable=True)
            target = region.resolved
            if target is None:
                self.unresolved.add(region.target)
                target = Region(0, region.offset + region.size, 0, region.kind, region.target)
            self.visit(target, base - target.addr - region.offset, lo, hi, flags, depth + 1)
            return
        if region.children:
            if region.name == DEVICE_MEMORY and region.kind is Kind.IO:
                flags = flags._replace(device_memory=True)
            order = self._order.get(id(region))
            if order is None:
                order = self._order[id(region)] = self._render_order(region)
            children, pairs = order
            firsts = []
            for child in children:
                firsts.append(len(self.pieces))
                self.visit(child, base, lo, hi, flags, depth + 1)
            if pairs:
                self._note(children, pairs, [*firsts, len(self.pieces)], base, lo, hi)
        answer = answers(region)
        if answer.yes:
            if not answer.certain:
                self.guessed.add(len(self.pieces))
            self.pieces.append(_Piece(lo, hi, region, lo - base, flags))
        elif not answer.certain:
            self.ghosts.append(_Ghost(lo, hi, len(self.pieces), region.name))

    def _note(
        self,
        children: list[Region],
        pairs: list[tuple[int, int]],
        firsts: list[int],
        base: int,
        lo: int,
        hi: int,
    ) -> None:
        """Note where children overlap; the pieces of the i-th begin at rank `firsts[i]`."""
        for i, j in pairs:
            a, b = children[i], children[j]
            start = max(lo, base + max(a.addr, b.addr))
            end = min(hi, base + min(a.addr + a.size, b.addr + b.size))
            front, behind = (range(firsts[n], firsts[n + 1]) for n in (i, j))
            if start < end and front and behind:
                self.overlaps.append(_Overlap(start, end, front, behind, (a.name, b.name)))

    def _render_order(self, region: Region) -> tuple[list[Region], list[tuple[int, int]]]:
        """Enabled children as `memory_region_update_container_subregions` ordered them.

        Higher priority first; among equals the one added last, which QEMU does not print.  At one
        address `info mtree` keeps that order.  Where equals overlap at different addresses, devices
        are taken to be added after RAM (MMCONFIG over RAM, hw/pci/pcie_host.c), and the smaller
        region after the larger (see `_in_front`); pairs of them come as places in the order.
        """
        groups: dict[int, list[Region]] = {}
        for child in region.children:
            if child.enabled:
                groups.setdefault(child.priority, []).append(child)
        out: list[Region] = []
        pairs: list[tuple[int, int]] = []
        for priority in sorted(groups, reverse=True):
            self._order_equals(groups[priority], out, pairs)
        return out, pairs

    def _order_equals(
        self, siblings: list[Region], out: list[Region], pairs: list[tuple[int, int]]
    ) -> None:
        siblings = sorted(siblings, key=attrgetter("addr"))  # stable: keeps QEMU's order
        cluster: list[Region] = []
        end = 0
        for sibling in siblings:
            if cluster and sibling.addr >= end:
                self._order_cluster(cluster, out, pairs)
                cluster, end = [], 0
            cluster.append(sibling)
            end = max(end, sibling.addr + sibling.size)
        self._order_cluster(cluster, out, pairs)

    def _order_cluster(
        self, cluster: list[Region], out: list[Region], pairs: list[tuple[int, int]]
    ) -> None:
        if len(cluster) < 2:
            out.extend(cluster)
            return
        by_addr: dict[int, list[Region]] = {}
        for sibling in cluster:
            by_addr.setdefault(sibling.addr, []).append(sibling)
        if len(by_addr) == 1:
            out.extend(cluster)
            return
        # take the best of the heads each time, so that QEMU's order at one address is kept
        heads = [(_in_front(stack[0]), n, 0, stack) for n, stack in enumerate(by_addr.values())]
        heapify(heads)
        first = len(out)
        while heads:
            _, n, i, stack = heappop(heads)
            out.append(stack[i])
            if i + 1 < len(stack):
                heappush(heads, (_in_front(stack[i + 1]), n, i + 1, stack))
        self._note_overlaps(out, first, pairs)

    def _note_overlaps(self, order: list[Region], first: int, pairs: list[tuple[int, int]]) -> None:
        """Pairs at different addresses that overlap, of the siblings from `first` on."""
        active: list[int] = []
        for i in sorted(range(first, len(order)), key=lambda i: order[i].addr):
            here = order[i].addr
            active = [j for j in active if order[j].addr + order[j].size > here]
            for j in active:
                if order[j].addr == here:
                    continue
                front, behind = min(i, j), max(i, j)
                if len(pairs) < _MAX_PAIRS:
                    pairs.append((front, behind))
                else:
                    self.ambiguous.add((order[front].name, order[behind].name))
                    break
            active.append(i)


def _in_front(region: Region) -> tuple[int, bool, int]:
    """Sorts siblings whose order is not printed: the least comes in front.

    The smaller one: a larger one in front would hide it for ever, be it RAM (m68k next-cube has
    some inside i/o).  Of equally large ones i/o, then that at the higher address: boards add
    devices in address order.
    """
    return (region.size, region.kind.backed, -region.addr)


class _Doubts:
    """Which guesses the visible pieces hang on."""

    def __init__(
        self, collector: _Collector, visible: Sequence[tuple[int, int, int, _Piece]]
    ) -> None:
        self._collector = collector
        self._visible = visible
        self._starts = [v[0] for v in visible]
        self._looks = 0

    def pairs(self) -> set[tuple[str, str]]:
        out = set(self._collector.ambiguous)
        out |= {o.names for o in self._collector.overlaps if self._matters(o)}
        for ghost in self._collector.ghosts:
            shown = self._behind(ghost)
            if shown is not None:
                out.add((shown, ghost.name))
        if self._collector.guessed:
            out |= self._guessed()
        return out

    def _between(self, start: int, end: int) -> Iterator[tuple[int, int, int, _Piece]]:
        """What is visible there, clipped; it ends early when too much was looked at."""
        i = max(bisect_right(self._starts, start) - 1, 0)
        for lo, hi, rank, piece in islice(self._visible, i, None):
            self._looks += 1
            if lo >= end or self._looks > _MAX_LOOKS:
                return
            if hi > start:
                yield max(lo, start), min(hi, end), rank, piece

    def _matters(self, overlap: _Overlap) -> bool:
        """The one in front hides something of the one behind."""
        pieces = self._collector.pieces
        for lo, hi, rank, _ in self._between(overlap.start, overlap.end):
            if rank in overlap.front:
                self._looks += len(overlap.behind)
                for behind in overlap.behind:
                    if pieces[behind].start < hi and pieces[behind].end > lo:
                        return True
        return self._looks > _MAX_LOOKS

    def _behind(self, ghost: _Ghost) -> str | None:
        """What is visible where the region would be; None when it would be hidden everywhere."""
        at = ghost.start
        for lo, hi, rank, piece in self._between(ghost.start, ghost.end):
            if lo > at:
                return NOTHING
            if rank >= ghost.rank:
                return piece.region.name
            at = hi
        return NOTHING if at < ghost.end else None

    def _guessed(self) -> set[tuple[str, str]]:
        """Regions that may be containers and are visible."""
        found = {rank for _, _, rank, _ in self._visible} & self._collector.guessed
        return {(self._collector.pieces[rank].region.name, NOTHING) for rank in found}


def _is_readonly_alias(alias: Region) -> bool:
    """Whether QEMU made the alias read-only though its target may be written.

    `pam-rom` is, whatever the RAM behind it is made of (hw/pci-host/pam.c, `init_pam`); `isa-bios`
    of flash since 9.1 (hw/i386/x86-common.c, `x86_isa_bios_init`), of ROM it makes no difference,
    and RAM behind it is isapc's writable firmware.
    """
    return alias.name == "pam-rom" or (alias.name == "isa-bios" and alias.kind is Kind.ROMD)


def _sweep(pieces: list[_Piece]) -> Iterator[tuple[int, int, int, _Piece]]:
    """(start, end, rank, piece) of what is visible, in address order."""
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].start)
    active: list[tuple[int, int]] = []  # (rank, end), a heap
    pos = 0
    i = 0
    n = len(order)
    while i < n or active:
        if not active:
            pos = pieces[order[i]].start
        while i < n and pieces[order[i]].start <= pos:
            rank = order[i]
            heappush(active, (rank, pieces[rank].end))
            i += 1
        while active and active[0][1] <= pos:
            heappop(active)
        if not active:
            continue
        rank, end = active[0]
        # visible until it ends or something of lower rank begins
        while i < n and pieces[order[i]].start < end:
            nxt = order[i]
            if nxt < rank:
                end = pieces[nxt].start
                break
            heappush(active, (nxt, pieces[nxt].end))
            i += 1
        yield pos, end, rank, pieces[rank]
        pos = end


def _simplify(visible: Iterator[tuple[int, int, int, _Piece]]) -> Iterator[FlatRange]:
    """Merge neighbours that continue each other (`flatview_simplify`, `can_merge`)."""
    last: FlatRange | None = None
    for start, end, _rank, p in visible:
        offset = p.offset + (start - p.start)
        region = p.region
        kind = Kind.ROM if p.flags.readonly else region.kind
        if (
            last is not None
            and last.end == start
            and last.name == region.name
            and last.owner == region.owner
            and last.offset + last.size == offset
            and last.kind is kind
            and last.nonvolatile == p.flags.nonvolatile
            and not last.unmergeable
            and not p.flags.unmergeable
        ):
            start, offset = last.start, last.offset
        elif last is not None:
            yield last
        size = end - start
        last = FlatRange(
            start=start,
            size=size,
            kind=kind,
            name=region.name,
            offset=offset,
            owner=region.owner,
            region_kind=region.kind,
            nonvolatile=p.flags.nonvolatile,
            unmergeable=p.flags.unmergeable,
            memslot=kind is not Kind.IO and start % HOST_PAGE == 0 and size % HOST_PAGE == 0,
            device_memory=p.flags.device_memory,
        )
    if last is not None:
        yield last
