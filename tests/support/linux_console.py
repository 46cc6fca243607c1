"""Commands for a Linux guest: the host's side of vm-images/linux/agent.

The agent sits on a serial port; its lines are described in vm-images/linux/agent.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from pathlib import Path
from typing import NamedTuple

from qmp_memlistener.errors import DeadlineExceeded, OperationFailed, TargetLost
from qmp_memlistener.guests.linux import AgentPort

__all__ = ["Console", "Outcome"]

COMMAND_MAX = 16_000
"""Bytes of a command.  The agent reads byte by byte, 5,000 to 20,000 a second under TCG."""

_KILLED = 128 + 9  # the exit status of what SIGKILL ended
_GRACE = 10.0  # seconds beyond a command's own deadline for the agent and the serial port


class Outcome(NamedTuple):
    """Exit status of a command, and what it printed (standard error included)."""

    status: int
    text: str


class Console(AgentPort):
    """The agent's serial port, listening at `path`; a context manager.

    One command at a time, whoever calls.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._number = 0
        self._answer: tuple[int, asyncio.Future[Outcome]] | None = None
        self._lock = asyncio.Lock()
        self._busy_until = 0.0  # with a command that nobody waits for any more

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
            self.check_lost()
            if self._transport is None or not self.boots:
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

    # -- what comes from the guest ---------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._fail(TargetLost("QEMU has ended during a command"))

    def line_received(self, line: bytes) -> None:
        """A line of the agent; what is none is skipped."""
        super().line_received(line)
        match line.split():
            case [b"ready", _]:
                self._busy_until = 0.0
                self._fail(OperationFailed("the Linux guest booted again during a command"))
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
