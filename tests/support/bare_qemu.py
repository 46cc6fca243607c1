"""QEMUs without a guest in them, for tests of what speaks to a monitor.

Unlike `guests.launch`, `running` leaves standard error and the command line to the test.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import Guest, UnixTarget, find_guest
from qmp_memlistener.qmp.sockets import listener_state

__all__ = ["NEW_MOUNTS", "Running", "can_unshare", "moved", "running"]


NEW_MOUNTS = ("unshare", "--mount", "--propagation", "private", "--")


@dataclass(frozen=True, slots=True)
class Running:
    """A QEMU of a test.  `pid` is that of the emulator (also when daemonised)."""

    pid: int
    directory: Path
    build: QemuBuild

    @property
    def a(self) -> UnixTarget:
        return UnixTarget(str(self.directory / "a"))

    @property
    def b(self) -> UnixTarget:
        return UnixTarget(str(self.directory / "b"))

    @property
    def qtest(self) -> Path:
        return self.directory / "qtest"

    def guest(self) -> Guest:
        found = find_guest(self.pid)
        assert found is not None
        return found


@asynccontextmanager
async def running(
    build: QemuBuild,
    directory: Path,
    *args: str,
    accel: str = "tcg",
    stderr: int | None = None,
    prefix: Sequence[str] = (),
    cwd: Path | None = None,
    monitors: bool = True,
) -> AsyncIterator[Running]:
    """A paused q35 with QMP monitors a and b and a qtest socket in `directory`."""
    pidfile = directory / "pid"
    argv = [*prefix, build.binary, *build.args, "-nodefaults", "-display", "none", "-S"]
    argv += ["-M", "q35", "-accel", accel, "-m", "64", "-pidfile", str(pidfile)]
    argv += ["-qtest", f"unix:{directory}/qtest,server=on,wait=off", "-qtest-log", "none"]
    if monitors:
        for name in ("a", "b"):
            argv += ["-qmp", f"unix:{directory}/{name},server=on,wait=off"]
    process = await asyncio.create_subprocess_exec(
        *argv,
        *args,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL if stderr is None else stderr,
        env={**os.environ, **build.env},
        cwd=cwd or directory,
    )
    pid = process.pid
    try:
        async with asyncio.timeout(20):
            while not await is_up(directory / "qtest"):
                if process.returncode not in (None, 0):
                    raise AssertionError(f"QEMU ended with {process.returncode}")
                await asyncio.sleep(0.02)
            while not (text := await asyncio.to_thread(read_if_there, pidfile)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        pid = int(text)
        yield Running(pid, directory, build)
    finally:
        if pid != process.pid:
            os.kill(pid, signal.SIGKILL)
        if process.returncode is None:
            process.kill()
        await process.wait()


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run((*NEW_MOUNTS, "true"), check=False, capture_output=True).returncode == 0


def read_if_there(path: Path) -> str:
    """QEMU may listen before it writes its process id, as seen on a busy host."""
    return path.read_text() if path.exists() else ""


async def is_up(path: Path) -> bool:
    """The socket listens, which QEMU creates last."""
    state = listener_state(UnixTarget(str(path)))
    return state is not None and state.listening


def moved(build: QemuBuild, binary: str) -> QemuBuild:
    """The same QEMU under another name: it then no longer finds its modules and firmware."""
    prefix = Path(build.binary).resolve().parent.parent
    modules = next((p.parent for p in prefix.glob("lib/*/qemu/accel-*.so")), prefix)
    data = [str(prefix / "share" / d) for d in ("qemu", "seabios")]
    args = (*build.args, *(word for d in data for word in ("-L", d)))
    env = {"QEMU_MODULE_DIR": str(modules), **build.env}
    return replace(build, binary=binary, args=args, env=env)
