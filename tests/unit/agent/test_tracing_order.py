"""Trace lines that come at awkward moments of a snapshot: an order a real QEMU gives at will.

The monitor and the log are stand-ins, for the order alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from qmp_memlistener.agent import tracing
from qmp_memlistener.agent.tracing import TraceSource
from qmp_memlistener.memslots import Rules
from qmp_memlistener.probes import delivery
from qmp_memlistener.qmp import Command, Monitor, Reply, TraceBatch, TraceSession, TraceTail
from qmp_memlistener.qmp.trace_records import (
    FlatViewChange,
    FlatViewEvent,
    HmpCommand,
    TraceRecord,
)
from qmp_memlistener.timeline import evidence
from qmp_memlistener.topology import MemoryMap
from qmp_memlistener.tracking import Tracker
from tests.support.trees import Mr, info_mtree

REBUILT = FlatViewEvent(1, FlatViewChange.NEW, 0x10, 0x20)


class Log:
    """A tail to which the test writes."""

    def __init__(self) -> None:
        self.batches: asyncio.Queue[TraceBatch] = asyncio.Queue()
        self.read = asyncio.Event()

    def __aiter__(self) -> Log:
        return self

    async def __anext__(self) -> TraceBatch:
        if self.batches.empty():
            self.read.set()
        return await self.batches.get()

    async def write(self, *records: TraceRecord, lost: str | None = None) -> None:
        """Return when the source has folded them in."""
        self.read.clear()
        self.batches.put_nowait(TraceBatch(list(records), 0, 1, lost))
        await self.read.wait()


class Qemu:
    """Answers snapshots; `behind` is what the log gets between the command and its answer."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.asked = asyncio.Semaphore(0)
        self.behind: list[TraceRecord] = []
        self.lost_behind: str | None = None
        self.answers = asyncio.Event()
        self.answers.set()

    async def marker(self) -> int:
        """As a `TraceSession` does it."""
        await self._log.write(HmpCommand(1, "print 0x7", 7))
        return 7

    async def pipeline(self, commands: Sequence[Command], *, deadline: float) -> list[Reply]:
        assert deadline > 0
        lines = [str((c.arguments or {})["command-line"]) for c in commands]
        marker = int(lines[0].split()[1], 16)
        await self._log.write(HmpCommand(1, lines[0], marker), HmpCommand(1, lines[1]))
        behind, self.behind = self.behind, []
        lost, self.lost_behind = self.lost_behind, None
        if behind or lost:
            await self._log.write(*behind, lost=lost)
        self.asked.release()
        await self.answers.wait()
        root = Mr("system", 1 << 64, container=True)
        root.add(Mr("pc.ram", 1 << 20, "ram"), 0)
        return [Reply("", 1, 2), Reply(info_mtree({"memory": root}), 2, 3)]


async def asked_again(qemu: Qemu, source: TraceSource) -> None:
    """After the first snapshot the source must want another, by itself."""
    reading = asyncio.create_task(source.read())
    try:
        await source.snapshot()
        await qemu.asked.acquire()
        keeping = asyncio.create_task(source.keep_snapshots())
        try:
            async with asyncio.timeout(2):
                await qemu.asked.acquire()
        finally:
            keeping.cancel()
    finally:
        reading.cancel()


def source_of(log: Log, qemu: Qemu) -> TraceSource:
    def tracker(maps: dict[int, MemoryMap], t_ns: int) -> Tracker:
        return Tracker(maps, t_ns, has_slots=True, traced=True, rules=Rules.parse("8.0"))

    return TraceSource(
        cast(Monitor, qemu),
        cast(TraceSession, qemu),
        cast(TraceTail, log),
        lambda _: None,
        tracker,
        lambda *_: None,
    )


@pytest.mark.asyncio
async def test_a_change_behind_the_very_first_snapshot_is_looked_at() -> None:
    log = Log()
    qemu = Qemu(log)
    qemu.behind = [REBUILT]
    await asked_again(qemu, source_of(log, qemu))


@pytest.mark.asyncio
async def test_lines_lost_while_a_snapshot_is_under_way_need_another() -> None:
    log = Log()
    qemu = Qemu(log)
    qemu.lost_behind = "the log was cut"
    await asked_again(qemu, source_of(log, qemu))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.asyncio
async def test_what_a_snapshot_without_an_answer_covers_is_waited_for(fails: bool) -> None:
    """Its place in the log has been read, and its text has not come yet."""
    log = Log()
    qemu = Qemu(log)
    source = source_of(log, qemu)
    reading = asyncio.create_task(source.read())
    try:
        await source.snapshot()
        assert await qemu.asked.acquire()
        await log.write(REBUILT)
        qemu.answers.clear()
        taking = asyncio.create_task(source.snapshot())
        assert await qemu.asked.acquire()
        settling = asyncio.create_task(source.settle())
        done, _ = await asyncio.wait([settling], timeout=0.1)
        assert not done
        if fails:
            taking.cancel()  # as at its deadline
        qemu.answers.set()
        async with asyncio.timeout(2):
            await settling
        assert source.tracker is not None
        assert source.tracker.unreported_ns is None
        assert source.snapshots == 2
    finally:
        reading.cancel()


def test_when_there_is_too_much_of_everything_transitions_come_first() -> None:
    """A turn of the log's makes more than a turn of an inbox or of the timeline takes."""
    assert 4 * max(delivery._TURN, evidence.STEP) <= tracing._SLICE
