"""From text to map: one call that parses, links, renders and finds the RAM blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..text import quoted
from .blocks import ram_blocks
from .link import link
from .model import FlatView, RamBlock, VirtioMemory
from .mtree import Dump, parse
from .render import render

__all__ = ["MemoryMap", "read_map", "read_maps"]


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
