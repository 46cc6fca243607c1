"""The rounds of a comparison: order, what counts, putting back, ends before the end."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from qmp_memlistener.errors import TargetLost
from qmp_memlistener.records import StallRecord
from qmp_memlistener.updates.compare import (
    CONTROL,
    INTERRUPTED,
    CompareOptions,
    Comparison,
    compare_rounds,
)
from qmp_memlistener.updates.model import Outcome, Result, Strategy, UpdateRefused
from tests.unit.updates.compare_fakes import US, FakeGuest, stall

D, P, H = Strategy.DIRECT, Strategy.PAUSE, Strategy.HOLE
WINDOW_S = 0.002


async def run(
    guest: FakeGuest, *strategies: Strategy, repeat: int = 3, seed: int = 1
) -> Comparison:
    return await compare_rounds(guest, guest, strategies, CompareOptions(repeat, WINDOW_S, seed))


def order(found: Comparison) -> list[str]:
    return [r.strategy for r in found.rounds]


@pytest.mark.asyncio
async def test_every_strategy_and_the_control_once_a_round_after_a_warm_up() -> None:
    guest = FakeGuest()
    found = await run(guest, D, P, repeat=4)
    assert guest.log[:5] == ["begin", D, "back", P, "back"]
    assert len(found.rounds) == 12
    for first in range(0, 12, 3):
        assert sorted(order(found)[first : first + 3]) == sorted([D, P, CONTROL])
    assert [r.order for r in found.rounds] == list(range(12))
    assert guest.subscribers == 0
    assert found.exit_code == 0


@pytest.mark.asyncio
async def test_the_order_is_random_and_the_seed_repeats_it() -> None:
    orders = [order(await run(FakeGuest(), D, P, H, repeat=4, seed=s)) for s in (1, 1, 2)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@pytest.mark.asyncio
async def test_what_was_seen_in_the_window_counts_for_its_round_only() -> None:
    guest = FakeGuest()
    guest.costs = {D: 50, P: 500}
    found = await run(guest, D, P, repeat=5)
    for each in found.rounds:
        changed = each.strategy != CONTROL
        # the one that was over before is not there, the one that a ping brackets is
        assert len(each.stalls) == changed
        assert (each.slot_ops, each.slots) == ((3, 2) if changed else (0, 0))
        assert each.transitions == (2 if changed else 1)
    (pause,) = [s for s in found.summary if s.strategy == P]
    assert pause.p50_ns == pause.max_ns == 501_000
    (seen,) = [d for d in found.differences if (d.a, d.b) == (D, P)]
    assert seen.seen
    assert seen.median_diff_ns == -450_000
    document = msgspec.json.decode(msgspec.json.encode(found))
    assert document["schema"] == 1
    assert set(document["summary"][0]) >= {"strategy", "kind", "n", "p50_ns", "p99_ns", "max_ns"}
    assert set(document["differences"][0]) >= {"a", "b", "kind", "median_diff_ns", "ci95_ns"}


@pytest.mark.asyncio
async def test_without_a_window_a_round_is_as_long_as_its_change() -> None:
    guest = FakeGuest()
    guest.answers = {(P, 3): "failed"}
    found = await compare_rounds(guest, guest, [D, P], CompareOptions(2, None, 1))
    assert found.window_ns == 0
    for each in found.rounds:
        if each.strategy == CONTROL:
            assert each.took_ns > 0
            assert each.transitions == 1
        elif each.outcome is Result.DONE:
            assert each.took_ns == US
            assert (each.slot_ops, len(each.stalls)) == (3, 1)
    assert sum(r.outcome is Result.FAILED for r in found.rounds) <= 1
    assert found.ended_early is None


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", ["refused", "failed"])
async def test_a_strategy_that_is_not_possible_is_left_out(answer: str) -> None:
    guest = FakeGuest()
    guest.answers = {(P, -1): answer}
    found = await run(guest, D, P)
    assert [(s.strategy, s.reason) for s in found.skipped] == [(P, f"{answer} here")]
    assert set(order(found)) == {D, CONTROL}
    guest = FakeGuest()
    guest.answers = {(P, -1): answer}
    with pytest.raises(UpdateRefused, match=f"{answer} here"):
        await run(guest, P)


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", ["refused", "failed", "partial"])
async def test_a_round_that_is_not_done_is_told_and_left_out(answer: str) -> None:
    guest = FakeGuest()
    guest.answers = {(D, 2): answer}
    found = await run(guest, D)
    assert [r.outcome for r in found.rounds if r.strategy == D].count(Result(answer)) == 1
    assert len(found.rounds) == 6
    assert {s.strategy: s.n for s in found.summary} == {D: 2, CONTROL: 3}
    assert not guest.is_changed


@pytest.mark.asyncio
async def test_a_guest_that_cannot_be_put_back_ends_it() -> None:
    guest = FakeGuest()
    guest.stuck_at = 2
    found = await run(guest, D, repeat=5)
    assert found.ended_early == "it stays"
    assert found.remedy == "take it out by hand"
    assert found.exit_code == 1
    assert order(found).count(D) == 2, "the last round is over and counts"
    assert guest.log[-1] == "back"


@pytest.mark.asyncio
async def test_a_guest_that_is_lost_leaves_the_rounds_so_far() -> None:
    class Mortal(FakeGuest):
        async def change(self, strategy: Strategy) -> Outcome:
            if self.changes == 3:
                raise TargetLost("the guest went away")
            return await super().change(strategy)

        async def put_back(self) -> None:
            if self.changes == 3 and not self.is_changed:
                raise TargetLost("the guest went away")
            await super().put_back()

    found = await run(Mortal(), D, repeat=5)
    assert found.ended_early == "the guest went away"
    assert found.exit_code == 3
    assert order(found).count(D) == 2


@pytest.mark.asyncio
async def test_interrupted_it_puts_the_guest_back_and_tells_the_rounds_so_far() -> None:
    guest = FakeGuest()
    guest.hangs_at = 3
    task = asyncio.create_task(run(guest, D, repeat=5))
    await guest.reached.wait()
    task.cancel()
    found = await task
    assert found.ended_early == INTERRUPTED
    assert found.exit_code == 130
    assert order(found).count(D) == 2
    assert not guest.is_changed
    assert guest.log[-1] == "back"
    assert guest.subscribers == 0


@pytest.mark.asyncio
async def test_interrupted_in_the_warm_up_there_is_nothing_to_tell() -> None:
    guest = FakeGuest()
    guest.hangs_at = 0
    task = asyncio.create_task(run(guest, D))
    await guest.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not guest.is_changed


@pytest.mark.asyncio
async def test_interrupted_and_not_put_back_says_the_latter() -> None:
    guest = FakeGuest()
    guest.hangs_at = guest.stuck_at = 2
    task = asyncio.create_task(run(guest, D))
    await guest.reached.wait()
    task.cancel()
    found = await task
    assert found.ended_early == "it stays"
    assert found.exit_code == 1
    assert task.cancelling() == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("times", [1, 2])
async def test_interrupted_while_it_puts_back(times: int) -> None:
    """Once: that is finished. Twice: it is not, and that is said."""
    guest = FakeGuest()
    guest.slow_put_back = True
    task = asyncio.create_task(run(guest, D))
    while guest.log.count("back") < 2:
        guest.reached.clear()
        await guest.reached.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    found = await task
    assert found.ended_early is not None
    if times == 1:
        assert found.ended_early == INTERRUPTED
        assert not guest.is_changed
    else:
        assert "interrupted again" in found.ended_early
        assert "device d0 is there" in found.ended_early
        assert guest.is_changed


@pytest.mark.asyncio
async def test_interrupted_and_then_again_while_it_puts_back() -> None:
    """The first brought it there, the second ends it."""
    guest = FakeGuest()
    guest.hangs_at = 2
    guest.slow_put_back = True
    task = asyncio.create_task(run(guest, D))
    while guest.changes < 3:
        guest.reached.clear()
        await guest.reached.wait()
    guest.reached.clear()
    task.cancel()
    await guest.reached.wait()
    task.cancel()
    found = await task
    assert found.ended_early is not None
    assert "interrupted again" in found.ended_early
    assert guest.is_changed


@pytest.mark.asyncio
async def test_a_round_in_which_nobody_measured_is_missing_and_not_zero() -> None:
    guest = FakeGuest()
    guest.costs = {D: 50, P: 50}
    guest.unmeasured_at = {2, 3, 4}  # the first round of each, after two warm-ups
    found = await run(guest, D, P, repeat=6)
    assert [r.measured for r in found.rounds[:4]] == [[], [], [], ["commit"]]
    for summary in found.summary:
        assert (summary.n, summary.missing) == (5, 1)
        expected = 0 if summary.strategy == CONTROL else 51_000
        assert (summary.p50_min_ns, summary.max_ns) == (expected, expected)
    (both,) = [d for d in found.differences if (d.a, d.b) == (D, P)]
    assert both.ci95_ns == (0, 0)


@pytest.mark.asyncio
async def test_what_was_never_measured_has_no_value() -> None:
    guest = FakeGuest()
    guest.kinds = frozenset()
    found = await run(guest, D, repeat=5)
    assert {(s.n, s.missing, s.p50_ns, s.max_ns) for s in found.summary} == {(0, 5, None, None)}
    assert {(d.median_diff_ns, d.ci95_ns, d.seen, d.enough) for d in found.differences} == {
        (None, None, False, False)
    }
    assert msgspec.json.decode(msgspec.json.encode(found))["summary"][0]["max_ns"] is None


@pytest.mark.asyncio
async def test_probes_that_take_long_are_waited_for_and_named() -> None:
    guest = FakeGuest()
    guest.late = [("uprobes", "pulse"), ("pulse",)]
    said: list[str] = []
    options = CompareOptions(1, WINDOW_S, 1)
    found = await compare_rounds(guest, guest, (D,), options, said.append)
    assert said[:2] == [
        "waiting for uprobes, pulse to start",
        "pulse not started after 30 s: what no other probe measures is missing",
    ]
    assert [p.name for p in found.probes] == ["uprobes"]


@pytest.mark.asyncio
async def test_a_stall_that_is_told_late_counts_for_the_round_that_it_was_in() -> None:
    class Late(FakeGuest):
        held: StallRecord | None = None

        async def put_back(self) -> None:
            if self.held is not None:
                self.emit(self.held)
            await super().put_back()

        async def change(self, strategy: Strategy) -> Outcome:
            found = await super().change(strategy)
            self.held = stall("commit", found.phases[0].start_ns + US, 70 * US)
            return found

    found = await run(Late(), D, repeat=3)
    assert [len(r.stalls) for r in found.rounds if r.strategy == D] == [2, 2, 2]
