"""What the tests of listeners share: maps and changes, listeners that keep what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qmp_memlistener.listener import Dispatcher, MemoryListener
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.records import SlotOp
from qmp_memlistener.topology import FlatRange, FlatView, Hole, Kind, Transition, diff
from qmp_memlistener.tracking import Change

__all__ = [
    "FILL",
    "HOLED",
    "MIB",
    "MOVED",
    "PATIENCE_S",
    "PUNCH",
    "WHOLE",
    "Log",
    "SlowLog",
    "change",
    "dispatching",
    "op",
    "told",
]

MIB = 1 << 20
PATIENCE_S = 5.0
Call = tuple[str, object]
Failed = tuple[MemoryListener, str, BaseException]


def ram(start: int, end: int) -> FlatRange:
    return FlatRange(start, end - start, Kind.RAM, "pc.ram", start, memslot=True)


def mmio(start: int, end: int, name: str = "regs") -> FlatRange:
    return FlatRange(start, end - start, Kind.IO, name, 0, "dev0")


WHOLE = FlatView([ram(0, 4 * MIB), mmio(8 * MIB, 9 * MIB, "far")])
HOLED = FlatView(
    [ram(0, MIB), mmio(MIB, 2 * MIB), ram(2 * MIB, 4 * MIB), mmio(8 * MIB, 9 * MIB, "far")]
)
MOVED = FlatView(
    [ram(0, 2 * MIB), mmio(2 * MIB, 3 * MIB), ram(3 * MIB, 4 * MIB), mmio(8 * MIB, 9 * MIB, "far")]
)


def op(number: int, kind: str = "add", gpa: int = 0, flags: int = 0) -> SlotOp:
    return SlotOp(
        t_ns=number, as_id=0, slot=number, op=OpKind(kind), gpa=gpa, size=MIB, flags=flags, ret=0,
        predicted=False, transition=None,
    )  # fmt: skip


def change(before: FlatView, after: FlatView, *ops: SlotOp) -> Change:
    return Change(after, diff(before, after), ops)


PUNCH = change(WHOLE, HOLED)
FILL = change(HOLED, WHOLE)


class Log(MemoryListener):
    """Keeps every callback with its argument; `wait` returns when there are `count` of them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._more = asyncio.Event()

    def note(self, name: str, argument: object = None) -> object:
        self.calls.append((name, argument))
        self._more.set()
        return None

    async def wait(self, count: int) -> list[Call]:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.calls) < count:
                self._more.clear()
                await self._more.wait()
        return self.calls

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def of(self, name: str) -> list[object]:
        return [argument for n, argument in self.calls if n == name]

    def begin(self) -> object:
        return self.note("begin")

    def region_del(self, section: FlatRange) -> object:
        return self.note("region_del", section)

    def region_add(self, section: FlatRange) -> object:
        return self.note("region_add", section)

    def region_nop(self, section: FlatRange) -> object:
        return self.note("region_nop", section)

    def log_start(self, section: FlatRange) -> object:
        return self.note("log_start", section)

    def log_stop(self, section: FlatRange) -> object:
        return self.note("log_stop", section)

    def hole_punched(self, hole: Hole) -> object:
        return self.note("hole_punched", hole)

    def hole_filled(self, hole: Hole) -> object:
        return self.note("hole_filled", hole)

    def slot_changed(self, op: SlotOp) -> object:
        return self.note("slot_changed", op)

    def commit(self, transition: Transition) -> object:
        return self.note("commit", transition)

    def lost(self, changes: int) -> object:
        return self.note("lost", changes)


class SlowLog(Log):
    """The same with `async` callbacks that let others run in between."""

    async def _slowly(self, name: str, argument: object = None) -> None:
        await asyncio.sleep(0)
        super().note(name, argument)
        await asyncio.sleep(0)

    def note(self, name: str, argument: object = None) -> object:
        return self._slowly(name, argument)  # handed on to the dispatcher, which awaits it


@asynccontextmanager
async def dispatching() -> AsyncIterator[tuple[Dispatcher, list[Failed]]]:
    """A dispatcher that ends with the block, and what failed."""
    failed: list[Failed] = []

    def on_failure(listener: MemoryListener, name: str, exc: BaseException) -> None:
        failed.append((listener, name, exc))

    dispatcher = Dispatcher(on_failure)
    try:
        async with asyncio.timeout(PATIENCE_S * 2):
            yield dispatcher, failed
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await dispatcher.close(deadline_s=0.05)


async def told(dispatcher: Dispatcher, *changes: Change) -> None:
    dispatcher.dispatch(changes)
    async with asyncio.timeout(PATIENCE_S):
        await dispatcher.idle()
