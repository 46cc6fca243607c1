"""What the tests of tracing share: events of a real QEMU, and what its log told of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmp_memlistener.qmp import (
    FlatViewEvent,
    HmpCommand,
    Monitor,
    TraceRecord,
    TraceSession,
    TraceTail,
)
from qmp_memlistener.qmp.trace_setup import event_states
from qmp_memlistener.records import SlotOp
from tests.support.bare_qemu import Running
from tests.support.qtest import QTest

__all__ = [
    "check_traced",
    "read_all",
    "read_until_marker",
    "states",
    "steps",
    "toggle_pam",
    "writing",
]


async def states(monitor: Monitor) -> dict[str, bool]:
    """Every trace event of this QEMU."""
    return await event_states(monitor, ["*"])


async def toggle_pam(qemu: Running, times: int) -> None:
    """RAM in place of the BIOS area at 0xe0000 and back: two transitions each time."""
    async with await QTest.connect(qemu.qtest) as qtest:
        await qtest.outl(0xCF8, 0x80000094)
        for _ in range(times):
            await qtest.outb(0xCFC + 1, 0x33)
            await qtest.outb(0xCFC + 1, 0x00)


async def read_until_marker(
    tail: TraceTail, session: TraceSession, seconds: float = 10
) -> list[TraceRecord]:
    """Everything that was logged before this call."""
    number = await session.marker()
    records: list[TraceRecord] = []
    async with asyncio.timeout(seconds):
        async for batch in tail:
            assert batch.lost is None
            records += batch.records
            if any(isinstance(r, HmpCommand) and r.marker == number for r in batch.records):
                return records
    raise AssertionError("the log ended")


async def check_traced(qemu: Running, session: TraceSession, accel: str) -> list[TraceRecord]:
    async with session.tail() as tail:
        await toggle_pam(qemu, 3)
        records = await read_until_marker(tail, session)
        assert tail.decoder.unknown == 0
    slots = [r for r in records if isinstance(r, SlotOp)]
    assert any(isinstance(r, FlatViewEvent) for r in records)
    assert bool(slots) == (accel == "kvm")
    assert all(r.ret == 0 and r.as_id == 0 for r in slots)
    return records


def steps(records: list[TraceRecord]) -> list[tuple[int, ...]]:
    """What identifies slot operations and new views among runs of the same machine."""
    out: list[tuple[int, ...]] = []
    for r in records:
        if isinstance(r, SlotOp):
            out.append((r.slot, r.flags, r.gpa, r.size, r.hva or 0))
        elif isinstance(r, FlatViewEvent) and r.change.value == "new":
            out.append((r.root,))
    return out


@contextmanager
def writing(path: Path) -> Iterator[int]:
    with open(path, "wb") as f:
        yield f.fileno()


def read_all(fd: int) -> bytes:
    data = b""
    try:
        while piece := os.read(fd, 65536):
            data += piece
    except BlockingIOError:
        pass
    return data
