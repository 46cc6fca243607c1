"""Pausing a guest around commands, or around a block of code, under a guard.

`run_paused` sends everything in one write, so that the pause lasts as long as the commands and no
round trip more.  `paused_guest` stops the guest for the length of a block.  Both arm the guard
first, resume only a guest that they stopped, and finish what they began when they are cancelled.

No guest is stopped that is migrating (`promise` says why): the guard asks when it is armed, and
ends a pause in which a migration begins.  That `cont` follows in the same write as `stop`, without
a question, is safe because a migration does not run from its beginning to its end between the two:

- QEMU takes commands from its monitors in turn and carries them out one at a time, holding the BQL
  (monitor/qmp.c): another client's `migrate` comes between two of ours at the earliest, and ours go
  on without a wait.  From then on device_add and device_del are refused, so that none takes long
  (qdev_device_add, softmmu/qdev-monitor.c: "not allowed while migrating").
- A migration takes the BQL to set up, walks through all RAM without it, and takes it to complete:
  5 ms at least where it was measured.

The same holds for a block that is shorter than LOOK_EVERY_NS; otherwise `cont` is sent to a guest
that was just found `paused`.  What was not prevented all the same is noticed: QEMU is asked again
behind `cont`, and a guest that runs after its migration is stopped.

QMP cannot show that another client sends `stop` while the guest is paused by us.  It has no
effect and makes no event (do_vm_stop, cpus.c of 7.2 to 11.1), and our `cont` undoes it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from ...errors import (
    CommandFailed,
    DeadlineExceeded,
    GuestMigrating,
    MemListenerError,
    TargetError,
    TargetLost,
)
from ...qmp import Command, Monitor, Reply
from ...qmp.guest import LOOK, GuestLook, look
from ...qmp.identity import wrong_guest
from .guard import ResumeGuard, Settled, has_guest, refuse_if_migrating
from .promise import LOOK_EVERY_NS
from .resuming import End, StopAndResume, lost, stop_again

__all__ = ["Pause", "paused_guest", "run_paused"]

T = TypeVar("T")

_RUNNING = "running"
_UNTOLD = "a guest whose status is unknown"
_LOOKS = 3
"""On a host that is always too slow the last answer has to do."""
_STOP, _CONT = Command("stop"), Command("cont")


@dataclass(slots=True)
class Pause:
    """A pause, what was sent meanwhile and what came of its end.

    `status_before` is QEMU's RunState right before the pause.  `[start_ns, end_ns)` is the pause:
    it ends when the RESUME event arrives here, and is as long as the stamps of the events say;
    without a pause it is the time of the commands.  `paused_before`: the guest did not run, and was
    left so.  `resumed`: it runs again.  `note` is what is worth telling.  `migrated`: a migration
    took the guest while it was paused, so that it is paused at the destination, too.  `replies` are
    those to the commands of `run_paused`, a CommandFailed for each that QEMU refused.
    """

    status_before: str = ""
    start_ns: int = 0
    end_ns: int = 0
    paused_before: bool = False
    resumed: bool = False
    note: str | None = None
    migrated: GuestMigrating | None = None
    replies: list[Reply | CommandFailed] = field(default_factory=list)
    look: GuestLook | None = field(default=None, repr=False)
    seen: StopAndResume | None = field(default=None, repr=False)

    @property
    def is_over(self) -> bool:
        """The guest runs already, most likely because the guard found the pause too long."""
        return self.seen is not None and self.seen.window is not None


async def run_paused(
    monitor: Monitor,
    guard: ResumeGuard,
    commands: Sequence[Command],
    *,
    deadline: float,
    pipelined: bool = True,
    sending: Callable[[], None] = lambda: None,
) -> Pause:
    """Run the commands while the guest is paused; every one, also after one that QEMU refuses.

    `sending` is called when they are about to be sent: what is raised before left them unsent.

    A guest that does not run is not stopped and not resumed.  One that another client stops in the
    moment before our own `stop` would be resumed by our `cont`, which is on its way then: it is
    stopped again at once, and the note says so.  `pipelined=False` sends one command after the
    other.

    Raises GuestMigrating and OperationFailed as `ResumeGuard.arm` (nothing was done), TargetLost
    when the connection ends (the guard has resumed the guest; the message says so),
    DeadlineExceeded when the replies take longer than `deadline` seconds: QEMU still holds our
    `cont` then, if the monitor stays connected, and the guard stays armed and takes no other pause
    until that one is over.  Cancelled, it ends when the replies have come.
    """
    if not pipelined:
        return await _one_by_one(monitor, guard, commands, deadline, sending)
    _check_same_guest(monitor, guard)
    async with guard.lock:
        status = await guard.arm(held=False)
        if status != _RUNNING:
            sending()
            return await _run_unpaused(monitor, commands, deadline, status)
        return await _to_the_end(_run_pipelined(monitor, guard, commands, deadline, sending))


@asynccontextmanager
async def paused_guest(
    monitor: Monitor, guard: ResumeGuard, *, deadline: float, pause: Pause | None = None
) -> AsyncIterator[Pause]:
    """Stop the guest for the length of the block; it runs again afterwards, however that ends.

    A guest that does not run is left alone.  `deadline` (seconds) is for each of `stop` and `cont`.
    A `pause` of the caller's has the result also when it was cancelled before the block.
    Raises GuestMigrating or OperationFailed when the guest is migrating, the guard is gone or QEMU
    refuses to stop (the block is not entered), TargetLost or DeadlineExceeded as `run_paused`.
    """
    _check_same_guest(monitor, guard)
    pause = Pause() if pause is None else pause
    entered = False
    async with guard.lock:
        pause.status_before = await guard.arm()
        with StopAndResume(monitor) as seen:
            pause.seen = seen
            try:
                pause.start_ns = time.monotonic_ns()
                if pause.status_before != _RUNNING:
                    pause.paused_before = True
                else:
                    await _to_the_end(_stop(monitor, guard, pause, deadline))
                entered = True
                yield pause
            finally:
                if not pause.paused_before:
                    await _to_the_end(_resume(monitor, guard, pause, deadline))
                    if not entered and pause.migrated is not None and _is_refused():
                        raise pause.migrated
                if seen.window is not None and not pause.paused_before:
                    pause.start_ns, pause.end_ns = seen.window
                else:
                    pause.end_ns = time.monotonic_ns()


def _is_refused() -> bool:
    """It is for a migration that the block is not entered."""
    return isinstance(sys.exc_info()[1], GuestMigrating)


# -- in one write ------------------------------------------------------------------------------


async def _run_pipelined(
    monitor: Monitor,
    guard: ResumeGuard,
    commands: Sequence[Command],
    deadline: float,
    sending: Callable[[], None],
) -> Pause:
    await _look_again(monitor, guard, deadline)
    sending()
    with StopAndResume(monitor) as seen:
        try:
            replies = await monitor.pipeline(
                [*LOOK, _STOP, *commands, _CONT, *LOOK], deadline=deadline
            )
        except DeadlineExceeded:
            raise
        except TargetError as error:
            raise lost(error, await guard.hand_over(deadline=deadline)) from error
    stop, *rest, cont = replies[2:-2]
    before, after = (GuestLook.of(*pair, untold=_RUNNING) for pair in (replies[:2], replies[-2:]))
    end = End()
    if isinstance(stop, CommandFailed):
        end.notes.append(f"QEMU refused to stop the guest ({stop.desc}): it ran all the time")
    if isinstance(cont, CommandFailed):
        await end.hand_over(guard, f"QEMU refused cont ({cont.desc})", deadline)
    else:
        if before.status == _RUNNING:
            await end.check(monitor, before, after, deadline)
        else:
            end.runs = not await stop_again(monitor, deadline)
            again = "" if end.runs else "; it is again"
            end.notes.append(f"the guest was {before.status} before our stop{again}")
        await end.release(guard)
    start_ns, end_ns = seen.window or (
        _end_of(stop, replies[1]),
        _end_of(cont, *reversed(rest), stop),
    )
    return Pause(
        status_before=before.status,
        replies=rest,
        start_ns=start_ns,
        end_ns=max(start_ns, end_ns),
        paused_before=before.status != _RUNNING,
        resumed=end.runs,
        note=end.note,
        migrated=end.migrated,
    )


async def _run_unpaused(
    monitor: Monitor, commands: Sequence[Command], deadline: float, status: str
) -> Pause:
    start = time.monotonic_ns()
    replies = await monitor.pipeline(commands, deadline=deadline) if commands else []
    return Pause(
        status_before=status,
        replies=replies,
        start_ns=start,
        end_ns=time.monotonic_ns(),
        paused_before=True,
        resumed=False,
        note=f"the guest was {status} before, and was left so",
    )


async def _look_again(monitor: Monitor, guard: ResumeGuard, deadline: float) -> None:
    """The guard has looked; but on a busy host its answer may come here long after.

    Raises GuestMigrating, or that QEMU does not answer: then the guard has nothing to guard.
    """
    at = guard.looked_ns
    for _ in range(_LOOKS):
        if time.monotonic_ns() - at < LOOK_EVERY_NS:
            return
        at = time.monotonic_ns()
        try:
            await refuse_if_migrating(monitor, "it was not paused", deadline=deadline)
        except TargetLost as error:
            raise lost(error, await guard.hand_over(deadline=deadline)) from error
        except MemListenerError:
            await guard.release()
            raise


# -- one after the other -----------------------------------------------------------------------


async def _one_by_one(
    monitor: Monitor,
    guard: ResumeGuard,
    commands: Sequence[Command],
    deadline: float,
    sending: Callable[[], None],
) -> Pause:
    async with paused_guest(monitor, guard, deadline=deadline) as pause:
        sending()
        for command in commands:
            pause.replies += await monitor.pipeline([command], deadline=deadline)
    return pause


async def _stop(monitor: Monitor, guard: ResumeGuard, pause: Pause, deadline: float) -> None:
    """Raises CommandFailed when QEMU refuses; then there is nothing to resume."""
    try:
        await _look_again(monitor, guard, deadline)
    except MemListenerError:
        pause.paused_before = True
        raise
    *looked, stop = await monitor.pipeline([*LOOK, _STOP], deadline=deadline)
    seen = GuestLook.of(*looked, untold=pause.status_before)
    pause.status_before = seen.status
    if isinstance(stop, CommandFailed) or seen.status != _RUNNING:
        # In the second case another client was quicker: QEMU has taken our `stop` for nothing.
        pause.paused_before = True
        await guard.release()
    if isinstance(stop, CommandFailed):
        raise stop
    pause.start_ns = stop.t_end_ns
    pause.look = seen
    if has_guest(seen):
        began = f"a migration began ({seen.migration}, {seen.status})"
        raise GuestMigrating(
            f"{began} when the guest was about to be paused; it was not held",
            remedy="wait until it is over, or cancel it",
        )


async def _resume(monitor: Monitor, guard: ResumeGuard, pause: Pause, deadline: float) -> None:
    end = End()
    try:
        seen, asked = pause.look, False
        if not pause.is_over and (
            seen is None or time.monotonic_ns() - pause.start_ns >= LOOK_EVERY_NS
        ):
            seen, asked = await look(monitor, deadline=deadline, untold=_UNTOLD), True
        # (asked again: it may have been resumed before QEMU answered)
        if seen is None or pause.is_over:
            # A `stop` that came after that RESUME is another client's: no `cont`.
            await end.release(guard)
            if end.runs and not guard.acted:
                end.notes.append("another client resumed the guest meanwhile")
        elif asked and (seen.status != "paused" or has_guest(seen)):
            # one of us sends `cont`, and the guard is at it already
            began = f"a migration began ({seen.migration})"
            why = began if seen.status == "paused" else f"the guest became {seen.status}"
            await end.hand_over(guard, why, deadline)
        else:
            cont, *looked = await monitor.pipeline([_CONT, *LOOK], deadline=deadline)
            if isinstance(cont, CommandFailed):
                await end.hand_over(guard, f"QEMU refused cont ({cont.desc})", deadline)
            else:
                await end.check(monitor, seen, GuestLook.of(*looked, untold=_RUNNING), deadline)
                await end.release(guard)
    except DeadlineExceeded:
        pause.resumed = False
        raise
    except TargetError as error:
        settled = await guard.hand_over(deadline=deadline)
        pause.resumed = settled in (Settled.RUNS, Settled.RESUMED)
        raise lost(error, settled) from error
    pause.resumed, pause.note, pause.migrated = end.runs, end.note, end.migrated


# -- both --------------------------------------------------------------------------------------


async def _to_the_end(work: Coroutine[object, object, T]) -> T:
    """Await it; when cancelled, wait for its end and be cancelled then.

    It is bounded by deadlines of its own.  A second cancellation does not wait.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda t: t.cancelled() or t.exception())  # nobody may be waiting
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


def _check_same_guest(monitor: Monitor, guard: ResumeGuard) -> None:
    """A guard that was started without saying for which guest."""
    if monitor.identity.differs(guard.identity):
        raise wrong_guest(guard.target, monitor.identity, guard.identity)


def _end_of(*replies: Reply | CommandFailed) -> int:
    """When the first of these that QEMU accepted was answered."""
    for reply in replies:
        if isinstance(reply, Reply):
            return reply.t_end_ns
    return time.monotonic_ns()
