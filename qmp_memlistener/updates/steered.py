"""A strategy for the changes that a guest itself makes: what the verb, the API and `compare` share.

How the interposer gets into QEMU is in `steer`.  Here is what must hold for the guest before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..errors import InputError, MissingPrerequisite
from ..host.bounded import in_thread
from ..host.processes import Process
from ..qmp import Monitor, read_facts
from ..records import Mode
from ..steer import Steering, judge, release, steer
from ..text import quoted
from .pause.guard import refuse_if_migrating

__all__ = ["process_of_monitor", "steer_guest", "steered_process"]


def process_of_monitor(monitor: Monitor) -> Process | None:
    """QEMU's process, where it is visible and still the one that was connected to."""
    pid = monitor.identity.pid
    process = Process.read(pid) if pid is not None else None
    if process is None or process.start_ticks != monitor.identity.start_ticks:
        return None
    return process


def steered_process(monitor: Monitor) -> Process:
    """The same.  Raises MissingPrerequisite where it is not visible."""
    process = process_of_monitor(monitor)
    if process is None:
        raise MissingPrerequisite(
            f"QEMU's process is not visible behind {monitor.target}",
            remedy="run this on the host of the guest, in its pid namespace or above",
        )
    return process


async def steer_guest(
    monitor: Monitor,
    strategy: Mode,
    *,
    strict: bool = False,
    interrupted: Callable[[Steering], object] | None = None,
) -> Steering:
    """Apply `strategy` to the guest's transitions from the next one on; OFF takes it out.

    Cancelled, it is done all the same: it takes milliseconds.  `interrupted` is told what came of
    it then.  Raises InputError, MissingPrerequisite where it cannot work, GuestMigrating, and as
    `steer.steer`.
    """
    if strategy not in tuple(Mode):
        names = ", ".join(Mode)
        raise InputError(f"there is no strategy {quoted(strategy)}", remedy=f"one of {names}")
    if strict and strategy is not Mode.HOLE:
        raise InputError("strict goes with the strategy hole")
    process = await in_thread(steered_process, monitor)
    await refuse_if_migrating(monitor, "it was left as it was")
    if strategy is Mode.OFF:
        work = asyncio.ensure_future(release(process))
    else:
        facts = await read_facts(monitor)
        await in_thread(judge, process, monitor.version, kvm=facts.kvm, wanted=strategy)
        work = asyncio.ensure_future(steer(process, strategy, strict=strict))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        done = await work
        if interrupted is not None:
            interrupted(done)
        raise
