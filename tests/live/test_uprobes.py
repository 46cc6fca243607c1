"""The uprobes probe on running guests: what it tells, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_memlistener.errors import CommandFailed, TargetError
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.probes import CommandSpan, Kind, Observation, ProbeUnavailable
from qmp_memlistener.probes.uprobes import UprobesProbe, wait_released
from qmp_memlistener.probes.uprobes.program import Program, examine
from qmp_memlistener.qmp import Monitor
from tests.support.live import QEMUS, Vm, booted, builds, cases, qmp
from tests.support.probes import Recorder, guest_context

pytestmark = [pytest.mark.qemu, pytest.mark.asyncio]

PREALLOC = 96 << 20
ENDS = QEMUS[:1] + QEMUS[1:][-1:]
"""The oldest and the newest: a run takes the kernel some seconds to clear away."""


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """The kernel opens new probes slowly as long as it takes out old ones."""
    yield
    assert wait_released(100)


class Seen(Recorder):
    """A sink that takes commands too."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[CommandSpan] = []

    def command(self, span: CommandSpan) -> None:
        self.commands.append(span)

    def of(self, kind: Kind, since_ns: int = 0) -> list[Observation]:
        found = [o for o in self.observations if o.kind is kind and o.start_ns >= since_ns]
        return sorted(found, key=lambda o: o.start_ns)

    def named(self, name: str) -> list[CommandSpan]:
        return [c for c in self.commands if c.name == name]


def probed(vm: Vm) -> Program:
    """Where the guest can be probed; skips the test when it cannot."""
    try:
        return examine(vm.guest.process.pid)
    except ProbeUnavailable as why:
        pytest.skip(f"uprobes: {why.message}")


@asynccontextmanager
async def probing(
    vm: Vm, *, named: bool = False, must_see: dict[Kind, int] | None = None
) -> AsyncIterator[tuple[UprobesProbe, Seen, Monitor]]:
    """The probe at work on a guest; nothing was lost when the block is left."""
    probed(vm)
    async with guest_context(vm.guest) as context:
        probe = UprobesProbe(replace(context, named=named, must_see=must_see or {}))
        assert (await probe.check()).usable
        seen = Seen()
        await probe.start(seen)
        try:
            yield probe, seen, context.monitor
        finally:
            await probe.stop()
    seen.check_nothing_wrong()


def inside(inner: Observation, outer: Observation) -> bool:
    return outer.start_ns <= inner.start_ns and inner.end_ns <= outer.end_ns


@cases("kvm")
async def test_each_toggle_is_a_commit_with_its_slot_updates(build: QemuBuild, accel: str) -> None:
    count = 20
    async with booted(build, accel) as vm, probing(vm) as (probe, seen, _):
        since = time.monotonic_ns()
        await vm.toggle(count, period_ms=2)
        await probe.flush()
        assert seen.reached["uprobes"] >= since
        updates = seen.of(Kind.SLOT_UPDATE, since)
        commits = [c for c in seen.of(Kind.COMMIT, since) if any(inside(u, c) for u in updates)]
    assert len(commits) == count
    for commit in commits:
        mine = [u.update for u in updates if inside(u, commit)]
        assert len(mine) == 4
        assert {u.ret for u in mine if u} == {0}
        assert commit.thread == "CPU 0"
        assert 0 < commit.at_least_ns <= commit.at_most_ns == commit.end_ns - commit.start_ns
    shapes = [u.update for u in updates if any(inside(u, c) for c in commits)]
    assert sum(1 for u in shapes if u is not None and u.size == 0) == 2 * count
    inhibits = seen.of(Kind.VCPU_INHIBIT, since)
    assert len(inhibits) == (0 if build.version.startswith("7.") else count)
    assert all(any(inside(i, c) for c in commits) for i in inhibits)


@builds(ENDS)
async def test_a_hold_of_the_main_loop_has_its_length_and_place(build: QemuBuild) -> None:
    """Preallocated memory is touched with the BQL held, in the command's own time."""
    async with booted(build, "tcg") as vm, probing(vm) as (probe, seen, monitor):
        await probe.burst(True)
        asked = time.monotonic_ns()
        await monitor.execute(
            "object-add",
            {"qom-type": "memory-backend-ram", "id": "m0", "size": PREALLOC, "prealloc": True},
        )
        answered = time.monotonic_ns()
        await probe.burst(False)
        await probe.flush()
        (command,) = seen.named("object-add")
        assert asked <= command.start_ns <= command.busy_until_ns <= command.end_ns <= answered
        hold = max(seen.of(Kind.BQL_HOLD, asked), key=lambda o: o.at_most_ns)
        assert hold.start_ns <= command.start_ns
        assert command.end_ns <= hold.end_ns
        assert hold.at_least_ns >= command.end_ns - command.start_ns
        assert hold.thread == "main"
        assert hold.site is not None
        assert hold.site.startswith("util/main-loop.c:")


@builds(ENDS)
async def test_commands_by_name_and_no_short_questions(build: QemuBuild, tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    human = ("-monitor", f"unix:{path},server=on,wait=off")
    async with (
        booted(build, "tcg", "pc", *human) as vm,
        probing(vm) as (probe, seen, monitor),
    ):
        for _ in range(20):
            await monitor.execute("query-name")
        await monitor.execute("human-monitor-command", {"command-line": "info status"})
        with pytest.raises(CommandFailed):
            await monitor.execute("object-add", {"qom-type": "no-such", "id": "o"})
        await monitor.execute("device_add", {"driver": "virtio-rng-pci"})
        await monitor.execute("system_reset")
        reader, writer = await asyncio.open_unix_connection(path)
        await reader.readuntil(b"(qemu) ")
        writer.write(b"info status\n")
        await reader.readuntil(b"(qemu) ")
        writer.close()
        await probe.flush()
        names = [c.name for c in seen.commands if not c.name.startswith("query-")]
        assert names == [
            *("human-monitor-command", "object-add", "device_add", "system_reset", "hmp")
        ]
        assert len(seen.commands) < 10


@builds(ENDS)
async def test_pauses_and_who_took_the_lock_meanwhile(build: QemuBuild) -> None:
    async with booted(build, "tcg", smp=2) as vm, probing(vm) as (probe, seen, monitor):
        spans = []
        for on in (False, True):
            if on:
                await probe.burst(True)
            asked = time.monotonic_ns()
            await monitor.execute("stop")
            stopped = time.monotonic_ns()
            await monitor.execute("system_reset")
            resumed = time.monotonic_ns()
            await monitor.execute("cont")
            spans.append((asked, stopped, resumed, time.monotonic_ns()))
        await probe.burst(False)
        await monitor.execute("stop")
        await probe.flush()
        pauses = seen.of(Kind.VCPU_PAUSE)
        assert len(pauses) == 2
        for pause, (asked, stopped, resumed, done) in zip(pauses, spans, strict=True):
            assert asked <= pause.start_ns <= stopped <= resumed <= pause.end_ns <= done
            assert pause.at_least_ns >= resumed - stopped - 1_000_000
            assert (pause.thread, pause.tid) == (None, None)
        assert pauses[0].handoffs is None
        assert pauses[1].handoffs is not None
        assert pauses[1].handoffs >= 1, "a vCPU stops with the BQL held"
        await probe.stop()
        last = seen.of(Kind.VCPU_PAUSE)[2]
        assert last.end_ns <= time.monotonic_ns()
        assert 0 < last.at_least_ns <= last.at_most_ns


@builds(QEMUS[-1:])
async def test_of_a_guest_that_was_stopped_before_only_the_next_pause_is_told(
    build: QemuBuild,
) -> None:
    async with booted(build, "tcg") as vm:
        async with qmp(vm.guest.monitors[1]) as monitor:
            await monitor.execute("stop")
        async with probing(vm) as (probe, seen, monitor):
            await monitor.execute("system_reset")
            await monitor.execute("cont")
            await monitor.execute("stop")
            await monitor.execute("cont")
            await probe.flush()
            assert len(seen.of(Kind.VCPU_PAUSE)) == 1


@builds(ENDS)
async def test_a_vcpu_that_is_plugged_is_seen_and_named(build: QemuBuild) -> None:
    more = ("-smp", "1,maxcpus=2")
    async with (
        booted(build, "tcg", "pc", *more) as vm,
        probing(vm, must_see={Kind.BQL_HOLD: 0}) as (probe, seen, monitor),
    ):
        free = await monitor.execute("query-hotpluggable-cpus")
        assert isinstance(free, list)
        (cpu,) = (c for c in free if "qom-path" not in c)
        await monitor.execute("device_add", {"driver": cpu["type"], "id": "c1", **cpu["props"]})
        async with asyncio.timeout(10):
            while not any(o.thread == "CPU 1" for o in seen.of(Kind.BQL_HOLD)):
                await monitor.execute("stop")  # wakes each vCPU
                await monitor.execute("cont")
                await probe.flush()
        tids = {o.tid for o in seen.observations if o.thread == "CPU 1"}
        assert len(tids) == 1
        assert not tids & {o.tid for o in seen.observations if o.thread in ("CPU 0", "main")}


@builds(ENDS)
async def test_the_lock_is_looked_at_only_while_an_operation_is_under_way(
    build: QemuBuild,
) -> None:
    everything = {Kind.BQL_HOLD: 0}
    async with booted(build, "tcg") as vm:
        async with probing(vm) as (probe, seen, monitor):
            await monitor.execute("query-name")
            await probe.burst(True)
            await probe.burst(True)
            await probe.burst(False)
            start = time.monotonic_ns()
            await vm.toggle(20)
            await probe.burst(False)
            end = time.monotonic_ns()
            await vm.toggle(20)
            await probe.flush()
            await probe.stop()
            (measured,) = seen.measurements
            assert int(measured.values["short_bql_hold"]) + len(seen.of(Kind.BQL_HOLD)) >= 20
            assert all(start - 10**8 < o.start_ns < end for o in seen.of(Kind.BQL_HOLD))
        async with probing(vm, must_see=everything) as (probe, seen, monitor):
            since = time.monotonic_ns()
            await vm.toggle(20)
            await probe.flush()
            holds = [o for o in seen.of(Kind.BQL_HOLD, since) if o.thread == "CPU 0"]
            assert len(holds) >= 20
            for one, two in itertools.pairwise(seen.of(Kind.BQL_HOLD)):
                assert one.end_ns <= two.start_ns + 20_000, "one thread at a time"


@builds(QEMUS[-1:])
async def test_what_costs_more_than_allowed_is_switched_off(build: QemuBuild) -> None:
    async with booted(build, "tcg") as vm:
        probed(vm)
        async with guest_context(vm.guest) as context:
            probe = UprobesProbe(replace(context, named=True, max_share=1e-6))
            seen = Seen()
            await probe.start(seen)
            try:
                toggling = asyncio.create_task(vm.toggle(10_000, period_ms=1))
                await seen.wait_for(lambda: len(seen.failures) > 0, 20)
                toggling.cancel()
            finally:
                await probe.stop()
    (note,) = seen.notes
    assert "no more looking at the BQL" in note
    assert "0% allowed" in note
    (failure,) = seen.failures
    assert isinstance(failure, ProbeUnavailable)
    assert failure.remedy == "allow more with --max-overhead"


# -- nothing stays -------------------------------------------------------------------------------


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
    async with asyncio.timeout(60):
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
