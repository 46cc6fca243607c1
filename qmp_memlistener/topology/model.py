"""The values of a memory topology: region, FlatRange, FlatView, hole, RAM block, transition.

Pure data; the msgspec structs are in recordings as they are.  Nothing here parses, renders or
compares views; see `mtree`, `render`, `memory_map` and `transition`.  Addresses and sizes are
bytes as `int`; ranges are half open.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, overload

import msgspec

__all__ = [
    "ADDRESS_SPACE_SIZE",
    "FlatRange",
    "FlatView",
    "Hole",
    "Kind",
    "Mapping",
    "RamBlock",
    "Region",
    "VirtioMemory",
]

ADDRESS_SPACE_SIZE = 1 << 64


class Kind(StrEnum):
    """What QEMU's `memory_region_type` prints (system/memory.c).

    `ram` and `ramd` (device RAM, VFIO BARs) are written by the guest without an exit, `rom` is
    read-only RAM, `romd` a ROM device in its readable mode, `i/o` everything that traps.
    """

    RAM = "ram"
    RAMD = "ramd"
    ROM = "rom"
    ROMD = "romd"
    IO = "i/o"

    @property
    def backed(self) -> bool:
        """Has host memory behind it, so an accelerator can map it."""
        return self is not Kind.IO


@dataclass(slots=True, eq=False)
class Region:
    """One line of `info mtree`: a memory region or an alias to one.

    `addr` is relative to the parent region, as QEMU keeps it.  For an alias, `target` names the
    aliased region and `offset` is where in it the alias begins; `resolved` is that region once
    the tree has been linked (None when QEMU's output does not show it).
    """

    addr: int
    size: int
    priority: int
    kind: Kind
    name: str
    enabled: bool = True
    nonvolatile: bool = False
    owner: str | None = None
    target: str | None = None
    offset: int = 0
    line_no: int = 0
    children: list[Region] = field(default_factory=list)
    resolved: Region | None = None

    @property
    def is_alias(self) -> bool:
        return self.target is not None


@dataclass(frozen=True, slots=True)
class FlatRange:
    """One range of a FlatView: `[start, start + size)` shows `name` from `offset` on.

    `kind` is what the guest sees (`rom` for RAM behind a read-only alias), `region_kind` what the
    region itself is: KVM's READONLY flag follows the region, not the alias (`kvm_mem_flags`,
    accel/kvm/kvm-all.c).  `memslot` says that an accelerator slot backs exactly this range: read
    from `info mtree -f`, predicted otherwise.  `unmergeable` keeps QEMU from joining neighbours
    (8.2, commit 533f5d6679).  `device_memory` says that a memory device shows it there: it lies in
    the machine's region of that name, which only a tree shows.
    """

    start: int
    size: int
    kind: Kind
    name: str
    offset: int = 0
    owner: str | None = None
    region_kind: Kind | None = None
    nonvolatile: bool = False
    unmergeable: bool = False
    memslot: bool = False
    device_memory: bool = field(default=False, compare=False)

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.start + self.size

    @property
    def region(self) -> tuple[str, str | None]:
        """In place of QEMU's MemoryRegion pointer: name and owner."""
        return (self.name, self.owner)

    @property
    def writable(self) -> bool:
        """RAM that the guest can write without leaving guest mode."""
        return self.kind is Kind.RAM or self.kind is Kind.RAMD


class VirtioMemory(NamedTuple):
    """How many virtio-mem and virtio-pmem devices a guest has."""

    mem: int
    pmem: int


class FlatView(Sequence[FlatRange]):
    """What an address space looks like to a CPU: disjoint ranges in address order.

    `virtio_memory` counts devices of the guest; None when that is not known.

    Raises ValueError when the ranges overlap, are empty or out of order.
    """

    __slots__ = ("_ranges", "_starts", "address_space", "virtio_memory")

    def __init__(
        self,
        ranges: Sequence[FlatRange],
        address_space: str = "memory",
        virtio_memory: VirtioMemory | None = None,
    ) -> None:
        self._ranges = tuple(ranges)
        self._starts = [r.start for r in self._ranges]
        self.address_space = address_space
        self.virtio_memory = virtio_memory
        end = 0
        for r in self._ranges:
            if r.start < end or r.size <= 0:
                raise ValueError(f"range {r.start:#x}+{r.size:#x} ({r.name}) overlaps or is empty")
            end = r.start + r.size
        if end > ADDRESS_SPACE_SIZE:
            raise ValueError(f"range ends at {end:#x}, behind the address space")

    def __len__(self) -> int:
        return len(self._ranges)

    @overload
    def __getitem__(self, index: int) -> FlatRange: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[FlatRange, ...]: ...
    def __getitem__(self, index: int | slice) -> FlatRange | tuple[FlatRange, ...]:
        return self._ranges[index]

    def __iter__(self) -> Iterator[FlatRange]:
        return iter(self._ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatView) and self._ranges == other._ranges

    def __hash__(self) -> int:
        return hash(self._ranges)

    def __repr__(self) -> str:
        return f"FlatView({self.address_space!r}, {len(self)} ranges)"

    def lookup(self, addr: int) -> FlatRange | None:
        """The range that holds `addr`, or None.  O(log n)."""
        i = bisect_right(self._starts, addr) - 1
        if i >= 0 and addr < self._ranges[i].end:
            return self._ranges[i]
        return None

    def between(self, start: int, end: int) -> tuple[FlatRange, ...]:
        """The ranges that intersect `[start, end)`, whole.  O(log n + result)."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        out = []
        for i in range(first, len(self._ranges)):
            r = self._ranges[i]
            if r.start >= end:
                break
            if r.end > start:
                out.append(r)
        return tuple(out)


class Mapping(msgspec.Struct, frozen=True, gc=False):
    """`[start, start + size)` of the address space shows a RAM block from `offset` on."""

    start: int
    size: int
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Hole(msgspec.Struct, frozen=True, gc=False):
    """A range inside a RAM block's mapped extent that the guest cannot reach as RAM.

    `offset` is where in the block the hole lies.  `covered_by` names the region in front of the
    RAM, `owner` the device or object that owns that region; both None when nothing is there.
    """

    block: str
    start: int
    size: int
    offset: int
    covered_by: str | None = None
    owner: str | None = None

    @property
    def end(self) -> int:
        return self.start + self.size


class RamBlock(msgspec.Struct, frozen=True, gc=False):
    """A RAM block (by region name and owner), where it is mapped, and the holes in it."""

    name: str
    owner: str | None
    mapped: tuple[Mapping, ...]
    holes: tuple[Hole, ...]
