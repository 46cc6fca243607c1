"""The rules of the resume guard, without a process or a QEMU: `Promise`."""

from __future__ import annotations

import pytest

from qmp_memlistener.updates.guard_process import Phase, Promise

S = 1_000_000_000
MAX_PAUSE = 2 * S


@pytest.fixture
def promise() -> Promise:
    """One that is armed: the guest runs and the agent may stop it."""
    promise = Promise(MAX_PAUSE)
    assert promise.arm()
    assert promise.due(0) == "query-status"
    promise.told_status(0, 0, "running")
    assert promise.phase is Phase.ARMED
    return promise


def test_nothing_is_due_while_nothing_is_promised() -> None:
    promise = Promise(MAX_PAUSE)
    promise.stopped(0)
    assert promise.due(10 * S) is None
    assert promise.wake_at() is None
    assert promise.phase is Phase.IDLE


@pytest.mark.parametrize("status", ["paused", "prelaunch", "inmigrate", "io-error", "suspended"])
def test_a_guest_that_does_not_run_is_not_guarded(status: str) -> None:
    promise = Promise(MAX_PAUSE)
    promise.arm()
    promise.told_status(0, 0, status)
    promise.stopped(1)
    assert (promise.phase, promise.status) == (Phase.IDLE, status)
    assert promise.due(10 * S) is None


def test_an_ordinary_pause_needs_no_command(promise: Promise) -> None:
    promise.stopped(1 * S)
    assert promise.due(1 * S) is None
    assert promise.wake_at() == 3 * S
    promise.resumed()
    assert promise.phase is Phase.KEPT
    assert promise.due(100 * S) is None
    promise.release()
    assert (promise.phase, promise.acted) == (Phase.IDLE, False)


def test_a_pause_that_lasts_too_long_is_ended(promise: Promise) -> None:
    promise.stopped(1 * S)
    assert promise.due(3 * S - 1) is None
    assert promise.due(3 * S) == "query-status"
    promise.told_status(3 * S, 3 * S, "paused")
    assert promise.due(3 * S) == "cont"
    promise.resumed()
    promise.continued(3 * S, None)
    assert (promise.phase, promise.acted) == (Phase.KEPT, True)
    assert promise.why == "it was paused for more than 2 s"


def test_a_stop_after_the_resume_is_somebody_elses(promise: Promise) -> None:
    promise.stopped(1 * S)
    promise.resumed()
    promise.stopped(2 * S)
    promise.abandoned(2 * S, "gone", 2 * S)
    assert promise.phase.is_settled
    assert promise.due(100 * S) is None


@pytest.mark.parametrize(
    "status", ["internal-error", "io-error", "shutdown", "postmigrate", "save-vm", "inmigrate"]
)
def test_a_guest_that_stands_for_another_reason_is_left_alone(
    promise: Promise, status: str
) -> None:
    promise.stopped(1 * S)
    promise.abandoned(2 * S, "gone", 2 * S)
    assert promise.due(2 * S) == "query-status"
    promise.told_status(2 * S, 2 * S, status)
    assert (promise.phase, promise.status, promise.acted) == (Phase.LEFT, status, False)
    assert promise.due(100 * S) is None


def test_a_stop_may_take_effect_after_the_agents_end(promise: Promise) -> None:
    promise.abandoned(1 * S, "gone", 1 * S)
    assert promise.due(1 * S) == "query-status"
    promise.told_status(1 * S, 1 * S, "running")
    assert promise.due(1 * S) is None, "not at once again"
    promise.stopped(1 * S)
    at = promise.wake_at()
    assert at is not None
    assert promise.due(at) == "query-status"
    promise.told_status(at, at, "paused")
    assert promise.due(at) == "cont"


def test_looking_on_after_the_agents_end_is_bounded(promise: Promise) -> None:
    promise.abandoned(1 * S, "gone", 1 * S)
    now, asked = 1 * S, 0
    while not promise.phase.is_settled:
        assert promise.due(now) == "query-status"
        promise.told_status(now, now, "running")
        asked += 1
        now = promise.wake_at() or now
    assert 2 <= asked <= 10
    assert now < 2 * S
    assert not promise.acted


def test_answers_from_before_the_agents_end_prove_nothing(promise: Promise) -> None:
    promise.abandoned(1 * S, "it closed its guard", 2 * S)
    now = 1 * S
    while now < 2 * S:
        assert promise.due(now) == "query-status"
        promise.told_status(now, now, "running")
        assert promise.phase is Phase.ARMED
        now = promise.wake_at() or now


def test_cont_is_tried_again_for_a_while(promise: Promise) -> None:
    promise.stopped(1 * S)
    promise.abandoned(1 * S, "gone", 1 * S)
    now, tries = 1 * S, 0
    while promise.phase is Phase.STOPPED:
        assert promise.due(now) == "query-status"
        promise.told_status(now, now, "paused")
        assert promise.due(now) == "cont"
        promise.continued(now, "There is a dump in process, please wait.")
        tries += 1
        now = promise.wake_at() or now
    assert promise.phase is Phase.LEFT
    assert promise.obstacle == "There is a dump in process, please wait."
    assert 10 < tries < 1000
    assert 5 * S < now < 60 * S


def test_a_second_pause_is_refused_while_the_first_is_not_over(promise: Promise) -> None:
    assert not promise.arm(), "its STOP may still come"
    promise.stopped(1 * S)
    assert not promise.arm()
    promise.resumed()
    assert promise.arm()
    assert promise.phase is Phase.ASKED


def test_arming_again_forgets_what_was(promise: Promise) -> None:
    promise.stopped(0)
    assert promise.due(MAX_PAUSE) == "query-status"
    promise.told_status(0, 0, "paused")
    promise.continued(0, None)
    promise.release()
    assert promise.arm()
    promise.told_status(0, 0, "running")
    assert (promise.acted, promise.why, promise.due(100 * S)) == (False, "", None)


def test_a_release_in_the_middle_ends_it(promise: Promise) -> None:
    promise.stopped(0)
    assert promise.due(MAX_PAUSE) == "query-status"
    promise.release()
    promise.told_status(0, 0, "paused")
    assert promise.phase is Phase.IDLE
    assert promise.due(100 * S) is None
