"""Guests that are not traced: what polling sees, and what it says it cannot; guest states."""

from __future__ import annotations

import pytest

from qmp_memlistener.guests import (
    QemuBuild,
)
from qmp_memlistener.records import GuestState, SlotOp
from tests.support.leftovers import enabled_events
from tests.support.live import Commits, Seen, attach_bare, booted, cases, op_shapes, planned, qmp

pytestmark = pytest.mark.qemu


@cases()
@pytest.mark.asyncio
async def test_polling_sees_what_stays_and_says_what_it_cannot(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    async with booted(build, accel) as vm, qmp(vm.guest.monitors[1]) as monitor:
        before = await enabled_events(monitor)
        commits = Commits()
        async with attach_bare(vm.target, trace=False, on_record=seen) as agent:
            assert agent.source == "polling"
            assert "short-lived holes may be missed" in seen.header.source
            assert any("not seen" in note for note in seen.notes)
            assert seen.header.stamp_bound_ns is None
            agent.register(commits)
            table = agent.slots
            for i, step in enumerate((vm.open_pam, vm.close_pam), 1):
                await step()
                await seen.wait_for(lambda i=i: len(seen.transitions) >= i)  # type: ignore[misc]
            await agent.settle()
            ops = seen.of(SlotOp)
            assert ops
            assert all(op.predicted for op in ops)
            wanted, _ = planned(commits.transitions[0], table, agent.rules)
            assert op_shapes(seen.ops(1)) == wanted

            for command, event, status, running in (
                ("stop", "STOP", "paused", False),
                ("cont", "RESUME", "running", True),
                ("system_reset", "RESET", "running", True),
            ):
                count = len(seen.of(GuestState))
                await monitor.execute(command)
                await seen.wait_for(lambda n=count: len(seen.of(GuestState)) > n)  # type: ignore[misc]
                state = seen.of(GuestState)[-1]
                assert (state.event, state.status, state.running) == (event, status, running)
            assert await enabled_events(monitor) == before
        assert [t.detail for t in seen.transitions] == ["full", "full"]
        seen.check_nothing_wrong()


@cases()
@pytest.mark.asyncio
async def test_with_a_trace_the_guests_state_is_told_too(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    async with (
        booted(build, accel) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        assert "every slot operation" in seen.header.source
        for command in ("stop", "cont", "system_reset"):
            await monitor.execute(command)
        await seen.wait_for(lambda: any(s.event == "RESET" for s in seen.of(GuestState)))
        await agent.settle()
        states = [(s.status, s.running) for s in seen.of(GuestState) if s.event != "RESET"]
        assert states[:2] == [("paused", False), ("running", True)]
