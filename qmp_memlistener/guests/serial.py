"""A serial port of a guest, on a unix socket of ours to which QEMU connects when it starts.

So nothing that the guest prints is lost.  What the lines mean is up to the derived class.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["SerialPort"]


class SerialPort(asyncio.Protocol):
    """A context manager that listens at `path` for QEMU; who connects later is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: self if self._transport is None else asyncio.Protocol(), str(self.path)
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()
        if self._transport is not None:
            self._transport.abort()

    def line_received(self, line: bytes) -> None:
        """A whole line, without its end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        start = len(self._input)
        self._input += data
        while (end := self._input.find(b"\n", start)) >= 0:
            line = bytes(self._input[:end])
            del self._input[: end + 1]
            start = 0
            self.line_received(line)
