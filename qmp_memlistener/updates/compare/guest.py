"""A guest that is changed again and again: the change itself, and the way back to where it was.

`HostGuest` is an attached guest; rounds need no more of one than `ComparedGuest` says.  Only
what the change itself makes is taken back: what else comes and goes in the guest is not ours.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol, TypeVar

from ...errors import CommandFailed, OperationFailed
from ...qmp import Command, Monitor
from ...qmp.guest import read_status
from ..guest_response import QUIET_S
from ..guest_view import backends_of, read_facts, read_guest
from ..journal import remove
from ..model import (
    Intent,
    Outcome,
    Phase,
    Plug,
    Resize,
    Result,
    Role,
    Strategy,
    Unplug,
    UpdateRefused,
)
from ..operation import Host, perform
from ..settings import UpdateOptions

__all__ = ["Changed", "ComparedGuest", "ComparedState", "HostGuest", "NotPutBack", "read_state"]

S = TypeVar("S", bound=StrEnum, contravariant=True)
Perform = Callable[[Host, Intent, Strategy, UpdateOptions | None], Awaitable[Outcome]]
"""`operation.perform`."""

PATIENCE_S = 30.0
"""How long a guest may take at least to give back what it got."""
_AGAIN_S = 0.1
_DIMM = "qml-dimm"
_MEMORY = "qml-mem"
"""How `plans` calls the DIMMs that `resize` makes, and the memory behind them."""


class NotPutBack(OperationFailed):
    """The guest is not as it was, and going on would compare different guests."""


@dataclass(frozen=True, slots=True)
class ComparedState:
    """What a change of ours may leave behind: what there is, and what virtio-mem devices were asked
    for and have, in bytes."""

    ids: frozenset[tuple[Role, str]] = frozenset()
    memory: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def devices(self) -> frozenset[str]:
        return frozenset(name for role, name in self.ids if role is Role.DEVICE)


class Changed(Protocol):
    """What rounds need of an outcome."""

    @property
    def outcome(self) -> Result: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def remedy(self) -> str | None: ...
    @property
    def phases(self) -> Sequence[Phase]: ...


class ComparedGuest(Protocol[S]):
    """What rounds need of a guest; `S` are its strategies."""

    async def begin(self) -> None:
        """Remember how the guest is.  Raises UpdateRefused for a change with no way back."""

    async def change(self, strategy: S) -> Changed:
        """Carry the intent out."""

    async def look(self) -> None:
        """Ask what `change` asks at its end, and change nothing."""

    async def put_back(self) -> None:
        """Make the guest as it was.  Raises NotPutBack, TargetError."""

    async def left(self) -> str:
        """How the guest differs from what it was, in words; empty when it does not."""


async def read_state(monitor: Monitor, intent: Intent) -> ComparedState:
    """Only what `intent` may touch.  Raises TargetError."""
    facts = await read_facts(monitor, intent)
    if isinstance(intent, Plug):
        ours = {(a.role, a.id) for a in (intent.device, *intent.backends)}
        return ComparedState(frozenset(i for i in ours if i[1] in facts.ids(i[0])))
    view = await read_guest(monitor)
    return ComparedState(
        frozenset(
            (role, name)
            for role, prefix in ((Role.DEVICE, _DIMM), (Role.OBJECT, _MEMORY))
            for name in facts.ids(role)
            if name.startswith(prefix)
        ),
        {v.id: (v.requested, v.size or 0) for v in view.virtio_mems if v.id is not None},
    )


class HostGuest:
    """An attached guest under `intent`.

    Less memory is compared on memory that each round gives the guest before, so that a guest never
    loses a DIMM of its own, which would not come back as it was.  `perform` and `read` are there to
    be replaced by tests.
    """

    def __init__(
        self,
        host: Host,
        intent: Intent,
        options: UpdateOptions,
        *,
        perform: Perform = perform,
        read: Callable[[Monitor, Intent], Awaitable[ComparedState]] = read_state,
    ) -> None:
        self._host = host
        self._intent = intent
        self._options = options
        self._perform = perform
        self._read = read
        self._start = ComparedState()

    async def begin(self) -> None:
        manager = self._host.monitor.abilities.manager
        if manager:
            raise UpdateRefused(
                f"{manager} gives devices ids of its own, so that the guest could not be put back "
                "as it was after each round; nothing was touched",
                remedy="use --transition or --guest-made, or `hotplug` and `unplug` by themselves",
            )
        match self._intent:
            case Unplug():
                raise UpdateRefused(
                    "what was unplugged cannot be put back without knowing how it was made",
                    remedy="compare plugging it: the inverse is part of every round",
                )
            case Resize(sign="="):
                change = self._intent.size - (await read_guest(self._host.monitor)).memory
                if not change:
                    raise UpdateRefused(
                        "the guest has that much memory already: there is nothing to compare",
                        remedy="name another size, such as +256M",
                    )
                self._intent = Resize("+" if change > 0 else "-", abs(change))
        self._start = await self._read(self._host.monitor, self._intent)

    async def change(self, strategy: Strategy) -> Outcome:
        intent = self._intent
        if isinstance(intent, Resize) and intent.sign == "-":
            # only what is measured goes under `pause`
            how = strategy if strategy is Strategy.HOLE else Strategy.DIRECT
            patient = self._patient(max(self._options.wait_s, PATIENCE_S))
            grown = await self._perform(self._host, Resize("+", intent.size), how, patient)
            if grown.outcome is not Result.DONE:
                return grown
            intent = await self._last_dimm() or intent
        return await self._perform(self._host, intent, strategy, self._options)

    async def _last_dimm(self) -> Unplug | None:
        """To take out the DIMM that was just plugged, whatever else has that size."""
        now = await self._read(self._host.monitor, self._intent)
        new = now.devices() - self._start.devices()
        return await self._unplugging(min(new)) if new else None

    async def look(self) -> None:
        async with self._host.operating():
            await read_status(self._host.monitor)

    async def put_back(self) -> None:
        end = time.monotonic() + max(self._options.wait_s, PATIENCE_S)
        why, remedy = "", None
        is_resized = False
        while True:
            now = await self._read(self._host.monitor, self._intent)
            if self._is_back(now):
                break
            left = end - time.monotonic()
            if left <= 0:
                raise NotPutBack(
                    f"the guest could not be put back as it was: {why or self._differences(now)}",
                    remedy=f"undo by hand: {self._differences(now)}"
                    + (f"; {remedy}" if remedy else ""),
                )
            is_resized |= now.memory != self._start.memory
            try:
                outcome = await self._undo(now, left)
            except OperationFailed as exc:
                why, remedy = exc.message, exc.remedy
            else:
                if outcome is not None and outcome.outcome is not Result.DONE:
                    why, remedy = outcome.reason or "", outcome.remedy
            await asyncio.sleep(min(_AGAIN_S, left) if why else 0)
        if is_resized:
            await asyncio.sleep(QUIET_S)  # as `perform` gives every other update

    async def left(self) -> str:
        return self._differences(await self._read(self._host.monitor, self._intent))

    def _is_back(self, now: ComparedState) -> bool:
        """Devices that another client has added meanwhile do not count."""
        return now.ids == self._start.ids and all(
            now.memory.get(name) == had for name, had in self._start.memory.items()
        )

    async def _undo(self, now: ComparedState, left: float) -> Outcome | None:
        """One step towards the start; an outcome where there is one."""
        for name in sorted(now.devices() - self._start.devices()):
            intent = await self._unplugging(name)
            return await self._perform(self._host, intent, Strategy.DIRECT, self._patient(left))
        await self._remove(now.ids - self._start.ids)
        async with self._host.operating() as ops:
            for name, (wanted, _) in self._start.memory.items():
                if now.memory.get(name, (wanted, 0))[0] != wanted:
                    path = f"/machine/peripheral/{name}"
                    arguments = {"path": path, "property": "requested-size", "value": wanted}
                    await ops.execute("qom-set", arguments)
        await asyncio.sleep(min(_AGAIN_S, left))
        return None

    async def _unplugging(self, name: str) -> Unplug:
        if isinstance(self._intent, Plug):
            return Unplug(name, self._intent.backends[::-1])
        return Unplug(name, await backends_of(self._host.monitor, name))

    async def _remove(self, things: Collection[tuple[Role, str]]) -> None:
        """Backends that are left over.  What is still in use stays, and is seen in the state."""
        async with self._host.operating() as ops:
            for role, name in sorted(things):
                try:
                    await remove(ops, Command(role.remove_command, {role.id_key: name}))
                except CommandFailed:
                    continue

    def _patient(self, seconds: float) -> UpdateOptions:
        return replace(self._options, wait_s=seconds)

    def _differences(self, now: ComparedState) -> str:
        """In words."""
        words = [f"{role} {name} is there" for role, name in sorted(now.ids - self._start.ids)]
        words += [f"{role} {name} is gone" for role, name in sorted(self._start.ids - now.ids)]
        for name, (requested, size) in self._start.memory.items():
            has = now.memory.get(name)
            if has is None:
                words.append(f"{name} is gone, and had {size >> 20} MiB")
            elif has != (requested, size):
                words.append(
                    f"{name} has {has[1] >> 20} MiB, {has[0] >> 20} wanted, and had "
                    f"{size >> 20}, {requested >> 20} wanted"
                )
        return ", ".join(words)
