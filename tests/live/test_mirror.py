"""A mirror of a real guest: in step under each strategy through all that changes a map."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from qmp_memlistener.agent import Agent
from qmp_memlistener.errors import TargetLost
from qmp_memlistener.guests import PciAddress, QemuBuild
from qmp_memlistener.mirror.backend import ModelBackend
from qmp_memlistener.mirror.mirror import Mirror
from qmp_memlistener.mirror.mirroring import check_guest, mirroring
from qmp_memlistener.qmp import Monitor, take_snapshot
from qmp_memlistener.topology import read_map
from qmp_memlistener.updates.model import Strategy, UpdateRefused
from tests.support.live import (
    QEMUS,
    Seen,
    Vm,
    attach_bare,
    best_accel,
    booted,
    builds,
    cases,
    qmp,
)

pytestmark = [pytest.mark.qemu, pytest.mark.asyncio]

MIB = 1 << 20
RAM_ABOVE = MIB  # main RAM is one slot above it, whatever PAM does
BAR = 0xE000_0000
DEVICE = PciAddress(0, 5)
HOTPLUG_BASE = 4 << 30  # pc puts memory devices behind the RAM above 4 GiB, here none
DIMM_SELECT, DIMM_CONTROL, DIMM_EJECT = 0xA00, 0xA14, 0x8
ARGS = (
    *("-m", "slots=4,maxmem=2G"),
    *("-object", f"memory-backend-ram,id=m0,size={MIB}"),
    *("-device", "ivshmem-plain,id=iv0,memdev=m0,addr=5"),
)
strategies = pytest.mark.parametrize("strategy", list(Strategy))


@dataclass(slots=True)
class Mirrored:
    """A guest, its agent and mirror, and a monitor for the test."""

    vm: Vm
    agent: Agent
    monitor: Monitor
    mirror: Mirror
    backend: ModelBackend = field(default_factory=ModelBackend)

    async def in_step(self) -> None:
        """A fresh snapshot shows what the backend holds, and the guest is as it was."""
        assert await check_guest(self.mirror, self.agent) == ()
        assert self.mirror.report().why_not is None
        assert await status(self.monitor) == "running"

    def slot_at(self, gpa: int) -> int | None:
        return next((s.slot for s in self.backend.slots() if s.gpa <= gpa < s.end), None)


async def status(monitor: Monitor) -> object:
    value = await monitor.execute("query-status")
    assert isinstance(value, dict)
    return value["status"]


@asynccontextmanager
async def mirrored(
    build: QemuBuild, accel: str, strategy: Strategy, seen: Seen
) -> AsyncIterator[Mirrored]:
    backend = ModelBackend()
    async with (
        booted(build, accel, "pc", *ARGS, monitors=4) as vm,
        qmp(vm.guest.monitors[-1]) as monitor,
        attach_bare(vm.target, on_record=seen) as agent,
        mirroring(agent, backend, strategy) as mirror,
    ):
        yield Mirrored(vm, agent, monitor, mirror, backend)


@cases()
@strategies
async def test_in_step_through_all_that_changes_a_map(
    build: QemuBuild, accel: str, strategy: Strategy, seen: Seen
) -> None:
    async with mirrored(build, accel, strategy, seen) as m:
        await m.in_step()
        above, start = m.slot_at(RAM_ABOVE), m.mirror.report()
        assert start.transitions == 1

        await m.vm.open_pam()
        await m.in_step()
        await m.vm.close_pam()
        await m.in_step()
        await m.vm.toggle(11, period_ms=2)
        await m.in_step()
        assert m.backend.backing(0xF0000) == ("pc.ram", "/objects/pc.ram", 0xF0000)
        toggled = m.mirror.report()
        assert toggled.transitions >= start.transitions + 3
        if strategy is Strategy.HOLE:
            assert m.slot_at(RAM_ABOVE) == above
            assert toggled.holes_marked >= 1
            assert toggled.holes_unmarked >= 1
        else:
            assert toggled.holes_marked == toggled.holes_unmarked == 0
            assert toggled.slots_deleted > start.slots_deleted

        await m.monitor.execute(
            "object-add", {"qom-type": "memory-backend-ram", "id": "d0", "size": 16 * MIB}
        )
        await m.monitor.execute("device_add", {"driver": "pc-dimm", "id": "d", "memdev": "d0"})
        await m.in_step()
        assert m.backend.backing(HOTPLUG_BASE) == ("d0", "/objects/d0", 0)

        await m.vm.pulse.map_bar(DEVICE, 2, BAR)
        await m.in_step()
        assert m.backend.backing(BAR + 5) == ("m0", "/objects/m0", 5)
        await m.vm.pulse.unmap_bar(DEVICE)
        await m.in_step()
        assert m.backend.backing(BAR) is None

        await m.vm.pulse.port_out(DIMM_SELECT, 0, 4)
        await m.vm.pulse.port_out(DIMM_CONTROL, DIMM_EJECT, 1)
        await m.in_step()
        assert m.backend.backing(HOTPLUG_BASE) is None

        boots = m.vm.pulse.header()
        assert boots is not None
        await m.monitor.execute("system_reset")

        def again() -> bool:
            header = m.vm.pulse.header()
            return header is not None and header.boots > boots.boots and header.ready

        await m.vm.pulse.wait_for(again, 20, lambda: "its second boot")
        await m.in_step()
        if strategy is Strategy.HOLE:
            assert m.slot_at(RAM_ABOVE) == above
    report = m.mirror.report()
    assert (report.in_step, report.differences, report.notes) == (True, [], [])
    assert (report.rebuilt, report.dropped, report.unpaused) == (0, 0, 0)
    assert report.lag.count > 0
    assert (report.lag.longest_ns or 0) > (report.updates.longest_ns or 0) / 2
    assert (report.exposed > 0) == (strategy is Strategy.DIRECT)
    assert report.pauses.count == (report.updates.count if strategy is Strategy.PAUSE else 0)
    assert report.pauses.total_ns < report.updates.total_ns


@builds()
async def test_hole_keeps_dirty_pages_that_direct_loses(build: QemuBuild, seen: Seen) -> None:
    """Two mirrors of one guest, side by side, while it opens and closes PAM."""
    async with (
        booted(build, best_accel(build)) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
    ):
        kept: dict[Strategy, int] = {}
        models = {Strategy.DIRECT: ModelBackend(), Strategy.HOLE: ModelBackend()}
        mirrors = {s: Mirror(model, strategy=s) for s, model in models.items()}
        for mirror in mirrors.values():
            agent.register(mirror)
        await agent.settle()
        ram = agent.map.view.lookup(RAM_ABOVE)
        assert ram is not None
        pages = [RAM_ABOVE + n * 4096 for n in range(256)]
        for s, model in models.items():
            await mirrors[s].log_start(ram)
            assert all(model.write(page) for page in pages)
        await vm.open_pam()
        await vm.close_pam()
        await agent.settle()
        for s, model in models.items():
            dirty = {page for slot in model.slots() for page in model.dirty(slot.slot)}
            kept[s] = len(dirty & {*pages})
            assert await check_guest(mirrors[s], agent) == ()
        assert kept == {Strategy.DIRECT: 0, Strategy.HOLE: len(pages)}
        assert mirrors[Strategy.DIRECT].report().bitmaps_dropped > 0


@builds()
async def test_a_guest_that_stands_still_is_not_resumed(build: QemuBuild, seen: Seen) -> None:
    async with mirrored(build, best_accel(build), Strategy.PAUSE, seen) as m:
        await m.monitor.execute("stop")
        await m.monitor.execute(
            "object-add", {"qom-type": "memory-backend-ram", "id": "d0", "size": 16 * MIB}
        )
        await m.monitor.execute("device_add", {"driver": "pc-dimm", "id": "d", "memdev": "d0"})
        assert await check_guest(m.mirror, m.agent) == ()
        assert await status(m.monitor) == "paused"
        report = m.mirror.report()
        assert report.already_paused >= 1
        await m.monitor.execute("cont")
        assert m.backend.backing(HOTPLUG_BASE) is not None


class Asking(ModelBackend):
    """Asks whether the guest runs before each change and after it."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self.monitor = monitor
        self.told: list[object] = []

    async def ask(self) -> None:
        self.told.append(await status(self.monitor))

    def begin(self) -> Awaitable[None]:  # type: ignore[override]  # it is async
        super().begin()
        return self.ask()

    def end(self) -> Awaitable[None]:  # type: ignore[override]  # it is async
        super().end()
        return self.ask()


@cases()
async def test_the_guest_stands_still_while_the_mirror_changes(
    build: QemuBuild, accel: str, seen: Seen
) -> None:
    async with (
        booted(build, accel, monitors=4) as vm,
        qmp(vm.guest.monitors[-1]) as monitor,
        attach_bare(vm.target, on_record=seen) as agent,
    ):
        backend = Asking(monitor)
        async with mirroring(agent, backend, Strategy.PAUSE) as mirror:
            for act in (vm.open_pam, vm.close_pam):
                await act()
                assert await check_guest(mirror, agent) == ()
                assert await status(monitor) == "running"
        report = mirror.report()
        assert len(backend.told) == 2 * report.updates.count >= 6
        assert set(backend.told) == {"paused"}
        assert (report.pauses.count, report.unpaused) == (report.updates.count, 0)


@builds(QEMUS[:1])
async def test_without_a_monitor_for_the_guard_nothing_is_paused(
    build: QemuBuild, seen: Seen
) -> None:
    async with (
        booted(build, best_accel(build), monitors=1) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
    ):
        with pytest.raises(UpdateRefused, match="guard"):
            async with mirroring(agent, ModelBackend(), Strategy.PAUSE):
                pass
        assert await status(agent.monitor) == "running"


@builds()
@strategies
async def test_a_guest_that_is_killed_leaves_a_mirror_that_says_so(
    build: QemuBuild, strategy: Strategy, seen: Seen
) -> None:
    async with mirrored(build, best_accel(build), strategy, seen) as m:
        toggling = asyncio.create_task(m.vm.toggle(10_000, period_ms=5))
        await seen.wait_for(lambda: len(seen.transitions) > 5)
        m.vm.guest.process.kill()
        assert isinstance(await asyncio.wait_for(m.agent.wait_lost(), 10), TargetLost)
        toggling.cancel()
        async with asyncio.timeout(10):
            while m.mirror.received < 1 + len(seen.transitions):  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.005)
        # QEMU may have died between two operations: then the last map lacks what it had deleted
        assert await m.mirror.check(m.agent.map) == ()
    report = m.mirror.report()
    assert report.in_step
    assert any("not compared at the end" in note for note in report.notes)


@builds(QEMUS[:1])
async def test_a_backend_that_drifts_is_found_and_put_right(build: QemuBuild, seen: Seen) -> None:
    async with mirrored(build, best_accel(build), Strategy.HOLE, seen) as m:
        slot = next(s for s in m.backend.slots() if s.block == "pc.ram")
        m.backend.set_hole(slot, 2 * MIB, 3 * MIB)
        (found,) = await check_guest(m.mirror, m.agent)
        assert (found.start, found.end, found.found) == (2 * MIB, 3 * MIB, None)
        assert found.wanted is not None
        assert (found.wanted.block, found.wanted.offset) == ("pc.ram", 2 * MIB)
        assert not m.mirror.in_step
        await m.mirror.resync(read_map((await take_snapshot(m.monitor)).text))
        await m.in_step()
