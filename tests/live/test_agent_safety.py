"""What an attachment leaves behind: nothing, however it ends.

Trace-event states, where QEMU's log goes, what stands in it, files on tmpfs, the monitors.  Its
parts are tested in test_monitor_trace; here it is the agent as a whole, and `watch` as a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmp_memlistener.agent import tracing
from qmp_memlistener.errors import MonitorBusy, TargetError, TargetLost
from qmp_memlistener.guests import HOST_BRIDGE, PAM_RAM, High, QemuBuild
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.records import GuestState, SlotOp
from tests.support.host import patience
from tests.support.leftovers import enabled_events, flush_rcu, left_behind, log_targets
from tests.support.live import (
    QEMUS,
    Seen,
    Vm,
    attach_bare,
    best_accel,
    booted,
    builds,
    cases,
    op_shapes,
    qmp,
    silenced,
)
from tests.support.verbs import started_verb

pytestmark = pytest.mark.qemu

OF_THE_USER = ("runstate_set", "vm_state_notify")
"""Events that a user had on before: one of those the agent uses, and one of those it does not."""


POINTS = 24
"""Moments, evenly spread, at which something is cancelled."""


@dataclass(frozen=True, slots=True)
class State:
    """What must be the same before and after."""

    events: frozenset[str]
    files: list[str]
    targets: list[str]

    @property
    def quick(self) -> tuple[frozenset[str], list[str]]:
        return self.events, self.files


@dataclass(frozen=True, slots=True)
class Kept:
    """A guest with a user's own tracing, and a monitor that watches what is done to it."""

    vm: Vm
    monitor: Monitor
    log: Path | None

    async def state(self) -> State:
        events, files = await self.quick_state()
        # QEMU closes a log that it no longer writes when RCU lets it (qemu_set_log, util/log.c).
        await flush_rcu(self.monitor)
        return State(events, files, log_targets(self.vm.guest.pid))

    async def quick_state(self) -> tuple[frozenset[str], list[str]]:
        return await enabled_events(self.monitor), left_behind(self.vm.guest.pid)

    def text(self) -> bytes:
        return b"" if self.log is None else self.log.read_bytes()

    async def log_something(self) -> None:
        """The user's event `vm_state_notify` fires twice."""
        await self.monitor.execute("stop")
        await self.monitor.execute("cont")


@asynccontextmanager
async def kept(
    build: QemuBuild, accel: str, log: str, directory: Path, monitors: int = 2
) -> AsyncIterator[Kept]:
    """A guest whose log is its standard error (a file), a file of its own, or nothing."""
    file = directory / "qemu.log"
    args = ("-D", str(file)) if log == "-D" else ()
    binary = silenced(build, directory) if log == "null" else build
    async with (
        booted(build, accel, "pc", *args, binary=binary, monitors=monitors) as vm,
        qmp(vm.guest.monitors[-1]) as monitor,
    ):
        for name in OF_THE_USER:
            await monitor.execute("trace-event-set-state", {"name": name, "enable": True})
        where = {"stderr": vm.guest.directory / "stderr", "-D": file, "null": None}[log]
        guest = Kept(vm, monitor, where)
        await guest.log_something()
        assert (b"vm_state_notify" in guest.text()) == (log != "null")
        yield guest


@builds()
@pytest.mark.parametrize("log", ["stderr", "-D", "null"])
@pytest.mark.asyncio
async def test_everything_is_as_it_was(
    build: QemuBuild, log: str, seen: Seen, tmp_path: Path
) -> None:
    async with kept(build, best_accel(build), log, tmp_path) as guest:
        before, head = await guest.state(), guest.text()
        assert before.files == []
        for failing in (False, True):
            with contextlib.suppress(RuntimeError):
                async with attach_bare(guest.vm.target, on_record=seen) as agent:
                    assert agent.source == "trace"
                    events, files = await guest.quick_state()
                    assert events != before.events
                    assert files != []
                    await guest.vm.toggle(4)
                    await agent.settle()
                    assert agent.transitions == 4
                    if failing:
                        raise RuntimeError
            assert await guest.state() == before
            assert guest.text().startswith(head)
        # What the user had traced still goes where it went.
        head = guest.text()
        await guest.log_something()
        if log != "null":
            assert guest.text()[len(head) :].count(b"vm_state_notify") == 2
            # Trace lines that we caused stay in a log that is read in place.
            assert guest.text().count(b"flatview_new ") >= 8
        # The monitor is free again.
        async with qmp(guest.vm.guest.monitors[0]) as again:
            assert await again.execute("query-name") == {}


@builds()
@pytest.mark.parametrize("log", ["stderr", "null"])
@pytest.mark.asyncio
async def test_after_a_killed_watch_the_next_attach_restores(
    build: QemuBuild, log: str, seen: Seen, tmp_path: Path
) -> None:
    async with kept(build, best_accel(build), log, tmp_path) as guest:
        before = await guest.state()
        async with started_verb("watch", guest.vm.target) as watch:
            await watch.ready()
            watch.process.kill()
            await watch.process.wait()
        events, files = await guest.quick_state()
        assert events != before.events
        assert files != []
        # What QEMU logged meanwhile is not taken for what happens now.
        await guest.vm.toggle(6)
        async with attach_bare(guest.vm.target, on_record=seen) as agent:
            assert agent.source == "trace"
            await guest.vm.open_pam()
            await agent.settle()
            assert agent.transitions == 1
        seen.check_nothing_wrong()
        assert await guest.state() == before


@cases()
@pytest.mark.asyncio
async def test_two_agents_on_one_guest(build: QemuBuild, accel: str, tmp_path: Path) -> None:
    """Both see everything; the first to leave does not blind the other, the last one restores."""
    first, second = Seen(), Seen()
    log = "stderr" if accel == "kvm" else "null"
    async with kept(build, accel, log, tmp_path, monitors=3) as guest:
        before = await guest.state()
        targets = [f"unix:{path}" for path in guest.vm.guest.monitors[:2]]
        async with attach_bare(targets[1], on_record=second) as staying:
            async with attach_bare(targets[0], on_record=first) as leaving:
                # As fast as it can, then so slowly that both take snapshots in between.
                for count, period_ms in ((100, 0), (30, 10)):
                    await guest.vm.toggle(count, period_ms)
                    await asyncio.gather(staying.settle(), leaving.settle())
                assert leaving.transitions == staying.transitions == 130
            assert {"flatview_new", "runstate_set"} <= await enabled_events(guest.monitor)
            await guest.vm.toggle(20)
            await staying.settle()
            assert staying.transitions == 150
        assert await guest.state() == before
    for seen in (first, second):
        seen.check_nothing_wrong()
    if accel == "kvm":
        ours, theirs = (op_shapes(s.of(SlotOp)) for s in (first, second))
        assert theirs[: len(ours)] == ours


@builds(QEMUS[:1])
@pytest.mark.parametrize("log", ["stderr", "null"])
@pytest.mark.asyncio
async def test_cancelling_while_attaching_leaves_nothing(
    build: QemuBuild, log: str, tmp_path: Path
) -> None:
    async with kept(build, best_accel(build), log, tmp_path) as guest:
        before = await guest.state()
        start = time.monotonic()
        async with attach_bare(guest.vm.target):
            whole = time.monotonic() - start
        early = 0
        for i in range(POINTS):
            entered = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(whole * (i + 1) / POINTS):
                    async with attach_bare(guest.vm.target):
                        entered = True
                        await asyncio.Event().wait()
            early += not entered
            assert await guest.quick_state() == before.quick, f"after {(i + 1) / POINTS:.0%}"
        assert early >= POINTS // 3
        async with attach_bare(guest.vm.target) as agent:
            assert agent.source == "trace"
        assert await guest.state() == before


@builds(QEMUS[:1])
@pytest.mark.parametrize("log", ["stderr", "null"])
@pytest.mark.asyncio
async def test_cancelling_while_leaving_leaves_nothing(
    build: QemuBuild, log: str, tmp_path: Path
) -> None:
    """The guest must be as before when the block is left, also when leaving it was cancelled."""
    async with kept(build, best_accel(build), log, tmp_path) as guest:
        before = await guest.state()
        agent = attach_bare(guest.vm.target)
        await agent.__aenter__()
        start = time.monotonic()
        await agent.__aexit__(None, None, None)
        whole = time.monotonic() - start
        for i in range(POINTS):
            agent = attach_bare(guest.vm.target)
            await agent.__aenter__()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(whole * i / POINTS):
                    await agent.__aexit__(None, None, None)
            assert await guest.quick_state() == before.quick, f"after {i / POINTS:.0%}"
        assert await guest.state() == before


@cases()
@pytest.mark.asyncio
async def test_a_guest_that_is_killed_leaves_its_last_transitions(
    build: QemuBuild, accel: str, seen: Seen, tmp_path: Path
) -> None:
    async with booted(build, accel, binary=silenced(build, tmp_path)) as vm:
        async with attach_bare(vm.target, on_record=seen) as agent:
            with pytest.raises(MonitorBusy):
                async with attach_bare(vm.target):
                    pass
            await vm.toggle(50)
            os.kill(vm.guest.pid, signal.SIGKILL)
            async with asyncio.timeout(patience(3)):
                reason = await agent.wait_lost()
            assert isinstance(reason, TargetLost)
            assert agent.is_lost
            # Everything that QEMU had logged is reported by then.
            assert agent.transitions == len(seen.transitions) == 50
            with pytest.raises(TargetError):
                await agent.settle()
        assert left_behind(vm.guest.pid) == []
    seen.check_nothing_wrong()


@builds(QEMUS[:1])
@pytest.mark.asyncio
async def test_a_defect_of_ours_ends_the_attachment(
    build: QemuBuild, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that has stopped following must say so, not look like a quiet guest."""

    def broken(_: str) -> None:
        raise ZeroDivisionError("a defect of a test")

    async with (
        booted(build, best_accel(build)) as vm,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        before = await enabled_events(monitor)
        async with attach_bare(vm.target, on_record=seen) as agent:
            with monkeypatch.context() as patch:
                patch.setattr(tracing, "maps_of", broken)
                await vm.open_pam()
                async with asyncio.timeout(patience(5)):
                    reason = await agent.wait_lost()
            assert "a defect of a test" in str(reason)
        assert await enabled_events(monitor) == before
        assert left_behind(vm.guest.pid) == []


@cases("kvm")
@pytest.mark.asyncio
async def test_a_guest_that_dies_of_a_missing_slot_is_told_of(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    """The second vCPU's code lies in the slot that goes and comes back.

    QEMU 7.2 may delete the slot under its feet: KVM internal error.  From 8.0 on it survives.
    """
    async with (
        booted(build, accel, smp=2) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        await vm.pulse.place(1, High.CODE)
        toggle = await vm.pulse.toggle(HOST_BRIDGE, vm.bridge.pam, (PAM_RAM << 4, 0), 200)

        async def over() -> bool:
            if toggle.done == toggle.goal:
                return True
            status = await monitor.execute("query-status")
            assert isinstance(status, dict)
            return str(status["status"]) != "running"

        async with asyncio.timeout(20):
            while not await over():  # noqa: ASYNC110 (the guest's memory has no events)
                await asyncio.sleep(0.005)
        await agent.settle()
        states = [s.status for s in seen.of(GuestState)]
        if agent.rules.queued:
            assert (toggle.done, states) == (200, [])
        if toggle.done < 200:
            assert states == ["internal-error"]
        # The write that killed it is among them; QEMU finished it.
        assert toggle.done <= agent.transitions <= toggle.done + 1
    seen.check_nothing_wrong()
