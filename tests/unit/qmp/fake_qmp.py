"""Servers that are no QEMU, or a sick one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from qmp_memlistener.qmp import UnixTarget
from qmp_memlistener.qmp.identity import ASKED

__all__ = ["GREETING", "Serve", "message", "negotiated", "replying", "request", "serving", "within"]

GREETING: dict[str, object] = {
    "QMP": {
        "version": {"qemu": {"major": 9, "minor": 1, "micro": 2}, "package": " (Debian 1:9) "},
        "capabilities": ["oob"],
    }
}
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def message(value: object) -> bytes:
    return json.dumps(value).encode() + b"\r\n"


@asynccontextmanager
async def serving(tmp_path: Path, serve: Serve) -> AsyncIterator[UnixTarget]:
    path = str(tmp_path / "qmp")
    writers: list[asyncio.StreamWriter] = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return

    server = await asyncio.start_unix_server(accepted, path)
    try:
        yield UnixTarget(path)
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()
        await asyncio.sleep(0)


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    start = time.monotonic()
    async with asyncio.timeout(seconds + 5):
        yield
    assert time.monotonic() - start < seconds


async def negotiated(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greets, accepts the capabilities, and says who it is: we are no QEMU, and so are asked."""
    writer.write(message(GREETING))
    for _ in ("qmp_capabilities", *ASKED):
        asked = json.loads(await request(reader))
        writer.write(message({"return": {}, "id": asked["id"]}))


async def request(reader: asyncio.StreamReader) -> bytes:
    """The next object; a client sends no line ends."""
    text = await reader.readuntil(b"}")
    while text.count(b"{") != text.count(b"}"):
        text += await reader.readuntil(b"}")
    return text


def replying(*replies: bytes, greeting: bytes = message(GREETING)) -> Serve:
    """As `negotiated`, then answers each line with the next of `replies`."""
    good = b'{"return": {}, "id": ID}\r\n'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        for reply in (good, *[good] * len(ASKED), *replies):
            exec_id = json.dumps(json.loads(await request(reader)).get("id")).encode()
            writer.write(reply.replace(b"ID", exec_id))
            await writer.drain()
        await reader.read()

    return serve
