"""MemoryListener and its dispatcher: the order of callbacks, sync and async; registration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from qmp_memlistener.listener import MemoryListener
from qmp_memlistener.topology import FlatRange, FlatView, Hole, Transition, diff
from qmp_memlistener.tracking import Change
from tests.unit.listener_support import (
    FILL,
    HOLED,
    MIB,
    MOVED,
    PUNCH,
    WHOLE,
    Log,
    SlowLog,
    change,
    dispatching,
    op,
    told,
)


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
