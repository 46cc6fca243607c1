"""The pulse guest's memory as the host maps it: header, heartbeats, gaps, toggle writes.

Reading only, and reading never disturbs the guest, which writes while we look: each method says
how it gets a consistent answer.  Addresses are those of `layout`.  Waiting and commands are in
`pulse`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from ..errors import InputError
from . import layout

__all__ = [
    "MAGIC",
    "CpuState",
    "Gap",
    "GapLog",
    "Header",
    "Heartbeat",
    "High",
    "Look",
    "PulseMemory",
    "ToggleLog",
    "ToggleWrite",
]

MAGIC = b"QMPPULSE"


class High(IntFlag):
    """What of a CPU lies above 1 MiB instead of below 640 KiB.

    CODE the instructions of its loop, DATA the heartbeat, stack and mailbox, TABLES the page
    tables that its CR3 points to.
    """

    NOTHING = 0
    CODE = layout.PLACE_CODE
    DATA = layout.PLACE_DATA
    TABLES = layout.PLACE_TABLES


@dataclass(frozen=True, slots=True)
class Header:
    """The guest as a whole.  `boots` counts its starts since the RAM was fresh."""

    version: int
    ready: bool
    expected_cpus: int
    live_cpus: int
    boots: int
    booted_by: Literal["disk", "rom"]
    entry_tsc: int
    ready_tsc: int


@dataclass(frozen=True, slots=True)
class CpuState:
    """`generation` counts how often the CPU's statistics began anew."""

    alive: bool
    high: High
    generation: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Beats since boot, and gaps between two beats since `reset_tsc`.  Gaps are ticks.

    `gaps` counts those above `threshold`; `max_gap` (which ended at `max_gap_tsc`) knows all.
    """

    count: int
    last_tsc: int
    max_gap: int
    max_gap_tsc: int
    threshold: int
    gaps: int
    reset_tsc: int
    state: CpuState


@dataclass(frozen=True, slots=True)
class Gap:
    """No beat in `[end_tsc - ticks, end_tsc)`; the one that ended it was number `count`."""

    end_tsc: int
    ticks: int
    count: int


@dataclass(frozen=True, slots=True)
class GapLog:
    """The latest gaps above the threshold, oldest first; `lost` older ones were overwritten."""

    gaps: tuple[Gap, ...]
    lost: int


@dataclass(frozen=True, slots=True)
class Look:
    """A CPU's heartbeat and those of its gaps that are new; `lost` new ones were overwritten.

    Every gap that ended before `beat.last_tsc` is counted in `beat.gaps`.
    """

    beat: Heartbeat
    gaps: tuple[Gap, ...]
    lost: int


@dataclass(frozen=True, slots=True)
class ToggleWrite:
    """Write number `index` (from 0) of a toggle; `ticks` saturates at 2**32 - 1."""

    index: int
    begin_tsc: int
    ticks: int
    value: int


@dataclass(frozen=True, slots=True)
class ToggleLog:
    """Writes of a toggle, oldest first; `lost` were overwritten before they were read."""

    writes: tuple[ToggleWrite, ...]
    lost: int


class PulseMemory:
    """The first 4 MiB of the RAM file `ram` (`Guest.ram`).  A context manager; closes the mapping.

    `ram` may be an open file, which is closed then.  `offset` is where in the file guest-physical
    address 0 lies.  The mapping is for reading alone unless `writable`.  Raises InputError when the
    file is smaller than that, OSError when it cannot be mapped.
    """

    def __init__(self, ram: Path | int, *, offset: int = 0, writable: bool = False) -> None:
        with open(ram, "r+b" if writable else "rb") as file:
            if os.fstat(file.fileno()).st_size < offset + layout.RAM_NEEDED:
                raise InputError(f"{ram} is smaller than the {layout.RAM_NEEDED >> 20} MiB needed")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), layout.RAM_NEEDED, access=access, offset=offset)
        self._bytes = memoryview(self._map)
        # Native casts: an aligned item is loaded and stored in one piece, which the guest needs.
        self._u32 = self._bytes.cast("I")
        self._u64 = self._bytes.cast("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the mapping back.  The guest goes on."""
        for view in (self._u32, self._u64, self._bytes):
            view.release()
        self._map.close()

    def header(self) -> Header | None:
        """None while no pulse guest has come up in this RAM."""
        at = layout.HEADER
        if self._bytes[at : at + 8] != MAGIC:
            return None
        by_rom = self._get32(at + layout.H_BOOTED_BY) == layout.BY_ROM
        return Header(
            version=self._get32(at + layout.H_VERSION),
            ready=self._get32(at + layout.H_STATE) == layout.STATE_READY,
            expected_cpus=self._get32(at + layout.H_EXPECTED),
            live_cpus=self._get32(at + layout.H_LIVE),
            boots=self._get32(at + layout.H_BOOTS),
            booted_by="rom" if by_rom else "disk",
            entry_tsc=self._get64(at + layout.H_ENTRY_TSC),
            ready_tsc=self._get64(at + layout.H_READY_TSC),
        )

    def cpu_state(self, cpu: int) -> CpuState:
        if not 0 <= cpu < layout.MAX_CPUS:
            raise ValueError(f"no CPU {cpu}: the guest runs at most {layout.MAX_CPUS}")
        return _state_of(self._get64(layout.HEADER + layout.H_CPU + 8 * cpu))

    def heartbeat(self, cpu: int = 0) -> Heartbeat:
        """The CPU's heartbeat now.  Each number is whole; together they may span a few beats."""
        while True:
            state = self.cpu_state(cpu)
            beat = self._beat(cpu, state)
            if self.cpu_state(cpu) == state:
                return beat

    def gaps(self, cpu: int = 0) -> GapLog:
        """The gaps above the threshold since the last reset that the ring still has."""
        while True:
            state = self.cpu_state(cpu)
            block = self._block(cpu, state)
            total = self._get64(block + layout.HB_GAPS)
            kept = self._entries(block, 0, total)
            if self.cpu_state(cpu) == state:
                return GapLog(kept, total - len(kept))

    def look(self, cpu: int, first: int = 0) -> Look | None:
        """The heartbeat and the gaps from number `first` (from 0) on.

        None when the CPU's statistics began anew meanwhile: look again.
        """
        at = layout.HEADER + layout.H_CPU + 8 * cpu
        word = self._get64(at)
        state = _state_of(word)
        beat = self._beat(cpu, state)
        kept = self._entries(self._block(cpu, state), first, beat.gaps)
        if self._get64(at) != word:
            return None
        return Look(beat, kept, max(0, beat.gaps - first) - len(kept))

    def gaps_before_restart(self, cpu: int, before: Heartbeat, until_tsc: int) -> tuple[Gap, ...]:
        """Gaps after those that `before` counts, up to the restart of statistics at `until_tsc`.

        A restart sets the counter to 0 and leaves the ring as it was, so what was not overwritten
        since is found by its number and its time.
        """
        block = self._block(cpu, before.state)
        found: list[Gap] = []
        for number in range(before.gaps, before.gaps + layout.GAP_ENTRIES):
            at = block + layout.GAP_RING + 32 * (number % layout.GAP_ENTRIES)
            end, ticks, count, name = (self._get64(at + 8 * i) for i in range(4))
            if name != number + 1 or not before.reset_tsc < end <= until_tsc:
                break
            found.append(Gap(end, ticks, count))
        return tuple(found)

    def tsc_reader(self, cpu: int) -> Callable[[], int]:
        """Reads the TSC of the CPU's latest beat, as quickly as can be.

        Once the CPU has moved its data elsewhere, what it reads changes no more.
        """
        index = (self._block(cpu) + layout.HB_LAST_TSC) // 8
        words = self._u64
        return lambda: words[index]

    def toggles_done(self) -> int:
        """Writes that the latest toggle has finished."""
        return self._get64(self._block(0) + layout.TG_DONE)

    def toggle_writes(self, first: int = 0) -> ToggleLog:
        """What the latest toggle wrote, from write number `first` on."""
        block = self._block(0)
        total = self._get64(block + layout.TG_DONE)
        start = max(first, total - layout.TOGGLE_ENTRIES)
        found = []
        for index in range(start, total):
            at = block + layout.TOGGLE_RING + 16 * (index % layout.TOGGLE_ENTRIES)
            ticks, value = self._get32(at + 8), self._get32(at + 12)
            found.append(ToggleWrite(index, self._get64(at), ticks, value))
        oldest = self._get64(block + layout.TG_DONE) - layout.TOGGLE_ENTRIES + 1
        kept = tuple(w for w in found if w.index >= oldest)
        return ToggleLog(kept, max(0, total - first) - len(kept))

    def _beat(self, cpu: int, state: CpuState) -> Heartbeat:
        at = self._block(cpu, state)
        return Heartbeat(
            count=self._get64(at + layout.HB_COUNT),
            last_tsc=self._get64(at + layout.HB_LAST_TSC),
            max_gap=self._get64(at + layout.HB_MAX_GAP),
            max_gap_tsc=self._get64(at + layout.HB_MAX_GAP_TSC),
            threshold=self._get64(at + layout.HB_THRESHOLD),
            gaps=self._get64(at + layout.HB_GAPS),
            reset_tsc=self._get64(at + layout.HB_RESET_TSC),
            state=state,
        )

    def _entries(self, block: int, first: int, total: int) -> tuple[Gap, ...]:
        """Those of the gaps from number `first` up to `total` that the ring still has."""
        first = max(first, total - layout.GAP_ENTRIES)
        found = []
        for number in range(first, total):
            at = block + layout.GAP_RING + 32 * (number % layout.GAP_ENTRIES)
            found.append(Gap(*(self._get64(at + 8 * i) for i in range(3))))
        # Meanwhile the guest may have gone on, and be writing one that does not count yet.
        oldest = self._get64(block + layout.HB_GAPS) - layout.GAP_ENTRIES + 1
        return tuple(found[max(0, oldest - first) :] if oldest > 0 else found)

    def _block(self, cpu: int, state: CpuState | None = None) -> int:
        high = (state or self.cpu_state(cpu)).high
        low = layout.BLOCKS + cpu * layout.BLOCK_SIZE
        return low + layout.HIGH_OFFSET if high & High.DATA else low

    def _get32(self, address: int) -> int:
        return self._u32[address // 4]

    def _get64(self, address: int) -> int:
        return self._u64[address // 8]


def _state_of(word: int) -> CpuState:
    return CpuState(
        alive=bool(word & layout.CPU_ALIVE),
        high=High(word & layout.PLACE_MASK),
        generation=word >> 32,
    )
