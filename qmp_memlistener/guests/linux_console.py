"""Commands for a Linux guest: the host's side of vm-images/linux/agent.

The agent sits on a serial port that is a unix socket of ours, to which QEMU connects when it
starts, so that nothing the guest says is lost.  Lines are described in vm-images/linux/agent.
Booting the guest is `linux`'s business.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ..errors import DeadlineExceeded, OperationFailed, TargetError, TargetLost

__all__ = ["Console", "Outcome"]

COMMAND_MAX = 16_000
"""Bytes of a command.  The agent reads byte by byte, 5,000 to 20,000 a second under TCG."""

_KILLED = 128 + 9  # the exit status of what SIGKILL ended
_GRACE = 10.0  # seconds beyond a command's own deadline for the agent and the serial port


class Outcome(NamedTuple):
    """Exit status of a command, and what it printed (standard error included)."""

    status: int
    text: str


class Console(asyncio.Protocol):
    """The agent's serial port, listening at `path`; a context manager.

    One command at a time, whoever calls.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()
        self._boots = 0
        self._said_ready = asyncio.Event()
        self._lost: TargetError | None = None
        self._number = 0
        self._answer: tuple[int, asyncio.Future[Outcome]] | None = None
        self._lock = asyncio.Lock()
        self._busy_until = 0.0  # with a command that nobody waits for any more

    @property
    def boots(self) -> int:
        """How often the guest has come up since QEMU started."""
        return self._boots

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        # QEMU connects, and once; whoever comes later is not heard.
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

    async def wait_boot(self, number: int = 1, timeout: float = 60.0) -> None:
        """Until the guest has come up `number` times.

        Raises DeadlineExceeded after `timeout` seconds and TargetLost when QEMU has ended.
        """
        try:
            async with asyncio.timeout(timeout):
                while self._boots < number:
                    self._check_lost()
                    self._said_ready.clear()
                    await self._said_ready.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the Linux guest was not up within {timeout:g} s",
                remedy="its kernel's messages are in the log; under KVM inside a VM try TCG",
            ) from None

    async def run(self, command: str, timeout: float = 10.0) -> Outcome:
        """Run a shell command in the guest, which kills it after `timeout` seconds.

        Raises DeadlineExceeded then and when no answer comes, OperationFailed when the guest
        boots meanwhile, TargetLost when QEMU ends, ValueError for a command that is too long.
        """
        code = command.encode()
        if len(code) > COMMAND_MAX:
            raise ValueError(f"a command has at most {COMMAND_MAX} bytes, not {len(code)}")
        seconds = max(1, round(timeout))
        async with self._lock:
            self._check_lost()
            if self._transport is None or not self._boots:
                raise OperationFailed("the Linux guest is not up yet")
            self._number += 1
            answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            self._answer = (self._number, answer)
            began = time.monotonic()
            ends = max(began, self._busy_until) + seconds + _GRACE
            line = f"\nrun {self._number} {seconds} {base64.b64encode(code).decode()}\n"
            try:
                self._transport.write(line.encode())
                async with asyncio.timeout(ends - began):
                    outcome = await answer
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the Linux guest gave no answer to {_short(command)} "
                    f"within {ends - began:.0f} s",
                    remedy="see whether QEMU still runs the guest (query-status), and its log",
                ) from None
            finally:
                self._answer = None
                if not answer.done() or answer.cancelled():
                    self._busy_until = ends
        if outcome.status == _KILLED and time.monotonic() - began >= seconds:
            raise DeadlineExceeded(f"{_short(command)} was killed in the guest after {seconds} s")
        return outcome

    def _check_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    # -- what comes from the guest ---------------------------------------------------------

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
            self._take(line.split())

    def connection_lost(self, exc: Exception | None) -> None:
        why = f" ({exc})" if exc is not None else ""
        self._lost = TargetLost(f"QEMU has ended, or closed the Linux guest's console{why}")
        self._fail(self._lost)
        self._said_ready.set()

    def _take(self, fields: list[bytes]) -> None:
        """A line of the agent; what is none is skipped."""
        match fields:
            case [b"ready", _]:
                self._boots += 1
                self._busy_until = 0.0
                self._fail(OperationFailed("the Linux guest booted again during a command"))
                self._said_ready.set()
            case [b"done", number, status, *output] if len(output) <= 1:
                try:
                    text = base64.b64decode(b"".join(output), validate=True).decode(
                        errors="replace"
                    )
                    self._complete(int(number), Outcome(int(status), text))
                except (ValueError, binascii.Error):
                    pass

    def _complete(self, number: int, outcome: Outcome) -> None:
        if self._answer is not None and self._answer[0] == number and not self._answer[1].done():
            self._answer[1].set_result(outcome)

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer[1].done():
            self._answer[1].set_exception(error)


def _short(command: str) -> str:
    line = " ".join(command.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
