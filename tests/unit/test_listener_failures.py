"""Listeners that fail, hang or lag: they are reported, ended in time, and harm nobody else."""

from __future__ import annotations

import asyncio

import pytest

from qmp_memlistener import listener as listener_module
from qmp_memlistener.listener import Dispatcher, MemoryListener
from qmp_memlistener.topology import Transition
from tests.unit.listener_support import FILL, PATIENCE_S, PUNCH, Log, dispatching, told


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
