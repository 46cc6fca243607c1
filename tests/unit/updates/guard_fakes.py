"""A QEMU that does what a real one will not do on request, and guards that look at it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qmp_memlistener.qmp import Monitor, UnixTarget
from qmp_memlistener.updates.pause.guard import ResumeGuard

__all__ = ["FakeQemu", "Fresh", "Stalling", "faked"]

GREETING: dict[str, object] = {
    "QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 0}}, "capabilities": ["oob"]}
}


class FakeQemu:
    """A run state behind several monitors.

    `refuse`: how often a command is refused (-1: always).  `becomes`: the status that a command
    leads to in place of its own.  `migrates`: the status and that of the migration before a command
    is carried out.  While `open` is not set, no command is answered; the answer to the command
    `late` comes when `told` is set, some time after its event.
    """

    def __init__(self) -> None:
        self.status = "running"
        self.refuse: dict[str, int] = {}
        self.becomes: dict[str, str] = {}
        self.migrates: dict[str, tuple[str, str]] = {}
        self.migration = "none"
        self.ran: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.late = ""
        self.told = asyncio.Event()
        self._clients: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.append(writer)
        try:
            # as QEMU does at times: answers that are for the client before
            stale = {"return": {"status": "shutdown", "running": False}, "id": 5}
            self._send(writer, stale)
            self._send(writer, GREETING)
            async for message in _messages(reader):
                await self.open.wait()
                if message["execute"] == "qmp_capabilities":
                    self._send(writer, stale)
                number = {"id": message["id"]} if "id" in message else {}
                answer = {**self._run(str(message["execute"])), **number}
                if message["execute"] == self.late:
                    await self.told.wait()
                self._send(writer, answer)
        except ConnectionError:
            pass
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            self._clients.remove(writer)
            writer.close()

    def hang_up(self) -> None:
        for writer in self._clients:
            writer.close()

    def _run(self, name: str) -> dict[str, object]:
        self.ran.append(name)
        left = self.refuse.get(name, 0)
        if left:
            self.refuse[name] = left - 1
            return {"error": {"class": "GenericError", "desc": f"no {name} now"}}
        if name in self.migrates:
            self.status, self.migration = self.migrates.pop(name)
        if name == "stop" and self.status == "running":
            self._change(self.becomes.get(name, "paused"), "STOP")
        elif name == "cont" and self.status in ("paused", "postmigrate"):
            self._change("running", "RESUME")
        elif name in self.becomes:
            self.status = self.becomes[name]
        if name == "query-migrate":
            return {"return": {} if self.migration == "none" else {"status": self.migration}}
        if name == "query-status":
            return {"return": {"status": self.status, "running": self.status == "running"}}
        return {"return": {}}

    def _change(self, status: str, event: str) -> None:
        self.status = status
        for writer in self._clients:
            self._send(writer, {"event": event, "timestamp": {"seconds": 1, "microseconds": 0}})

    def _send(self, writer: asyncio.StreamWriter, message: dict[str, object]) -> None:
        writer.write(json.dumps(message).encode() + b"\r\n")


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, object]]:
    """JSON objects one behind the other: a client need not end a line."""
    text = ""
    while data := await reader.read(4096):
        text = (text + data.decode()).lstrip()
        while text:
            try:
                message, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            text = text[end:].lstrip()
            yield message


@asynccontextmanager
async def faked(
    directory: Path, guard_type: type[ResumeGuard] = ResumeGuard
) -> AsyncIterator[tuple[FakeQemu, Monitor, ResumeGuard]]:
    fake = FakeQemu()
    paths = [str(directory / name) for name in ("a", "b")]
    servers = [await asyncio.start_unix_server(fake.serve, path) for path in paths]
    try:
        async with (
            await Monitor.connect(UnixTarget(paths[0]), deadline=30.0) as monitor,
            await guard_type.start([UnixTarget(paths[1])]) as guard,
        ):
            fake.ran.clear()
            yield fake, monitor, guard
            fake.open.set()
    finally:
        for server in servers:
            server.close()
        fake.hang_up()
        await asyncio.sleep(0)


class Fresh(ResumeGuard):
    """What it says is never too old, however busy this host is."""

    async def arm(self, *, held: bool = True) -> str:
        status = await super().arm(held=held)
        self.looked_ns += 1 << 60
        return status


class Stalling(Fresh):
    """QEMU stops answering right after this guard was armed."""

    fake: FakeQemu | None = None

    async def arm(self, *, held: bool = True) -> str:
        status = await super().arm(held=held)
        if self.fake is not None:
            self.fake.open.clear()
        return status
