"""The link through libvirt (`links.Link`), which holds the monitor of its guests.

Commands travel as virDomainQemuMonitorCommand, 2 ms each and one at a time: libvirt has a lock on
the domain that each of them takes.  Its calls block for as long as libvirtd likes, so they are made
in threads that nobody waits for in the end.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence

from ..errors import CommandFailed, DeadlineExceeded, ProtocolViolation, TargetError
from ..host.bounded import in_thread
from .discovery import find_guests
from .identity import GuestIdentity, is_domain, wrong_guest
from .libvirt_session import DomainFacts, LibvirtSession
from .links import MANAGED, Abilities, Command, OnEvent, QemuVersion, Reply
from .targets import LibvirtTarget

__all__ = ["LibvirtLink"]

_OPEN_S = 5.0
"""Connecting may start libvirtd (socket activation), and asks it several things."""
_CLOSE_S = 1.0


class LibvirtLink:
    """One connection to libvirt, for one domain."""

    def __init__(
        self, target: LibvirtTarget, on_event: OnEvent, on_end: Callable[[], None]
    ) -> None:
        self.abilities = Abilities()
        self.version = QemuVersion(0, 0, 0)
        self._target = target
        self._on_event = on_event
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._session = LibvirtSession(target, self._heard, self._has_gone)
        self._running = False
        self._error: TargetError | None = None
        self._call: asyncio.Future[list[Reply | CommandFailed]] | None = None

    @property
    def why_slow(self) -> str:
        return (
            "; or another client of libvirt's has a job on the domain: "
            f"virsh domjobinfo {self._target.domain}"
        )

    @property
    def is_running(self) -> bool:
        return self._running

    async def open(self, meant: GuestIdentity | None, deadline: float) -> GuestIdentity:
        limit = max(deadline, _OPEN_S)
        try:
            async with asyncio.timeout(limit):
                facts = await in_thread(self._session.open)
                identity = await in_thread(_identify, facts)
                _check(self._target, meant, identity)
                (version,) = await self._run([Command("query-version")])
        except TimeoutError:
            self.abort()
            raise DeadlineExceeded(
                f"libvirt did not answer for {self._target} within {limit:g} s",
                remedy="libvirtd hangs, or has a job on this domain: virsh domjobinfo "
                f"{self._target.domain}",
            ) from None
        except BaseException:
            self.abort()
            raise
        if isinstance(version, CommandFailed):
            self.abort()
            raise version
        try:
            self.version = QemuVersion.read(version.value)
        except (LookupError, TypeError, ValueError) as error:
            self.abort()
            raise ProtocolViolation(f"{self._target} has an odd version: {error}") from error
        self.abilities = Abilities(
            asks=True,
            descriptors=facts.hands_files,
            manager=f"libvirt ({facts.uri})",
            remark=f"libvirt marks the domain {facts.name} as tainted (custom-monitor) for as long "
            "as it runs, because monitor commands are sent through it",
        )
        if self._error is not None:
            self.abort()
            raise self._error
        self._running = True
        return meant or identity

    async def run(
        self, commands: Sequence[Command], *, oob: bool = False
    ) -> list[Reply | CommandFailed]:
        if oob:
            raise ProtocolViolation(f"{self._target}: libvirt passes no out-of-band commands on")
        if not self._running:
            raise ConnectionError("the session has ended")
        return await self._run(commands)

    async def _run(self, commands: Sequence[Command]) -> list[Reply | CommandFailed]:
        while self._call is not None and not self._call.done():
            await asyncio.wait([self._call])  # of one that was given up
        enough = threading.Event()
        call = asyncio.ensure_future(in_thread(_send, self._session, commands, enough))
        self._call = call
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            enough.set()
            call.add_done_callback(lambda c: c.cancelled() or c.exception())
            raise

    async def end(self) -> None:
        self._running = False
        try:
            async with asyncio.timeout(_CLOSE_S):
                await in_thread(self._session.close)
        except TimeoutError:
            pass  # nothing waits for that thread
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        self._running = False
        threading.Thread(target=self._session.close, daemon=True, name="libvirt close").start()

    # -- in libvirt's thread -------------------------------------------------------------------

    def _heard(self, name: str, seconds: int, microseconds: int, details: str | None) -> None:
        now = time.monotonic_ns()
        try:
            data = json.loads(details) if details else {}
        except (ValueError, RecursionError):
            data = {}
        message: dict[str, object] = {
            "event": name,
            "data": data,
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
        }
        self._in_loop(lambda: self._on_event(message, now, len(details or "")))

    def _has_gone(self, error: TargetError) -> None:
        self._in_loop(lambda: self._finish(error))

    def _in_loop(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            pass  # the loop is closed: nobody listens any more

    def _finish(self, error: TargetError) -> None:
        if self._error is None:
            self._error = error
        if self._running:
            self._running = False
            self._on_end()


def _send(
    session: LibvirtSession, commands: Sequence[Command], enough: threading.Event
) -> list[Reply | CommandFailed]:
    """In a thread: one after the other, until nobody waits any more."""
    replies: list[Reply | CommandFailed] = []
    for command in commands:
        if enough.is_set():
            break
        start = time.monotonic_ns()
        if command.name in MANAGED:
            refused = session.change(command.name, command.arguments or {})
            if command.name == "stop" and enough.is_set():
                # libvirt let it in after it was given up: no `cont` would follow
                session.change("cont", {})
                break
            replies.append(
                Reply({}, start, time.monotonic_ns())
                if refused is None
                else CommandFailed(command.name, "libvirt", refused)
            )
            continue
        message: dict[str, object] = {"execute": command.name}
        if command.arguments is not None:
            message["arguments"] = dict(command.arguments)
        text = session.command(json.dumps(message), () if command.fd is None else (command.fd,))
        replies.append(_reply(command, text, start, time.monotonic_ns()))
    return replies


def _reply(command: Command, text: str, start_ns: int, end_ns: int) -> Reply | CommandFailed:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict) and "return" in answer:
        return Reply(answer["return"], start_ns, end_ns)
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        raise ProtocolViolation(f"the answer to {command.name} that libvirt gave is none of QEMU's")
    return CommandFailed.of(command.name, error)


def _identify(facts: DomainFacts) -> GuestIdentity:
    """The domain's process, where exactly one on this host is that domain."""
    if not facts.local:
        return GuestIdentity()
    domain = LibvirtTarget(facts.uuid, facts.uri)
    found = [guest for guest in find_guests() if is_domain(guest, domain)]
    return GuestIdentity.of(found[0].process) if len(found) == 1 else GuestIdentity()


def _check(target: LibvirtTarget, meant: GuestIdentity | None, found: GuestIdentity) -> None:
    """Raises WrongGuest.  Where the process is not visible, UUID and name are compared next."""
    if meant is None or found == meant or meant.is_named:
        return
    if meant.certain or found.certain:
        raise wrong_guest(target, meant, found)
