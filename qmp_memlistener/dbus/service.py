"""The service: a connection to the bus, an object for each QEMU of this host, calls and signals.

Who may connect to the bus and who may call is the bus' to decide: a session bus is its user's, and
on a system bus nobody may without the policy of `interface.policy_text`.  Here calls are bounded: a
client that does not wait for answers is refused more, and signals are dropped and counted when the
bus does not take them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

from dbus_fast import BusType, DBusError, Message, MessageFlag, MessageType, NameFlag
from dbus_fast import RequestNameReply as NameReply
from dbus_fast.aio import MessageBus

from ..errors import MemListenerError, MissingPrerequisite, OperationFailed, TargetLost
from ..host.bounded import in_thread
from ..qmp import Guest, find_guests
from .answers import LARGE, error, failed, interfaces, properties
from .guest import ServedGuest, Settings
from .interface import (
    BUS_NAME,
    GUEST,
    OBJECT_MANAGER,
    PROPERTIES,
    ROOT,
    guest_xml,
    root_xml,
    tree_xml,
)
from .outbox import Outbox, be_patient

__all__ = ["Service", "serving"]

_LOOK_S = 3.0
_CONNECT_S = 10.0
_MOST_PENDING = 16
"""So many calls of one client may wait for a guest."""
_BUS = "org.freedesktop.DBus"
_OWN = ":own"
"""The watcher that is the service itself."""


class Service:
    """Serves until `run` ends; made by `serving`."""

    def __init__(self, bus: MessageBus, settings: Settings, *, watch_all: bool) -> None:
        self._bus = bus
        self._settings = settings
        self._watch_all = watch_all
        self._guests: dict[str, ServedGuest] = {}
        self._pidfds: dict[str, int] = {}
        self._pending: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._followed: set[str] = set()
        """Clients of which the bus tells when they leave."""
        self._out = Outbox(bus)
        self.named = asyncio.Event()
        """Clients can find us."""

    @property
    def guests(self) -> Sequence[ServedGuest]:
        return list(self._guests.values())

    async def run(self) -> None:
        """Serve until the bus is gone, which raises TargetLost, or until this is cancelled."""
        self._bus.add_message_handler(self._message)
        gone = asyncio.ensure_future(_gone(self._bus))
        try:
            await self._own_name()
            self._find(await in_thread(find_guests))
            self.named.set()
            while not gone.done():
                await asyncio.wait({gone}, timeout=_LOOK_S)
                self._find(await in_thread(find_guests))
            raise TargetLost(
                f"the bus has closed the connection{gone.result()}",
                remedy="start it again when the bus is there; no guest is touched meanwhile",
            )
        finally:
            gone.cancel()
            await self._close()

    async def _own_name(self) -> None:
        try:
            reply = await self._bus.request_name(BUS_NAME, NameFlag.DO_NOT_QUEUE)
        except DBusError as exc:
            raise MissingPrerequisite(
                f"the bus does not let us have the name {BUS_NAME}: {exc.text}",
                remedy="on a system bus run as root, with the policy that "
                "`qmp-memlistener dbus-serve --policy` prints in /etc/dbus-1/system.d",
            ) from exc
        if reply is not NameReply.PRIMARY_OWNER:
            raise OperationFailed(
                f"another process serves {BUS_NAME} on this bus",
                remedy=f"`busctl status {BUS_NAME}` shows it",
            )

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        guests, self._guests = self.guests, {}
        for path in list(self._pidfds):
            self._forget_process(path)
        await asyncio.gather(*(guest.close() for guest in guests))

    # -- which guests there are --------------------------------------------------------------

    def _find(self, found: Sequence[Guest]) -> None:
        keys = {(guest.pid, guest.process.start_ticks) for guest in found}
        for served in self.guests:
            if (served.guest.pid, served.guest.process.start_ticks) not in keys:
                self._remove(served.path)
        for guest in found:
            self._add(guest)

    def _add(self, guest: Guest) -> None:
        path = f"{ROOT}/guest/{guest.pid}_{guest.process.start_ticks}"
        if path in self._guests:
            return
        served = ServedGuest(
            guest,
            self._settings,
            partial(self._out.guest_signal, path),
            partial(self._announce, path),
        )
        try:
            # the kernel tells us at once when the process ends
            pidfd = os.pidfd_open(guest.pid)
        except OSError:
            return  # it has ended
        self._guests[path] = served
        self._pidfds[path] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._remove, path)
        self._out.signal(
            ROOT, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", [path, interfaces(served)]
        )
        if self._watch_all:
            self._spawn(self._watch_own(served))

    async def _watch_own(self, served: ServedGuest) -> None:
        with contextlib.suppress(MemListenerError):  # State and Reason tell
            await served.watch(_OWN)

    def _remove(self, path: str) -> None:
        self._forget_process(path)
        served = self._guests.pop(path, None)
        if served is None:
            return
        self._spawn(served.close())
        body = [path, [GUEST]]
        self._out.signal(ROOT, OBJECT_MANAGER, "InterfacesRemoved", "oas", body)

    def _forget_process(self, path: str) -> None:
        pidfd = self._pidfds.pop(path, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    # -- calls -------------------------------------------------------------------------------

    def _message(self, msg: Message) -> Message | bool:
        """Each message of the bus; what is no call of ours is left to the library."""
        if msg.message_type is MessageType.SIGNAL:
            if msg.sender == _BUS and msg.member == "NameOwnerChanged":
                name, _, owner = msg.body
                if not owner:
                    self._client_left(name)
            return False
        if msg.message_type is not MessageType.METHOD_CALL:
            return False
        answer = self._call(msg)
        if isinstance(answer, Message):
            self._reply(msg, answer)
        return True

    def _reply(self, call: Message, answer: Message) -> None:
        if not call.flags & MessageFlag.NO_REPLY_EXPECTED:
            self._out.send(answer)

    def _call(self, msg: Message) -> Message | None:
        """The answer; None when it comes later."""
        path = msg.path or ""
        served = self._guests.get(path)
        standard = (msg.interface or "", msg.member, msg.signature)
        match standard:
            case ("" | "org.freedesktop.DBus.Introspectable", "Introspect", ""):
                return self._introspect(msg, path, served)
            case ("" | "org.freedesktop.DBus.Peer", "Ping", ""):
                return Message.new_method_return(msg)
            case ("" | "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", "") if (
                path == ROOT
            ):
                objects = {path: interfaces(guest) for path, guest in self._guests.items()}
                return Message.new_method_return(msg, "a{oa{sa{sv}}}", [objects])
        if served is None:
            if path.startswith(f"{ROOT}/guest/"):
                return error(msg, "UnknownObject", "there is no such guest, or it has ended")
            return error(msg, "UnknownMethod", "there is no such object, interface or method")
        match standard:
            case ("" | "org.freedesktop.DBus.Properties", "Get" | "Set" | "GetAll", _):
                return properties(msg, served)
            case ("" | "org.qmp_memlistener1.Guest", "Unwatch", ""):
                if not served.unwatch(msg.sender or ""):
                    return failed(msg, OperationFailed("this client does not watch the guest"))
                self._unfollow(msg.sender or "")
                return Message.new_method_return(msg)
            case ("" | "org.qmp_memlistener1.Guest", "Watch", ""):
                return self._later(msg, self._watch(msg, served))
            case ("" | "org.qmp_memlistener1.Guest", "Snapshot", ""):
                return self._later(msg, self._snapshot(msg, served))
        return error(msg, "UnknownMethod", "there is no such interface or method")

    def _introspect(self, msg: Message, path: str, served: ServedGuest | None) -> Message:
        if served is not None:
            return Message.new_method_return(msg, "s", [guest_xml()])
        if path == ROOT:
            return Message.new_method_return(msg, "s", [root_xml()])
        below = [known for known in (f"{ROOT}/guest", *self._guests) if _is_below(known, path)]
        prefix = path.rstrip("/") + "/"
        names = {known.removeprefix(prefix).partition("/")[0] for known in below}
        return Message.new_method_return(msg, "s", [tree_xml(sorted(names))])

    def _later(self, msg: Message, answer: Coroutine[object, object, Message]) -> Message | None:
        sender = msg.sender or ""
        if self._pending[sender] >= _MOST_PENDING:
            answer.close()
            return error(msg, "LimitsExceeded", f"{_MOST_PENDING} calls of this client wait")
        self._pending[sender] += 1
        self._spawn(self._answer(msg, sender, answer))
        return None

    async def _answer(
        self, msg: Message, sender: str, answer: Coroutine[object, object, Message]
    ) -> None:
        try:
            reply = await answer
        except MemListenerError as exc:
            reply = failed(msg, exc)
        finally:
            self._pending[sender] -= 1
            if not self._pending[sender]:
                del self._pending[sender]
        self._reply(msg, reply)

    async def _snapshot(self, msg: Message, served: ServedGuest) -> Message:
        return Message.new_method_return(msg, "a{sv}", [await served.snapshot()])

    async def _watch(self, msg: Message, served: ServedGuest) -> Message:
        who = msg.sender or ""
        if who not in self._followed:
            self._followed.add(who)
            await self._bus_call("AddMatch", "s", [_left_rule(who)])
        try:
            await served.watch(who)
            if not await self._bus_call("NameHasOwner", "s", [who]):
                self._client_left(who)
        finally:
            self._unfollow(who)
        return Message.new_method_return(msg)

    def _client_left(self, name: str) -> None:
        for guest in self.guests:
            guest.unwatch(name)
        self._unfollow(name)

    def _unfollow(self, who: str) -> None:
        """The bus need not tell any more when a client leaves that watches nothing."""
        if who in self._followed and not any(who in guest.watchers for guest in self.guests):
            self._followed.discard(who)
            self._spawn(self._drop_match(who))

    async def _drop_match(self, who: str) -> None:
        with contextlib.suppress(MemListenerError):
            await self._bus_call("RemoveMatch", "s", [_left_rule(who)])

    async def _bus_call(self, member: str, signature: str, body: list[object]) -> object:
        call = Message(
            destination=_BUS,
            path="/org/freedesktop/DBus",
            interface=_BUS,
            member=member,
            signature=signature,
            body=body,
        )
        try:
            async with asyncio.timeout(_CONNECT_S):
                reply = await self._bus.call(call)
        except TimeoutError:
            raise OperationFailed(f"the bus did not answer {member} in time") from None
        assert reply is not None, "a reply is expected"
        if reply.message_type is MessageType.ERROR:
            raise OperationFailed(f"the bus refused {member}: {reply.body}")
        return reply.body[0] if reply.body else None

    def _announce(self, path: str, names: Sequence[str]) -> None:
        """PropertiesChanged: small values themselves, large ones and unknown ones by name."""
        served = self._guests.get(path)
        if served is None or not names:
            return
        changed, invalidated = {}, []
        for name in names:
            value = None if name in LARGE else served.value(name)
            if value is None:
                invalidated.append(name)
            else:
                changed[name] = value
        body = [GUEST, changed, invalidated]
        self._out.signal(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", body)

    def _spawn(self, what: Coroutine[object, object, None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def serving(
    bus_type: BusType,
    settings: Settings | None = None,
    *,
    watch_all: bool = False,
    address: str | None = None,
) -> AsyncIterator[Service]:
    """A service that is connected to the bus; `run` serves.  Raises MissingPrerequisite."""
    name = bus_type.name.lower()
    try:
        async with asyncio.timeout(_CONNECT_S):
            bus = await MessageBus(bus_address=address, bus_type=bus_type).connect()
    except Exception as exc:
        raise MissingPrerequisite(
            f"the {name} bus cannot be connected to: {str(exc) or type(exc).__name__}",
            remedy="is there one?  `busctl --system` or `busctl --user` shows it; dbus-run-session "
            "starts one for a command",
        ) from exc
    be_patient(bus)
    try:
        yield Service(bus, settings or Settings(), watch_all=watch_all)
    finally:
        bus.disconnect()


async def _gone(bus: MessageBus) -> str:
    """When the bus has closed the connection: why, in parentheses."""
    waiting = cast("Awaitable[None]", bus.wait_for_disconnect())  # type: ignore[no-untyped-call]
    try:
        await waiting
    except Exception as exc:
        return f" ({str(exc) or type(exc).__name__})"
    return ""


def _left_rule(name: str) -> str:
    return f"type='signal',sender='{_BUS}',member='NameOwnerChanged',arg0='{name}'"


def _is_below(path: str, top: str) -> bool:
    return path.startswith(top.rstrip("/") + "/")
