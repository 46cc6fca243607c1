"""Guests in a state in which nothing may be changed, and monitors that are none for a guard.

What a guest's configuration does not allow, block jobs and freezes are in `test_updates`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener import Agent, Outcome
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.updates.model import Plug, Resize, Role, Strategy, Unplug
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.settings import UpdateOptions
from tests.live.verbs_support import one_build
from tests.support.live import Vm, attach_bare, best_accel, booted, builds, qmp
from tests.support.verbs import run_verb, started_verb

pytestmark = pytest.mark.qemu

MIB = 1 << 20
VIRTIO_MEM = (
    *("-m", "slots=4,maxmem=4G", "-device", "virtio-rng-pci,id=d0"),
    *("-object", "memory-backend-ram,id=vm0-ram,size=256M"),
    *("-device", "virtio-mem-pci,id=vm0,memdev=vm0-ram,requested-size=0"),
)
PVPANIC = ("-device", "pvpanic,ioport=1285", "-action", "panic=pause")
PANICKED = 1
PLUG = Plug(parse_addition(Role.DEVICE, "virtio-rng-pci,id=x"))
SHORT = UpdateOptions(wait_s=0.1)


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These guests give no sign."""
    monkeypatch.setattr("qmp_memlistener.updates.guest_response.QUIET_S", 0.05)
    monkeypatch.setattr("qmp_memlistener.updates.guest_response.FIRST_SIGN_S", 0.1)


@asynccontextmanager
async def attached(
    build: QemuBuild, *args: str, machine: str = "pc"
) -> AsyncIterator[tuple[Vm, Agent, Monitor]]:
    """A guest, an agent with a monitor for its guard, and a monitor of the test's own."""
    async with (
        booted(build, best_accel(build), machine, *args) as vm,
        attach_bare(vm.target, guarded=True) as agent,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        yield vm, agent, monitor


async def status(monitor: Monitor) -> str:
    answer = await monitor.execute("query-status")
    assert isinstance(answer, dict)
    return str(answer["status"])


async def reached(monitor: Monitor, wanted: str) -> None:
    async with asyncio.timeout(20):
        while await status(monitor) != wanted:  # noqa: ASYNC110 - not every state has an event
            await asyncio.sleep(0.02)


async def things(monitor: Monitor) -> object:
    """Objects, devices, and how large virtio-mem is meant to be."""
    return (
        await monitor.execute("qom-list", {"path": "/objects"}),
        await monitor.execute("qom-list", {"path": "/machine/peripheral"}),
        await monitor.execute("query-memory-devices"),
    )


def check_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.outcome == "refused", outcome
    for word in words:
        assert word in str(outcome.reason)
    assert outcome.remedy
    assert (outcome.phases, outcome.slot_ops, outcome.transitions) == ([], [], 0)
    assert outcome.guest_state.before == outcome.guest_state.after


# -- states --------------------------------------------------------------------------------------


async def migrating(_: Vm, monitor: Monitor) -> None:
    """To one who never reads, until this QEMU ends: it is never over."""
    await monitor.execute("migrate", {"uri": "exec:exec tail --pid=$PPID -f /dev/null"})


async def migrated(_: Vm, monitor: Monitor) -> None:
    await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
    await reached(monitor, "postmigrate")


async def panicked(vm: Vm, monitor: Monitor) -> None:
    """What a guest's pvpanic driver does (docs/specs/pvpanic in QEMU)."""
    told = asyncio.create_task(vm.pulse.port_out(0x505, PANICKED, 1))
    await reached(monitor, "guest-panicked")
    told.cancel()
    await asyncio.gather(told, return_exceptions=True)


State = Callable[[Vm, Monitor], Coroutine[None, None, None]]
STATES: dict[str, tuple[State, tuple[str, ...], str]] = {
    "a migration is under way": (migrating, (), "running"),
    "migrated away": (migrated, (), "postmigrate"),
    "panicked": (panicked, PVPANIC, "guest-panicked"),
}


@builds()
@pytest.mark.parametrize("words", STATES)
@pytest.mark.asyncio
async def test_a_guest_in_no_state_for_it(build: QemuBuild, words: str) -> None:
    come, args, state = STATES[words]
    async with attached(build, *VIRTIO_MEM, *args) as (vm, agent, monitor):
        await come(vm, monitor)
        before = await things(monitor)
        for intent in (PLUG, Unplug("d0"), Resize("+", 128 * MIB)):
            for strategy in Strategy:
                outcome = await agent.update(intent, strategy, SHORT)
                check_refused(outcome, words, "nothing was touched")
                assert outcome.guest_state.after == state
        assert await things(monitor) == before
        assert await status(monitor) == state


@builds()
@pytest.mark.asyncio
async def test_somebody_who_stops_the_guest_while_we_wait_has_it_stopped(build: QemuBuild) -> None:
    """The update is over when the guest is asked; we end none but our own pause."""
    async with attached(build, *VIRTIO_MEM) as (_, agent, monitor):
        waiting = asyncio.create_task(
            agent.resize("+64M", strategy="hole", options=UpdateOptions(wait_s=1.0))
        )
        async with asyncio.timeout(20):
            while "'requested-size': 67108864" not in repr(await things(monitor)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await monitor.execute("stop")
        outcome = await waiting
        assert outcome.outcome == "partial"
        assert "vm0 has 0 of 64 MiB" in str(outcome.reason)
        assert (outcome.guest_state.before, outcome.guest_state.after) == ("running", "paused")
        assert await status(monitor) == "paused"


# -- windows -------------------------------------------------------------------------------------


@builds()
@pytest.mark.asyncio
async def test_a_window_that_is_too_small_for_a_hole(build: QemuBuild) -> None:
    """No firmware has opened the port's windows."""
    port = ("-device", "pcie-root-port,id=rp0,chassis=1")
    hole = Plug(
        parse_addition(Role.DEVICE, "ivshmem-plain,id=z,memdev=m0"),
        (parse_addition(Role.OBJECT, "memory-backend-ram,id=m0,size=64M,share=on"),),
    )
    async with attached(build, *port, machine="q35") as (_, agent, monitor):
        before = await things(monitor)
        outcome = await agent.update(hole, "hole", SHORT)
        check_refused(outcome, "windows of rp0", "64 MiB")
        assert "pref64-reserve=64M" in str(outcome.remedy)
        assert await things(monitor) == before
        assert (await agent.update(PLUG, "hole", SHORT)).outcome == "refused"
        assert (await agent.update(PLUG, "pause", SHORT)).outcome == "done"
        assert await status(monitor) == "running"


@builds()
@pytest.mark.asyncio
async def test_a_port_that_is_taken_is_none_for_another(build: QemuBuild) -> None:
    """No firmware has given the ports bus numbers, so query-pci shows nothing behind them."""
    ports = [("-device", f"pcie-root-port,id=rp{n},chassis={n + 1}") for n in range(2)]
    async with attached(build, *ports[0], *ports[1], machine="q35") as (_, agent, monitor):
        for name in ("e0", "e1"):
            outcome = await agent.hotplug("virtio-rng-pci", id=name, options=SHORT)
            assert outcome.outcome == "done"
        buses = {
            await monitor.execute(
                "qom-get", {"path": f"/machine/peripheral/{name}", "property": "parent_bus"}
            )
            for name in ("e0", "e1")
        }
        assert buses == {f"/machine/peripheral/rp{n}/rp{n}" for n in range(2)}
        third = await agent.hotplug("virtio-rng-pci", id="e2", options=SHORT)
        check_refused(third, "no free PCIe root port", "nothing was touched")


# -- the guard's monitor -------------------------------------------------------------------------


@one_build
@pytest.mark.asyncio
async def test_a_monitor_that_is_none_for_a_guard(build: QemuBuild, tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    async with (
        attached(build, *VIRTIO_MEM) as (vm, agent, monitor),
        booted(build, best_accel(build)) as other,
    ):
        before = await things(monitor)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(deaf))
            server.listen()
            for name, code, words in (
                (f"unix:{vm.guest.monitors[2]}", 1, "no free monitor"),  # ours
                (f"unix:{other.guest.monitors[0]}", 3, f"pid {other.guest.pid}"),
                (f"pid:{other.guest.pid}", 3, f"pid {other.guest.pid}"),
                (f"unix:{tmp_path}/gone", 3, "gone"),
                (f"unix:{deaf}", 1, "no free monitor"),
            ):
                ran = await run_verb(
                    *("resize", f"unix:{vm.guest.monitors[1]}", "+128M", "--strategy", "pause"),
                    *("--guard-monitor", name, "--no-trace", "--probes", "none"),
                )
                assert ran.code == code, (name, ran)
                assert words in ran.out + ran.err
                assert "remedy: " in ran.out + ran.err
                assert code != 1 or ran.out.startswith("refused: "), ran.out
                assert "Traceback" not in ran.err
        assert await things(monitor) == before
        assert await status(monitor) == "running"
        assert await status(agent.monitor) == "running"


# -- freezes -------------------------------------------------------------------------------------


@one_build
@pytest.mark.asyncio
async def test_every_verb_leaves_a_frozen_guest_alone(build: QemuBuild, tmp_path: Path) -> None:
    """Over any of its monitors, and nothing is written."""
    file = tmp_path / "recording"
    async with (
        booted(build, best_accel(build), "pc", *VIRTIO_MEM) as vm,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        async with started_verb("watch", vm.target, "--freeze", "--probes", "none") as watch:
            await watch.ready()
            before = await things(monitor)
            target = f"unix:{vm.guest.monitors[1]}"
            verbs = [
                ("hotplug", target, "--device", "virtio-rng-pci,id=x", "-o", file),
                ("unplug", f"pid:{vm.guest.pid}", "d0", "--backends"),
                ("resize", target, "-128M", "--strategy", "hole"),
                ("resize", target, "+128M", "--strategy", "pause", "--json"),
            ]
            for ran in await asyncio.gather(*(run_verb(*verb) for verb in verbs)):
                ran.check_error(1, "frozen", str(watch.process.pid), "remedy: ")
                assert ran.out == ""
        assert await things(monitor) == before
        assert not file.exists()
