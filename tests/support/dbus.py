"""A message bus of a test's own, and clients on it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from qmp_memlistener.dbus.interface import BUS_NAME, GUEST, PROPERTIES, ROOT
from tests.support.host import patience

__all__ = ["BUS_CONFIG", "Client", "own_bus", "run_tool", "skip_without"]

BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>{kind}</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    {rules}
  </policy>
  {more}
</busconfig>
"""
_ALL = '<allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/>'
_SYSTEM = """<allow user="*"/><deny own="*"/><deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/><allow receive_type="method_return"/>
    <allow receive_type="error"/><allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>"""


def skip_without(*programs: str) -> None:
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (`tools/setup.sh` as root installs it)")


@asynccontextmanager
async def own_bus(
    directory: Path, *, include: Path | None = None
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A dbus-daemon: its address and process.  With `include`, a system bus with that policy."""
    skip_without("dbus-daemon")
    path = directory / "bus"
    more = "" if include is None else f"<include>{include}</include>"
    text = BUS_CONFIG.format(
        kind="session" if include is None else "system",
        path=path,
        rules=_ALL if include is None else _SYSTEM,
        more=more,
    )
    (directory / "bus.conf").write_text(text)
    process = await asyncio.create_subprocess_exec(
        *("dbus-daemon", f"--config-file={directory / 'bus.conf'}", "--nofork", "--print-pid"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(patience(10.0)):
            assert await process.stdout.readline(), "dbus-daemon did not start"
        yield f"unix:path={path}", process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Client:
    """One connection; `signals` are those that came from the service, in order."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self.signals: list[Message] = []
        self._news = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def connected(cls, address: str) -> AsyncIterator[Client]:
        async with asyncio.timeout(patience(10.0)):
            bus = await MessageBus(bus_address=address).connect()
        client = cls(bus)
        try:
            bus.add_message_handler(client._take)
            await client.call(
                *("AddMatch", "s", [f"type='signal',path_namespace='{ROOT}'"]),
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                to="org.freedesktop.DBus",
            )
            yield client
        finally:
            bus.disconnect()

    def _take(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL and (message.path or "").startswith(ROOT):
            self.signals.append(message)
            self._news.set()

    async def call(
        self,
        member: str,
        signature: str = "",
        body: Sequence[object] = (),
        *,
        path: str = ROOT,
        interface: str = GUEST,
        to: str = BUS_NAME,
    ) -> list[object]:
        """The answer's body.  Raises AssertionError with the error's name and text."""
        reply = await self.ask(member, signature, body, path=path, interface=interface, to=to)
        assert reply.message_type is not MessageType.ERROR, (reply.error_name, reply.body)
        return list(reply.body)

    async def ask(
        self,
        member: str,
        signature: str = "",
        body: Sequence[object] = (),
        *,
        path: str = ROOT,
        interface: str = GUEST,
        to: str = BUS_NAME,
    ) -> Message:
        """The answer, which may be an error."""
        message = Message(
            destination=to,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
        )
        async with asyncio.timeout(patience(30.0)):
            reply = await self.bus.call(message)
        assert reply is not None
        return reply

    async def properties(self, path: str) -> dict[str, object]:
        (found,) = await self.call("GetAll", "s", [GUEST], path=path, interface=PROPERTIES)
        assert isinstance(found, dict)
        return {name: value.value for name, value in found.items()}

    async def object_of(self, pid: int) -> str:
        """The path of the guest's object, as soon as it is there."""
        async with asyncio.timeout(patience(20.0)):
            while True:
                self._news.clear()
                (known,) = await self.call(
                    "GetManagedObjects", interface="org.freedesktop.DBus.ObjectManager"
                )
                assert isinstance(known, dict)
                for path in known:
                    if path.startswith(f"{ROOT}/guest/{pid}_"):
                        return str(path)
                await self._news.wait()

    def seen(self, member: str, path: str) -> list[Message]:
        """Signals of this name from this object; of the manager's those about it."""
        return [
            s
            for s in self.signals
            if s.member == member and (s.path == path or (s.path == ROOT and s.body[0] == path))
        ]

    async def until(self, member: str, path: str, count: int = 1) -> list[Message]:
        """When so many such signals have come."""
        async with asyncio.timeout(patience(20.0)):
            while len(found := self.seen(member, path)) < count:
                self._news.clear()
                await self._news.wait()
        return found

    async def until_property(self, path: str, name: str, value: object) -> None:
        """When the property has this value."""
        async with asyncio.timeout(patience(20.0)):
            while (await self.properties(path)).get(name) != value:
                self._news.clear()
                await self._news.wait()


async def run_tool(*argv: str) -> str:
    """Standard output of a program that must succeed."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(patience(20.0)):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
