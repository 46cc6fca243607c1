"""Finds the region behind each alias of a parsed `info mtree` text.

QEMU prints an alias with the *name* of its target only, and names repeat (every PCI bridge has a
`pci_bridge_pci`).  But it also prints each aliased region once, in the order in which the aliases
were met (`mtree_info_as`, system/memory.c), so the target of an alias is one of those sections.
Among several of one name the owner decides, then the type, then whether the window fits.  Without
owners (no -o) bridges are distinguished by what their windows show; of a bridge behind a bridge the
outer one was printed first.
"""

from __future__ import annotations

from .model import Region
from .mtree import Dump

__all__ = ["link"]


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
