"""The uprobes probe on running guests: what it reports."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_memlistener.errors import CommandFailed
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.probes import Observation, ProbeUnavailable, StallKind
from qmp_memlistener.probes.uprobes import UprobesProbe
from tests.live.uprobes_support import ENDS, Seen, probed, probing
from tests.support.live import QEMUS, booted, builds, cases, qmp
from tests.support.probes import guest_context

pytestmark = [pytest.mark.qemu, pytest.mark.asyncio]

PREALLOC = 96 << 20


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
        updates = seen.of(StallKind.SLOT_UPDATE, since)
        commits = [
            c for c in seen.of(StallKind.COMMIT, since) if any(inside(u, c) for u in updates)
        ]
    assert len(commits) == count
    for commit in commits:
        mine = [u.update for u in updates if inside(u, commit)]
        assert len(mine) == 4
        assert {u.ret for u in mine if u} == {0}
        assert commit.thread == "CPU 0"
        assert 0 < commit.at_least_ns <= commit.at_most_ns == commit.end_ns - commit.start_ns
    shapes = [u.update for u in updates if any(inside(u, c) for c in commits)]
    assert sum(1 for u in shapes if u is not None and u.size == 0) == 2 * count
    inhibits = seen.of(StallKind.VCPU_INHIBIT, since)
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
        hold = max(seen.of(StallKind.BQL_HOLD, asked), key=lambda o: o.at_most_ns)
        assert hold.start_ns <= command.start_ns
        assert command.end_ns <= hold.end_ns
        # what hits cost at most meanwhile is no part of its lower bound
        assert hold.at_least_ns >= 0.95 * (command.end_ns - command.start_ns)
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
                # the kernel may be slow to open what looks at the BQL
                await seen.wait_for(lambda: StallKind.BQL_HOLD in seen.measured["uprobes"], 30)
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
        pauses = seen.of(StallKind.VCPU_PAUSE)
        assert len(pauses) == 2
        for pause, (asked, stopped, resumed, done) in zip(pauses, spans, strict=True):
            assert asked <= pause.start_ns <= stopped <= resumed <= pause.end_ns <= done
            assert pause.at_least_ns >= resumed - stopped - 1_000_000
            assert (pause.thread, pause.tid) == (None, None)
        assert pauses[0].handoffs is None
        assert pauses[1].handoffs is not None
        assert pauses[1].handoffs >= 1, "a vCPU stops with the BQL held"
        await probe.stop()
        last = seen.of(StallKind.VCPU_PAUSE)[2]
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
            assert len(seen.of(StallKind.VCPU_PAUSE)) == 1


@builds(ENDS)
async def test_a_vcpu_that_is_plugged_is_seen_and_named(build: QemuBuild) -> None:
    more = ("-smp", "1,maxcpus=2")
    async with (
        booted(build, "tcg", "pc", *more) as vm,
        probing(vm, must_see={StallKind.BQL_HOLD: 0}) as (probe, seen, monitor),
    ):
        free = await monitor.execute("query-hotpluggable-cpus")
        assert isinstance(free, list)
        (cpu,) = (c for c in free if "qom-path" not in c)
        await monitor.execute("device_add", {"driver": cpu["type"], "id": "c1", **cpu["props"]})
        async with asyncio.timeout(10):
            while not any(o.thread == "CPU 1" for o in seen.of(StallKind.BQL_HOLD)):
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
    everything = {StallKind.BQL_HOLD: 0}
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
            assert int(measured.values["short_bql_hold"]) + len(seen.of(StallKind.BQL_HOLD)) >= 20
            assert all(start - 10**8 < o.start_ns < end for o in seen.of(StallKind.BQL_HOLD))
        async with probing(vm, must_see=everything) as (probe, seen, monitor):
            since = time.monotonic_ns()
            await vm.toggle(20)
            await probe.flush()
            holds = [o for o in seen.of(StallKind.BQL_HOLD, since) if o.thread == "CPU 0"]
            assert len(holds) >= 20
            for one, two in itertools.pairwise(seen.of(StallKind.BQL_HOLD)):
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
    assert "the BQL is no longer watched" in note
    assert "0% allowed" in note
    (failure,) = seen.failures
    assert isinstance(failure, ProbeUnavailable)
    assert failure.remedy == "allow more with --max-overhead"
