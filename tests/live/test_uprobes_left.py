"""The uprobes probe leaves nothing behind, however it or its QEMU ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from qmp_memlistener.errors import TargetError
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.host.bounded import in_thread
from qmp_memlistener.probes import ProbeUnavailable
from qmp_memlistener.probes.uprobes import UprobesProbe
from qmp_memlistener.probes.uprobes.program import Program
from qmp_memlistener.probes.uprobes.release import wait_released
from tests.live.uprobes_support import ENDS, Seen, probed, probing
from tests.support.host import patience
from tests.support.leftovers import enabled_events
from tests.support.live import QEMUS, booted, builds, qmp
from tests.support.probes import guest_context
from tests.support.verbs import run_verb

# the kernel closes uprobes one by one, those of other tests before ours
pytestmark = [pytest.mark.qemu, pytest.mark.alone, pytest.mark.asyncio]


def text(pid: int, program: Program) -> dict[str, bytes]:
    """The first byte of each function in the memory of a process."""
    found = {}
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for start, offset in mappings(pid):
            for name, place in program.roles.values():
                if offset <= place < offset + (1 << 26):
                    try:
                        found[name] = os.pread(memory.fileno(), 1, start + place - offset)
                    except OSError:
                        pass
    return found


def mappings(pid: int) -> list[tuple[int, int]]:
    """Address and file offset of the program's code."""
    exe = os.readlink(f"/proc/{pid}/exe")
    with open(f"/proc/{pid}/maps") as maps:
        fields = [line.split(None, 5) for line in maps]
    return [
        (int(f[0].split("-")[0], 16), int(f[2], 16))
        for f in fields
        if len(f) == 6 and f[5].strip() == exe and "x" in f[1]
    ]


BREAKPOINT = b"\xcc"


async def without_breakpoints(pid: int, program: Program) -> None:
    """Until QEMU's functions are as they were; the kernel takes probes out one by one."""
    assert await in_thread(wait_released, patience(120))
    async with asyncio.timeout(patience(60)):
        while BREAKPOINT in text(pid, program).values():  # noqa: ASYNC110 (nobody tells us)
            await asyncio.sleep(0.05)


@builds(ENDS)
async def test_nothing_is_left_after_stop_and_other_guests_are_never_touched(
    build: QemuBuild,
) -> None:
    async with booted(build, "tcg") as vm, booted(build, "tcg") as beside:
        program = probed(vm)
        pid = vm.guest.process.pid
        before = text(pid, program)
        assert len(before) == len({name for name, _ in program.roles.values()})
        descriptors = len(os.listdir("/proc/self/fd"))
        async with probing(vm, named=True) as (probe, _, _):
            during = text(pid, program)
            assert during["memory_region_transaction_commit"] == BREAKPOINT
            assert text(beside.guest.process.pid, program) == before
            await probe.stop()
            await probe.stop()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        await without_breakpoints(pid, program)
        assert text(pid, program) == before
        await vm.toggle(10)


@builds(QEMUS[-1:])
async def test_nothing_is_left_after_a_kill(build: QemuBuild) -> None:
    script = (
        "import sys, time\n"
        "from qmp_memlistener.probes.uprobes import UprobeReader\n"
        "reader = UprobeReader(int(sys.argv[1]), lambda batch: None)\n"
        "reader.start()\n"
        "reader.set_bql(True).result()\n"
        "print('on', flush=True)\n"
        "time.sleep(600)\n"
    )
    async with booted(build, "tcg") as vm:
        program = probed(vm)
        pid = vm.guest.process.pid
        before = text(pid, program)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script, str(pid)), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"on\n"
        assert BREAKPOINT in text(pid, program).values()
        process.kill()
        await process.wait()
        await without_breakpoints(pid, program)
        assert text(pid, program) == before
        await vm.toggle(10)


@builds(QEMUS[-1:])
async def test_what_a_killed_agent_left_is_found_while_the_kernel_still_ends_it(
    build: QemuBuild,
) -> None:
    async with booted(build, "tcg") as vm:
        program = probed(vm)
        pid = vm.guest.process.pid
        async with qmp(vm.guest.monitors[1]) as monitor:
            before = await enabled_events(monitor)
        watch = [sys.executable, "-m", "qmp_memlistener", "watch", f"pid:{pid}", "--json"]
        null = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*watch, stdout=null, stderr=null)
        async with asyncio.timeout(patience(60)):
            while BREAKPOINT not in text(pid, program).values():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        process.kill()
        ran = await run_verb("doctor", "--clean", "--json")
        (document,) = ran.documents
        cleaned = document["cleaned"]
        assert isinstance(cleaned, list)
        assert (len(cleaned), document["leftovers"]) == (1, []), ran.err
        await process.wait()
        async with qmp(vm.guest.monitors[1]) as monitor:
            assert await enabled_events(monitor) == before


@builds(ENDS)
async def test_qemu_may_die_at_any_time(build: QemuBuild) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    async with booted(build, "tcg") as vm:
        probed(vm)
        async with guest_context(vm.guest) as context:
            probe = UprobesProbe(context)
            seen = Seen()
            await probe.start(seen)
            await probe.burst(True)
            toggling = asyncio.create_task(vm.toggle(1_000_000))
            await seen.wait_for(lambda: bool(seen.observations))
            os.kill(vm.guest.process.pid, signal.SIGKILL)
            await vm.guest.process.wait()
            toggling.cancel()
            await probe.flush()
            await probe.burst(False)
            await probe.burst(True)
            await probe.flush()
            await probe.stop()
            seen.check_nothing_wrong()
            with pytest.raises(ProbeUnavailable):
                await UprobesProbe(context).start(seen)
            with pytest.raises(TargetError):
                await context.monitor.execute("query-name")
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@builds(QEMUS[-1:])
async def test_a_cancelled_start_leaves_nothing(build: QemuBuild) -> None:
    async with booted(build, "tcg") as vm:
        program = probed(vm)
        descriptors = len(os.listdir("/proc/self/fd"))
        async with guest_context(vm.guest) as context:
            for turns in (1, 3):
                probe = UprobesProbe(context)
                starting = asyncio.create_task(probe.start(Seen()))
                for _ in range(turns):
                    await asyncio.sleep(0)
                starting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await starting
                await probe.stop()
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        await without_breakpoints(vm.guest.process.pid, program)
