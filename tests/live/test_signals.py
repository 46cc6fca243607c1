"""However a verb is ended from outside, it leaves the guest, its trace events and its log alone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import Monitor
from tests.live.verbs_support import in_time, is_as_before, one_build, watched
from tests.support.leftovers import enabled_events, file_has, left_behind, log_targets
from tests.support.live import NO_QEMU, QEMUS, Vm, best_accel, booted, qmp
from tests.support.verbs import started_verb

pytestmark = pytest.mark.qemu

# the other two are in test_verbs_watch and test_verbs_updates
SIGNALS = [signal.SIGHUP, signal.SIGQUIT]


@asynccontextmanager
async def untouched(build: QemuBuild, *args: str) -> AsyncIterator[tuple[Vm, Monitor]]:
    """A guest that is in the end as it was: events, log, what of ours is on disk, running."""
    async with (
        booted(build, best_accel(build), "pc", *args, monitors=4) as vm,
        qmp(vm.guest.monitors[3]) as monitor,
    ):
        before = await enabled_events(monitor), log_targets(vm.guest.pid)
        yield vm, monitor
        assert await is_as_before(vm, monitor, before[0])
        assert log_targets(vm.guest.pid) == before[1]
        status = await monitor.execute("query-status")
        assert isinstance(status, dict)
        assert status["running"] is True


@one_build
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.asyncio
async def test_watch(build: QemuBuild, number: signal.Signals) -> None:
    async with untouched(build) as (vm, _), watched(vm) as watch:
        await vm.toggle(4)
        ran = await watch.signalled(number)
        assert (ran.code, ran.err) == (0, "")
        assert ran.seconds < in_time()


@one_build
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.asyncio
async def test_an_update_whose_guest_is_waited_for(
    build: QemuBuild, number: signal.Signals
) -> None:
    async with untouched(build, "-device", "virtio-rng-pci,id=r0") as (vm, _):
        async with started_verb(
            *("unplug", vm.target, "r0", "--wait", "60s", "--json", "--probes", "ping")
        ) as verb:
            await verb.told("waiting for the guest")
            ran = await verb.signalled(number)
        assert ran.code == 130
        assert ran.err.splitlines()[-1] == "interrupted"
        assert ran.documents[-1]["outcome"] == "partial"


@pytest.mark.skipif(not QEMUS, reason=NO_QEMU)
@pytest.mark.asyncio
async def test_a_demo_and_its_guest_are_gone() -> None:
    with tempfile.TemporaryDirectory() as directory:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmp_memlistener", "demo", "--repeat", "0"),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "TMPDIR": directory},
            start_new_session=True,
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            while b"attaching" not in await process.stdout.readline():
                pass
            process.send_signal(signal.SIGHUP)
            await process.communicate()
        assert process.returncode == 130
        assert os.listdir(directory) == []
        assert members(process.pid) == []


@one_build
@pytest.mark.asyncio
async def test_at_any_moment_of_the_start(build: QemuBuild) -> None:
    """Imports, discovery, connecting, tracing, the first snapshot, the probes."""
    async with untouched(build) as (vm, _):
        for moment_ms in (150, 300, 450, 700):
            async with started_verb("watch", f"pid:{vm.guest.pid}", "--probes", "ping") as verb:
                await asyncio.sleep(moment_ms / 1e3)
                ran = await verb.signalled(signal.SIGHUP)
            # before the program has begun the signal is the kernel's to handle
            assert ran.code in (0, 130, -signal.SIGHUP), ran.err
            assert "Traceback" not in ran.err


@one_build
@pytest.mark.asyncio
async def test_a_terminal_that_is_closed(build: QemuBuild) -> None:
    async with untouched(build) as (vm, _):
        ours, theirs = os.openpty()
        process = await asyncio.create_subprocess_exec(
            *("setsid", "-c", sys.executable, "-m", "qmp_memlistener"),
            *("watch", vm.target, "--probes", "ping"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        await asyncio.to_thread(read_until, ours, b"map: ")
        await vm.toggle(4)
        os.close(ours)
        async with asyncio.timeout(in_time()):
            await process.wait()


@one_build
@pytest.mark.asyncio
async def test_a_reader_that_reads_no_more(build: QemuBuild) -> None:
    """Its pipe is full, so `watch` is in the middle of a write."""
    ours, theirs = os.pipe()
    async with untouched(build) as (vm, _):
        async with started_verb(
            *("watch", vm.target, "--json", "--probes", "ping"), stdout=theirs
        ) as verb:
            os.close(theirs)
            await asyncio.to_thread(read_until, ours, b'"type":"probes"')
            await vm.toggle(200)
            ran = await verb.signalled(signal.SIGTERM)
        os.close(ours)
        assert ran.code == 0
        assert ran.seconds < in_time()


@pytest.mark.alone
@one_build
@pytest.mark.asyncio
async def test_a_second_signal_ends_at_once_and_leaves_a_note(
    build: QemuBuild, tmp_path: Path
) -> None:
    """QEMU does not answer, so nothing can be put back in time; the next agent does it."""
    file = tmp_path / "r.jsonl"
    async with untouched(build) as (vm, _):
        async with started_verb("record", vm.target, "-o", file, "--probes", "none") as verb:
            await file_has(file, b'"type":"probes"')
            os.kill(vm.guest.pid, signal.SIGSTOP)
            try:
                verb.process.send_signal(signal.SIGTERM)
                await verb.told("another signal ends this at once")
                start = time.monotonic()
                verb.process.send_signal(signal.SIGTERM)
                ran = await verb.end()
            finally:
                os.kill(vm.guest.pid, signal.SIGCONT)
            assert "ended at once" in ran.err
            assert time.monotonic() - start < 1.0
            assert ran.code == 130
        assert left_behind(vm.guest.pid)
        async with started_verb("doctor", "--clean") as doctor:
            assert (await doctor.end()).code in (0, 4)


def members(group: int) -> list[int]:
    """Processes of a group."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(name))
    return found


def read_until(fd: int, text: bytes) -> None:
    """Read until `text` came."""
    seen = b""
    while text not in seen:
        seen += os.read(fd, 4096)
