"""Verbs as processes, read line by line; everything that waits does so with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.support.host import patience

__all__ = [
    "Ran",
    "Verb",
    "run_in_terminal",
    "run_verb",
    "started_verb",
]

STILL_WAITS = re.compile(r"^(ending, but )?waiting .*\n", re.MULTILINE)
"""What any verb may say that a busy host keeps waiting."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a verb ended; `seconds` is from the call of `Verb.end`."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def documents(self) -> list[dict[str, object]]:
        """Every line of stdout as JSON."""
        return [msgspec.json.decode(line, type=dict[str, object]) for line in self.lines]

    def check_error(self, code: int, *words: str) -> None:
        """The documented exit code, one message on stderr with a remedy, nothing raw."""
        assert self.code == code, self.err
        assert re.match(r"error: \S", self.err), self.err
        for word in words:
            assert word in self.err
        assert "Traceback" not in self.err


class Verb:
    """A running verb whose output is read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._lines: list[str] = []
        self._errors: list[str] = []

    async def told(self, text: str, seconds: float = 30.0) -> None:
        """Until a line of stderr holds `text`."""
        assert self.process.stderr is not None
        async with asyncio.timeout(patience(seconds)):
            while True:
                line = (await self.process.stderr.readline()).decode()
                if not line:
                    raise AssertionError(f"the verb ended after {self._errors!r}")
                self._errors.append(line)
                if text in line:
                    return

    async def line(self, seconds: float = 10.0) -> str:
        """The next line of stdout."""
        assert self.process.stdout is not None
        async with asyncio.timeout(patience(seconds)):
            line = (await self.process.stdout.readline()).decode()
        if not line:
            raise AssertionError(f"the verb ended after {self._lines!r}")
        self._lines.append(line)
        return line

    async def until(self, text: str, seconds: float = 10.0) -> str:
        """Lines up to the first that holds `text`, which is returned."""
        async with asyncio.timeout(patience(seconds)):
            while text not in (line := await self.line(seconds)):
                pass
        return line

    async def end(self, seconds: float = 10.0) -> Ran:
        """Wait for the end; the output includes what was read before."""
        start = time.monotonic()
        async with asyncio.timeout(patience(seconds)):
            out, err = await self.process.communicate()
        took = time.monotonic() - start
        assert self.process.returncode is not None
        text = "".join(self._lines) + (out or b"").decode()
        errors = "".join(self._errors) + STILL_WAITS.sub("", err.decode())
        return Ran(self.process.returncode, text, errors, took)

    async def signalled(self, number: int) -> Ran:
        """Send a signal, then wait for the end.

        A process that is killed ends when the kernel has taken its uprobes out, up to 0.1 s each.
        """
        self.process.send_signal(number)
        return await self.end(60.0 if number == signal.SIGKILL else 10.0)

    async def ready(self) -> None:
        """Until the first map was printed: the verb is attached and will see what comes."""
        while not re.search(r'"type":"map"|  map: \d', await self.line()):
            pass


@asynccontextmanager
async def started_verb(
    *args: str | Path, stdout: int = asyncio.subprocess.PIPE
) -> AsyncIterator[Verb]:
    """`qmp-memlistener args` as a process; killed when the block is left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmp_memlistener", *map(str, args)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TERM": "xterm"},
        limit=1 << 22,
    )
    try:
        yield Verb(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run_verb(*args: str | Path, seconds: float = 20.0) -> Ran:
    """Run `qmp-memlistener args` to its end."""
    async with started_verb(*args) as verb:
        return await verb.end(seconds)


async def run_in_terminal(*args: str | Path, columns: int = 80, seconds: float = 20.0) -> list[str]:
    """The lines that `qmp-memlistener args` prints on a terminal, without colours."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    out = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(ours, 65536):
                out.extend(data)

    try:
        async with started_verb(*args, stdout=theirs) as verb:
            os.close(theirs)
            reading = asyncio.create_task(asyncio.to_thread(read))
            ran = await verb.end(seconds)
            await reading
        assert (ran.code, ran.err) == (0, "")
    finally:
        os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.decode()).splitlines()
