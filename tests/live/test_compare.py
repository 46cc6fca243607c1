"""Comparing strategies on real guests: what is counted, what is put back, what is left out."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from qmp_memlistener import Strategy, attach
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.guests.linux import LinuxSpec
from qmp_memlistener.probes import Sink, StallKind
from qmp_memlistener.probes.ping import PingProbe
from qmp_memlistener.qmp.guest import read_status
from qmp_memlistener.updates.compare import CONTROL, INTERRUPTED, CompareOptions, compare
from qmp_memlistener.updates.compare.guest import read_state
from qmp_memlistener.updates.model import Plug, Role, UpdateRefused
from qmp_memlistener.updates.options import parse_addition, parse_resize
from qmp_memlistener.updates.settings import UpdateOptions
from tests.support.linux import booted_linux
from tests.support.live import QEMUS, booted, builds

pytestmark = pytest.mark.qemu

D, P, H = Strategy
SHORT = CompareOptions(repeat=2, window_s=0.5, seed=3)


@builds(of=QEMUS[:1])
@pytest.mark.asyncio
async def test_strategies_on_linux(build: QemuBuild) -> None:
    spec = LinuxSpec(machine="pc", virtio_mem=1 << 30)
    async with booted_linux(build, spec) as linux:
        target = f"unix:{linux.guest.guest.monitors[1]}"
        before = await linux.guest.memory_total()
        async with attach(target, guarded=True, probes=("runstate", "trace")) as agent:
            found = await compare(agent, parse_resize("+256M"), tuple(Strategy), SHORT)
        assert found.ended_early is None
        assert found.skipped == []
        names = [r.strategy for r in found.rounds]
        for name in (*Strategy, CONTROL):
            assert names.count(name) == 2
        assert [r.order for r in found.rounds] == list(range(8))
        assert {r.outcome for r in found.rounds} == {"done"}
        by_name = {r.strategy: r for r in found.rounds}
        assert by_name["direct"].slot_ops == by_name["pause"].slot_ops == 1
        assert by_name["hole"].slot_ops == by_name[CONTROL].slot_ops == 0
        (paused,) = [s for s in found.summary if (s.strategy, s.kind) == ("pause", "vcpu_pause")]
        assert paused.stalls == 2
        assert all(
            s.max_ns == 0 for s in found.summary if s.kind == "vcpu_pause" and s is not paused
        )
        document = msgspec.json.decode(msgspec.json.encode(found))
        assert {"schema", "rounds", "summary", "differences"} <= set(document)
        assert {"strategy", "order", "stalls"} <= set(document["rounds"][0])
        await linux.guest.until(linux.guest.memory_total, lambda total: total == before)


@builds()
@pytest.mark.asyncio
async def test_a_strategy_that_is_not_possible_is_left_out(build: QemuBuild) -> None:
    async with (
        booted(build, "tcg") as vm,
        attach(vm.target, probes=("runstate",)) as agent,
    ):
        with pytest.raises(UpdateRefused, match="virtio-mem"):
            await compare(agent, parse_resize("+256M"), [Strategy.HOLE], SHORT)


@builds()
@pytest.mark.asyncio
async def test_a_guest_that_keeps_the_device_ends_it(build: QemuBuild) -> None:
    """This one has no driver that would let go: rounds would not start alike."""
    plug = Plug(parse_addition(Role.DEVICE, "virtio-rng-pci,id=r0"))
    options = CompareOptions(repeat=2, window_s=0.1, update=UpdateOptions(wait_s=0.1))
    async with (
        booted(build, "tcg") as vm,
        attach(vm.target, probes=("runstate",)) as agent,
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qmp_memlistener.updates.compare.guest.PATIENCE_S", 0.2)
            found = await compare(agent, plug, [Strategy.DIRECT], options)
    assert found.rounds == []
    assert found.ended_early is not None
    assert "could not be put back" in found.ended_early
    assert found.remedy is not None
    assert "r0" in found.remedy


@builds(of=QEMUS[:1])
@pytest.mark.asyncio
async def test_a_probe_that_begins_late_measures_from_then_on_and_takes_part_in_the_burst(
    build: QemuBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()
    bursts: list[bool] = []
    start, burst = PingProbe.start, PingProbe.burst

    async def late(self: PingProbe, sink: Sink) -> None:
        await go.wait()
        await start(self, sink)

    async def noted(self: PingProbe, on: bool) -> None:
        bursts.append(on)
        await burst(self, on)

    monkeypatch.setattr(PingProbe, "start", late)
    monkeypatch.setattr(PingProbe, "burst", noted)
    async with (
        booted(build, "tcg") as vm,
        attach(vm.target, probes=("runstate", "ping")) as agent,
    ):
        begun = time.monotonic_ns()
        assert await agent.probes_ready(0) == ("ping",)
        async with agent.burst():
            go.set()
            assert await agent.probes_ready(20) == ()
            ready = time.monotonic_ns()
            assert bursts == [True]
            await agent.settle()
        assert bursts == [True, False]
        now = time.monotonic_ns()
        assert agent.measured(begun, now) == {StallKind.VCPU_PAUSE}
        assert agent.measured(ready, now) == {StallKind.VCPU_PAUSE, StallKind.MAIN_LOOP}
        assert {p.name for p in agent.probes() if p.active} == {"runstate", "ping"}


@pytest.mark.full
@builds(of=QEMUS[:1])
@pytest.mark.asyncio
async def test_interrupted_at_any_moment_it_puts_the_guest_back(build: QemuBuild) -> None:
    """The guest has a DIMM of its own of that size, which stays; `resize` made it."""
    spec = LinuxSpec(machine="pc", pulse_us=None, virtio_mem=1 << 30)
    options = CompareOptions(repeat=100, window_s=0.3, seed=1)
    wanted = parse_resize("+256M")
    async with booted_linux(build, spec) as linux:
        target = f"unix:{linux.guest.guest.monitors[1]}"
        async with attach(target, guarded=True, probes=("runstate",)) as agent:
            own = await agent.resize("+256M")
            assert own.outcome == "done", own.reason
            before = await read_state(linux.monitor, wanted)
            assert ("device", "qml-dimm0") in before.ids
            for number in (0, 2, 4, 5, 7):
                rounds: asyncio.Queue[str] = asyncio.Queue()
                task = asyncio.create_task(
                    compare(agent, wanted, (D, P, H), options, rounds.put_nowait)
                )
                if number >= 5:
                    await rounds.get()
                await asyncio.sleep(0.15 * number)
                task.cancel()
                try:
                    found = await task
                except asyncio.CancelledError:
                    assert number < 5
                else:
                    assert found.ended_early == INTERRUPTED
                    assert found.rounds
                assert await read_state(linux.monitor, wanted) == before
                assert (await read_status(linux.monitor)).status == "running"


@pytest.mark.full
@builds(of=QEMUS[:2][-1:])
@pytest.mark.asyncio
async def test_less_memory_and_a_device(build: QemuBuild) -> None:
    """Linux lets go of what it was given; ids are free again."""
    spec = LinuxSpec(machine="pc", pulse_us=None, virtio_mem=1 << 30)
    plug = Plug(
        parse_addition(Role.DEVICE, "ivshmem-plain,id=iv0,memdev=ivm0"),
        (parse_addition(Role.OBJECT, "memory-backend-ram,id=ivm0,size=1M,share=on"),),
    )
    async with booted_linux(build, spec) as linux:
        target = f"unix:{linux.guest.guest.monitors[1]}"
        async with attach(target, guarded=True, probes=("runstate", "trace")) as agent:
            for intent, strategies in ((parse_resize("-256M"), (P, H)), (plug, (D, P))):
                before = await read_state(linux.monitor, intent)
                found = await compare(agent, intent, strategies, SHORT)
                assert found.ended_early is None
                assert found.skipped == []
                assert [r.reason for r in found.rounds] == [None] * 6
                assert await read_state(linux.monitor, intent) == before
                by_name = {r.strategy: r for r in found.rounds}
                assert by_name["pause"].slot_ops >= 1
                assert by_name["pause"].transitions >= 1
                pauses = [s.stalls for s in found.summary if s.kind == "vcpu_pause"]
                assert sum(pauses) == 2
