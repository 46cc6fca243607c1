"""RAM blocks: where each backed region is mapped, and the holes the guest sees in it.

A RAM block may be mapped several times (below and above 4 GiB, SMRAM aliases); mappings are
distinguished by the distance between guest address and block offset.  With a region tree a mapping
reaches as far as the block would be visible if nothing were in front of it.  With a flat view alone
it reaches from its first to its last visible byte, and on to where the block's next mapping goes on
in it, as far as that is covered: RAM below 4 GiB ends where RAM above it begins (`_proven`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from .model import FlatRange, FlatView, Hole, Mapping, RamBlock
from .render import Extent

__all__ = ["holes_in", "ram_blocks", "shared_extents"]

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
