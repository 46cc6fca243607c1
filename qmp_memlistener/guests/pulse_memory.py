"""The pulse guest's memory as the host reads it: header, heartbeats, gaps, toggle writes.

Reading only, and reading never disturbs the guest, which writes while we look: each method says
how it gets a consistent answer.  Addresses are those of `layout`.  Waiting and commands are in
`pulse`.

The file that holds the RAM is its owner's, who may truncate it at any time; touching a mapping of
what is gone ends a process with SIGBUS.  So it is read with pread(2) and never mapped.  One pread
says nothing of the order in which its words were read, so where the order counts there are two.
A word of 8 bytes is read in one piece: 0 of 2.2 million were torn where the kernel copies with `rep
movsb` (FSRM), and otherwise it moves short copies in words (arch/x86/lib/copy_user_64.S).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Literal, Self

from ..errors import InputError
from . import layout

__all__ = [
    "MAGIC",
    "CpuState",
    "Gap",
    "PulseHeader",
    "Heartbeat",
    "High",
    "Look",
    "PulseMemory",
    "ToggleLog",
    "ToggleWrite",
]

MAGIC = b"QMPPULSE"

# up to H_READY_TSC, HB_RESET_TSC; an entry of each ring
_HEADER = struct.Struct("<8xIIIIIIQQ")
_BEAT = struct.Struct("<10Q")
_GAP = struct.Struct("<4Q")
_WRITE = struct.Struct("<QII")


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
class PulseHeader:
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
    """Heartbeats since boot, and gaps between two heartbeats since `reset_tsc`.  Gaps are ticks.

    `gaps` counts those above `threshold`; `max_gap` (which ended at `max_gap_tsc`) counts all.
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
    """No heartbeat in `[end_tsc - ticks, end_tsc)`; the one that ended it was number `count`."""

    end_tsc: int
    ticks: int
    count: int


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
    """The first 4 MiB of the RAM file `ram` (`LaunchedGuest.ram`).  A context manager.

    `ram` may be an open file; it is closed in the end.  `offset` is where in the file
    guest-physical address 0 lies.  Raises InputError when the file is smaller than that, which
    each method may find out, and OSError when it cannot be opened or read.
    """

    def __init__(self, ram: Path | int, *, offset: int = 0, writable: bool = False) -> None:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._fd = os.open(ram, flags) if isinstance(ram, Path) else ram
        self._offset = offset
        if os.fstat(self._fd).st_size < offset + layout.RAM_NEEDED:
            self.close()
            raise InputError(f"{ram} is smaller than the {layout.RAM_NEEDED >> 20} MiB needed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, once.  The guest goes on."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def source(self) -> tuple[Path, int]:
        """The very file while this is open, and the offset in it."""
        return Path(f"/proc/self/fd/{self._fd}"), self._offset

    def header(self) -> PulseHeader | None:
        """None while no pulse guest has come up in this RAM."""
        at = layout.HEADER
        if self._read(at, 8) != MAGIC:
            return None
        # what is there once it is ready is read later than that it is
        ready = self._get32(at + layout.H_STATE) == layout.STATE_READY
        found = _HEADER.unpack(self._read(at, _HEADER.size))
        version, _, expected, live, boots, booted_by, entry, ready_tsc = found
        return PulseHeader(
            version=version,
            ready=ready,
            expected_cpus=expected,
            live_cpus=live,
            boots=boots,
            booted_by="rom" if booted_by == layout.BY_ROM else "disk",
            entry_tsc=entry,
            ready_tsc=ready_tsc,
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

    def gaps(self, cpu: int = 0) -> Look:
        """The gaps above the threshold since the last reset that the ring still has."""
        while True:
            found = self.look(cpu)
            if found is not None:
                return found

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
        ring = self._ring(block)
        for number in range(before.gaps, before.gaps + layout.GAP_ENTRIES):
            end, ticks, count, name = ring[number % layout.GAP_ENTRIES]
            if name != number + 1 or not before.reset_tsc < end <= until_tsc:
                break
            found.append(Gap(end, ticks, count))
        return tuple(found)

    def tsc_reader(self, cpu: int) -> Callable[[], int]:
        """Reads the TSC of the CPU's latest heartbeat, as quickly as can be.

        Once the CPU has moved its data elsewhere, what it reads changes no more.
        """
        at = self._offset + self._block(cpu) + layout.HB_LAST_TSC
        buffer = bytearray(8)
        pread, buffers, word = os.preadv, [buffer], memoryview(buffer).cast("Q")

        def read() -> int:
            pread(self._fd, buffers, at)
            return word[0]

        return read

    def toggles_done(self) -> int:
        """Writes that the latest toggle has finished."""
        return self._get64(self._block(0) + layout.TG_DONE)

    def toggle_writes(self, first: int = 0) -> ToggleLog:
        """What the latest toggle wrote, from write number `first` on."""
        block = self._block(0)
        total = self._get64(block + layout.TG_DONE)
        start = max(first, total - layout.TOGGLE_ENTRIES)
        found = []
        size = layout.TOGGLE_ENTRIES * _WRITE.size
        ring = tuple(_WRITE.iter_unpack(self._read(block + layout.TOGGLE_RING, size)))
        for index in range(start, total):
            begin, ticks, value = ring[index % layout.TOGGLE_ENTRIES]
            found.append(ToggleWrite(index, begin, ticks, value))
        oldest = self._get64(block + layout.TG_DONE) - layout.TOGGLE_ENTRIES + 1
        kept = tuple(w for w in found if w.index >= oldest)
        return ToggleLog(kept, max(0, total - first) - len(kept))

    def _beat(self, cpu: int, state: CpuState) -> Heartbeat:
        at = self._block(cpu, state)
        words = _BEAT.unpack(self._read(at, _BEAT.size))
        count, last_tsc, max_gap, max_gap_tsc, threshold, _, _, _, _, reset_tsc = words
        return Heartbeat(
            count=count,
            last_tsc=last_tsc,
            max_gap=max_gap,
            max_gap_tsc=max_gap_tsc,
            threshold=threshold,
            # later than the heartbeat: it counts all before that
            gaps=self._get64(at + layout.HB_GAPS),
            reset_tsc=reset_tsc,
            state=state,
        )

    def _entries(self, block: int, first: int, total: int) -> tuple[Gap, ...]:
        """Those of the gaps from number `first` up to `total` that the ring still has."""
        first = max(first, total - layout.GAP_ENTRIES)
        if first >= total:
            return ()
        ring = self._ring(block)
        found = [Gap(*ring[n % layout.GAP_ENTRIES][:3]) for n in range(first, total)]
        # Meanwhile the guest may have gone on, and be writing one that does not count yet.
        oldest = self._get64(block + layout.HB_GAPS) - layout.GAP_ENTRIES + 1
        return tuple(found[max(0, oldest - first) :] if oldest > 0 else found)

    def _ring(self, block: int) -> tuple[tuple[int, int, int, int], ...]:
        """End, ticks, count and number from 1 of each entry."""
        size = layout.GAP_ENTRIES * _GAP.size
        return tuple(_GAP.iter_unpack(self._read(block + layout.GAP_RING, size)))

    def _block(self, cpu: int, state: CpuState | None = None) -> int:
        high = (state or self.cpu_state(cpu)).high
        low = layout.BLOCKS + cpu * layout.BLOCK_SIZE
        return low + layout.HIGH_OFFSET if high & High.DATA else low

    def _get32(self, address: int) -> int:
        # a copy of less than 8 bytes is one byte by byte
        return self._get64(address & ~7) >> 8 * (address & 4) & 0xFFFFFFFF

    def _get64(self, address: int) -> int:
        return int.from_bytes(self._read(address, 8), "little")

    def _read(self, address: int, size: int) -> bytes:
        found = os.pread(self._fd, size, self._offset + address)
        if len(found) < size:
            raise InputError(
                "the file that holds the guest's RAM was truncated",
                remedy="leave the file alone while QEMU runs: QEMU itself ends with SIGBUS",
            )
        return found


def _state_of(word: int) -> CpuState:
    return CpuState(
        alive=bool(word & layout.CPU_ALIVE),
        high=High(word & layout.PLACE_MASK),
        generation=word >> 32,
    )
