"""Throw-away QEMU guests for the demo, the tests and the benchmarks.

`launch` starts one and cleans up after it.  Which QEMU to start is `qemus`' business, what runs in
the guest `pulse`'s, and the monitors are the caller's: each is free when `launch` hands it over.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from ..errors import MissingPrerequisite, OperationFailed
from .qemus import QemuBuild

__all__ = ["LaunchedGuest", "GuestSpec", "launch"]

_INSTALL = "install the Debian package qemu-system-x86, or run `make qemus` in a checkout"
_POLL = 0.002  # seconds
_LOG = "stderr"
_STDERR_SHOWN = 4000
_RAM_IDS = {"pc": "pc.ram", "q35": "pc.ram", "microvm": "microvm.ram", "virt": "mach-virt.ram"}
_SOCKET_PATH_MAX = 107  # sun_path, less its final NUL


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """How to start a guest.

    `machine` and `accel` are values of -machine and -accel, options included; `memory` is bytes.
    `monitors` QMP sockets are created, and a qtest socket when `qtest` is set.  With
    `shared_memory` RAM is a file this process can map too, below 4 GiB at the same offsets as in
    the guest.  `data_dirs` become -L options, `args` come last.
    """

    binary: str = "qemu-system-x86_64"
    machine: str = "pc"
    accel: str = "kvm"
    memory: int = 64 << 20
    smp: int = 1
    args: tuple[str, ...] = ()
    monitors: int = 3
    qtest: bool = False
    shared_memory: bool = True
    data_dirs: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def on(self, build: QemuBuild) -> GuestSpec:
        """The same guest on another QEMU."""
        return replace(
            self,
            binary=build.binary,
            args=(*build.args, *self.args),
            env={**build.env, **self.env},
        )


@dataclass(frozen=True, slots=True)
class LaunchedGuest:
    """A running guest.  Paths are valid until the `launch` block is left."""

    spec: GuestSpec
    process: asyncio.subprocess.Process
    directory: Path
    monitors: tuple[Path, ...]
    qtest: Path | None
    ram: Path | None
    argv: tuple[str, ...]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def stderr(self) -> str:
        """What QEMU has printed so far, at most the last few thousand characters."""
        return _tail(self.directory / _LOG)


@asynccontextmanager
async def launch(spec: GuestSpec, *, timeout: float = 30.0) -> AsyncIterator[LaunchedGuest]:
    """Start a guest; ends it and removes its files when the block is left, however it is left.

    The block is entered when every socket listens, all of them free, and with a monitor also when
    QEMU's main loop runs, so that no option can fail any more.  Raises MissingPrerequisite when
    there is no such binary, OperationFailed with QEMU's own words when QEMU ends before that or is
    not up within `timeout` seconds.
    """
    binary = shutil.which(spec.binary)
    if binary is None:
        raise MissingPrerequisite(f"{spec.binary} is not installed", remedy=_INSTALL)
    with (
        _directory() as directory,
        _ram_file(spec, directory) as ram,
    ):
        monitors = tuple(directory / f"qmp{i}" for i in range(spec.monitors))
        qtest = directory / "qtest" if spec.qtest else None
        argv = (binary, *_arguments(spec, monitors, qtest, ram))
        # A session of its own: Ctrl-C in our terminal is ours to handle, not QEMU's.
        with _log_file(directory) as log:
            process = await asyncio.create_subprocess_exec(
                *_bound_to_us(),
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **spec.env},
                start_new_session=True,
            )
        guest = LaunchedGuest(spec, process, directory, monitors, qtest, ram, argv)
        try:
            await _wait_up(guest, timeout)
            yield guest
        finally:
            await _end(process)


def _arguments(
    spec: GuestSpec, monitors: tuple[Path, ...], qtest: Path | None, ram: Path | None
) -> Iterator[str]:
    machine = spec.machine
    if ram is not None:
        # The machine's own name for its RAM, so that the map looks as it does without this.
        ram_id = _RAM_IDS.get(re.split(r"[,-]", machine)[0], "ram")
        machine = f"{machine},memory-backend={ram_id}"
        backend = f"memory-backend-file,id={ram_id},share=on,mem-path={ram},size={spec.memory}"
        yield from ("-object", backend)
    yield from ("-machine", machine, "-accel", spec.accel)
    yield from ("-m", f"size={spec.memory}B", "-smp", str(spec.smp))
    yield from ("-nodefaults", "-no-user-config", "-display", "none")
    for path in monitors:
        yield from ("-qmp", f"unix:{path},server=on,wait=off")
    if qtest is not None:
        yield from ("-qtest", f"unix:{qtest},server=on,wait=off", "-qtest-log", "none")
    for path_ in spec.data_dirs:
        yield from ("-L", path_)
    yield from spec.args


def _bound_to_us() -> tuple[str, ...]:
    """Prefix that makes the kernel end QEMU should we be killed; a spinning guest never ends.

    util-linux' setpriv does it (PR_SET_PDEATHSIG), then becomes QEMU, with the same pid.
    """
    setpriv = shutil.which("setpriv")
    return () if setpriv is None else (setpriv, "--pdeathsig", "TERM", "--")


@contextmanager
def _directory() -> Iterator[Path]:
    top = tempfile.gettempdir()
    if len(top) + len("/qmp-memlistener-12345678/qmp00") > _SOCKET_PATH_MAX:
        top = "/tmp"
    with tempfile.TemporaryDirectory(prefix="qmp-memlistener-", dir=top) as name:
        yield Path(name)


@contextmanager
def _ram_file(spec: GuestSpec, directory: Path) -> Iterator[Path | None]:
    """A file of the guest's size in /dev/shm, or beside the sockets where that is too small."""
    if not spec.shared_memory:
        yield None
        return
    where = Path("/dev/shm")
    try:
        room = os.statvfs(where)
        if room.f_bavail * room.f_frsize < spec.memory:
            where = directory
    except OSError:
        where = directory
    with sized_file(where, ".ram", spec.memory) as ram:
        yield ram


@contextmanager
def sized_file(where: Path, suffix: str, size: int) -> Iterator[Path]:
    """A new file of `size` zero bytes in the directory `where`; gone when the block is left."""
    handle, name = tempfile.mkstemp(prefix="qmp-memlistener-", suffix=suffix, dir=where)
    try:
        try:
            os.truncate(handle, size)
        finally:
            os.close(handle)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _log_file(directory: Path) -> Iterator[BinaryIO]:
    """Where QEMU's messages go: a pipe would freeze its main loop when it is not read.

    Only QEMU keeps it open, and as its stderr alone: what it logs there goes nowhere else.
    """
    with open(directory / _LOG, "wb") as log:
        yield log


async def _wait_up(guest: LaunchedGuest, timeout: float) -> None:
    """Until every socket listens and QEMU's main loop runs, or the guest has failed.

    QEMU listens, and greets, before it creates its devices, and can still fail at those.  Commands
    are carried out in the main loop, so an answer to one shows that it is up.
    """
    sockets = [str(p) for p in (*guest.monitors, guest.qtest) if p is not None]
    failed = asyncio.create_task(guest.process.wait())
    up = asyncio.create_task(_come_up(sockets, guest.monitors[:1]))
    try:
        await asyncio.wait({failed, up}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            what = f"ended with status {failed.result()} before it was up"
        elif not up.done():
            what = f"was not up after {timeout:g} s"
        else:
            return up.result()
        raise OperationFailed(f"{guest.argv[0]} {what}: {guest.stderr() or 'no message'}")
    finally:
        for task in (failed, up):
            task.cancel()
        await asyncio.gather(failed, up, return_exceptions=True)


async def _come_up(sockets: list[str], monitors: tuple[Path, ...]) -> None:
    """Never returns when QEMU fails: the caller watches the process."""
    await _until(lambda: _listening().issuperset(sockets))
    for path in monitors:
        while not await _answers(path):  # noqa: ASYNC110 (see _until)
            await asyncio.sleep(_POLL)
        # The monitor is free again for its one client when QEMU has noticed that we left.
        await _until(lambda: not _served() & set(sockets))


async def _until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 (/proc has no events)
        await asyncio.sleep(_POLL)


async def _answers(path: Path) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            writer.write(b'{"execute":"qmp_capabilities"}\n')
            return b"QMP" in await reader.readline() and b"return" in await reader.readline()
        finally:
            writer.close()
            await writer.wait_closed()
    except OSError:
        return False


def _listening() -> set[str]:
    """Paths of listening unix sockets: __SO_ACCEPTCON (0x10000) is in their flags."""
    return {path for flags, _, path in _unix_sockets() if flags & 0x10000}


def _served() -> set[str]:
    """Paths of unix sockets of which a server holds a connection (SS_CONNECTED is 3)."""
    return {path for _, state, path in _unix_sockets() if state == 3}


def _unix_sockets() -> Iterator[tuple[int, int, str]]:
    """Flags, state and path of every unix socket that has a path.

    Columns of /proc/net/unix: number, references, protocol, flags, type, state, inode, path.
    """
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8:
            yield int(fields[3], 16), int(fields[5], 16), fields[7]


async def _end(process: asyncio.subprocess.Process) -> None:
    """Terminate, then kill.  A cancellation shortens the wait but never leaves QEMU alive."""
    if process.returncode is not None:
        return
    try:
        process.terminate()
        async with asyncio.timeout(5.0):
            await process.wait()
    except ProcessLookupError:
        pass
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            try:
                process.kill()
            except ProcessLookupError:
                pass
            await asyncio.shield(process.wait())


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _STDERR_SHOWN))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
