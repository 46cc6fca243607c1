"""Guests that are steered or were so from the start, their races, and a KVM that refuses."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    GuestSpec,
    High,
    LaunchedGuest,
    Pulse,
    QemuBuild,
    boot_args,
    launch,
)
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import Monitor, UnixTarget
from qmp_memlistener.records import Mode
from qmp_memlistener.steer import OBJECT, State, state_of
from qmp_memlistener.steer.channel import number_of
from tests.support.host import patience
from tests.support.live import QEMUS, skip_without_kvm
from tests.support.verbs import Ran, run_verb

__all__ = [
    "NEEDS",
    "STEERED",
    "TOGGLES",
    "Faults",
    "boots",
    "build_bios",
    "build_shared",
    "build_writer",
    "injector_ended",
    "preloaded",
    "racing",
    "state",
    "steer",
    "toggled",
]

STEERED = [b for b in QEMUS if int(b.version.split(".")[0]) < 8]
NEEDS = [
    pytest.mark.qemu,
    pytest.mark.kvm,
    pytest.mark.skipif(not STEERED, reason="needs QEMU 7.2 or older (Debian 12)"),
    pytest.mark.skipif(not OBJECT.exists(), reason="not built: needs a C compiler"),
]
"""Marks of the tests of steering."""
TOGGLES = 100

_SUPPORT = Path(__file__).parent


def build_shared(source: Path, directory: Path, *options: str) -> Path:
    """A shared object."""
    built = directory / f"{source.stem}.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [
            *(compiler, "-O1", "-fPIC", "-shared", "-ftls-model=initial-exec", *options),
            *("-o", str(built), str(source)),
        ],
        check=True,
    )
    return built


def build_writer(directory: Path, memory: int) -> Path:
    """The BIOS of a guest that writes all its RAM while it toggles PAM (steer_writer.S)."""
    return build_bios("steer_writer", directory, f"-DEND={memory:#x}")


def build_bios(name: str, directory: Path, *options: str) -> Path:
    """Of a source here."""
    built = directory / f"{name}.o"
    image = directory / f"{name}.bin"
    compiler = os.environ.get("CC", "cc")
    source = _SUPPORT / f"{name}.S"
    subprocess.run([compiler, "-m32", "-c", *options, "-o", built, source], check=True)
    linker = ("ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0xffff0000", "-e", "start")
    subprocess.run([*linker, "-o", image, built], check=True)
    return image


def preloaded(mode: Mode, *before: Path, interposer: Path = OBJECT) -> dict[str, str]:
    """The environment of a QEMU as `run` makes it."""
    return {
        "LD_PRELOAD": ":".join(map(str, (*before, interposer))),
        "QMP_MEMLISTENER_STEER": str(number_of(mode)),
    }


@asynccontextmanager
async def racing(
    place: High = High.CODE,
    env: dict[str, str] | None = None,
    build: QemuBuild | None = None,
    args: tuple[str, ...] = (),
    accel: str = "kvm",
) -> AsyncIterator[tuple[LaunchedGuest, Pulse]]:
    build = build or STEERED[-1]
    skip_without_kvm(STEERED[-1] if build not in QEMUS else build, "kvm")
    args = (*boot_args(), *args)
    spec = GuestSpec(machine="pc", accel=accel, memory=256 << 20, smp=2, args=args, env=env or {})
    async with launch(spec.on(build)) as guest:
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready()
            await pulse.place(1, place)
            yield guest, pulse


async def toggled(guest: LaunchedGuest, pulse: Pulse, count: int = TOGGLES) -> str:
    """Toggle PAM; `survived`, or the state that QEMU came to."""
    before = boots(pulse)
    # connected before: while a vCPU has the BQL again and again, QEMU is slow to greet
    async with (
        asyncio.timeout(60),
        await Monitor.connect(UnixTarget(str(guest.monitors[1]))) as monitor,
    ):
        toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), count, period=20)
        while toggle.done < count:
            await asyncio.sleep(0.01)
            status = await monitor.execute("query-status")
            if status["status"] != "running":  # type: ignore[index]
                return str(status["status"])  # type: ignore[index]
            if boots(pulse) != before:
                return "reset"
    return "survived"


def boots(pulse: Pulse) -> int:
    header = pulse.header()
    return header.boots if header is not None else -1


def state(guest: LaunchedGuest) -> State:
    process = Process.read(guest.pid)
    assert process is not None
    found = state_of(process)
    assert found is not None
    return found


async def steer(guest: LaunchedGuest, *options: str, monitor: int = 0) -> Ran:
    target = f"unix:{guest.monitors[monitor]}"
    return await run_verb("steer", target, "--json", "--strategy", *options)


async def injector_ended(process: Process, verb: str, step: int, how: signal.Signals) -> int:
    """An injector that gets a signal before its `step`-th step with QEMU: how it ended."""
    injector = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _ENDED, str(step), str(int(how)), verb, process.key, str(OBJECT)),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(patience(20)):
            return await injector.wait()
    finally:
        if injector.returncode is None:
            injector.kill()
            await injector.wait()


_ENDED = """
import os, sys
from qmp_memlistener.steer import hijack, injector
left, how = int(sys.argv.pop(1)), int(sys.argv.pop(1))
def counted(step):
    def counting(*arguments):
        global left
        left -= 1
        if left == -1:
            os.kill(os.getpid(), how)
        return step(*arguments)
    return counting
hijack._ptrace, os.pwrite = counted(hijack._ptrace), counted(os.pwrite)
sys.exit(injector.main())
"""


class Faults:
    """What is preloaded before the interposer (steer_faults.c)."""

    def __init__(self, directory: Path, *, without: int = 0) -> None:
        self.object = build_shared(_SUPPORT / "steer_faults.c", directory)
        self._file = directory / "faults"
        self._file.write_bytes(struct.pack("<II", 0, without))
        self.env = {"STEER_FAULTS": str(self._file)}

    def refuse(self, nth: int = 1) -> None:
        """The nth add from now."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("<I", nth))

    @property
    def refused(self) -> bool:
        """It has come to that."""
        return self._file.read_bytes()[:4] == bytes(4)
