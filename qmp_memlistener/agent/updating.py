"""What an agent does to its guest: plug, unplug, resize.  A part of `Agent`.

How an update goes is the business of `updates`; here is only the way in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec

from ..monitor import Companions, Monitor
from ..recording import Header, Record
from ..updates.guest_facts import backends_of
from ..updates.model import Addition, Intent, Outcome, Plug, Role, Strategy, Unplug, Value
from ..updates.operation import UpdateOptions, perform
from ..updates.options import parse_addition, parse_resize
from .measuring import Measuring

__all__ = ["Updating"]


class Updating:
    """The updates of an attached guest; `Agent` supplies the rest.

    Each method returns an Outcome, also when the guest or the strategy does not allow it; they
    raise InputError for what no QEMU could do and TargetError when the guest is lost.  `strategy`
    is `direct`, `pause` or `hole`; `pause` needs a monitor for its guard, which `attach(...,
    guarded=True)` keeps free.
    """

    monitor: Monitor
    companions: Companions
    measuring: Measuring
    header: Header

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]:
        raise NotImplementedError

    def operating(self) -> AbstractAsyncContextManager[Monitor]:
        raise NotImplementedError

    async def settle(self, *, listeners_s: float = 2.0) -> None:
        raise NotImplementedError

    @asynccontextmanager
    async def burst(self) -> AsyncIterator[None]:
        """The probes look closer as long as the block lasts."""
        await self.measuring.burst(True)
        try:
            yield
        finally:
            await self.measuring.burst(False)

    async def update(
        self,
        intent: Intent,
        strategy: Strategy | str = Strategy.DIRECT,
        options: UpdateOptions | None = None,
    ) -> Outcome:
        """Carry out an intent."""
        return await perform(self, intent, Strategy(strategy), options)

    async def hotplug(
        self,
        driver: str,
        *,
        id: str,  # noqa: A002 - QEMU's name for it
        strategy: Strategy | str = Strategy.DIRECT,
        backends: Sequence[Addition] = (),
        options: UpdateOptions | None = None,
        properties: Mapping[str, Value] | None = None,
        **more: Value,
    ) -> Outcome:
        """Plug a device: `await agent.hotplug("ivshmem-plain", id="iv0", memdev="m0")`.

        Its properties are typed; `properties` has those whose names are none in Python.
        `backends` are made first, and removed if plugging fails.
        """
        arguments = {"driver": driver, "id": id, **(properties or {}), **more}
        device = parse_addition(Role.DEVICE, msgspec.json.encode(arguments).decode())
        return await self.update(Plug(device, tuple(backends)), strategy, options)

    async def unplug(
        self,
        id: str,  # noqa: A002 - QEMU's name for it
        *,
        strategy: Strategy | str = Strategy.DIRECT,
        backends: bool = False,
        options: UpdateOptions | None = None,
    ) -> Outcome:
        """Take out the device `id`, with `backends` also what it stood on."""
        also = await backends_of(self.monitor, id) if backends else ()
        return await self.update(Unplug(id, also), strategy, options)

    async def resize(
        self,
        size: str,
        *,
        strategy: Strategy | str = Strategy.DIRECT,
        options: UpdateOptions | None = None,
    ) -> Outcome:
        """More memory (`+256M`), less (`-256M`), or so much in all (`=4G`)."""
        return await self.update(parse_resize(size), strategy, options)
