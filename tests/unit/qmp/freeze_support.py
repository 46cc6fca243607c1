"""What the tests of the freeze share: processes that hold one, a place, a process for QEMU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from qmp_memlistener.host import state
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp.freeze import FreezeKey, process_key

__all__ = ["Holding", "frozen_files", "key_of", "place", "standing_in"]

# The user is changed after the imports: another one need not be able to read this checkout.
_HOLD = """
import asyncio, os, sys
from qmp_memlistener.errors import MemListenerError
from qmp_memlistener.qmp import freeze
from qmp_memlistener.host import state
from qmp_memlistener.host.processes import Process

shm, pid, uid, umask = sys.argv[1], *map(int, sys.argv[2:5])
state.SHM = shm
os.umask(umask)
if uid != os.geteuid():
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)

async def main():
    key = freeze.process_key(Process.read(pid))
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        freeze.check_not_frozen(key)
        async with freeze.hold_freeze(key, "a control loop runs") as held:
            print("held", *held.remarks, flush=True)
            sys.stdin.readline()
        print("released", flush=True)
    except MemListenerError as error:
        print(type(error).__name__, error.message, flush=True)

asyncio.run(main())
"""


class Holding:
    """A process that freezes the guest behind `pid` once it is told to `go`."""

    def __init__(
        self,
        shm: Path,
        pid: int,
        *,
        uid: int | None = None,
        umask: int = 0o022,
        within: Sequence[str] = (),
    ) -> None:
        user = os.geteuid() if uid is None else uid
        self.process = subprocess.Popen(
            [*within, sys.executable, "-c", _HOLD, *map(str, (shm, pid, user, umask))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        assert self._line() == "ready"

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> None:
        """Let it begin."""
        self._tell()

    def answer(self) -> str:
        """`held`, with remarks, or the error's class and message."""
        return self._line()

    def go(self) -> str:
        self.start()
        return self.answer()

    def release(self) -> None:
        self._tell()
        assert self._line() == "released"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that all users may write, in the place of /dev/shm."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o1777)
        monkeypatch.setattr(state, "SHM", name)
        yield Path(name)


@contextmanager
def standing_in(
    *, uid: int | None = None, within: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for QEMU."""
    command = [*within, "sleep", "60"]
    with subprocess.Popen(command, user=uid) as process:
        try:
            yield process
        finally:
            process.kill()


def key_of(pid: int) -> FreezeKey:
    process = Process.read(pid)
    assert process is not None
    return process_key(process)


def frozen_files(shm: Path) -> list[Path]:
    return sorted(shm.glob("qmp-memlistener-*/freeze-*"))
