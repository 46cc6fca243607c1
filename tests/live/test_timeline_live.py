"""The timeline on real guests: what belongs to a toggle of PAM is tied to it, and nothing else."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_memlistener import Agent, attach
from qmp_memlistener.guests import HOST_BRIDGE, PAM_RAM, QemuBuild
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.records import (
    ProbesRecord,
    SlotOp,
    StallRecord,
    SummaryRecord,
    TransitionRecord,
)
from tests.live.verbs_support import one_build
from tests.support.host import patience
from tests.support.live import NO_QEMU, QEMUS, Seen, booted, builds, cases, qmp

pytestmark = [pytest.mark.qemu, pytest.mark.skipif(not QEMUS, reason=NO_QEMU)]

TOGGLES = 200
MOST = 0.95 * TOGGLES


async def needs_uprobes(agent: Agent, seen: Seen) -> None:
    """Skip, saying why, where uprobes are not to be had."""
    await agent.measuring.wait_started()
    record = seen.of(ProbesRecord)[-1]
    (uprobes,) = (p for p in record.probes if p.name == "uprobes")
    if not uprobes.active:
        pytest.skip(f"no uprobes here: {uprobes.reason}")


def tied(seen: Seen, kind: str) -> set[int | str | None]:
    """The transitions that stalls of a kind were made by."""
    return {
        s.cause.ref
        for s in seen.of(StallRecord)
        if s.kind == kind and s.cause is not None and s.cause.type == "transition"
    }


def in_gaps(seen: Seen) -> set[int | str | None]:
    """The transitions that made a gap of a vCPU or part of one: a write to a host bridge makes two
    commits, and a busy host may take the vCPU away in the other for longer."""
    gaps = [s for s in seen.of(StallRecord) if s.kind == "vcpu_gap"]
    return tied(seen, "vcpu_gap") | {seq for s in gaps for seq in s.during}


@builds()
@pytest.mark.asyncio
async def test_gap_operations_and_commit_of_each_toggle_are_tied(
    build: QemuBuild, seen: Seen
) -> None:
    async with booted(build, "kvm") as vm:
        clock = await vm.pulse.calibrate()
        # below what a toggle takes, so that each of its gaps goes to the ring
        await vm.pulse.reset(threshold=clock.ticks(150_000))
        async with attach(vm.target, probes=("trace", "pulse", "uprobes"), on_record=seen) as agent:
            await needs_uprobes(agent, seen)
            assert await agent.probes_ready(patience(10.0)) == ()  # the pulse's clock is known
            await vm.toggle(TOGGLES, period_ms=5)
            await agent.settle()
    transitions = {t.seq for t in seen.transitions}
    assert len(transitions) == TOGGLES
    for kind in ("commit", "slot_update", "missing"):
        assert len(tied(seen, kind)) >= MOST, kind
    assert len(in_gaps(seen)) >= MOST
    if agent.rules.queued:
        assert len(tied(seen, "vcpu_inhibit")) >= MOST
    # one incident for each: gap, operations and commit of a toggle share it
    by_incident: dict[int, set[str]] = {}
    for stall in seen.of(StallRecord):
        by_incident.setdefault(stall.incident, set()).add(stall.kind)
    whole = [k for k in by_incident.values() if k >= {"commit", "slot_update"}]
    assert len(whole) >= MOST
    known = [s for s in seen.of(StallRecord) if s.kind == "vcpu_gap" and s.cause is not None]
    gaps = [by_incident[s.incident] for s in known if s.cause and s.cause.type == "transition"]
    assert all("commit" in kinds for kinds in gaps)
    commits = [s for s in seen.of(StallRecord) if s.kind == "commit" and len(s.witnesses) > 1]
    both = [s for s in commits if {"trace", "uprobes"} <= set(s.witnesses)]
    assert len(both) >= MOST


@builds()
@pytest.mark.asyncio
async def test_a_write_that_changes_nothing_is_tied_to_nothing(
    build: QemuBuild, seen: Seen
) -> None:
    async with booted(build, "kvm") as vm:
        clock = await vm.pulse.calibrate()
        await vm.pulse.reset(threshold=clock.ticks(30_000))
        await vm.open_pam()
        async with attach(vm.target, probes=("trace", "pulse", "uprobes"), on_record=seen) as agent:
            await needs_uprobes(agent, seen)
            assert await agent.probes_ready(patience(10.0)) == ()
            toggle = await vm.pulse.toggle(
                HOST_BRIDGE, vm.bridge.pam, (PAM_RAM << 4, PAM_RAM << 4), TOGGLES
            )
            await toggle.wait()
            await agent.settle()
    assert seen.transitions == []
    gaps = [s for s in seen.of(StallRecord) if s.kind == "vcpu_gap"]
    assert gaps, "the writes exit to QEMU, which the guest notices"
    assert {s.cause.type for s in seen.of(StallRecord) if s.cause is not None} <= {
        "unknown",
        "agent",
        "command",
    }
    assert not any(s.during for s in seen.of(StallRecord))


@cases()
@pytest.mark.asyncio
async def test_a_long_command_is_named_as_the_cause(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    """Another client's, while it holds the BQL."""
    async with (
        booted(build, accel) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
        attach(vm.target, probes=("ping", "uprobes"), on_record=seen) as agent,
    ):
        await needs_uprobes(agent, seen)
        for _ in range(10):  # an idle ping looks every 100 ms: a hold may fall in between
            await hold_bql(monitor)
            await agent.settle()
            if shared := incidents(seen, "bql_hold") & incidents(seen, "main_loop"):
                break
    holds = [s for s in seen.of(StallRecord) if s.kind == "bql_hold" and s.at_least_ns > 20_000_000]
    named = [s for s in holds if s.cause is not None and s.cause.ref == "object-add"]
    assert named
    assert all(s.cause is not None and s.cause.type == "command" for s in named)
    assert shared & {s.incident for s in named}


def incidents(seen: Seen, kind: str) -> set[int]:
    """In which stalls of this kind took part."""
    return {s.incident for s in seen.of(StallRecord) if s.kind == kind}


async def hold_bql(monitor: Monitor) -> None:
    """Some 50 ms: memory is cleared under the BQL."""
    arguments = {"qom-type": "memory-backend-ram", "id": "m0", "size": 256 << 20, "prealloc": True}
    await monitor.execute("object-add", arguments, deadline=30.0)
    await monitor.execute("object-del", {"id": "m0"}, deadline=30.0)


@builds()
@pytest.mark.asyncio
async def test_without_root_lines_alone_tie_operations_to_transitions(
    build: QemuBuild, seen: Seen
) -> None:
    async with (
        booted(build, "kvm") as vm,
        attach(vm.target, probes=("trace",), on_record=seen) as agent,
    ):
        await vm.toggle(20, period_ms=2)
        await agent.settle()
    assert tied(seen, "missing") == {t.seq for t in seen.transitions}
    assert {s.probe for s in seen.of(StallRecord)} == {"trace"}
    (summary,) = seen.of(SummaryRecord)
    assert summary.transitions == len(seen.of(TransitionRecord))
    assert summary.stalls == len(seen.of(StallRecord))


@builds()
@pytest.mark.asyncio
async def test_every_probe_at_work_and_qemu_dies(build: QemuBuild, seen: Seen) -> None:
    """The attachment ends by itself, with what was seen and a summary."""
    fds = len(os.listdir("/proc/self/fd"))
    async with booted(build, "kvm") as vm:
        async with attach(vm.target, on_record=seen) as agent:
            await vm.toggle(20, period_ms=2)
            vm.guest.process.kill()
            await agent.wait_lost()
        assert len(seen.transitions) == 20
        assert seen.of(SummaryRecord)
    assert len(os.listdir("/proc/self/fd")) <= fds + 2


@pytest.mark.asyncio
async def test_forged_operations_are_told_from_those_that_uprobes_saw(
    seen: Seen, tmp_path: Path
) -> None:
    """Somebody writes to QEMU's log what QEMU would, and only once we read it."""
    log = tmp_path / "log"
    script = tmp_path / "qemu"
    script.write_text(f'#!/bin/sh\nexec "{QEMUS[0].binary}" "$@" 2>>"{log}"\n')
    script.chmod(0o755)
    async with (
        booted(QEMUS[0], "kvm", binary=replace(QEMUS[0], binary=str(script))) as vm,
        attach(vm.target, probes=("trace", "uprobes"), on_record=seen) as agent,
    ):
        await needs_uprobes(agent, seen)
        slot = "Slot#7 flags=0x0 gpa=0x80000000 size=0x1000 ua=0x7f0000000000 ret=0"
        # what stands in the log soon after uprobes began may have been done before
        async with asyncio.timeout(10):
            while not (notes := [note for note in seen.notes if "no uprobe saw" in note]):
                await vm.toggle(5)
                forge(log, f"kvm_set_user_memory {slot}\n")
                await asyncio.sleep(0.1)
    assert "0x80000000" in notes[0]
    # of what QEMU did itself nothing is missing on either side
    assert not any("uprobes saw and" in note for note in seen.notes)


def forge(log: Path, line: str) -> None:
    with open(log, "a") as f:
        f.write(line)


@one_build
@pytest.mark.asyncio
async def test_a_migration_is_why_slots_are_logged(build: QemuBuild, seen: Seen) -> None:
    """It switches dirty logging for all slots in one commit: no transition, no map change.

    On in a thread of its own, which is there before uprobes are in it: these ioctls are not always
    seen.  Off in the main thread (migrate_fd_cleanup, migration/migration.c).
    """

    def switched(flag: int) -> set[int]:
        return {op.slot for op in seen.of(SlotOp) if op.op == "flags" and op.flags & 1 == flag}

    async with booted(build, "kvm") as vm, qmp(vm.guest.monitors[2]) as monitor:
        async with attach(vm.target, probes=("trace", "uprobes"), on_record=seen) as agent:
            await needs_uprobes(agent, seen)
            await monitor.execute("migrate-set-parameters", {"max-bandwidth": 4096})
            await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
            async with asyncio.timeout(20):
                while not switched(1):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                await monitor.execute("migrate_cancel")
                while switched(1) != switched(0):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await agent.settle()
        updates = [s for s in seen.of(StallRecord) if s.kind == "slot_update"]
        causes = {(s.cause.type, s.cause.ref) for s in updates if s.cause is not None}
        assert causes == {("slot_op", "dirty logging (migration)")}
        assert len(updates) >= len(switched(0)) > 1
        assert seen.transitions == []
