"""Renders a region tree into the FlatView that QEMU itself would build.

The rules are those of `render_memory_region` and `flatview_simplify` (system/memory.c; 7.2:
softmmu/memory.c): children before their parent, higher priority first, read-only and non-volatile
inherited through aliases, what was rendered first obscures what comes later, neighbours merge
when they continue each other.  Instead of inserting into a growing list, every visible piece gets
its rank in that order and one sweep over the addresses keeps the piece of lowest rank: O(n log n).

`info mtree` leaves three things out; the rules for them are in this module, each with its source:

- whether an i/o region answers by itself or only holds others (`doubts.answers`);
- which aliases are read-only (`_is_readonly_alias`);
- the order of siblings of equal priority that overlap at different addresses
  (`_render_order`).

Where what is visible hangs on a guess about the first or the third, `Rendering.ambiguous` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import groupby
from operator import attrgetter

from ..errors import MtreeError
from .doubts import NOTHING, Clipped, Doubts, Inherited, Overlap, Visible, answers
from .model import ADDRESS_SPACE_SIZE, FlatRange, FlatView, Kind, Region, VirtioMemory

__all__ = ["NOTHING", "Extent", "Rendering", "render"]

HOST_PAGE = 4096
_MAX_DEPTH = 64  # nesting of real machines stays below 20
# Aliases of aliases may multiply: 32 root ports take a thousand visits, 100,000 regions that many.
_MAX_VISITS = 1_000_000
# Pairs of overlapping siblings: real machines have some ten.  What is beyond is named without a
# closer look.
_MAX_PAIRS = 256

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

    `ambiguous` holds pairs of names: at some address both could be visible, the tree does not show
    which is, and the first is taken for it.  They are overlapping siblings whose order QEMU does
    not print, or a region of which it is unknown whether it answers and what is behind it (NOTHING
    when there is nothing).  `unresolved` holds names of alias targets that the text does not
    describe (rendered as they are).
    """

    view: FlatView
    extents: tuple[Extent, ...]
    ambiguous: tuple[tuple[str, str], ...]
    unresolved: tuple[str, ...]


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
        collector.visit(root, 0, 0, ADDRESS_SPACE_SIZE, Inherited(), 0)
    visible = list(_sweep(collector.pieces))
    view = FlatView(list(_simplify(visible)), address_space, virtio_memory)
    extents = tuple(
        Extent(p.start, p.end - p.start, p.region.name, p.region.owner, p.offset)
        for p in collector.pieces
        if p.region.kind.backed
    )
    return Rendering(
        view,
        extents,
        tuple(sorted(collector.doubts.pairs(visible))),
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


class _Collector:
    """Walks the tree in QEMU's rendering order and notes every piece that could be visible.

    Each guess is noted in `doubts`.
    """

    def __init__(self) -> None:
        self.pieces: list[Clipped] = []
        self.unresolved: set[str] = set()
        self.doubts = Doubts(self.pieces)
        self._order: dict[int, tuple[list[Region], list[tuple[int, int]]]] = {}
        self._visits = 0

    def visit(
        self, region: Region, base: int, lo: int, hi: int, flags: Inherited, depth: int
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
            self._visit_children(region, base, lo, hi, flags, depth)
        yes, certain = answers(region)
        piece = Clipped(lo, hi, region, lo - base, flags)
        if not certain:
            self.doubts.note_guess(piece, taken=yes)
        if yes:
            self.pieces.append(piece)

    def _visit_children(
        self, region: Region, base: int, lo: int, hi: int, flags: Inherited, depth: int
    ) -> None:
        order = self._order.get(id(region))
        if order is None:
            order = self._order[id(region)] = self._render_order(region)
        children, pairs = order
        firsts = []  # the pieces of the i-th child begin at this rank
        for child in children:
            firsts.append(len(self.pieces))
            self.visit(child, base, lo, hi, flags, depth + 1)
        firsts.append(len(self.pieces))
        for i, j in pairs:
            a, b = children[i], children[j]
            start = max(lo, base + max(a.addr, b.addr))
            end = min(hi, base + min(a.addr + a.size, b.addr + b.size))
            front, behind = (range(firsts[n], firsts[n + 1]) for n in (i, j))
            if start < end and front and behind:
                names = (a.name, b.name)
                self.doubts.overlaps.append(Overlap(start, end, front, behind, names))

    def _render_order(self, region: Region) -> tuple[list[Region], list[tuple[int, int]]]:
        """Enabled children as `memory_region_update_container_subregions` ordered them.

        Higher priority first; among equals the one added last, which QEMU does not print.  At one
        address `info mtree` keeps that order.  Where equals overlap at different addresses, devices
        are taken to be added after RAM (MMCONFIG over RAM, hw/pci/pcie_host.c), and the smaller
        region after the larger (see `_in_front`); pairs of them come as places in the order.
        """
        out: list[Region] = []
        pairs: list[tuple[int, int]] = []
        for cluster in _clusters(region.children):
            if len(cluster) == 1:
                out += cluster
                continue
            first = len(out)
            out += _ordered(cluster)
            self._note_overlaps(out, first, pairs)
        return out, pairs

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
                    self.doubts.unseen.add((order[front].name, order[behind].name))
                    break
            active.append(i)


def _clusters(children: Sequence[Region]) -> Iterator[list[Region]]:
    """Enabled siblings of one priority that overlap, directly or by others, in address order."""
    cluster: list[Region] = []
    end = priority = 0
    # stable: keeps QEMU's order at one address
    for sibling in sorted(filter(attrgetter("enabled"), children), key=_by_priority):
        if cluster and (sibling.addr >= end or sibling.priority != priority):
            yield cluster
            cluster, end = [], 0
        cluster.append(sibling)
        priority = sibling.priority
        end = max(end, sibling.addr + sibling.size)
    if cluster:
        yield cluster


def _by_priority(region: Region) -> tuple[int, int]:
    return -region.priority, region.addr


def _ordered(cluster: list[Region]) -> list[Region]:
    """The best of the first ones at each address, again and again: QEMU's order there is kept."""
    stacks = [list(stack) for _, stack in groupby(cluster, key=attrgetter("addr"))]
    if len(stacks) == 1:
        return cluster
    heads = [(_in_front(stack[0]), n, 0) for n, stack in enumerate(stacks)]
    heapify(heads)
    out = []
    while heads:
        _, n, i = heappop(heads)
        out.append(stacks[n][i])
        if i + 1 < len(stacks[n]):
            heappush(heads, (_in_front(stacks[n][i + 1]), n, i + 1))
    return out


def _in_front(region: Region) -> tuple[int, bool, int]:
    """Sorts siblings whose order is not printed: the least comes in front.

    The smaller one: a larger one in front would hide it for ever, be it RAM (m68k next-cube has
    some inside i/o).  Of equally large ones i/o, then that at the higher address: boards add
    devices in address order.
    """
    return (region.size, region.kind.backed, -region.addr)


def _is_readonly_alias(alias: Region) -> bool:
    """Whether QEMU made the alias read-only though its target may be written.

    `pam-rom` is, whatever the RAM behind it is made of (hw/pci-host/pam.c, `init_pam`); `isa-bios`
    of flash since 9.1 (hw/i386/x86-common.c, `x86_isa_bios_init`), of ROM it makes no difference,
    and RAM behind it is isapc's writable firmware.
    """
    return alias.name == "pam-rom" or (alias.name == "isa-bios" and alias.kind is Kind.ROMD)


def _sweep(pieces: list[Clipped]) -> Iterator[Visible]:
    """What is visible, in address order."""
    starts = [piece.start for piece in pieces]
    order = sorted(range(len(pieces)), key=starts.__getitem__)
    active: list[tuple[int, int]] = []  # (rank, end), a heap
    pos = 0
    i = 0
    n = len(order)
    while i < n or active:
        if not active:
            pos = starts[order[i]]
        while i < n and starts[order[i]] <= pos:
            rank = order[i]
            heappush(active, (rank, pieces[rank].end))
            i += 1
        while active and active[0][1] <= pos:
            heappop(active)
        if not active:
            continue
        rank, end = active[0]
        # visible until it ends or something of lower rank begins
        while i < n and starts[order[i]] < end:
            nxt = order[i]
            if nxt < rank:
                end = starts[nxt]
                break
            heappush(active, (nxt, pieces[nxt].end))
            i += 1
        yield pos, end, rank, pieces[rank]
        pos = end


def _simplify(visible: Iterable[Visible]) -> Iterator[FlatRange]:
    """Merge neighbours that continue each other (`flatview_simplify`, `can_merge`)."""
    start = offset = until = 0
    last: Clipped | None = None
    for lo, hi, _rank, piece in visible:
        at = piece.offset + (lo - piece.start)
        if last is not None:
            if until == lo and offset + (lo - start) == at and _can_merge(last, piece):
                until = hi
                continue
            yield _flat_range(start, until, offset, last)
        start, until, offset, last = lo, hi, at, piece
    if last is not None:
        yield _flat_range(start, until, offset, last)


def _can_merge(one: Clipped, other: Clipped) -> bool:
    a, b = one.region, other.region
    return (
        (a is b or (a.name, a.owner) == (b.name, b.owner))
        and _kind(one) is _kind(other)
        and one.flags.nonvolatile == other.flags.nonvolatile
        and not one.flags.unmergeable
        and not other.flags.unmergeable
    )


def _kind(piece: Clipped) -> Kind:
    return Kind.ROM if piece.flags.readonly else piece.region.kind


def _flat_range(start: int, end: int, offset: int, piece: Clipped) -> FlatRange:
    region, flags = piece.region, piece.flags
    kind = _kind(piece)
    size = end - start
    return FlatRange(
        start=start,
        size=size,
        kind=kind,
        name=region.name,
        offset=offset,
        owner=region.owner,
        region_kind=region.kind,
        nonvolatile=flags.nonvolatile,
        unmergeable=flags.unmergeable,
        memslot=kind is not Kind.IO and start % HOST_PAGE == 0 and size % HOST_PAGE == 0,
        device_memory=flags.device_memory,
    )
