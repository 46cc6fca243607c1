"""attach() and the Agent: one guest, its map, its transitions, its listeners.

    async with attach("unix:/run/vm.qmp") as agent:
        agent.register(Holes())
        error = await agent.wait_lost()

How the block is entered is in `attachment`; what is seen there is folded by `tracking`, sent to
listeners and published as records.  Leaving the block puts trace events and log back as they
were, whatever the reason for leaving.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Self

import msgspec

from ..errors import MemListenerError, TargetError
from ..listener import MemoryListener
from ..memslots import Rules, SlotTable
from ..probes import StallKind
from ..probes.registry import known_names
from ..qmp import CONNECT_DEADLINE, Companions, GuestFacts, Monitor, Target
from ..records import Header, Mode, ProbeState, Record
from ..steer import Steering
from ..topology import MemoryMap
from ..updates.guest_view import backends_of
from ..updates.model import Addition, Intent, Outcome, Plug, Role, Strategy, Unplug, Value
from ..updates.operation import perform
from ..updates.options import parse_addition, parse_resize
from ..updates.settings import UpdateOptions
from ..updates.steered import steer_guest
from ..waits import waiting
from .attachment import Attached, AttachOptions, Opening
from .background import Background
from .probe_runner import Measuring
from .publisher import Publisher, RecordStream

__all__ = ["Agent", "attach"]

_CLOSE_DEADLINE = 10.0


def attach(
    target: str | Target,
    *,
    trace: bool = True,
    probes: Sequence[str] | None = None,
    max_overhead: float | None = None,
    must_see: Mapping[StallKind, int] | None = None,
    freeze: str | None = None,
    record: str | None = None,
    ping_monitor: str | Target | None = None,
    ops_monitor: str | Target | None = None,
    guarded: bool = False,
    probes_at_once: bool = True,
    on_record: Callable[[Record], None] | None = None,
    deadline: float = CONNECT_DEADLINE,
) -> Agent:
    """Attach to a running guest and follow its memory map: `async with attach(...) as agent`.

    `target` is `unix:PATH`, a path, `HOST:PORT`, `pid:N`, `name:GUEST` or `libvirt:DOMAIN`
    (`libvirt:DOMAIN?connect=URI`).  `trace=False` never touches trace
    events or the log.  `probes` names those that measure stalls: by default the best that work
    here, none with `()`; `max_overhead` bounds what each may take of a host CPU (0.02: 2 %);
    stalls longer than the limits (ns) in `must_see` are not to be missed, whatever that costs.
    `freeze` is the reason why this guest must not be touched while the block lasts: other
    processes of ours refuse to.  `record` names a new file for the recording, `on_record` is
    called with every record from the header on.  `ping_monitor` and `ops_monitor` name further
    monitors of the same QEMU; otherwise free ones are found.  `guarded` keeps one free for the
    guard that a pause needs.  With `probes_at_once=False` the probes start with the first
    update, once it is known not to be refused.  `deadline` is for the connection, in seconds.

    Entering the block raises InputError (no such form of target, the recording exists, a monitor
    that is named twice, no such probe), GuestFrozen, TargetUnreachable, MonitorBusy, WrongGuest
    (also for a monitor of another guest), ProtocolViolation, DeadlineExceeded or TargetLost.
    """
    return Agent(
        AttachOptions(
            target=target,
            trace=trace,
            probes=None if probes is None else known_names(probes),
            max_overhead=max_overhead,
            must_see=dict(must_see or {}),
            freeze=freeze,
            record=record,
            ping_monitor=ping_monitor,
            ops_monitor=ops_monitor,
            guarded=guarded,
            probes_at_once=probes_at_once,
            on_record=on_record,
            deadline=deadline,
        )
    )


class Agent:
    """A watched guest; made by `attach`, usable inside its block.

    `monitor` is the connection it observes through, `operations` the one that was named for that
    (the observer's when none was, see `operating`), `measuring` the active probes.
    `facts` is what QEMU reports of the guest, `header` the first record, `remarks` what the user
    should know about this attachment, and `unrestored`, once it is left, what could not be put
    back as it was.
    """

    monitor: Monitor
    operations: Monitor
    measuring: Measuring
    facts: GuestFacts
    companions: Companions
    header: Header

    def __init__(self, options: AttachOptions) -> None:
        self.remarks: list[str] = []
        self.unrestored: list[str] = []
        self._options = options
        self._publisher = Publisher()
        self._background: Background
        self._attached: Attached
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._background = Background()
        async with AsyncExitStack() as stack:
            opening = Opening(
                self._options, stack, self._publisher, self._background, self.unrestored
            )
            attached = await opening.run()
            self._stack = stack.pop_all()
        self._attached = attached
        self.monitor = attached.monitors.observer
        self.operations = attached.monitors.operations
        self.measuring = attached.measuring
        self.facts = attached.facts
        self.companions = attached.monitors.companions
        self.header = attached.header
        self.remarks += attached.remarks
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        closing = asyncio.ensure_future(self._stack.__aexit__(kind, error, trace))
        try:
            with waiting("for the guest's trace events and log to be put back"):
                await asyncio.shield(closing)
        except asyncio.CancelledError:
            # the guest is put back as it was all the same
            await asyncio.wait([closing], timeout=_CLOSE_DEADLINE)
            raise

    # -- what is known ---------------------------------------------------------------------

    @property
    def source(self) -> str:
        """How changes are seen: `trace` (every one) or `polling` (some may be missed)."""
        return self._attached.source.name

    @property
    def map(self) -> MemoryMap:
        """The `memory` address space as of the last snapshot."""
        return self._attached.tracker.map

    @property
    def slots(self) -> SlotTable:
        """The memslots: as traced, or as QEMU's rules predict them."""
        return self._attached.tracker.slots

    @property
    def rules(self) -> Rules:
        """The rules by which this QEMU turns its map into slots."""
        return self._attached.tracker.rules

    @property
    def transitions(self) -> int:
        """How many transitions have been reported."""
        return self._attached.tracker.seq

    @property
    def snapshots(self) -> tuple[int, int]:
        """How many snapshots were taken, and the sum of their round trips in ns."""
        return self._attached.source.snapshots, self._attached.source.snapshot_ns

    @property
    def strategy(self) -> Mode | None:
        """What `steer` applies to the guest's own transitions; None where that is not known."""
        return self._attached.steering.strategy

    def probes(self) -> list[ProbeState]:
        """Which probes are active, and why others are not."""
        return self.measuring.state().probes

    def measured(self, start_ns: int, end_ns: int) -> frozenset[StallKind]:
        """The kinds of stall of which everything in `[start_ns, end_ns)` was seen."""
        return self.measuring.measured(start_ns, end_ns)

    async def probes_started(self) -> None:
        """Return when every probe is active, or has failed with a reason."""
        await self.measuring.wait_started()

    async def probes_ready(self, timeout_s: float) -> tuple[str, ...]:
        """Wait until all probes measure that can; returns those that do not yet."""
        return await self.measuring.wait_ready(timeout_s)

    # -- listening -------------------------------------------------------------------------

    def register(self, listener: MemoryListener) -> None:
        """Tell `listener` the present map and then every change.

        Raises ValueError when it is registered already.
        """
        self._publisher.dispatcher.register(listener, self.map.view)

    async def unregister(self, listener: MemoryListener) -> None:
        """Remove `listener` when it has got what has happened so far."""
        await self._publisher.dispatcher.unregister(listener)

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]:
        """Call `callback` with every record from now on; returns the way to stop that."""
        return self._publisher.records.subscribe(callback)

    def records(self, *, limit: int = 100_000) -> RecordStream:
        """An async iterator over the records from now on; it ends with the attachment."""
        return self._publisher.records.stream(limit)

    def driver_taken(self, device: str) -> tuple[int | None, int] | None:
        """When a driver of the guest took the PCI device: last seen without, first seen with one.

        In ns; None when none has, or where that is not known.
        """
        return self._attached.source.masters.taken(device)

    # -- operating -------------------------------------------------------------------------

    @asynccontextmanager
    async def operating(self) -> AsyncIterator[Monitor]:
        """A monitor for commands that take long, so that snapshots need not wait for them.

        The one that was named, else one that is free, for as long as the block lasts; the
        observer's own when there is no other.
        """
        free = self.companions.operations
        if self.monitor.abilities.manager:
            yield self.monitor  # its manager carries changes out
            return
        if self.operations is not self.monitor or free is None:
            yield self.operations
            return
        try:
            monitor = await Monitor.connect(
                free, meant=self.monitor.identity, deadline=self._options.deadline
            )
        except TargetError:
            yield self.monitor  # another task was quicker
            return
        async with monitor:
            yield monitor

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
        """Carry out an intent under `direct`, `pause` or `hole`.

        `pause` needs a monitor for its guard, which `attach(..., guarded=True)` keeps free.
        Returns an Outcome also when the guest or the strategy does not allow it; raises InputError
        for what no QEMU could do and TargetError when the guest is lost.  The methods below are
        short forms of this one.
        """
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
        """Unplug the device `id`; with `backends` remove its backends, too."""
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

    async def steer(self, strategy: Mode | str, *, strict: bool = False) -> Steering:
        """Apply a strategy to the changes that the guest itself makes; `off` takes it out again.

        As the verb of that name (docs/steering.md).  It stays when the block is left, and when this
        process dies.  Raises InputError, MissingPrerequisite where it cannot work, GuestMigrating,
        OperationFailed (QEMU runs as before) and TargetError.  When the result's `after` is not
        what was asked for, its `reason` says why.
        """
        done = await steer_guest(self.monitor, Mode(strategy), strict=strict)
        publish = self._publisher.records.publish
        await self._attached.steering.reach(done.after, self.measuring, publish)
        return done

    # -- waiting ---------------------------------------------------------------------------

    async def settle(self, *, listeners_s: float = 2.0) -> None:
        """Return when everything that has happened so far is reported and listeners know it.

        With tracing that is exact; without, a snapshot is taken.  Stalls that have ended are
        reported, too.  A listener that is busy for longer than `listeners_s` seconds is not waited
        for.  Raises TargetError.
        """
        now = time.monotonic_ns()
        await self._attached.source.settle()
        await self.measuring.settle(now)
        told = asyncio.ensure_future(self._publisher.dispatcher.idle())
        try:
            await asyncio.wait([told], timeout=listeners_s)
        finally:
            told.cancel()

    async def wait_lost(self) -> MemListenerError:
        """Wait until the guest is gone or cannot be followed any more; returns the reason."""
        return await asyncio.shield(self._background.lost)

    @property
    def is_lost(self) -> bool:
        """The guest is gone or cannot be followed any more."""
        return self._background.lost.done()
