"""A connection to one QMP monitor: deadlines, typed errors, times, events, and its end.

Wraps a link (`links`), which carries the messages; one object is one place at one monitor, and a
QMP monitor has one place.  What is said over it is the business of `hmp` and others.

    async with await Monitor.connect(parse_target("unix:/run/vm.qmp")) as monitor:
        status = await monitor.execute("query-status")

Sources: docs/interop/qmp-spec.rst; monitor/qmp.c for the in-band queue and OOB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

from ..errors import CommandFailed, DeadlineExceeded, TargetError, TargetLost, WrongGuest
from ..waits import waiting
from . import allowed
from .events import EventStream, MonitorEvent, decode_event
from .identity import ASKED, GuestIdentity, same_answers
from .libvirt_link import LibvirtLink
from .links import MANAGED, Abilities, Command, Link, QemuVersion, Reply
from .no_link import NoLink
from .resolving import resolve
from .socket_link import SocketLink
from .targets import Address, LibvirtTarget, PidTarget, Target

__all__ = ["CONNECT_DEADLINE", "Command", "Monitor", "QemuVersion", "Reply"]

CONNECT_DEADLINE = 1.0
COMMAND_DEADLINE = 10.0
_CLOSE_DEADLINE = 1.0


class Monitor:
    """A connected QMP monitor.  Use `connect`; the constructor does not connect.

    `identity` is the guest that answers: it is fixed by the first connection, or by `meant`.
    `abilities` says what can be done over this connection.
    `lost` is a future that gets the error (a TargetLost or ProtocolViolation) as its *result*
    when the session ends, whoever ended it.
    """

    def __init__(self, target: Address, *, permits: Iterable[allowed.Permit] = ()) -> None:
        self.target = target
        self._permits = frozenset(permits)
        self.version = QemuVersion(0, 0, 0)
        self.abilities = Abilities()
        self.identity = GuestIdentity()
        self._meant: GuestIdentity | None = None
        self.lost: asyncio.Future[TargetError] = asyncio.get_running_loop().create_future()
        self._link = self._new_link()
        self._ended = asyncio.Event()
        self._reaper: asyncio.Task[None] | None = None
        self._in_band = asyncio.Lock()
        self._callbacks: list[Callable[[MonitorEvent], None]] = []
        self._streams: list[EventStream] = []
        self._closing = False

    @classmethod
    async def connect(
        cls,
        target: Target,
        *,
        meant: GuestIdentity | None = None,
        deadline: float = CONNECT_DEADLINE,
        permits: Iterable[allowed.Permit] = (),
    ) -> Monitor:
        """Connect and negotiate, within `deadline` seconds.

        A `pid:N` or `name:GUEST` target means the first of that QEMU's monitors that is free, or
        libvirt.  Raises WrongGuest when another guest answers than `meant` (without: whoever does
        is meant from then on), TargetUnreachable, MonitorBusy, ProtocolViolation, DeadlineExceeded
        or TargetLost (the peer hung up before it greeted), MissingPrerequisite without libvirt's
        module.  `permits` are what the user asked for although it does harm.
        """
        permits = frozenset(permits)
        with waiting(f"for {target} to answer"):
            found, meant = await resolve(target, meant)
            for one, more in zip(found, (*found[1:], None), strict=True):
                monitor = cls(one, permits=permits)
                monitor._meant = meant
                try:
                    await monitor._open(deadline)
                except WrongGuest:
                    if more is None:
                        raise
                else:
                    return monitor
        raise AssertionError("resolve finds at least one")

    async def reconnect(self, *, deadline: float = CONNECT_DEADLINE) -> None:
        """Connect again to the same guest.  Event streams and callbacks stay registered.

        Raises as `connect` does: WrongGuest when another guest answers there now.
        """
        await self._shut(_CLOSE_DEADLINE)
        self.lost = asyncio.get_running_loop().create_future()
        self._link = self._new_link()
        self._ended = asyncio.Event()
        self._in_band = asyncio.Lock()
        self._closing = False
        await self._open(deadline)
        for stream in self._streams:
            stream.revive()

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, object] | None = None,
        *,
        deadline: float = COMMAND_DEADLINE,
        oob: bool = False,
    ) -> object:
        """Run one command and return its value.  Raises as `timed` does."""
        return (await self.timed(name, arguments, deadline=deadline, oob=oob)).value

    async def timed(
        self,
        name: str,
        arguments: Mapping[str, object] | None = None,
        *,
        deadline: float = COMMAND_DEADLINE,
        oob: bool = False,
    ) -> Reply:
        """Run one command and return its value with its times.

        In-band commands of one Monitor are sent one after the other; `oob` ones overtake them.
        Raises CommandNotAllowed (nothing was sent), CommandFailed (QEMU refused), DeadlineExceeded,
        TargetLost, ProtocolViolation.
        After DeadlineExceeded the command may still run in QEMU; its reply is dropped.
        """
        if oob:
            replies = await self._run([Command(name, arguments)], deadline, oob=True)
        else:
            replies = await self.pipeline([Command(name, arguments)], deadline=deadline)
        reply = replies[0]
        if isinstance(reply, CommandFailed):
            raise reply
        return reply

    async def pipeline(
        self, commands: Sequence[Command], *, deadline: float = COMMAND_DEADLINE
    ) -> list[Reply | CommandFailed]:
        """Send several commands in one write; QEMU runs them in order, also after a failure.

        Each result is a Reply or, for a command QEMU refused, the CommandFailed (not raised).
        Raises DeadlineExceeded, TargetLost, ProtocolViolation.
        """
        try:
            async with asyncio.timeout(deadline):
                async with self._in_band:
                    return await self._run(commands, None)
        except TimeoutError:
            raise self._too_slow(commands, deadline) from None

    def events(self, *, limit: int = 4096) -> EventStream:
        """A new stream of the events from now on; see `EventStream`."""
        stream = EventStream(limit, self._streams.remove)
        self._streams.append(stream)
        return stream

    def subscribe(self, callback: Callable[[MonitorEvent], None]) -> Callable[[], None]:
        """Call `callback` with each event, in the event loop; returns the way to stop it.

        The callback must be quick and must not raise.
        """
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    @property
    def is_connected(self) -> bool:
        return self._link.is_running and not self._closing

    async def close(self, *, deadline: float = _CLOSE_DEADLINE) -> None:
        """End the session.  Idempotent; returns within about `deadline` even if QEMU hangs."""
        await self._shut(deadline)
        for stream in tuple(self._streams):
            stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _new_link(self) -> Link:
        def on_end() -> None:
            self._ended.set()

        if isinstance(self.target, PidTarget):
            return NoLink(self.target, on_end)
        if isinstance(self.target, LibvirtTarget):
            return LibvirtLink(self.target, self._on_event, on_end)
        return SocketLink(self.target, self._on_event, on_end)

    async def _open(self, deadline: float) -> None:
        link = self._link
        until = asyncio.get_running_loop().time() + deadline
        self.identity = await link.open(self._meant, deadline)
        self.version, self.abilities = link.version, link.abilities
        self._reaper = asyncio.create_task(self._reap(link), name=f"reap {self.target}")
        if not self.identity.certain:
            try:
                self.identity = same_answers(self.target, self.identity, await self._asked(until))
            except BaseException:
                await self._shut(_CLOSE_DEADLINE)
                raise
        self._meant = self.identity

    async def _asked(self, until: float) -> dict[str, object]:
        """What the guest says of itself; a command that it refuses counts as no answer."""
        left = max(0.1, until - asyncio.get_running_loop().time())
        replies = await self.pipeline([Command(name) for name in ASKED], deadline=left)
        return {
            name: reply.value
            for name, reply in zip(ASKED, replies, strict=True)
            if isinstance(reply, Reply)
        }

    async def _run(
        self, commands: Sequence[Command], deadline: float | None, *, oob: bool = False
    ) -> list[Reply | CommandFailed]:
        for command in commands:  # everything that leaves passes here
            self._check(command)
        if not self.is_connected:
            raise self._lost_error()
        try:
            async with asyncio.timeout(deadline):
                return await self._link.run(commands, oob=oob)
        except TimeoutError:
            raise self._too_slow(commands, deadline or 0) from None
        except ConnectionError:
            await self._await_reaper()
            raise self._lost_error() from None

    def _check(self, command: Command) -> None:
        """Raises CommandNotAllowed.  (Tests send what the product would not over a subclass.)"""
        if self.abilities.manager and command.name in MANAGED:
            return  # its manager judges
        allowed.check(command.name, command.arguments, self._permits)

    def _too_slow(self, commands: Sequence[Command], deadline: float) -> DeadlineExceeded:
        names = ", ".join(c.name for c in commands)
        return DeadlineExceeded(
            f"{self.target} did not answer {names} within {deadline:g} s",
            remedy="QEMU's main loop is stalled, or the process is stopped; it may still do it"
            + self._link.why_slow,
        )

    def _lost_error(self) -> TargetError:
        if self.lost.done():
            return self.lost.result()
        return TargetLost(f"the connection to {self.target} is closed")

    def _on_event(self, message: Mapping[str, object], t_ns: int, size: int) -> None:
        event = decode_event(message, t_ns)
        for callback in tuple(self._callbacks):
            callback(event)
        for stream in self._streams:
            stream.push(event, size)

    async def _reap(self, link: Link) -> None:
        """The only place that ends the link: qemu.qmp does not bear two at a time."""
        await self._ended.wait()
        error: TargetError | None = None
        try:
            await link.end()
        except TargetError as cause:
            error = cause
        if self._closing or error is None:
            error = TargetLost(f"the connection to {self.target} is closed")
        if not self.lost.done():
            self.lost.set_result(error)
        if self._closing:
            return
        for stream in tuple(self._streams):
            stream.fail(error)

    async def _await_reaper(self) -> None:
        if self._reaper is not None:
            await asyncio.wait((self._reaper,), timeout=_CLOSE_DEADLINE)

    async def _shut(self, deadline: float) -> None:
        self._closing = True
        reaper, self._reaper = self._reaper, None
        if reaper is None:
            return
        self._ended.set()
        try:
            done, _ = await asyncio.wait((reaper,), timeout=deadline)
            if not done:
                # The peer does not read: what we wanted to send cannot be flushed.
                self._link.abort()
                await asyncio.wait((reaper,), timeout=deadline)
        finally:
            if not reaper.done():
                self._link.abort()
                reaper.cancel()
