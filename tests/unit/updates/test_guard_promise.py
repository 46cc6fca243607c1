"""The rules of the resume guard, without a process or a QEMU: `Promise`."""

from __future__ import annotations

import pytest

from qmp_memlistener.updates.pause.promise import LOOK_EVERY_NS, MIGRATED, Due, Promise, Stage

S = 1_000_000_000
MAX_PAUSE = 2 * S


@pytest.fixture
def promise() -> Promise:
    """One that is armed: the guest runs and the agent may stop it."""
    promise = Promise(MAX_PAUSE)
    assert promise.arm(0)
    assert promise.due(0) is Due.LOOK
    promise.told(0, 0, "running", "none")
    assert promise.stage is Stage.ARMED
    return promise


def test_nothing_is_due_while_nothing_is_promised() -> None:
    promise = Promise(MAX_PAUSE)
    promise.stopped(0)
    assert promise.due(10 * S) is None
    assert promise.wake_at() is None
    assert promise.stage is Stage.IDLE


@pytest.mark.parametrize("status", ["paused", "prelaunch", "inmigrate", "io-error", "suspended"])
def test_a_guest_that_does_not_run_is_not_guarded(status: str) -> None:
    promise = Promise(MAX_PAUSE)
    promise.arm(0)
    promise.told(0, 0, status, "none")
    promise.stopped(1)
    assert (promise.stage, promise.status) == (Stage.IDLE, status)
    assert promise.due(10 * S) is None


def test_an_ordinary_pause_needs_no_command(promise: Promise) -> None:
    promise.stopped(1 * S)
    assert promise.due(1 * S) is None
    assert promise.wake_at() == 1 * S + LOOK_EVERY_NS
    promise.resumed()
    assert promise.stage is Stage.KEPT
    assert promise.due(100 * S) is None
    promise.release()
    assert (promise.stage, promise.acted) == (Stage.IDLE, False)


def test_a_pause_that_lasts_too_long_is_ended(promise: Promise) -> None:
    promise.stopped(1 * S)
    promise.told(2 * S, 3 * S - 1, "paused", "none")
    assert promise.due(3 * S - 1) is None
    assert promise.wake_at() == 3 * S
    assert promise.due(3 * S) is Due.LOOK
    promise.told(3 * S, 3 * S, "paused", "none")
    assert promise.due(3 * S) is Due.CONT
    promise.resumed()
    promise.continued(3 * S, None)
    assert (promise.stage, promise.acted) == (Stage.KEPT, True)
    assert promise.why == "it was paused for more than 2 s"


def test_a_stop_after_the_resume_is_somebody_elses(promise: Promise) -> None:
    promise.stopped(1 * S)
    promise.resumed()
    promise.stopped(2 * S)
    promise.abandoned(2 * S, "gone", 2 * S)
    assert promise.stage.is_settled
    assert promise.due(100 * S) is None


@pytest.mark.parametrize(
    "status", ["internal-error", "io-error", "shutdown", "postmigrate", "save-vm", "inmigrate"]
)
def test_a_guest_that_stands_for_another_reason_is_left_alone(
    promise: Promise, status: str
) -> None:
    promise.stopped(1 * S)
    promise.abandoned(2 * S, "gone", 2 * S)
    assert promise.due(2 * S) is Due.LOOK
    promise.told(2 * S, 2 * S, status, "none")
    assert (promise.stage, promise.status, promise.acted) == (Stage.LEFT, status, False)
    assert promise.due(100 * S) is None


def test_a_stop_may_take_effect_after_the_agents_end(promise: Promise) -> None:
    promise.abandoned(1 * S, "gone", 1 * S)
    assert promise.due(1 * S) is Due.LOOK
    promise.told(1 * S, 1 * S, "running", "none")
    assert promise.due(1 * S) is None, "not at once again"
    promise.stopped(1 * S)
    at = promise.wake_at()
    assert at is not None
    assert promise.due(at) is Due.LOOK
    promise.told(at, at, "paused", "none")
    assert promise.due(at) is Due.CONT


def test_looking_on_after_the_agents_end_is_bounded(promise: Promise) -> None:
    promise.abandoned(1 * S, "gone", 1 * S)
    now, asked = 1 * S, 0
    while not promise.stage.is_settled:
        assert promise.due(now) is Due.LOOK
        promise.told(now, now, "running", "none")
        asked += 1
        now = promise.wake_at() or now
    assert 2 <= asked <= 10
    assert now < 2 * S
    assert not promise.acted


def test_answers_from_before_the_agents_end_prove_nothing(promise: Promise) -> None:
    promise.abandoned(1 * S, "it closed its guard", 2 * S)
    now = 1 * S
    while now < 2 * S:
        assert promise.due(now) is Due.LOOK
        promise.told(now, now, "running", "none")
        assert promise.stage is Stage.ARMED
        now = promise.wake_at() or now


def test_cont_is_tried_again_for_a_while(promise: Promise) -> None:
    promise.stopped(1 * S)
    promise.abandoned(1 * S, "gone", 1 * S)
    now, tries = 1 * S, 0
    while promise.stage is Stage.STOPPED:
        assert promise.due(now) is Due.LOOK
        promise.told(now, now, "paused", "none")
        assert promise.due(now) is Due.CONT
        promise.continued(now, "There is a dump in process, please wait.")
        tries += 1
        now = promise.wake_at() or now
    assert promise.stage is Stage.LEFT
    assert promise.obstacle == "There is a dump in process, please wait."
    assert 10 < tries < 1000
    assert 5 * S < now < 60 * S


def test_a_second_pause_is_refused_while_the_first_is_not_over(promise: Promise) -> None:
    assert not promise.arm(0), "its STOP may still come"
    promise.stopped(1 * S)
    assert not promise.arm(0)
    promise.resumed()
    assert promise.arm(0)
    assert promise.stage is Stage.ASKED


def test_arming_again_forgets_what_was(promise: Promise) -> None:
    promise.stopped(0)
    assert promise.due(MAX_PAUSE) is Due.LOOK
    promise.told(0, 0, "paused", "none")
    promise.continued(0, None)
    promise.release()
    assert promise.arm(0)
    promise.told(0, 0, "running", "none")
    assert (promise.acted, promise.why, promise.due(100 * S)) == (False, "", None)


def test_a_release_in_the_middle_ends_it(promise: Promise) -> None:
    promise.stopped(0)
    assert promise.due(MAX_PAUSE) is Due.LOOK
    promise.release()
    promise.told(0, 0, "paused", "none")
    assert promise.stage is Stage.IDLE
    assert promise.due(100 * S) is None


# -- migration -------------------------------------------------------------------------------


@pytest.mark.parametrize("migration", ["setup", "active", "pre-switchover", "device", "of-2040"])
def test_a_guest_that_migrates_is_not_to_be_stopped(migration: str) -> None:
    promise = Promise(MAX_PAUSE)
    promise.arm(0)
    promise.told(0, 0, "running", migration)
    assert (promise.stage, promise.migration) == (Stage.IDLE, migration)


@pytest.mark.parametrize("migration", ["", "none", "completed", "failed", "cancelled"])
def test_a_migration_that_is_over_is_none(migration: str) -> None:
    promise = Promise(MAX_PAUSE)
    promise.arm(0)
    promise.told(0, 0, "running", migration)
    assert promise.stage is Stage.ARMED


def test_the_answer_to_an_earlier_question_is_none(promise: Promise) -> None:
    promise.release()
    promise.arm(5 * S)
    promise.told(4 * S, 5 * S, "paused", "none")
    assert promise.due(5 * S) is Due.LOOK
    promise.told(5 * S, 5 * S, "running", "none")
    assert promise.stage is Stage.ARMED


def looks(promise: Promise, now: int, end: int) -> int:
    """The looks that were due from `now` to `end`, all showing that nothing migrates."""
    count = 0
    while now < end:
        if promise.due(now) is Due.LOOK:
            promise.told(now, now, "paused", "none")
            count += 1
        now = promise.wake_at() or end
    return count


def test_a_held_pause_is_looked_at_again_and_again(promise: Promise) -> None:
    promise.stopped(1 * S)
    assert looks(promise, 1 * S, 1 * S + 100 * LOOK_EVERY_NS) == 99


def test_a_pause_whose_cont_is_on_its_way_is_left_in_peace(promise: Promise) -> None:
    promise.release()
    promise.arm(1, held=False)
    promise.told(1, 1, "running", "none")
    promise.stopped(1 * S)
    assert looks(promise, 1 * S, 1 * S + 9 * LOOK_EVERY_NS) == 0


@pytest.mark.parametrize("told", ["in a look", "by an event"])
def test_a_migration_ends_the_pause(promise: Promise, told: str) -> None:
    promise.stopped(1 * S)
    at = 1 * S + (LOOK_EVERY_NS if told == "in a look" else 1)
    if told == "by an event":
        promise.migrating(at, "setup")
    assert promise.due(at) is Due.LOOK
    promise.told(at, at, "paused", "setup")
    assert promise.due(at) is Due.CONT
    promise.resumed()
    promise.continued(at, None)
    assert promise.due(at) is Due.LOOK, "it may have come too late"
    promise.told(at, at, "running", "active")
    assert (promise.stage, promise.acted) == (Stage.KEPT, True)
    assert promise.why == "a migration began (setup)"


def test_a_guest_that_runs_after_its_migration_is_stopped_again(promise: Promise) -> None:
    promise.stopped(1 * S)
    promise.told(2 * S, 2 * S, "paused", "active")
    assert promise.due(2 * S) is Due.CONT
    promise.resumed()
    promise.continued(2 * S, None)
    promise.told(2 * S, 2 * S, "running", "completed")
    assert promise.due(2 * S) is Due.STOP
    promise.stopped_again()
    assert (promise.stage, promise.acted, promise.obstacle) == (Stage.LEFT, False, MIGRATED)


def test_a_guest_that_was_migrated_in_the_pause_is_left_alone(promise: Promise) -> None:
    promise.stopped(1 * S)
    promise.told(2 * S, 2 * S, "postmigrate", "completed")
    assert promise.due(2 * S) is None
    assert (promise.stage, promise.why, promise.obstacle) == (
        Stage.LEFT,
        "it was migrated",
        MIGRATED,
    )


def test_a_migration_that_fails_at_its_end_leaves_a_guest_to_resume(promise: Promise) -> None:
    promise.stopped(1 * S)
    promise.told(2 * S, 2 * S, "finish-migrate", "device")
    at = promise.wake_at()
    assert at is not None
    assert promise.due(at - 1) is None
    assert promise.due(at) is Due.LOOK
    promise.told(at, at, "paused", "failed")
    assert promise.due(at) is Due.CONT
