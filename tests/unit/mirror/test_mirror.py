"""What a mirror says and does when it is behind, fails, is cancelled, or cannot pause."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import msgspec
import pytest

from qmp_memlistener import listener as listener_module
from qmp_memlistener.errors import OperationFailed, TargetLost
from qmp_memlistener.listener import Dispatcher, MemoryListener
from qmp_memlistener.memslots import LOG_DIRTY_PAGES, OpKind, Slot
from qmp_memlistener.mirror.backend import ModelBackend
from qmp_memlistener.mirror.mirror import Mirror
from qmp_memlistener.records import SlotOp
from qmp_memlistener.topology import FlatView, MemoryMap, diff
from qmp_memlistener.tracking import Change
from qmp_memlistener.updates.model import Strategy
from tests.unit.memslots.memslots_model import PAGE, content_of, io, ram, rom
from tests.unit.mirror.mirror_model import EMPTY, mirror_of

WHOLE = FlatView([ram(0, 8 * PAGE)])
HOLED = FlatView([ram(0, 2 * PAGE), rom(2 * PAGE, PAGE), ram(3 * PAGE, 5 * PAGE)])
MMIO = FlatView([*HOLED, io(64 * PAGE, PAGE)])
STRATEGIES = pytest.mark.parametrize("strategy", list(Strategy))


@STRATEGIES
@pytest.mark.asyncio
async def test_counts(strategy: Strategy) -> None:
    mirror, backend, told = mirror_of(strategy)
    assert mirror.report().why_not == "no map was received yet"
    await told(WHOLE)
    await told(HOLED)
    await told(MMIO)
    await told(WHOLE)
    report = mirror.report()
    assert report.in_step
    assert (report.transitions, report.updates.count, report.rebuilt) == (4, 3, 0)
    by_kind = {
        Strategy.DIRECT: (5, 4, 0, 0),
        Strategy.PAUSE: (5, 4, 0, 0),
        Strategy.HOLE: (2, 1, 1, 1),
    }
    kinds = (
        report.slots_added,
        report.slots_deleted,
        report.holes_marked,
        report.holes_unmarked,
    )
    # whole; X to X1, R, X2; nothing; X1, R, X2 to X
    assert kinds == by_kind[strategy]
    assert report.operations == sum(kinds) == len(backend.calls)
    assert report.exposed == (2 if strategy is Strategy.DIRECT else 0)
    assert report.pauses.count == (3 if strategy is Strategy.PAUSE else 0)
    assert report.pauses.total_ns == report.pauses.count * 10
    assert report.notes == []
    assert msgspec.json.decode(msgspec.json.encode(report))["strategy"] == str(strategy)


@pytest.mark.asyncio
async def test_a_mirror_that_shall_pause_needs_to_know_how() -> None:
    with pytest.raises(ValueError, match="mirroring"):
        Mirror(ModelBackend(), Strategy.PAUSE)


@pytest.mark.asyncio
async def test_a_guest_that_cannot_be_paused_is_followed_all_the_same() -> None:
    mirror, backend, told = mirror_of(Strategy.PAUSE)
    await told(WHOLE)
    backend.pausing.refuse = OperationFailed("the guard is gone")
    await told(HOLED)
    assert backend.content() == content_of(HOLED)
    report = mirror.report()
    assert (report.in_step, report.unpaused, report.pauses.count) == (True, 1, 1)
    assert report.notes == ["before an update of the mirror: the guard is gone"]


@pytest.mark.asyncio
async def test_what_came_of_a_pause_that_was_cancelled_before_its_block_is_told() -> None:
    mirror, backend, told = mirror_of(Strategy.PAUSE)
    await told(WHOLE)
    backend.pausing.cancelled_with = "the guest was migrated meanwhile"
    with pytest.raises(asyncio.CancelledError):
        await told(HOLED)
    assert mirror.report().notes[0] == "the guest was migrated meanwhile"
    assert mirror.report().pauses.count == 1


@pytest.mark.asyncio
async def test_a_guest_that_goes_while_it_is_paused_leaves_the_mirror_in_step() -> None:
    mirror, backend, told = mirror_of(Strategy.PAUSE)
    backend.pausing.fail_to_resume = TargetLost("QEMU is gone")
    await told(HOLED)
    assert backend.content() == content_of(HOLED)
    assert len(backend.calls) == 3, "and the update was made once"
    report = mirror.report()
    assert (report.in_step, report.unpaused) == (True, 0)
    assert report.notes == ["after an update of the mirror: QEMU is gone"]


@STRATEGIES
@pytest.mark.asyncio
async def test_a_failure_is_reported_once_and_following_ends(strategy: Strategy) -> None:
    mirror, backend, told = mirror_of(strategy)
    await told(WHOLE)
    backend.fail_in = 1
    with pytest.raises(OperationFailed, match=r"no longer in step.*a call of the test"):
        await told(HOLED)
    assert not mirror.report().in_step
    assert not backend.pausing.paused
    backend.fail_in = None
    calls = len(backend.calls)
    await told(WHOLE)
    await told(HOLED)
    assert len(backend.calls) == calls, "it waits for resync"
    assert not mirror.report().in_step
    await mirror.resync()
    assert mirror.report().in_step
    assert backend.content() == content_of(HOLED)
    notes = mirror.report().notes
    assert notes[0].startswith("out of step: the backend failed in ")
    assert notes[1:] == ["in step again"]


@pytest.mark.asyncio
async def test_resync_that_fails_can_be_tried_again() -> None:
    mirror, backend, told = mirror_of(Strategy.DIRECT)
    with pytest.raises(OperationFailed, match="no map was received yet"):
        await mirror.resync()
    await told(HOLED)
    backend.fail_in = 2
    with pytest.raises(OperationFailed, match="call of the test"):
        await mirror.resync()
    assert not mirror.report().in_step
    backend.fail_in = None
    await mirror.resync(MemoryMap(WHOLE, (), rendered=True))
    assert mirror.report().in_step
    assert backend.content() == content_of(WHOLE)


@pytest.mark.asyncio
async def test_a_check_that_finds_something_ends_following() -> None:
    mirror, backend, told = mirror_of(Strategy.HOLE)
    await told(HOLED)
    assert await mirror.check(MMIO) == ()
    (found,) = await mirror.check(WHOLE)
    assert (found.start, found.end) == (2 * PAGE, 3 * PAGE)
    report = mirror.report()
    assert report.differences == [found]
    assert report.why_not == str(found)
    assert (report.in_step, report.checks) == (False, 2)
    await mirror.resync(WHOLE)
    assert mirror.report().in_step
    assert backend.content() == content_of(WHOLE)


class Slow(ModelBackend):
    """An async backend that waits to be let on before each slot it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.adding = asyncio.Event()
        self.go = asyncio.Event()

    async def wait(self, slot: Slot) -> None:
        self.adding.set()
        await self.go.wait()
        ModelBackend.add_slot(self, slot)

    def add_slot(self, slot: Slot) -> Awaitable[None]:  # type: ignore[override]  # it is async
        return self.wait(slot)


def told_of(before: FlatView, after: FlatView) -> Change:
    return Change(after, diff(before, after), ())


@pytest.mark.asyncio
async def test_a_mirror_that_is_too_slow_goes_on_from_the_next_whole_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener_module, "QUEUE_LIMIT", 1)
    failures: list[BaseException] = []

    def failed(listener: MemoryListener, name: str, exc: BaseException) -> None:  # noqa: ARG001
        failures.append(exc)

    backend = Slow()
    mirror = Mirror(backend, strategy=Strategy.HOLE)
    dispatcher = Dispatcher(failed)
    dispatcher.register(mirror, WHOLE)
    await backend.adding.wait()
    # one is waited for, one waits, the rest is dropped
    dispatcher.dispatch(
        [
            told_of(WHOLE, MMIO),
            told_of(MMIO, WHOLE),
            told_of(WHOLE, HOLED),
        ]
    )
    assert not mirror.report().in_step
    backend.go.set()
    await dispatcher.idle()
    report = mirror.report()
    assert (report.in_step, report.dropped) == (False, 2)
    assert report.why_not is not None
    assert "2 changes dropped" in report.why_not
    dispatcher.dispatch([told_of(HOLED, WHOLE)])
    await dispatcher.idle()
    report = mirror.report()
    assert (report.in_step, report.rebuilt) == (True, 0)
    assert report.notes[-1] == "in step again"
    assert await mirror.check(WHOLE) == ()
    await dispatcher.close()
    assert failures == []


@pytest.mark.asyncio
async def test_a_mirror_that_is_cancelled_on_its_way_is_out_of_step() -> None:
    backend = Slow()
    mirror = Mirror(backend)
    mirror.begin()
    task = asyncio.create_task(mirror.commit(diff(EMPTY, HOLED)))
    await backend.adding.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert mirror.report().why_not == "an update was cancelled on its way"
    backend.go.set()
    await mirror.resync()
    assert mirror.report().in_step
    assert await mirror.check(HOLED) == ()


def slot_op(t_ns: int) -> SlotOp:
    return SlotOp(
        t_ns=t_ns, as_id=0, slot=0, op=OpKind.ADD, gpa=0, size=PAGE, flags=0, ret=0,
        predicted=False, transition=1,
    )  # fmt: skip


@pytest.mark.asyncio
async def test_the_lag_counts_from_qemus_first_operation() -> None:
    mirror, _, told = mirror_of(Strategy.DIRECT)
    await told(WHOLE)
    assert mirror.report().lag.count == 0, "of the map at the beginning there is none"
    mirror.begin()
    mirror.slot_changed(slot_op(1000))
    mirror.slot_changed(slot_op(5000))
    await mirror.commit(diff(WHOLE, HOLED))
    report = mirror.report()
    assert report.lag.count == 1
    assert (report.lag.longest_ns or 0) > (report.updates.longest_ns or 0) > 0
    assert report.pauses.longest_ns is None
    await mirror.log_start(HOLED[0])
    assert mirror.report().updates.count == 3
    assert mirror.report().lag.count == 1, "a log that starts is no transition"
    await told(WHOLE)
    assert mirror.report().lag.count == 1


@STRATEGIES
@pytest.mark.asyncio
async def test_dirty_logging_follows_the_guest(strategy: Strategy) -> None:
    mirror, backend, told = mirror_of(strategy)
    await told(HOLED)

    def logged() -> set[str | None]:
        return {s.block for s in backend.slots() if s.flags & LOG_DIRTY_PAGES}

    assert logged() == set()
    await mirror.log_start(HOLED[0])
    assert logged() == {"pc.ram"}
    changed = mirror.report().flags_changed
    assert changed == (1 if strategy is Strategy.HOLE else 2)
    await mirror.log_start(HOLED[2])
    assert mirror.report().flags_changed == changed, "it is logged already"
    # within a transition: together with it
    mirror.begin()
    await mirror.log_stop(HOLED[0])
    assert logged() == {"pc.ram"}
    await mirror.commit(diff(HOLED, MMIO))
    assert logged() == set()


@pytest.mark.asyncio
async def test_ram_that_nobody_knows_yet_is_left_out_until_the_next_map() -> None:
    mirror, backend, told = mirror_of(Strategy.HOLE)
    await told(WHOLE)
    unknown = FlatView([*WHOLE, ram(16 * PAGE, PAGE, "RAM of slot 9", 0)])
    await told(unknown)
    assert mirror.report().in_step
    assert backend.content() == content_of(WHOLE)
    await told(FlatView([*WHOLE, ram(16 * PAGE, PAGE, "dimm", 0)]))
    assert backend.content()[16] == ("dimm", 0)


@pytest.mark.asyncio
async def test_slots_that_become_one_again_without_any_that_follows_a_block() -> None:
    """Two holes too many, at the ends; later they are not counted: such a table is made anew."""
    mirror, backend, told = mirror_of(Strategy.HOLE, max_holes=1)
    split = FlatView([ram(2 * PAGE, PAGE), ram(4 * PAGE, PAGE)])
    for view in (WHOLE, split, FlatView([*split, io(64 * PAGE, PAGE)])):
        await told(view)
        assert mirror.report().in_step
        assert backend.content() == content_of(view)
    assert mirror.report().rebuilt == 1
    assert len(backend.slots()) == 1
