"""Whether a migration has a guest, which may not be paused then; as the agent asks for it.

Why, and what follows from it, is in `promise`.
"""

from __future__ import annotations

from ...errors import GuestMigrating
from ...qmp import Monitor
from ...qmp.guest import GuestLook, look
from .promise import TAKEN, is_migrating

__all__ = ["RAN_TWICE", "WAIT", "check_not_migrating", "has_guest", "refuse_if_migrating"]

RAN_TWICE = (
    "a migration completed before our `cont`, and the guest was stopped here again; if it is "
    "paused at the destination, it stays so until `cont` is sent there"
)
WAIT = "wait until it is over, or cancel it"
_WHY = {
    "inmigrate": ("it waits for an incoming migration", WAIT),
    "finish-migrate": ("it is being migrated", WAIT),
    "postmigrate": ("it has been migrated away", "name the QEMU that it was migrated to"),
}


def has_guest(seen: GuestLook) -> bool:
    """A migration has the guest: it would not have been paused."""
    return is_migrating(seen.migration) or seen.status in TAKEN


def check_not_migrating(status: str, migration: str, done: str = "it was not paused") -> None:
    """Raises GuestMigrating, `done` says what was not."""
    if is_migrating(migration):
        why, remedy = f"a migration is under way ({migration})", WAIT
    elif status in TAKEN:
        why, remedy = f"the guest is in the state {status}: {_WHY[status][0]}", _WHY[status][1]
    else:
        return
    raise GuestMigrating(f"{why}; {done}", remedy=remedy)


async def refuse_if_migrating(monitor: Monitor, done: str, *, deadline: float = 10.0) -> None:
    """Raises GuestMigrating, and as `Monitor.pipeline`."""
    seen = await look(monitor, deadline=deadline)
    check_not_migrating(seen.status, seen.migration, done)
