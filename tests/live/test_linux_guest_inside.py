"""Inside the Linux guest: its console under stress, its pulse, an image without the program."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qmp_memlistener.errors import DeadlineExceeded, OperationFailed, TargetLost
from qmp_memlistener.guests import Pulse, QemuBuild
from qmp_memlistener.guests.linux import LinuxImage, LinuxSpec
from qmp_memlistener.host.processes import Process
from qmp_memlistener.probes.pulse_ram import open_pulse
from tests.support.linux import booted_linux, image
from tests.support.linux_guest import LinuxGuest, boot_linux
from tests.support.live import QEMUS, builds

pytestmark = [pytest.mark.qemu, pytest.mark.full, pytest.mark.asyncio]

OLDEST = QEMUS[:1]
STOPPED_S = 0.2
SCRIPT = Path(__file__).resolve().parents[2] / "vm-images" / "linux" / "build.py"


@builds(OLDEST)
async def test_the_console_keeps_what_it_is_told(build: QemuBuild) -> None:
    async with booted_linux(build, LinuxSpec(machine="pc", pulse_us=None)) as vm:
        guest = vm.guest
        assert await guest.run("echo out; echo err >&2; exit 3") == (3, "out\nerr\n")
        assert await guest.run("printf 'a\\000\\377\\n'") == (0, "a\0�\n")
        assert (await guest.run("no-such-command")).status == 127
        long = "x" * 8_000
        assert await guest.run(f"v={long}; echo ${{#v}}") == (0, "8000\n")
        assert await guest.check("seq 20000") == "".join(f"{n}\n" for n in range(1, 20001))
        with pytest.raises(OperationFailed, match=r"'false' failed .*\(1\)"):
            await guest.check("false")

        # Messages of the kernel go elsewhere, however many.
        await guest.check("(for i in $(seq 200); do echo '<1>noise' >/dev/kmsg; done) &")
        for n in range(5):
            assert await guest.run(f"echo {n}") == (0, f"{n}\n")
        await guest.until(lambda: guest.run("true"), lambda _: guest.log().count("noise") == 200)

        with pytest.raises(DeadlineExceeded, match="killed in the guest after 1 s"):
            await guest.run("sleep 60", timeout=1)
        assert await guest.run("echo next") == (0, "next\n")
        abandoned = asyncio.create_task(guest.run("sleep 1; echo late", timeout=5))
        await asyncio.sleep(0)
        abandoned.cancel()
        with pytest.raises(asyncio.CancelledError):
            await abandoned
        assert await guest.run("echo mine") == (0, "mine\n")

        await vm.monitor.execute("system_reset")
        await guest.wait_booted(2)
        assert await guest.run("echo again") == (0, "again\n")
        await vm.monitor.execute("quit")
        with pytest.raises(TargetLost):
            await guest.run("sleep 9")


@builds(OLDEST)
async def test_the_pulse_of_every_cpu(build: QemuBuild) -> None:
    if not image().has_pulse:
        pytest.skip(str(image().why_no_pulse))
    async with booted_linux(build, LinuxSpec(smp=2)) as vm:
        guest = vm.guest
        with Pulse(guest.page) as pulse:
            header = await pulse.wait_ready(2)
            assert (header.expected_cpus, header.boots) == (2, 1)
            for cpu in range(2):
                await pulse.wait_beats(20, cpu)
                assert pulse.cpu_state(cpu).alive
            await check_it_yields_to_nobody(guest)

            # The probe finds it in QEMU's memory, beside the RAM that is shared as well.
            process = Process.read(guest.guest.pid)
            assert process is not None
            with open_pulse(process) as seen:
                assert seen.header() == pulse.header()

            await guest.set_workload(True)
            clock = await pulse.calibrate()
            for cpu in range(2):
                await pulse.reset(cpu, clock.ticks(int(STOPPED_S * 1e9 / 2)))
                await pulse.wait_beats(2, cpu)
            least = stop_for(guest.guest.pid, STOPPED_S)
            for cpu in range(2):
                await pulse.wait_beats(2, cpu)
                longest = max(pulse.gaps(cpu).gaps, key=lambda g: g.ticks)
                assert longest.ticks == pulse.heartbeat(cpu).max_gap
                assert clock.duration_ns(longest.ticks) >= 0.99 * least
            await guest.set_workload(False)

            with pytest.raises(OperationFailed, match="does not know this command"):
                await pulse.peek(0, 4)
            slow = await beats_in(pulse, 0.5)
            await guest.set_pulse(False)
            stopped = pulse.header()
            assert stopped is not None
            assert not stopped.ready
            assert not pulse.cpu_state(0).alive
            await guest.set_pulse(True, 0)
            assert (await pulse.wait_ready(2)).boots == 2
            await pulse.wait_beats()
            assert await beats_in(pulse, 0.5) > 20 * slow


async def check_it_yields_to_nobody(guest: LinuxGuest) -> None:
    """One process a CPU with a real-time policy; its bits in Cpus_allowed name the CPU.

    proc(5): policy is field 41 of stat; SCHED_FIFO is 1.
    """
    text = await guest.check(
        "for p in $(pidof pulse-beat); do"
        " echo $(cut -d' ' -f41 /proc/$p/stat) $(grep Cpus_allowed: /proc/$p/status); done"
    )
    found = sorted(line.split() for line in text.splitlines())
    assert found == [["0", "Cpus_allowed:", "3"], *(["1", "Cpus_allowed:", c] for c in "12")]


def stop_for(pid: int, seconds: float) -> int:
    """Stop all threads of a process of ours; returns for how many ns they stood, at least."""
    os.kill(pid, signal.SIGSTOP)
    try:
        state = Path(f"/proc/{pid}/task")
        until = time.monotonic() + 5
        while any(re.search(r"\) [RSD] ", t) for t in map(read_stat, state.iterdir())):
            assert time.monotonic() < until
        began = time.monotonic_ns()
        time.sleep(seconds)
        return time.monotonic_ns() - began
    finally:
        os.kill(pid, signal.SIGCONT)


def read_stat(task: Path) -> str:
    try:
        return (task / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def beats_in(pulse: Pulse, seconds: float) -> int:
    before = pulse.heartbeat(0).count
    await asyncio.sleep(seconds)
    return pulse.heartbeat(0).count - before


def build_again(cache: Path) -> subprocess.CompletedProcess[str]:
    """Another image out of the same packages, in `cache`, with no program to be found."""
    (cache / "6.1").mkdir()
    shutil.copytree(image().kernel.parent / "parts", cache / "6.1" / "parts")
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--dir", str(cache)],
        env={**os.environ, "PATH": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


@builds(OLDEST)
async def test_an_image_built_without_a_compiler(
    build: QemuBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = await asyncio.to_thread(build_again, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "without pulse: no C compiler" in done.stdout
    monkeypatch.setenv("QMP_MEMLISTENER_LINUX", str(tmp_path))
    found = LinuxImage.find()
    assert "no C compiler" in (found.why_no_pulse or "")
    async with boot_linux(found, LinuxSpec(machine="pc"), build) as guest:
        assert await guest.run("echo up") == (0, "up\n")
        with pytest.raises(OperationFailed, match="no pulse program"):
            await guest.set_pulse(True)
