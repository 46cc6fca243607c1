"""A mirror after any sequence of maps, against pages that are simulated one by one."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qmp_memlistener.memslots import Rules
from qmp_memlistener.mirror.backend import map_differences
from qmp_memlistener.topology import FlatView
from qmp_memlistener.updates.model import Strategy
from tests.unit.memslots.memslots_model import PAGE, Vm, content_of, views
from tests.unit.mirror.mirror_model import mirror_of, tell_all

LIVES = st.lists(views(), min_size=1, max_size=6)
STRATEGIES = pytest.mark.parametrize("strategy", list(Strategy))


@STRATEGIES
@given(LIVES, st.sampled_from([None, 0, 1, 2, 64]))
def test_the_backend_shows_each_map_it_was_told(
    strategy: Strategy, maps: list[FlatView], max_holes: int | None
) -> None:
    async def run() -> None:
        mirror, backend, told = mirror_of(strategy, max_holes=max_holes)
        for n, view in enumerate(maps, start=1):
            await told(view)
            assert backend.content() == content_of(view)
            assert Vm(backend.slots()).reach() == content_of(view)
            assert map_differences(view, backend.slots(), Rules()) == ()
            assert await mirror.check(view) == ()
            report = mirror.report()
            assert (report.in_step, report.why_not) == (True, None)
            assert report.transitions == n
            assert report.operations == len(backend.calls)

    asyncio.run(run())


@STRATEGIES
@given(LIVES)
def test_who_uses_the_backend_never_misses_memory_that_stays(
    strategy: Strategy, maps: list[FlatView]
) -> None:
    """But under `direct`, where just that is what QEMU does."""

    async def run() -> None:
        mirror, backend, told = mirror_of(strategy)
        exposed = 0
        before: dict[int, tuple[str, int]] = {}
        for view in maps:
            backend.seen.clear()
            await told(view)
            after = content_of(view)
            stays = before.keys() & after.keys()
            exposed += any(stays - seen.keys() for seen in backend.seen)
            before = after
        assert mirror.report().exposed == exposed
        if strategy is not Strategy.DIRECT:
            assert exposed == 0

    asyncio.run(run())


@given(LIVES)
def test_under_pause_nothing_is_called_while_the_guest_runs(maps: list[FlatView]) -> None:
    async def run() -> None:
        mirror, backend, told = mirror_of(Strategy.PAUSE)
        for view in maps:
            calls, pauses = len(backend.calls), backend.pausing.pauses
            await told(view)
            # once for each update, and not at all when there is nothing to do
            assert backend.pausing.pauses - pauses == (len(backend.calls) > calls)
        assert backend.unpaused == []
        assert not backend.pausing.paused
        assert mirror.report().pauses.count == backend.pausing.pauses

    asyncio.run(run())


@given(LIVES)
def test_holes_leave_ids_and_dirty_bits_alone(maps: list[FlatView]) -> None:
    """A slot that is not deleted keeps its id, and each page outside its holes its dirty bit."""

    async def run() -> None:
        mirror, backend, told = mirror_of(Strategy.HOLE, max_holes=None)
        await told(maps[0])
        for r in maps[0]:
            await mirror.log_start(r)
        for view in maps[1:]:
            before = {s.key: s for s in backend.slots()}
            written = {
                s.slot: {p for low, high in s.mapped for p in range(low, high, PAGE)}
                for s in backend.slots()
                if s.logged and all(backend.write(low) for low, _ in s.mapped)
            }
            for pages in written.values():
                assert all(backend.write(page) for page in pages)
            backend.deleted.clear()
            await told(view)
            gone = {s.slot for s in backend.deleted}
            for slot in backend.slots():
                old = before.get(slot.key)
                if old is None or old.slot in gone:
                    continue
                assert slot.slot == old.slot
                assert (slot.gpa, slot.size) == (old.gpa, old.size)
                if slot.slot in written:
                    mapped = {p for low, high in slot.mapped for p in range(low, high, PAGE)}
                    assert backend.dirty(slot.slot) == written[slot.slot] & mapped

    asyncio.run(run())


@STRATEGIES
@given(LIVES, st.integers(0, 40), st.sampled_from([None, 1]))
def test_after_a_failure_anywhere_a_resync_puts_it_right(
    strategy: Strategy, maps: list[FlatView], fail_in: int, max_holes: int | None
) -> None:
    async def run() -> None:
        mirror, backend, told = mirror_of(strategy, max_holes=max_holes)
        backend.fail_in = fail_in
        await tell_all(told, maps)
        assume(backend.fail_in < 0)
        assert not mirror.report().in_step
        assert not backend.pausing.paused
        backend.fail_in = None
        await mirror.resync()
        assert mirror.report().in_step
        assert backend.content() == content_of(maps[-1])
        await told(maps[0])
        assert backend.content() == content_of(maps[0])
        assert mirror.report().rebuilt >= 1

    asyncio.run(run())
