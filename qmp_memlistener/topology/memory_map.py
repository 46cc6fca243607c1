"""From text to map: one call that parses, links, renders and finds the RAM blocks.

`link` finds the region behind each alias.  QEMU prints an alias with the *name* of its target only,
and names repeat (every PCI bridge has a `pci_bridge_pci`).  But it also prints each aliased region
once, in the order in which the aliases were met (`mtree_info_as`, system/memory.c), so the target
of an alias is one of those sections.  Among several of one name the owner decides, then the type,
then whether the window fits.  Without owners (no -o) bridges are distinguished by what their
windows show; of a bridge behind a bridge the outer one was printed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..text import quoted
from .blocks import ram_blocks
from .model import FlatView, RamBlock, Region, VirtioMemory
from .mtree import Dump, parse
from .render import render

__all__ = ["MemoryMap", "link", "read_map", "read_maps"]


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
