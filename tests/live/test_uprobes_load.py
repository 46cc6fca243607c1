"""Uprobes at high rates: nothing is lost, and what is lost in too small a ring is told.

The probed program knows how often it called, and when each call was.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmp_memlistener.probes import ProbeUnavailable, StallKind
from qmp_memlistener.probes.uprobes import Batch, UprobeReader, Window
from qmp_memlistener.probes.uprobes.functions import Group
from qmp_memlistener.probes.uprobes.program import examine

SOURCE = Path(__file__).parent.parent / "support" / "uprobes_target.c"
RECORDS_A_CALL = 3
"""The lock function's entry and return, and the entry of the unlock function."""


@dataclass(frozen=True, slots=True)
class Target:
    """The probed program."""

    process: asyncio.subprocess.Process
    log: Path

    async def run(self, count: int, rate: int = 0) -> float:
        """Let it call `count` times, `rate` times a second; returns how long it took."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        start = time.monotonic()
        stdin.write(f"{count} {rate}\n".encode())
        await asyncio.wait_for(stdout.readline(), 60)
        return time.monotonic() - start

    def calls(self) -> list[tuple[int, int]]:
        """When each call of all runs began and ended."""
        return list(struct.iter_unpack("@QQ", self.log.read_bytes()))


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Target]:
    """Built and started; skips when it cannot be built or not be probed."""
    if shutil.which("cc") is None:
        pytest.skip("cc (a C compiler) is not installed")
    binary, log = directory / "target", directory / "log"
    build = await asyncio.create_subprocess_exec(
        *("cc", "-O1", "-rdynamic", "-pthread", "-o", str(binary), str(SOURCE))
    )
    assert await build.wait() == 0
    process = await asyncio.create_subprocess_exec(
        *(str(binary), str(log)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        try:
            examine(process.pid)
        except ProbeUnavailable as why:
            pytest.skip(f"uprobes: {why.message}")
        yield Target(process, log)
    finally:
        process.kill()
        await process.wait()


class Collector:
    """The batches of a reader."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch) -> None:
        self.batches.append(batch)

    @property
    def holds(self) -> list[Window]:
        return [w for b in self.batches for w in b.windows if w.kind is StallKind.BQL_HOLD]

    @property
    def hits(self) -> int:
        return sum(b.hits.get(Group.BQL, 0) for b in self.batches)

    @property
    def lost(self) -> int:
        return sum(loss.count for b in self.batches for loss in b.losses)


@asynccontextmanager
async def reading(
    of: Target, collector: Collector, ring_bytes: int | None = None
) -> AsyncIterator[UprobeReader]:
    reader = UprobeReader(of.process.pid, collector, ring_bytes=ring_bytes)
    await asyncio.to_thread(reader.start)
    try:
        await asyncio.wrap_future(reader.set_bql(True))
        for _ in range(20):  # few enough at a time for the smallest ring
            await of.run(5, 1000)
            await asyncio.wrap_future(reader.flush())
        assert reader.bql_known
        assert collector.lost == 0
        os.truncate(of.log, 0)
        collector.batches.clear()
        yield reader
    finally:
        await asyncio.to_thread(reader.stop)


def check_true(holds: list[Window], calls: list[tuple[int, int]]) -> None:
    """Each window is the one call whose number it bears, and no call is told twice."""
    numbers = []
    for hold in holds:
        assert hold.site is not None
        number = hold.site.line
        assert calls[number][0] <= hold.start_ns <= hold.end_ns <= calls[number][1]
        numbers.append(number)
    assert sorted(set(numbers)) == sorted(numbers)


@pytest.mark.asyncio
@pytest.mark.parametrize("rate", [10_000, 50_000])
async def test_no_record_is_lost_and_every_window_is_true(
    rate: int, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Three seconds at `rate` records a second, or at what a busy host reaches."""
    calls, seen = rate, Collector()
    async with target(tmp_path) as program, reading(program, seen) as reader:
        took = await program.run(calls, rate // RECORDS_A_CALL)
        await asyncio.wrap_future(reader.flush())
        peak = max(reader.peaks.values())
    reached = RECORDS_A_CALL * calls / took
    record_testsuite_property(f"uprobes: records a second, of {rate} wanted", round(reached))
    record_testsuite_property(f"uprobes: part of the ring used at {rate}", round(peak, 3))
    assert (seen.lost, seen.hits, len(seen.holds)) == (0, RECORDS_A_CALL * calls, calls)
    check_true(seen.holds, program.calls())


@pytest.mark.asyncio
async def test_what_finds_no_room_is_counted_and_makes_no_false_window(tmp_path: Path) -> None:
    """A ring of one page at full speed: hits and losses together are all there was."""
    calls, seen = 20_000, Collector()
    async with target(tmp_path) as program, reading(program, seen, ring_bytes=4096):
        await program.run(calls)
    assert seen.lost > 0
    assert seen.hits + seen.lost == RECORDS_A_CALL * calls
    assert 0 < len(seen.holds) < calls
    check_true(seen.holds, program.calls())
