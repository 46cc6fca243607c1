"""Whether a migration has a guest, which may not be paused then; as the agent asks and tells it.

Why, and what follows from it, is in `promise`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from ..errors import CommandFailed, DeadlineExceeded, GuestMigrating, ProtocolViolation
from ..qmp import Command, Monitor, Reply
from .model import Role
from .promise import TAKEN, is_migrating

__all__ = [
    "LOOK",
    "RAN_TWICE",
    "Look",
    "check_not_migrating",
    "refuse_if_migrating",
    "remove",
]

LOOK = (Command("query-migrate"), Command("query-status"))
"""In this order: a migration that completes between the two leaves a guest that does not run."""
RAN_TWICE = (
    "a migration completed before our `cont`, and the guest was stopped here again; if it is "
    "paused at the destination, it is so until `cont` is sent there"
)
_SETUP_S = 10.0
_SETUP_POLL_S = 0.005
_WAIT = "wait until it is over, or cancel it"
_WHY = {
    "inmigrate": ("it waits for an incoming migration", _WAIT),
    "finish-migrate": ("it is being migrated", _WAIT),
    "postmigrate": ("it has been migrated away", "name the QEMU that it was migrated to"),
}


def check_not_migrating(status: str, migration: str, done: str = "it was not paused") -> None:
    """Raises GuestMigrating, `done` says what was not."""
    if is_migrating(migration):
        why, remedy = f"a migration is under way ({migration})", _WAIT
    elif status in TAKEN:
        why, remedy = f"the guest is in the state {status}: {_WHY[status][0]}", _WHY[status][1]
    else:
        return
    raise GuestMigrating(f"{why}; {done}", remedy=remedy)


async def refuse_if_migrating(monitor: Monitor, done: str, *, deadline: float = 10.0) -> None:
    """Raises GuestMigrating, and as `Monitor.pipeline`."""
    look = Look.of(*await monitor.pipeline(LOOK, deadline=deadline))
    check_not_migrating(look.status, look.migration, done)


async def remove(monitor: Monitor, command: Command, *, deadline: float = 10.0) -> None:
    """Send a command that removes a backend; a memory backend not while a migration is set up.

    Under TCG that stops QEMU for good: the thread of the migration has the lock of the list of RAM
    blocks and gives the BQL away meanwhile, and the main loop, with the BQL, waits for that lock
    (ram_init_bitmaps in migration/ram.c; do_run_on_cpu; qemu_ram_free and qemu_ram_alloc, 7.2).
    What begins between the question and the command cannot be excluded.  Raises DeadlineExceeded
    after a while, and as `Monitor.execute`.
    """
    if command.name == Role.OBJECT.remove_command:
        await _await_set_up(monitor)
    await monitor.execute(command.name, command.arguments, deadline=deadline)


async def _await_set_up(monitor: Monitor) -> None:
    until = time.monotonic() + _SETUP_S
    while await _migration(monitor) == "setup":
        if time.monotonic() > until:
            raise DeadlineExceeded(
                f"a migration has been set up for {_SETUP_S:g} s: no object was removed meanwhile",
                remedy=_WAIT,
            )
        await asyncio.sleep(_SETUP_POLL_S)


async def _migration(monitor: Monitor) -> object:
    try:
        told = await monitor.execute("query-migrate")
    except CommandFailed:
        return None  # a QEMU that does not know the command cannot migrate
    return told.get("status") if isinstance(told, dict) else None


@dataclass(frozen=True, slots=True)
class Look:
    """QEMU's answers to LOOK: its RunState and MigrationStatus, and what tells one migration from
    the next (times in ms, bytes)."""

    status: str
    migration: str
    which: tuple[object, ...]

    @classmethod
    def of(
        cls,
        migrate: Reply | CommandFailed,
        status: Reply | CommandFailed,
        *,
        untold: str | None = None,
    ) -> Look:
        """`untold` is the status when QEMU refuses to tell it; without, that is raised.

        Raises CommandFailed, ProtocolViolation.
        """
        state: object = untold
        if isinstance(status, Reply):
            state = status.value.get("status") if isinstance(status.value, dict) else None
        elif untold is None:
            raise status
        if not isinstance(state, str):
            raise ProtocolViolation(f"query-status returned {status!r:.100}")
        # (a QEMU that does not know the command cannot migrate)
        value = migrate.value if isinstance(migrate, Reply) else None
        told = value if isinstance(value, dict) else {}
        which = tuple(told.get(name) for name in ("total-time", "downtime", "setup-time"))
        ram = told.get("ram")
        sent = ram.get("transferred") if isinstance(ram, dict) else None
        return cls(state, str(told.get("status", "none")), (*which, sent))

    @property
    def is_migrating(self) -> bool:
        """It would not have been paused."""
        return is_migrating(self.migration) or self.status in TAKEN

    def ran_twice(self, before: Look) -> bool:
        """`cont` was accepted between the two looks, but a migration had completed before it."""
        return (
            self.status == "running"
            and self.migration == "completed"
            and (before.migration, before.which) != (self.migration, self.which)
        )
