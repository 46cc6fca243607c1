"""What the benchmarks with real guests share: QEMUs, guests, watching processes, CPU accounts."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from qmp_memlistener.guests import (
    GuestSpec,
    LaunchedGuest,
    Pulse,
    QemuBuild,
    boot_args,
    find_qemus,
    kvm_usable,
    launch,
)

__all__ = ["Host", "cpu_ns", "hosts", "main_thread_ns", "peak_rss", "pulse_guest", "watching"]

_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Host:
    """A QEMU to measure with, and the accelerator that works with it."""

    build: QemuBuild
    accel: str

    def __str__(self) -> str:
        return f"QEMU {self.build.version}, {self.accel}"


def hosts(quick: bool, *, ends: bool = False) -> list[Host]:
    """Every QEMU here, oldest first; the `ends` are the oldest and the newest, quick the oldest.

    Prints why there is none.
    """
    builds = find_qemus()
    if not builds:
        print("\nleft out: no qemu-system-x86_64 here (Debian package qemu-system-x86)")
    if quick:
        builds = builds[:1]
    elif ends and len(builds) > 2:
        builds = [builds[0], builds[-1]]
    found = []
    for build in builds:
        probe = kvm_usable(build)
        if not probe:
            print(f"\nQEMU {build.version} without KVM: {probe.reason}")
        found.append(Host(build, "kvm" if probe else "tcg"))
    return found


@asynccontextmanager
async def pulse_guest(host: Host, *args: str) -> AsyncIterator[tuple[LaunchedGuest, Pulse]]:
    """A booted pulse guest with one vCPU."""
    spec = GuestSpec(machine="pc", accel=host.accel, args=(*boot_args(), *args))
    async with launch(spec.on(host.build)) as guest:
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready()
            yield guest, pulse


@asynccontextmanager
async def watching(guest: LaunchedGuest, *options: str) -> AsyncIterator[int]:
    """`qmp-memlistener watch --json` as a process of its own, attached; gives its pid."""
    argv = ["-m", "qmp_memlistener", "watch", f"unix:{guest.monitors[0]}", "--json", *options]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *argv,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert process.stdout is not None
    drain: asyncio.Task[bytes] | None = None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                line = await process.stdout.readline()
                if not line:
                    _, err = await process.communicate()
                    raise SystemExit(f"watch ended: {err.decode()[-2000:]}")
                if b'"type":"probes"' in line:
                    break
        drain = asyncio.create_task(process.stdout.read())
        yield process.pid
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if drain is not None:
            await drain


def cpu_ns(pid: int) -> int:
    """Nanoseconds of CPU that all threads of a process have had (Linux, sched-stats.rst)."""
    return sum(_thread_ns(task) for task in Path(f"/proc/{pid}/task").iterdir())


def main_thread_ns(pid: int) -> int:
    """The same for its first thread: QEMU's main loop."""
    return _thread_ns(Path(f"/proc/{pid}/task/{pid}"))


def _thread_ns(task: Path) -> int:
    return int((task / "schedstat").read_text().split()[0])


def peak_rss(pid: int) -> int:
    """Bytes of memory a process has had resident at most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/status has no VmHWM")
