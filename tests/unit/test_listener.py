"""MemoryListener and its dispatcher: order, sync and async, listeners that fail, hang or lag."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from qmp_memlistener import listener as listener_module
from qmp_memlistener.listener import Dispatcher, MemoryListener
from qmp_memlistener.recording import SlotOp
from qmp_memlistener.topology import FlatRange, FlatView, Hole, Kind, Transition, diff
from qmp_memlistener.tracking import Change

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
        t_ns=number, as_id=0, slot=number, op=kind, gpa=gpa, size=MIB, flags=flags, ret=0,
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


# -- order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Log, SlowLog])
@pytest.mark.asyncio
async def test_the_callbacks_of_a_transition_in_order(make: Callable[[], Log]) -> None:
    log = make()
    async with dispatching() as (dispatcher, failed):
        dispatcher.register(log, None)
        ops = (op(3, "delete"), op(3), op(4, gpa=2 * MIB))
        await told(dispatcher, change(WHOLE, HOLED, *ops))
    transition = diff(WHOLE, HOLED)
    assert log.calls == [
        ("begin", None),
        ("region_del", WHOLE[0]),
        ("region_add", HOLED[0]),
        ("region_add", HOLED[1]),
        ("region_add", HOLED[2]),
        ("region_nop", HOLED[3]),
        *(("slot_changed", o) for o in ops),
        ("hole_punched", Hole("pc.ram", MIB, MIB, MIB, "regs", "dev0")),
        ("commit", transition),
    ]
    assert failed == []


@pytest.mark.asyncio
async def test_dels_and_adds_ascend() -> None:
    log = Log()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(log, None)
        await told(dispatcher, change(HOLED, MOVED))
    for name in ("region_del", "region_add"):
        starts = [r.start for r in log.of(name) if isinstance(r, FlatRange)]
        assert len(starts) == 3
        assert starts == sorted(starts)
    assert log.names.index("region_add") > len(log.names) - log.names[::-1].index("region_del") - 1


@pytest.mark.asyncio
async def test_a_hole_that_is_filled() -> None:
    log = Log()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(log, None)
        await told(dispatcher, FILL)
    assert log.of("hole_filled") == [Hole("pc.ram", MIB, MIB, MIB, "regs", "dev0")]
    assert log.of("hole_punched") == []


@pytest.mark.asyncio
async def test_a_hole_that_moves_is_filled_and_punched() -> None:
    log = Log()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(log, None)
        await told(dispatcher, change(HOLED, MOVED))
    assert log.of("hole_filled") == [Hole("pc.ram", MIB, MIB, MIB, "regs", "dev0")]
    assert log.of("hole_punched") == [Hole("pc.ram", 2 * MIB, MIB, 2 * MIB, "regs", "dev0")]
    assert log.names.index("hole_filled") < log.names.index("hole_punched")
    assert log.names[-1] == "commit"


@pytest.mark.asyncio
async def test_slot_operations_without_a_transition() -> None:
    """Dirty logging starts and stops: no begin, no commit, the section behind the slot."""
    log = Log()
    start, stop, elsewhere = op(1, "flags", 0, 1), op(1, "flags", 0, 0), op(2, "flags", 6 * MIB, 1)
    async with dispatching() as (dispatcher, _):
        dispatcher.register(log, None)
        await told(dispatcher, Change(WHOLE, None, (start, stop, elsewhere)))
    assert log.calls == [
        ("slot_changed", start),
        ("log_start", WHOLE[0]),
        ("slot_changed", stop),
        ("log_stop", WHOLE[0]),
        ("slot_changed", elsewhere),
    ]


@pytest.mark.asyncio
async def test_transitions_come_one_after_the_other() -> None:
    log = SlowLog()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(log, None)
        await told(dispatcher, *[PUNCH, FILL] * 20)
    assert [n for n in log.names if n in ("begin", "commit")] == ["begin", "commit"] * 40
    assert log.of("commit") == [PUNCH.transition, FILL.transition] * 20


@pytest.mark.asyncio
async def test_the_default_callbacks_do_nothing() -> None:
    async with dispatching() as (dispatcher, failed):
        dispatcher.register(MemoryListener(), WHOLE)
        await told(dispatcher, change(WHOLE, HOLED, op(1, "flags", flags=1)), FILL)
    assert failed == []


# -- registration --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_registration_tells_the_present_map() -> None:
    early, late = Log(), Log()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(early, WHOLE)
        await told(dispatcher, PUNCH)
        dispatcher.register(late, HOLED)
        await told(dispatcher, FILL)
    replay = late.calls[: late.names.index("commit") + 1]
    assert [name for name, _ in replay] == ["begin", *["region_add"] * 4, "commit"]
    assert [section for _, section in replay[1:-1]] == list(HOLED)
    first = replay[-1][1]
    assert isinstance(first, Transition)
    assert len(first.before) == 0
    assert first.after == HOLED
    assert late.of("commit")[1:] == [FILL.transition]
    assert early.of("commit")[1:] == [PUNCH.transition, FILL.transition]


@pytest.mark.asyncio
async def test_a_map_with_nothing_in_it() -> None:
    log = Log()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(log, FlatView(()))
        await told(dispatcher)
    assert log.names == ["begin", "commit"]


@pytest.mark.asyncio
async def test_a_listener_registers_once() -> None:
    log, other = Log(), Log()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(log, None)
        dispatcher.register(other, None)
        with pytest.raises(ValueError, match="registered already"):
            dispatcher.register(log, WHOLE)
        await told(dispatcher, PUNCH)
        assert log.of("commit") == [PUNCH.transition]

        await dispatcher.unregister(log)
        with pytest.raises(ValueError, match="not registered"):
            await dispatcher.unregister(log)
        await told(dispatcher, FILL)
        assert log.of("commit") == [PUNCH.transition]
        assert other.of("commit") == [PUNCH.transition, FILL.transition]

        dispatcher.register(log, WHOLE)
        await told(dispatcher)
        assert len(log.of("commit")) == 2


@pytest.mark.asyncio
async def test_unregister_lets_the_listener_finish() -> None:
    log = SlowLog()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(log, None)
        dispatcher.dispatch([PUNCH, FILL])
        await dispatcher.unregister(log)
        assert log.of("commit") == [PUNCH.transition, FILL.transition]


@pytest.mark.asyncio
async def test_close_lets_all_listeners_finish() -> None:
    logs = [Log(), SlowLog(), SlowLog()]
    async with dispatching() as (dispatcher, _):
        for log in logs:
            dispatcher.register(log, None)
        dispatcher.dispatch([PUNCH, FILL] * 10)
        await dispatcher.close()
        assert [len(log.of("commit")) for log in logs] == [20] * 3
        dispatcher.dispatch([PUNCH])
        await dispatcher.close()
        assert [len(log.of("commit")) for log in logs] == [20] * 3


@pytest.mark.asyncio
async def test_a_listener_that_unregisters_itself() -> None:
    """From its own callback, as one does after the first transition."""
    async with dispatching() as (dispatcher, failed):

        class Once(Log):
            async def commit(self, transition: Transition) -> None:
                super().commit(transition)
                async with asyncio.timeout(1.0):
                    await dispatcher.unregister(self, deadline_s=60.0)
                self.note("unregistered")

        once, other = Once(), Log()
        dispatcher.register(once, None)
        dispatcher.register(other, None)
        dispatcher.dispatch([PUNCH, FILL])
        each = 8  # callbacks of either transition
        await other.wait(2 * each)
        await once.wait(each + 1)
        await told(dispatcher)
        assert failed == []
        assert once.names[-2:] == ["commit", "unregistered"]
        assert once.of("commit") == [PUNCH.transition]


# -- listeners that fail -------------------------------------------------------------------


class Failing(Log):
    """Raises in one callback."""

    def __init__(self, where: str, what: BaseException) -> None:
        super().__init__()
        self._where = where
        self._what = what

    def note(self, name: str, argument: object = None) -> object:
        super().note(name, argument)
        if name == self._where:
            raise self._what
        return None


@pytest.mark.parametrize("where", ["begin", "region_del", "region_add", "hole_punched", "commit"])
@pytest.mark.asyncio
async def test_a_failure_is_reported_and_harms_nobody(where: str) -> None:
    error = RuntimeError("broken listener")
    bad, good = Failing(where, error), Log()
    async with dispatching() as (dispatcher, failed):
        dispatcher.register(bad, None)
        dispatcher.register(good, None)
        await told(dispatcher, PUNCH)
        count = len(bad.of(where))
        assert count
        assert failed == [(bad, where, error)] * count
        assert bad.calls == good.calls, "the other callbacks still come, to both"
        await told(dispatcher, FILL)
        assert bad.of("commit") == good.of("commit") == [PUNCH.transition, FILL.transition]


@pytest.mark.asyncio
async def test_an_async_failure() -> None:
    class Bad(MemoryListener):
        async def commit(self, _: Transition) -> None:
            await asyncio.sleep(0)
            raise OSError(28, "disk full")

    good = Log()
    async with dispatching() as (dispatcher, failed):
        dispatcher.register(Bad(), None)
        dispatcher.register(good, None)
        await told(dispatcher, PUNCH, FILL)
    assert [(name, type(exc)) for _, name, exc in failed] == [("commit", OSError)] * 2
    assert len(good.of("commit")) == 2


@pytest.mark.asyncio
async def test_a_callback_that_ends_in_a_cancellation_of_its_own() -> None:
    """It awaited a task that somebody cancelled: nobody cancelled the listener."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    gone.cancel()

    class Bad(Log):
        async def commit(self, transition: Transition) -> None:
            super().commit(transition)
            await gone

    bad, good = Bad(), Log()
    async with dispatching() as (dispatcher, failed):
        dispatcher.register(bad, None)
        dispatcher.register(good, None)
        await told(dispatcher, PUNCH)
        await told(dispatcher, FILL)
    assert len(good.of("commit")) == 2
    assert len(bad.of("commit")) == 2
    assert [name for _, name, _ in failed] == ["commit", "commit"]


@pytest.mark.asyncio
async def test_what_reports_a_failure_may_fail_too() -> None:
    def on_failure(*_: object) -> None:
        raise RuntimeError("nobody wants to know")

    bad = Failing("begin", ValueError("x"))
    dispatcher = Dispatcher(on_failure)
    dispatcher.register(bad, None)
    try:
        await told(dispatcher, PUNCH, FILL)
        assert bad.of("commit") == [PUNCH.transition, FILL.transition]
    finally:
        await dispatcher.close(deadline_s=0.05)


# -- listeners that hang -------------------------------------------------------------------


class Hanging(Log):
    """Never comes back from its first `begin`; `stubborn` ignores that many cancellations."""

    def __init__(self, stubborn: int = 0) -> None:
        super().__init__()
        self._stubborn = stubborn
        self._for_ever = asyncio.Event()

    async def begin(self) -> None:
        super().begin()
        while True:
            try:
                await self._for_ever.wait()
                return
            except asyncio.CancelledError:
                self.note("cancelled")
                if self._stubborn <= 0:
                    raise
                self._stubborn -= 1

    def release(self) -> None:
        self._for_ever.set()


@pytest.mark.asyncio
async def test_a_hanging_listener_delays_nobody() -> None:
    hanging, good = Hanging(), Log()
    async with dispatching() as (dispatcher, failed):
        dispatcher.register(hanging, None)
        dispatcher.register(good, None)
        dispatcher.dispatch([PUNCH, FILL])
        while len(good.of("commit")) < 2:
            await good.wait(len(good.calls) + 1)
        assert hanging.names == ["begin"]
        assert failed == []


@pytest.mark.parametrize("how", ["unregister", "close"])
@pytest.mark.asyncio
async def test_a_hanging_listener_is_ended_at_the_deadline(how: str) -> None:
    hanging = Hanging()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(hanging, None)
        dispatcher.dispatch([PUNCH])
        await hanging.wait(1)
        async with asyncio.timeout(1.0):
            if how == "close":
                await dispatcher.close(deadline_s=0.02)
            else:
                await dispatcher.unregister(hanging, deadline_s=0.02)
    assert hanging.names == ["begin", "cancelled"]


@pytest.mark.asyncio
async def test_a_listener_that_ignores_its_end_does_not_keep_us() -> None:
    hanging = Hanging(stubborn=3)
    dispatcher = Dispatcher(lambda *_: None)
    dispatcher.register(hanging, None)
    dispatcher.dispatch([PUNCH])
    await hanging.wait(1)
    try:
        async with asyncio.timeout(1.0):
            await dispatcher.close(deadline_s=0.02)
    finally:
        hanging.release()
        await hanging.wait(3)


@pytest.mark.asyncio
async def test_one_deadline_for_all() -> None:
    listeners = [Hanging() for _ in range(20)]
    async with dispatching() as (dispatcher, _):
        for listener in listeners:
            dispatcher.register(listener, None)
        dispatcher.dispatch([PUNCH])
        for listener in listeners:
            await listener.wait(1)
        async with asyncio.timeout(2.0):
            await dispatcher.close(deadline_s=0.2)
    assert all(listener.names[-1] == "cancelled" for listener in listeners)


# -- listeners that lag --------------------------------------------------------------------


class Gated(Log):
    """Goes on with a `begin` only when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def begin(self) -> None:
        super().begin()
        await self.gate.wait()


@pytest.mark.asyncio
async def test_a_listener_that_lags_is_told_how_much_it_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener_module, "QUEUE_LIMIT", 3)
    slow, fast = Gated(), Log()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(slow, None)
        dispatcher.register(fast, None)
        dispatcher.dispatch([PUNCH])
        await slow.wait(1)
        await fast.wait(1)
        for _ in range(5):
            dispatcher.dispatch([FILL, PUNCH])
            await asyncio.sleep(0)
        slow.gate.set()
        async with asyncio.timeout(PATIENCE_S):
            await dispatcher.idle()
        dispatcher.dispatch([FILL])
        async with asyncio.timeout(PATIENCE_S):
            await dispatcher.idle()
    assert slow.of("lost") == [7]
    assert len(slow.of("commit")) == 1 + 3 + 1
    assert fast.of("lost") == []
    assert len(fast.of("commit")) == 12


@pytest.mark.asyncio
async def test_a_loss_is_told_where_it_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the changes before it and those after: a mirror must know which are whole."""
    monkeypatch.setattr(listener_module, "QUEUE_LIMIT", 2)
    slow = Gated()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(slow, None)
        dispatcher.dispatch([PUNCH])
        await slow.wait(1)
        dispatcher.dispatch([FILL, PUNCH, FILL, PUNCH])  # the last two are lost
        slow.gate.set()
        async with asyncio.timeout(PATIENCE_S):
            await dispatcher.idle()
        dispatcher.dispatch([FILL])
        async with asyncio.timeout(PATIENCE_S):
            await dispatcher.idle()
    told_of = [call for call in slow.calls if call[0] in ("lost", "commit")]
    assert told_of == [
        ("commit", PUNCH.transition),
        ("commit", FILL.transition),
        ("commit", PUNCH.transition),
        ("lost", 2),
        ("commit", FILL.transition),
    ]


@pytest.mark.asyncio
async def test_a_loss_at_the_end_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "QUEUE_LIMIT", 1)
    slow = Gated()
    async with dispatching() as (dispatcher, _):
        dispatcher.register(slow, None)
        dispatcher.dispatch([PUNCH])
        await slow.wait(1)
        dispatcher.dispatch([FILL, PUNCH])
        slow.gate.set()
        await dispatcher.close(deadline_s=PATIENCE_S)
    assert slow.of("lost") == [1]
