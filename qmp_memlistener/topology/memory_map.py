"""From text to map: one call that parses, links, renders and finds RAM blocks with their holes.

`link` finds the region behind each alias.  QEMU prints an alias with the *name* of its target only,
and names repeat (every PCI bridge has a `pci_bridge_pci`).  But it also prints each aliased region
once, in the order in which the aliases were met (`mtree_info_as`, system/memory.c), so the target
of an alias is one of those sections.  Among several of one name the owner decides, then the type,
then whether the window fits.  Without owners (no -o) bridges are distinguished by what their
windows show; of a bridge behind a bridge the outer one was printed first.

A RAM block may be mapped several times (below and above 4 GiB, SMRAM aliases); mappings are
distinguished by the distance between guest address and block offset.  With a region tree a mapping
reaches as far as the block would be visible if nothing were in front of it.  With a flat view alone
it reaches from its first to its last visible byte, and on to where the block's next mapping goes on
in it, as far as that is covered: RAM below 4 GiB ends where RAM above it begins (`_proven`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from ..errors import InputError
from ..text import quoted
from .model import FlatRange, FlatView, Hole, Mapping, RamBlock, Region, VirtioMemory
from .mtree import Dump, parse
from .render import Extent, render

__all__ = ["MemoryMap", "holes_in", "link", "ram_blocks", "read_map", "read_maps", "shared_extents"]


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """One address space: its FlatView, its RAM blocks, and what the text left open.

    `rendered` is False when the view is QEMU's own (`info mtree -f`).  `ambiguous` and
    `unresolved` are those of `render.Rendering`.
    """

    view: FlatView
    ram_blocks: tuple[RamBlock, ...]
    rendered: bool
    ambiguous: tuple[tuple[str, str], ...] = ()
    unresolved: tuple[str, ...] = ()


def read_map(text: str | Dump, address_space: str = "memory") -> MemoryMap:
    """The map of one address space from any `info mtree` text, parsed or not.

    Raises MtreeError for text that is not `info mtree` output and InputError when it has no such
    address space.
    """
    dump = text if isinstance(text, Dump) else parse(text)
    known = dump.flat_views if dump.is_flat else dump.address_spaces
    if address_space not in known:
        raise InputError(
            f"no address space {quoted(address_space)} in it",
            remedy="it has: " + ", ".join(sorted(known)),
        )
    return _read(dump, [address_space])[address_space]


def read_maps(text: str | Dump, address_spaces: Sequence[str]) -> dict[str, MemoryMap]:
    """Those of `address_spaces` that the text has, parsed or not.

    Raises MtreeError for text that is not `info mtree` output.
    """
    return _read(text if isinstance(text, Dump) else parse(text), address_spaces)


def _read(dump: Dump, address_spaces: Sequence[str]) -> dict[str, MemoryMap]:
    maps: dict[str, MemoryMap] = {}
    if dump.is_flat:
        for name in address_spaces:
            view = dump.flat_views.get(name)
            if view is not None:
                maps[name] = MemoryMap(view, ram_blocks(view), rendered=False)
        return maps
    link(dump)
    # each PCI device is an address space (bus master), with its type for a name (do_pci_register_
    # device, hw/pci/pci.c); a text that was cut does not show them
    count = dump.address_space_counts
    devices = VirtioMemory(count["virtio-mem-pci"], count["virtio-pmem-pci"]) if count else None
    for name in address_spaces:
        if name in dump.address_spaces:
            r = render(dump.address_spaces[name], name, devices)
            blocks = ram_blocks(r.view, r.extents)
            maps[name] = MemoryMap(r.view, blocks, True, r.ambiguous, r.unresolved)
    return maps


def link(dump: Dump) -> None:
    """Set `Region.resolved` of every alias in `dump`; None where the text has no such region."""
    by_name: dict[str, list[tuple[int, Region]]] = {}
    for index, region in enumerate(dump.regions):
        by_name.setdefault(region.name, []).append((index, region))
    for root in dump.address_spaces.values():
        if root is not None:
            _link_below(root, -1, by_name)
    for index, region in enumerate(dump.regions):
        _link_below(region, index, by_name)


def _link_below(root: Region, index: int, by_name: dict[str, list[tuple[int, Region]]]) -> None:
    """Link the aliases of one section; `index` is its place among the sections."""
    todo = [root]
    while todo:
        region = todo.pop()
        if region.target is not None:
            found = by_name.get(region.target)
            if found:
                if len(found) == 1:
                    region.resolved = found[0][1]
                else:
                    # a bus is never behind a bridge on itself: its section comes later
                    first = index + 1 if region.target == root.name else 0
                    region.resolved = _choose(region, first, found)
        todo.extend(region.children)


def _choose(alias: Region, first: int, candidates: list[tuple[int, Region]]) -> Region:
    """The likeliest target, better from section `first` on; the first printed wins a tie."""
    best, best_score = candidates[0][1], (-1,) * 5
    for at, c in candidates:
        score = (
            c.owner == alias.owner,
            c.kind is alias.kind,
            at >= first,
            alias.offset + alias.size <= c.size,
            _shows(c, alias.offset, alias.offset + alias.size),
        )
        if score > best_score:
            best, best_score = c, score
    return best


def _shows(region: Region, start: int, end: int) -> bool:
    """Something enabled of `region` lies in its `[start, end)`."""
    if not region.children:
        return region.kind.backed
    return any(c.enabled and c.addr < end and c.addr + c.size > start for c in region.children)


# -- RAM blocks --------------------------------------------------------------------------------


_Key = tuple[str, str | None, int]  # name, owner, guest address minus offset


def ram_blocks(view: FlatView, extents: Iterable[Extent] | None = None) -> tuple[RamBlock, ...]:
    """The RAM blocks of `view`, ordered by first mapped address, then name.

    `extents` are `Rendering.extents`; without them the visible ranges give the extents.
    """
    visible: dict[_Key, list[FlatRange]] = {}
    for r in view:
        if r.kind.backed:
            visible.setdefault((r.name, r.owner, r.start - r.offset), []).append(r)
    spans: dict[_Key, list[tuple[int, int]]] = {}
    for e in _proven(view) if extents is None else extents:
        spans.setdefault((e.name, e.owner, e.start - e.offset), []).append(
            (e.start, e.start + e.size)
        )
    blocks: dict[tuple[str, str | None], tuple[list[Mapping], list[Hole]]] = {}
    for key, intervals in spans.items():
        if key not in visible:
            continue  # wholly covered, or a disabled alias window: not mapped at all
        name, owner, delta = key
        mapped, holes = blocks.setdefault((name, owner), ([], []))
        for start, end in _union(intervals):
            mapped.append(Mapping(start, end - start, start - delta))
            holes.extend(holes_in(view, name, owner, start, end, delta))
    return tuple(
        RamBlock(
            name,
            owner,
            tuple(sorted(mapped, key=lambda m: m.start)),
            tuple(sorted(holes, key=lambda h: h.start)),
        )
        for (name, owner), (mapped, holes) in sorted(
            blocks.items(), key=lambda b: (min(m.start for m in b[1][0]), b[0][0])
        )
    )


def shared_extents(*views: FlatView) -> list[Extent]:
    """For every mapping, the extent from its first to its last byte visible in any of `views`."""
    spans: dict[_Key, tuple[int, int]] = {}
    for view in views:
        for r in view:
            if r.kind.backed:
                key = (r.name, r.owner, r.start - r.offset)
                lo, hi = spans.get(key, (r.start, r.end))
                spans[key] = (min(lo, r.start), max(hi, r.end))
    return [
        Extent(lo, hi - lo, name, owner, lo - delta)
        for (name, owner, delta), (lo, hi) in spans.items()
    ]


def _proven(view: FlatView) -> list[Extent]:
    """The extents that a flat view shows, with the holes at their ends that offsets prove.

    Of a block with several mappings each goes up to the offset at which the next one begins, where
    something else lies there in front of it: TSEG at the end of RAM below 4 GiB, say.  Where
    nothing is, or where the first byte of another RAM block is, the block was never mapped.
    """
    shown = sorted(shared_extents(view), key=lambda e: (e.name, e.owner or "", e.offset))
    out: list[Extent] = []
    for extent, following in zip_longest(shown, shown[1:]):
        size = extent.size
        same = following is not None and (following.name, following.owner) == (
            extent.name,
            extent.owner,
        )
        gap = following.offset - extent.offset - size if same and following is not None else 0
        if gap > 0:
            end = extent.start + size
            for r in view.between(end, end + gap):
                if r.start > end or r.kind.backed:
                    break
                end = min(r.end, extent.start + size + gap)
            if end == extent.start + size + gap:
                size += gap
        out.append(replace(extent, size=size))
    return out


def holes_in(
    view: FlatView, name: str, owner: str | None, start: int, end: int, delta: int
) -> list[Hole]:
    """What of `[start, end)` does not show block `name` at `address - delta`, by coverer."""
    holes: list[Hole] = []

    def add(lo: int, hi: int, covered_by: str | None, by: str | None) -> None:
        last = holes[-1] if holes else None
        if (
            last is not None
            and last.end == lo
            and (last.covered_by, last.owner) == (covered_by, by)
        ):
            lo = last.start
            holes.pop()
        holes.append(Hole(name, lo, hi - lo, lo - delta, covered_by, by))

    pos = start
    for r in view.between(start, end):
        lo, hi = max(r.start, start), min(r.end, end)
        if pos < lo:
            add(pos, lo, None, None)
        pos = hi
        if (r.name, r.owner) == (name, owner) and r.start - r.offset == delta:
            continue
        add(lo, hi, r.name, r.owner)
    if pos < end:
        add(pos, end, None, None)
    return holes


def _union(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out
