"""Which monitors a resume guard may take."""

from __future__ import annotations

from ..host.bounded import in_thread
from ..qmp import Companions, SocketTarget, find_guest, parse_target
from ..qmp.dial import resolve
from .model import UpdateRefused

__all__ = ["guard_targets"]


async def guard_targets(
    companions: Companions, used: SocketTarget, named: str | None
) -> list[SocketTarget]:
    """The one that was named, else those that are free now, best first.

    Raises UpdateRefused when there is none: without a guard nothing is paused.
    """
    if named is not None:
        return list((await resolve(parse_target(named)))[0])
    known = companions.guest
    guest = await in_thread(find_guest, known.process.pid) if known is not None else None
    free = [t for t in guest.free_targets() if t != used] if guest is not None else []
    if companions.guard is not None:
        free = [companions.guard, *(t for t in free if t != companions.guard)]
    if not free:
        where = (
            "QEMU's process is not visible here"
            if guest is None
            else "all of the guest's monitors are in use"
        )
        raise UpdateRefused(
            f"there is no monitor for the guard that resumes the guest if we cannot ({where}); "
            "nothing was touched",
            remedy="start QEMU with another -qmp unix:PATH,server=on,wait=off, or name one with "
            "--guard-monitor",
        )
    return free
