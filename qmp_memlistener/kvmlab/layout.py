"""What a race is run on: one RAM block, the hole that comes and goes, and where the guest works.

Arithmetic only: views for the plans, addresses for the guest's tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from ..errors import InputError
from ..memslots import LOG_DIRTY_PAGES, Rules, SlotTable, slot_table
from ..topology import FlatRange, FlatView, Kind
from .memory import PAGE

__all__ = ["RAM", "Layout"]

RAM = "ram"
_BASE = 1 << 20
_GAP = 2 << 20
_CODE = PAGE  # where code in the slot lies, from the beginning of the side that it is on


@dataclass(frozen=True, slots=True)
class Layout:
    """`size` bytes of RAM at `start`, and a hole of `hole_size` bytes, `hole_offset` into it.

    `extra` slots of a page each lie above, untouched.  Raises InputError for what does not fit.
    """

    size: int = 64 << 20
    hole_size: int = PAGE
    hole_offset: int | None = None
    extra: int = 0
    logged: bool = False
    start: int = _BASE

    def __post_init__(self) -> None:
        if self.size < 16 * PAGE or self.size % PAGE:
            raise InputError(
                f"a slot of {self.size} bytes", remedy=f"use whole pages, {16 * PAGE} bytes or more"
            )
        if self.hole_size < 1:
            raise InputError(f"a hole of {self.hole_size} bytes", remedy="use 1 byte or more")
        hole = self.hole
        low, high = self.lost
        if hole[0] < self.start or low < self.start or high > self.end:
            raise InputError(
                f"a hole of {self.hole_size} bytes at offset {hole[0] - self.start:#x} does not "
                f"lie in a slot of {self.size}",
                remedy="make it smaller, or the slot larger",
            )
        if self.size - (high - low) < 8 * PAGE:
            raise InputError(
                "the hole leaves less than 8 pages of the slot", remedy="make it smaller"
            )
        if self.extra < 0:
            raise InputError(f"{self.extra} further slots", remedy="use 0 or more")

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def hole(self) -> tuple[int, int]:
        """The hole, to the byte; in the middle where no place was asked for."""
        offset = self.hole_offset
        if offset is None:
            offset = (self.size - self.hole_size) // 2 // PAGE * PAGE
        return self.start + offset, self.start + offset + self.hole_size

    @property
    def lost(self) -> tuple[int, int]:
        """The pages that have no slot while the hole is there: `kvm_align_section` (QEMU)."""
        low, high = self.hole
        return low // PAGE * PAGE, -(-high // PAGE) * PAGE

    @property
    def private_gpa(self) -> int:
        """Where the lab's own slot may lie."""
        return -(-(self.end + _GAP + self.extra * 2 * PAGE) // _GAP) * _GAP

    def extra_gpa(self, index: int) -> int:
        return self.end + _GAP // 2 + index * 2 * PAGE

    def views(self, chunk: int | None = None) -> tuple[FlatView, FlatView]:
        """The map without the hole and with it; RAM split into regions of `chunk` bytes.

        Offsets are those in all of the RAM, whatever region shows it.
        """
        low, high = self.hole
        step = chunk or self.size
        full: list[FlatRange] = []
        holed: list[FlatRange] = []
        for at in range(self.start, self.end, step):
            end = min(at + step, self.end)
            name = RAM if chunk is None else f"{RAM}[{(at - self.start) // step}]"
            whole = FlatRange(at, end - at, Kind.RAM, name, at - self.start)
            full.append(whole)
            if high <= at or end <= low:
                holed.append(whole)
                continue
            if at < low:
                holed.append(FlatRange(at, low - at, Kind.RAM, name, at - self.start))
            if high < end:
                holed.append(FlatRange(high, end - high, Kind.RAM, name, high - self.start))
        holed.append(FlatRange(low, high - low, Kind.IO, "hole"))
        return FlatView(full), FlatView(sorted(holed, key=lambda r: r.start))

    def table(self, view: FlatView, rules: Rules) -> SlotTable:
        """The slots of a map from nothing."""
        table = slot_table(view, rules)
        if not self.logged:
            return table
        return SlotTable(replace(s, flags=s.flags | LOG_DIRTY_PAGES) for s in table)

    # -- where the guest works ---------------------------------------------------------------------

    def edges(self, vcpu: int) -> list[int]:
        """Words of RAM that stays, of the vCPU's own: at both ends of it and beside the hole.

        Of the sides of the hole those that there are.
        """
        low, high = self.lost
        off = 64 * vcpu
        out = []
        if low > self.start:
            out += [self.start + off, low - 64 - off]
        if high < self.end:
            out += [high + off, self.end - 64 - off]
        return out

    def touching(self, vcpu: int) -> int:
        """A word in the pages of the hole."""
        return self.lost[0] + 64 * vcpu

    def share(self, vcpu: int, vcpus: int) -> tuple[int, int, int, int]:
        """The pages a writer sweeps: first, first of the hole, first behind it, end.

        Where the hole is not in its share, no page is.
        """
        pages = self.size // PAGE
        first = self.start + pages * vcpu // vcpus * PAGE
        end = self.start + pages * (vcpu + 1) // vcpus * PAGE
        low, high = (min(max(a, first), end) for a in self.lost)
        return first, low, high, end

    def inside(self, size: int) -> int:
        """A gpa in RAM that stays for code or tables of `size` bytes.

        Raises InputError when there is no room on either side of the hole.
        """
        low, high = self.lost
        for start, end in ((self.start, low), (high, self.end)):
            if start + _CODE + size <= end:
                return start + _CODE
        raise InputError(
            f"no room for {size} bytes of the guest beside the hole",
            remedy="make the slot larger, or the hole smaller",
        )
