"""What a resume guard owes to a guest that is stopped for a while, and which command is due.  Pure.

`guard_process` carries it out, and loads this file by path: only the standard library is imported.

- Only the first STOP after `arm` is ours.  With the first RESUME after that the promise is kept,
  whoever sent `cont`; a later STOP is another client's.  QMP does not say who stopped a guest: one
  that another client stops in the moment between `arm` and our own `stop` is taken for ours.
- The guard acts when the agent is gone (end of file, or it is no longer our parent), when the agent
  says that it lost QEMU, when the pause lasts longer than allowed, which is also how a hanging
  agent shows, and when a migration begins during the pause.  Then `cont` is sent, but only if the
  status is exactly `paused`: a guest that is stopped for another reason (internal-error, io-error,
  postmigrate ...) is left alone, and that is noted.
- A migration that completes while the guest is paused leaves it paused at the destination: the
  state that is stored for it there is the one before QEMU itself stops the guest
  (global_state_store in migration_completion, migration/migration.c; migration_stop_vm since 9.1).
  So while the guest is stopped QEMU is asked for migrations, again and again.  (The event MIGRATION
  shows it sooner, where the capability `events` is on.)
- `cont` is accepted in `postmigrate`, where it would run the guest a second time: QEMU refuses it
  only in `finish-migrate` and in states that need a reset (qmp_cont, monitor/qmp-cmds.c, 7.2 to
  11.1).  Where it was sent during a migration QEMU is asked afterwards; if the migration had
  completed before it, the guest is stopped again.
- When a monitor's client goes, QEMU drops what is still queued of it (CHR_EVENT_CLOSED in
  monitor/qmp.c), but the command it has begun is executed: a `stop` may take effect after its
  sender's end.  So a guest that runs is asked about some more times.  All monitors are read by one
  thread in QEMU and served by another, so that a few answers after the agent's end there can be no
  `stop` on its way.
"""

from __future__ import annotations

import enum

__all__ = ["LOOK_EVERY_NS", "TAKEN", "Due", "Stage", "Promise", "is_migrating"]

LOOK_EVERY_NS = 2_000_000
"""How often QEMU is asked for migrations while the guest is stopped.

From `migrate` to the moment at which the state of the guest is stored a migration took 5 ms at
least, of guests of 1 MiB without firmware, on 7.2, 10.0 and 11.1: it takes the BQL to set up, walks
through all RAM, and takes the BQL to complete.  What begins and completes between two looks is not
prevented, only reported.  (`mode` cpr-*, from 8.2 on, stops and stores the state at once.)
"""
_FIRST_LOOK_NS = 20_000_000
"""The same for a pause whose `cont` is in QEMU's queue already: each look would be in its way."""
_CHECKS = 3
"""Answers of QEMU, after the agent's end, that show that no `stop` came."""
_CHECK_EVERY_NS = 10_000_000
_RETRY_EVERY_NS = 100_000_000
_RETRY_FOR_NS = 10_000_000_000

_OVER = frozenset({"", "none", "completed", "failed", "cancelled"})
TAKEN = frozenset({"inmigrate", "finish-migrate", "postmigrate"})
"""RunStates in which a migration has the guest, or had it."""

MIGRATED = (
    "it was migrated while it was paused, and is paused at the destination, too, until `cont` is "
    "sent there"
)


def is_migrating(status: str) -> bool:
    """For a MigrationStatus: it is not over (migration_is_idle, migration/migration.c)."""
    return status not in _OVER


class Due(enum.Enum):
    """What to send now: one write each."""

    LOOK = (b"query-migrate", b"query-status")
    """In this order: a guest that runs after it was not migrated is one that may be stopped."""
    CONT = (b"cont",)
    STOP = (b"stop",)


class Stage(enum.Enum):
    """What is promised at the moment."""

    IDLE = "idle"
    """Nothing."""
    ASKED = "asked"
    """The agent is about to stop the guest; QEMU is asked whether it runs."""
    ARMED = "armed"
    """The agent may stop the guest at any moment."""
    STOPPED = "stopped"
    """It has: the guest must run again."""
    DOUBTED = "doubted"
    """`cont` was sent during a migration: it may have come too late."""
    KEPT = "kept"
    """It was resumed."""
    LEFT = "left"
    """It was not, and we have stopped trying."""

    @property
    def is_settled(self) -> bool:
        return self in (Stage.IDLE, Stage.KEPT, Stage.LEFT)


class Promise:
    """What is owed to the guest, and which command is due.  Times are CLOCK_MONOTONIC ns.

    `why` says why the guard acts, empty while it need not; `acted` that its `cont` was accepted;
    `status` and `migration` are QEMU's last answers, to a question that was sent at `looked_ns`;
    `obstacle` is what keeps the guest from running.
    """

    def __init__(self, max_pause_ns: int) -> None:
        self.stage = Stage.IDLE
        self.why = ""
        self.acted = False
        self.status = ""
        self.migration = ""
        self.looked_ns = 0
        self.obstacle = ""
        self._max_pause_ns = max_pause_ns
        self._held = False
        self._since = 0
        """Armed, then stopped."""
        self._is_paused = False
        self._not_before = 0
        self._give_up = 0
        self._sure_at = 0
        self._checks = 0

    def arm(self, now: int, *, held: bool = True) -> bool:
        """The agent wants to stop the guest; not `held`: its `cont` follows at once.

        False while an earlier pause is not over, or may still come: then there would be no telling
        which STOP is whose.
        """
        if self.stage in (Stage.ARMED, Stage.STOPPED, Stage.DOUBTED):
            return False
        self._forget(Stage.ASKED)
        self.acted = False
        self._held = held
        self._since = now
        return True

    def release(self) -> None:
        """The agent says that the guest runs, or that it was never stopped."""
        self._forget(Stage.IDLE)

    def stopped(self, now: int) -> None:
        """A STOP event."""
        if self.stage is Stage.ARMED:
            self.stage = Stage.STOPPED
            self._since = now
            if not self.why:
                self._not_before = now + (LOOK_EVERY_NS if self._held else _FIRST_LOOK_NS)

    def resumed(self) -> None:
        """A RESUME event."""
        if self.stage is Stage.STOPPED:
            self.stage = Stage.KEPT

    def migrating(self, now: int, migration: str) -> None:
        """A MIGRATION event."""
        if self.stage is Stage.STOPPED and not self.why and is_migrating(migration):
            self._not_before = now

    def abandoned(self, now: int, why: str, sure_at: int) -> None:
        """The agent cannot keep the promise; from `sure_at` on it can send no `stop` either."""
        if not self.why:
            self._act(now, why)
        self._sure_at = sure_at

    def due(self, now: int) -> Due | None:
        """What to send now; call it when nothing is on its way."""
        if self.stage is Stage.ASKED:
            return Due.LOOK
        if self.stage is Stage.DOUBTED:
            return Due.STOP if self.obstacle else Due.LOOK
        if self.stage is Stage.STOPPED and not self.why and now >= self._since + self._max_pause_ns:
            self._act(now, f"it was paused for more than {self._max_pause_ns / 1e9:g} s")
        if now < self._not_before:
            return None
        if self.stage is Stage.STOPPED:
            return Due.CONT if self._is_paused else Due.LOOK
        return Due.LOOK if self.stage is Stage.ARMED and self.why else None

    def wake_at(self) -> int | None:
        """When `due` may have something new to say without an event."""
        if self.stage is Stage.STOPPED and not self.why:
            return min(self._not_before, self._since + self._max_pause_ns)
        if self.stage is Stage.STOPPED or (self.stage is Stage.ARMED and self.why):
            return self._not_before
        return None

    def told(self, sent: int, now: int, status: str, migration: str) -> None:
        """QEMU's answers to a look that was sent at `sent`."""
        if self.stage is Stage.ASKED and sent < self._since:
            return  # it was about the pause before
        self.status, self.migration, self.looked_ns = status, migration, sent
        if self.stage is Stage.ASKED:
            free = status == "running" and not is_migrating(migration)
            self.stage = Stage.ARMED if free else Stage.IDLE
        elif self.stage is Stage.STOPPED:
            self._told_stopped(now)
        elif self.stage is Stage.DOUBTED:
            if status == "running" and migration == "completed":
                self.obstacle = MIGRATED
            else:
                self.stage = Stage.KEPT
        elif self.stage is Stage.ARMED and self.why:
            self._checks += sent >= self._sure_at
            self._not_before = now + _CHECK_EVERY_NS
            if self._checks >= _CHECKS:
                self.stage = Stage.IDLE

    def continued(self, now: int, refusal: str | None) -> None:
        """QEMU's answer to `cont`; the status is asked for again before the next one."""
        self._is_paused = False
        if refusal is None:
            self.acted = True
            if self.stage in (Stage.STOPPED, Stage.KEPT):
                late = is_migrating(self.migration)
                self.stage = Stage.DOUBTED if late else Stage.KEPT
        elif self.stage is Stage.STOPPED:
            self.obstacle = refusal
            self._try_again(now)

    def stopped_again(self) -> None:
        """QEMU's answer to `stop`."""
        if self.stage is Stage.DOUBTED:
            self.acted = False
            self.stage = Stage.LEFT

    def _told_stopped(self, now: int) -> None:
        if not self.why:
            if self.status in TAKEN:
                self._act(now, "it was migrated")
            elif is_migrating(self.migration):
                self._act(now, f"a migration began ({self.migration})")
            else:
                self._not_before = now + LOOK_EVERY_NS
                return
        self._is_paused = self.status == "paused"
        if self._is_paused:
            return
        if self.status == "running":
            self.stage = Stage.KEPT
        elif self.status == "finish-migrate":
            # one that fails now may leave it `paused`
            self.obstacle = MIGRATED
            self._try_again(now)
        else:
            self.obstacle = MIGRATED if self.status in TAKEN else ""
            self.stage = Stage.LEFT

    def _try_again(self, now: int) -> None:
        self._not_before = now + _RETRY_EVERY_NS
        if now >= self._give_up:
            self.stage = Stage.LEFT

    def _act(self, now: int, why: str) -> None:
        self.why = why
        self._not_before = now
        self._give_up = now + _RETRY_FOR_NS

    def _forget(self, stage: Stage) -> None:
        self.stage = stage
        self.why = self.obstacle = ""
        self._is_paused = False
        self._checks = self._sure_at = self._not_before = 0
