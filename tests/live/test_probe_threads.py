"""The threads probe on real QEMUs: stalls that another client makes, stops, starvation, ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from qmp_memlistener import attach
from qmp_memlistener.guests import GuestSpec, LaunchedGuest, QemuBuild, launch
from qmp_memlistener.host.processes import Process
from qmp_memlistener.probes import Context, Observation, StallKind
from qmp_memlistener.probes.threads import ThreadsProbe
from qmp_memlistener.probes.threads.tasks import Access, Tasks, examine
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.records import ProbesRecord, StallRecord
from tests.support.host import patience
from tests.support.live import NO_QEMU, QEMUS, Seen, booted, builds, qmp
from tests.support.probes import Recorder, at_work, guest_context
from tests.support.strangers import STRANGER, acting_as, needs_root

pytestmark = [pytest.mark.qemu, pytest.mark.skipif(not QEMUS, reason=NO_QEMU)]

MS = 1_000_000
SLOW_READ_NS = 60 * MS
HOGGED_S = 2.0


@asynccontextmanager
async def stopped_guest(build: QemuBuild) -> AsyncIterator[tuple[LaunchedGuest, Context, Monitor]]:
    """The guest never runs: its main loop is what matters.  Reads of its drive take 60 ms."""
    drive = f"driver=null-co,node-name=slow,size=1048576,latency-ns={SLOW_READ_NS},read-zeroes=on"
    spec = GuestSpec(
        machine="pc", accel="tcg", memory=256 << 20, monitors=2, args=("-S", "-blockdev", drive)
    )
    async with (
        launch(spec.on(build)) as guest,
        guest_context(guest) as context,
        qmp(guest.monitors[1]) as other,
    ):
        yield guest, context, other


async def hold(monitor: Monitor, way: str) -> tuple[int, int]:
    """Keep the main loop busy; when the command began and was done for its client.

    It computes, it waits for threads that clear memory, or it waits for a drive in an event loop of
    its own (blk_pread of a null-co node: aio_poll).
    """
    arguments: dict[str, object]
    match way:
        case "compute":
            command, arguments = "pmemsave", {"val": 0, "size": 256 << 20, "filename": "/dev/null"}
        case "memory":
            command = "object-add"
            arguments = {"qom-type": "memory-backend-ram", "id": "m", "size": 64 << 20}
            arguments |= {"prealloc": True, "prealloc-threads": 2}
        case _:
            command = "human-monitor-command"
            arguments = {"command-line": 'qemu-io slow "read 0 4k"'}
    reply = await monitor.timed(command, arguments, deadline=60)
    if way == "memory":
        await asyncio.sleep(0.03)  # or both are one stall
        await monitor.execute("object-del", {"id": "m"}, deadline=60)
    return reply.t_start_ns, reply.t_end_ns


@builds()
@pytest.mark.asyncio
async def test_stalls_that_another_client_makes_are_bracketed(build: QemuBuild) -> None:
    async with stopped_guest(build) as (_, context, other):
        probe = ThreadsProbe(context)
        async with at_work(probe) as recorder:
            spans = []
            for way in ("compute", "memory", "drive") * 3:
                await asyncio.sleep(0.03)
                spans.append((way, *await hold(other, way)))
            await probe.flush()
        recorder.check_nothing_wrong()
    for way, start, end in spans:
        stall = recorder.between(start, end)[0]
        assert stall.kind is StallKind.MAIN_LOOP
        assert (stall.probe, stall.thread) == ("threads", "main")
        # the client's round trip is longer than the stall in it, but for what follows the answer
        assert stall.at_least_ns <= end - start + patience(10 * MS), way
        assert stall.at_most_ns - stall.at_least_ns <= 0.5 * (end - start) + patience(20 * MS), way
        if way == "drive":
            assert stall.at_most_ns >= SLOW_READ_NS
    (measurement,) = recorder.measurements
    assert measurement.values.keys() == {"looks", "own_cpu_ns"}
    assert int(measurement.values["own_cpu_ns"]) > 0


@builds()
@pytest.mark.asyncio
async def test_a_qemu_that_is_stopped_stalls_and_says_why(build: QemuBuild) -> None:
    async with stopped_guest(build) as (guest, context, _):
        probe = ThreadsProbe(context)
        async with at_work(probe) as recorder:
            os.kill(guest.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(0.2)
                await asyncio.wait_for(probe.flush(), patience(5))
                assert not any(s.kind is StallKind.MAIN_LOOP for s in recorder.observations)
            finally:
                os.kill(guest.pid, signal.SIGCONT)
            await recorder.wait_for(lambda: bool(loops(recorder)))
    (stall,) = (s for s in loops(recorder) if s.at_least_ns >= 100 * MS)
    assert stall.at_most_ns >= 200 * MS
    assert stall.site == "stopped by a signal or a debugger, or frozen"


@pytest.mark.asyncio
async def test_a_qemu_that_is_killed_ends_the_probe_without_a_failure() -> None:
    async with stopped_guest(QEMUS[-1]) as (guest, context, _):
        probe = ThreadsProbe(context)
        async with at_work(probe) as recorder:
            os.kill(guest.pid, signal.SIGKILL)
            await recorder.wait_for(lambda: bool(recorder.measurements))
            await asyncio.wait_for(probe.flush(), patience(5))
        recorder.check_nothing_wrong()


def loops(recorder: Recorder) -> list[Observation]:
    """Stalls of the main loop."""
    return [s for s in recorder.observations if s.kind is StallKind.MAIN_LOOP]


@builds()
@pytest.mark.asyncio
async def test_it_is_used_in_place_of_idle_pings(build: QemuBuild, seen: Seen) -> None:
    spec = GuestSpec(machine="pc", accel="tcg", monitors=2, args=("-S",))
    async with launch(spec.on(build)) as guest:
        async with attach(str(guest.monitors[0]), trace=False, on_record=seen) as agent:
            await agent.probes_started()
            async with qmp(guest.monitors[1]) as other:  # nothing of ours is there
                start, end = await hold(other, "compute")
            await agent.settle()
        states = {p.name: p for p in seen.of(ProbesRecord)[-1].probes}
        assert states["threads"].active
        assert "threads" in str(states["ping"].reason)
        stalls = [s for s in seen.of(StallRecord) if s.start_ns < end and s.end_ns > start]
        assert {s.probe for s in stalls if s.kind == StallKind.MAIN_LOOP} == {"threads"}


@contextmanager
def sleeping(user: int) -> Iterator[Process]:
    """A process of a user's."""
    with subprocess.Popen(["sleep", "600"], user=user, group=user) as child:
        try:
            process = Process.read(child.pid)
            assert process is not None
            yield process
        finally:
            child.kill()


@contextmanager
def waiting_process() -> Iterator[Process]:
    """A process with two threads, which wait."""
    script = (
        "import select, sys, threading\n"
        "threading.Thread(target=sys.stdin.readline).start()\n"
        "print('ready', flush=True)\n"
        "select.poll().poll()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            process = Process.read(child.pid)
            assert process is not None
            yield process
        finally:
            child.kill()


@needs_root
def test_what_may_be_read_depends_on_who_reads() -> None:
    with sleeping(STRANGER) as theirs, sleeping(0) as ours:
        assert examine(theirs).access is Access.SYSCALL, "root"
        with acting_as(STRANGER):
            assert examine(theirs).access is Access.SYSCALL, "the same user"
            found = examine(ours)
        assert found.access is Access.SCHEDSTAT
        assert (found.reason, found.remedy) == (
            "QEMU runs as another user",
            "run as root or as the user that QEMU runs as",
        )


def test_a_thread_that_has_ended_is_not_another_one_with_its_number() -> None:
    with waiting_process() as process:
        examined = examine(process)
        tasks = Tasks(process)
        try:
            (other,) = tasks.ids() - {process.pid}
            task = tasks.open(other, examined)
            assert task is not None
            assert task.schedstat()
            os.kill(process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(ProcessLookupError):
                task.schedstat()
            assert tasks.open(other, examined) is None
            task.close()
        finally:
            tasks.close()


@pytest.mark.full
@builds()
@pytest.mark.asyncio
async def test_gaps_of_a_vcpu_without_a_cpu_are_the_schedulers(
    build: QemuBuild, seen: Seen
) -> None:
    """Another process has the guest's only CPU half of the time."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a second CPU for the agent")
    cpu = max(os.sched_getaffinity(0))
    async with booted(build, "kvm") as vm:
        for tid in os.listdir(f"/proc/{vm.guest.pid}/task"):
            os.sched_setaffinity(int(tid), {cpu})
        async with attach(vm.target, probes=("pulse", "threads"), on_record=seen) as agent:
            assert await agent.probes_ready(patience(10.0)) == ()
            hog = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
            try:
                os.sched_setaffinity(hog.pid, {cpu})
                await asyncio.sleep(HOGGED_S)
            finally:
                hog.kill()
                await hog.wait()
            await agent.settle()
    gaps = [
        s for s in seen.of(StallRecord) if s.kind == StallKind.VCPU_GAP and "pulse" in s.witnesses
    ]
    named = [s for s in gaps if s.cause is not None and s.cause.type == "scheduler"]
    assert len(gaps) > 20
    assert len(named) >= 0.7 * len(gaps)
