"""A mirror of a guest that an agent is attached to: its pauses, its beginning and its end.

    async with attach(target) as agent, mirroring(agent, backend, Strategy.PAUSE) as mirror: ...

What a mirror does with a transition is in `mirror`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Protocol

from ..errors import MemListenerError, OperationFailed
from ..listener import MemoryListener
from ..memslots import DEFAULT_MAX_HOLES, Rules
from ..qmp import Companions, Monitor, take_snapshot
from ..records import MirrorDifference
from ..topology import read_map
from ..updates.model import Strategy
from ..updates.pause import paused_guest
from ..updates.pause.guard import ResumeGuard
from ..updates.pause.guard_start import guard_targets
from .backend import SlotBackend
from .mirror import Mirror, Pauser

__all__ = ["GuestToMirror", "check_guest", "mirroring"]

_ATTEMPTS = 5
_BEHIND_S = 30.0  # how long a check waits for a mirror that is behind
_PAUSE_DEADLINE = 5.0


class GuestToMirror(Protocol):
    """An attached guest: what a mirror needs of the agent."""

    @property
    def monitor(self) -> Monitor: ...
    @property
    def companions(self) -> Companions: ...
    @property
    def rules(self) -> Rules: ...
    def register(self, listener: MemoryListener) -> None: ...
    async def unregister(self, listener: MemoryListener) -> None: ...
    async def settle(self, *, listeners_s: float = 2.0) -> None: ...
    def operating(self) -> AbstractAsyncContextManager[Monitor]: ...


@asynccontextmanager
async def mirroring(
    agent: GuestToMirror,
    backend: SlotBackend,
    strategy: Strategy = Strategy.DIRECT,
    *,
    max_holes: int | None = DEFAULT_MAX_HOLES,
    deadline: float = 5.0,
    max_pause_s: float = 2.0,
    guard_monitor: str | None = None,
) -> AsyncIterator[Mirror]:
    """A mirror of the guest `agent` is attached to; compared with a fresh snapshot at the end.

    The block is entered when the backend shows the present map.  What the comparison at its end
    found is in `Mirror.report().differences`; when the guest is gone, a note says that there was
    none.  A block that is left by an exception ends without.

    Under PAUSE a resume guard holds a monitor of its own (`guard_monitor`, else a free one) and
    resumes the guest when a pause lasts longer than `max_pause_s`.  Raises UpdateRefused when there
    is none for it, OperationFailed when the backend cannot be filled, TargetError.
    """
    async with AsyncExitStack() as stack:
        pause: Pauser | None = None
        if strategy is Strategy.PAUSE:
            pause = await _pauser(agent, stack, max_pause_s, guard_monitor)
        mirror = Mirror(
            backend,
            strategy,
            pause=pause,
            rules=agent.rules,
            max_holes=max_holes,
            deadline=deadline,
        )
        agent.register(mirror)
        try:
            await agent.settle(listeners_s=_BEHIND_S)
            if not mirror.in_step:
                raise OperationFailed(f"the mirror could not begin: {mirror.report().why_not}")
            yield mirror
            await _compare(agent, mirror)
        finally:
            await agent.unregister(mirror)


async def check_guest(mirror: Mirror, agent: GuestToMirror) -> tuple[MirrorDifference, ...]:
    """Compare what the mirror's backend holds with a fresh snapshot of the guest.

    Taken again when the map changed meanwhile.  Raises TargetError, and OperationFailed when it
    never holds still.
    """
    for _ in range(_ATTEMPTS):
        await agent.settle(listeners_s=_BEHIND_S)
        received = mirror.received
        fresh = read_map((await take_snapshot(agent.monitor)).text)
        await agent.settle(listeners_s=_BEHIND_S)
        if mirror.received == received:
            return await mirror.check(fresh)
    raise OperationFailed(
        f"the guest's map changed during each of {_ATTEMPTS} snapshots: nothing was compared",
        remedy="check when the guest is quiet, or while it is paused",
    )


async def _pauser(
    agent: GuestToMirror, stack: AsyncExitStack, max_pause_s: float, named: str | None
) -> Pauser:
    manager = agent.monitor.abilities.manager
    found = await guard_targets(
        agent.companions, agent.monitor.target, named, managed=bool(manager)
    )
    # the one that `operating` would take is left to it, where there is another
    targets = sorted(found, key=lambda target: target == agent.companions.operations)
    guard = await ResumeGuard.start(targets, agent.monitor.identity, max_pause_s=max_pause_s)
    await stack.enter_async_context(guard)
    monitor = await stack.enter_async_context(agent.operating())
    return lambda pause: paused_guest(monitor, guard, deadline=_PAUSE_DEADLINE, pause=pause)


async def _compare(agent: GuestToMirror, mirror: Mirror) -> None:
    try:
        await check_guest(mirror, agent)
    except MemListenerError as exc:
        mirror.remark(f"not compared at the end: {exc.message}")
