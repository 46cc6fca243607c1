"""PURE: `info mtree` text to region tree, FlatView, RAM blocks with holes, and transitions.

Knows nothing of sockets, clocks or processes.
"""

from .memory_map import MemoryMap, link, ram_blocks, read_map, read_maps, shared_extents
from .model import FlatRange, FlatView, Hole, Kind, Mapping, RamBlock, Region
from .mtree import Dump, parse
from .render import Extent, Rendering, render
from .transition import Flip, HoleChange, Move, RamChange, Transition, diff, same_range

__all__ = [
    "Dump",
    "Extent",
    "FlatRange",
    "FlatView",
    "Flip",
    "Hole",
    "HoleChange",
    "Kind",
    "Mapping",
    "MemoryMap",
    "Move",
    "RamBlock",
    "RamChange",
    "Region",
    "Rendering",
    "Transition",
    "diff",
    "link",
    "parse",
    "ram_blocks",
    "read_map",
    "read_maps",
    "render",
    "same_range",
    "shared_extents",
]
