"""The kernel opens uprobes slowly while it closes others: nobody must wait for that who leaves."""

from __future__ import annotations

import asyncio
import time

import pytest

from qmp_memlistener import attach
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.records import ProbesRecord
from qmp_memlistener.waits import waits
from tests.support.live import QEMUS, Seen, best_accel, booted, builds

pytestmark = pytest.mark.qemu

ROUNDS = 3
PATIENCE_S = 4.0
"""Closing all uprobes of a guest takes the kernel longer than that, several times over."""


@builds()
@pytest.mark.asyncio
async def test_leaving_while_uprobes_are_still_being_opened(build: QemuBuild, seen: Seen) -> None:
    async with booted(build, best_accel(build)) as vm:
        for _ in range(ROUNDS):
            async with attach(vm.target, probes=("uprobes",), on_record=seen):
                await asyncio.sleep(0)
                left = time.monotonic()
            assert time.monotonic() - left < PATIENCE_S
        for record in seen.of(ProbesRecord):
            (uprobes,) = (p for p in record.probes if p.name == "uprobes")
            assert uprobes.active is (uprobes.reason is None)


@builds(QEMUS[-1:])
@pytest.mark.asyncio
async def test_one_attachment_after_another(build: QemuBuild, seen: Seen) -> None:
    """The agent is there at once; what its probes wait for is told."""
    async with booted(build, best_accel(build)) as vm:
        for _ in range(ROUNDS):
            start = time.monotonic()
            async with attach(vm.target, probes=("uprobes",), on_record=seen) as agent:
                assert time.monotonic() - start < PATIENCE_S
                started = asyncio.create_task(agent.probes_started())
                await asyncio.sleep(0)
                told = [wait.what for wait in waits()]
                assert started.done() or "for probes to start: uprobes" in told
                await started
                uprobes = next(p for p in agent.probes() if p.name == "uprobes")
                if not uprobes.active:
                    pytest.skip(f"uprobes: {uprobes.reason}")


@builds(QEMUS[:1])
@pytest.mark.asyncio
async def test_nothing_is_attached_for_an_update_that_is_refused(
    build: QemuBuild, seen: Seen
) -> None:
    async with (
        booted(build, best_accel(build)) as vm,
        attach(vm.target, probes_at_once=False, on_record=seen) as agent,
    ):
        outcome = await agent.resize("+128M")
        assert outcome.outcome == "refused"
        assert [p for p in agent.probes() if p.active] == []
        assert seen.of(ProbesRecord) == []
        await agent.probes_started()
        assert [p for p in agent.probes() if p.active]
        assert len(seen.of(ProbesRecord)) >= 1
