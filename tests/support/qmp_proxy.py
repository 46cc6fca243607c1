"""A proxy in front of a real QMP monitor that lets one command fail in a chosen way.

    async with QmpProxy.on(guest.monitors[0]) as proxy:
        proxy.begin(Fault("device_add", 1, How.CUT_AFTER))

It listens on a TCP port, so that whoever connects sees nothing of the process behind it.  Each
client gets a connection to the monitor of its own, one after the other, as QEMU has it.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

__all__ = ["INJECTED", "Fault", "How", "QmpProxy"]

INJECTED = "injected by the test"
_LIMIT = 1 << 24
_NO_COMMAND = "x-no-such-command"


class How(StrEnum):
    """What becomes of a command.

    REFUSED: QEMU does not get it, the client gets an error in its turn.  SWALLOWED: neither QEMU
    gets it nor the client an answer.  MUTED: QEMU carries it out, the client gets no answer.
    CUT_BEFORE, CUT_AFTER: the connection ends before QEMU gets it, or after it has carried it out
    and before the client gets the answer.
    """

    REFUSED = "refused"
    SWALLOWED = "swallowed"
    MUTED = "muted"
    CUT_BEFORE = "cut before"
    CUT_AFTER = "cut after"


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the `nth` command (from 1) called `name`; nobody connects after that one that
    cuts the connection `for_good`."""

    name: str
    nth: int
    how: How
    for_good: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.nth}, {self.how}{' for good' if self.for_good else ''}"


class QmpProxy:
    """Made by `on`; `target` is where it listens.

    Since `begin`: `commands` are what clients sent, `forwarded` what QEMU got of it, `done` what it
    has carried out, `hits` how many faults there were.  While `closed` nobody gets through.
    """

    def __init__(self, monitor: Path) -> None:
        self.target = ""
        self.commands: list[str] = []
        self.forwarded: list[str] = []
        self.done: list[str] = []
        self.hits = 0
        self.closed = False
        self._monitor = monitor
        self._faults: tuple[Fault, ...] = ()
        self._counts: Counter[str] = Counter()
        self._clients: set[asyncio.Task[None]] = set()
        self._one = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def on(cls, monitor: Path) -> AsyncIterator[Self]:
        """A proxy of this monitor as long as the block lasts."""
        proxy = cls(monitor)
        server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0, limit=_LIMIT)
        host, port = server.sockets[0].getsockname()
        proxy.target = f"{host}:{port}"
        try:
            yield proxy
        finally:
            server.close()
            for task in tuple(proxy._clients):
                task.cancel()
            if proxy._clients:
                await asyncio.wait(proxy._clients, timeout=5)
            await server.wait_closed()

    def begin(self, *faults: Fault) -> None:
        """Count commands from now on, and let these fail."""
        self.commands = []
        self.forwarded = []
        self.done = []
        self.hits = 0
        self._counts.clear()
        self._faults = faults

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            async with self._one:  # QEMU serves one client at a time
                if not self.closed:
                    await self._serve(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either side has hung up, or the test is over
        finally:
            self._clients.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        qemu_reader, qemu_writer = await asyncio.open_unix_connection(self._monitor, limit=_LIMIT)
        session = _Session(self, writer, qemu_writer)
        ways = [
            asyncio.create_task(session.from_client(reader)),
            asyncio.create_task(session.from_qemu(qemu_reader)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            qemu_writer.close()
            with suppress(OSError):
                await qemu_writer.wait_closed()

    def _take(self, name: str) -> How | None:
        """A command has come: what becomes of it."""
        self.commands.append(name)
        self._counts[name] += 1
        for fault in self._faults:
            if (fault.name, fault.nth) == (name, self._counts[name]):
                self.hits += 1
                self.closed = fault.for_good
                return fault.how
        return None


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, object]]:
    """JSON objects one after the other; clients need not put anything between them."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text = ""
    while data := await reader.read(1 << 16):
        text += decode(data)
        while text := text.lstrip():
            try:
                message, end = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                break  # the rest is still to come
            text = text[end:]
            yield message


class _Session:
    """One client.  Each way ends when its peer hangs up or the connection is to be cut."""

    def __init__(
        self, proxy: QmpProxy, client: asyncio.StreamWriter, qemu: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._qemu = qemu
        self._sent: dict[object, tuple[str, How | None]] = {}
        """What QEMU has not answered, by id, and what becomes of the answers."""
        self._answered = asyncio.Event()

    async def from_client(self, reader: asyncio.StreamReader) -> None:
        async for message in _messages(reader):
            name = str(message.get("execute") or message.get("exec-oob"))
            how = self._proxy._take(name)
            if how is How.CUT_BEFORE:
                await self._all_answered()
                return
            if how is How.SWALLOWED:
                continue
            self._sent[message.get("id")] = name, how
            if how is How.REFUSED:
                # QEMU itself answers in the right order
                message = {"execute": _NO_COMMAND, "id": message.get("id")}
            else:
                self._proxy.forwarded.append(name)
            self._qemu.write(json.dumps(message).encode() + b"\n")
            if how is How.CUT_AFTER:
                await self._all_answered()
                return

    async def from_qemu(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if "return" not in message and "error" not in message:
                self._client.write(line)  # the greeting, an event
                continue
            name, how = self._sent.pop(message.get("id"))
            if "return" in message:
                self._proxy.done.append(name)
            if how is How.REFUSED:
                message["error"] = {"class": "GenericError", "desc": INJECTED}
                line = json.dumps(message).encode() + b"\r\n"
            if how not in (How.CUT_AFTER, How.MUTED):
                self._client.write(line)
            self._answered.set()

    async def _all_answered(self) -> None:
        """QEMU drops what it has not begun when a connection ends: let it finish."""
        while self._sent:
            self._answered.clear()
            await self._answered.wait()
