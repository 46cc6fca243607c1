"""Guests of libvirt's: watched through it, and as they were afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from qmp_memlistener import attach
from qmp_memlistener.errors import DeadlineExceeded, TargetLost, TargetUnreachable
from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, Pulse
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp import Manager, Monitor, find_guest, parse_target
from tests.support.host import patience
from tests.support.libvirt import ACCEL, REAPING, Libvirtd, domain_xml, libvirtd, needs_libvirt
from tests.support.live import Seen
from tests.support.verbs import started_verb

pytestmark = [pytest.mark.qemu, needs_libvirt, pytest.mark.asyncio]

NAME = "pulse one"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Libvirtd]:
    with libvirtd() as daemon:
        daemon.create(domain_xml(NAME, accel=ACCEL))
        yield daemon


def agrees(daemon: Libvirtd) -> None:
    """What virsh says of a domain that was not changed."""
    assert daemon.virsh("domstate", NAME) == "running"
    status = json.loads(daemon.virsh("qemu-monitor-command", NAME, '{"execute":"query-status"}'))
    assert status["return"]["status"] == "running"


async def test_every_transition_that_the_guest_makes_is_seen(daemon: Libvirtd) -> None:
    seen = Seen()
    xml = daemon.virsh("dumpxml", NAME)
    async with attach(daemon.target(NAME), probes=(), on_record=seen) as agent:
        assert agent.source == "trace", agent.remarks
        assert any("tainted" in remark for remark in agent.remarks)
        assert agent.header.pid == daemon.qemu_pid(NAME)
        with Pulse(daemon.ram(NAME)) as pulse:
            await pulse.wait_ready()
            toggle = await pulse.toggle(
                HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 200, period=0, unit="ticks"
            )
            assert await toggle.wait() == 200
        await asyncio.to_thread(agrees, daemon)
        await agent.settle()
        assert sum(t.merged for t in seen.transitions) == 200
    assert agent.unrestored == []
    agrees(daemon)
    assert daemon.virsh("dumpxml", NAME) == xml


def traced(daemon: Libvirtd) -> bool:
    """The event that tracing switches on is on, as virsh sees it."""
    command = '{"execute":"trace-event-get-state","arguments":{"name":"kvm_set_user_memory"}}'
    answer = json.loads(daemon.virsh("qemu-monitor-command", NAME, command))
    return [event["state"] for event in answer["return"]] == ["enabled"]


async def test_the_domain_is_found_by_its_process_and_its_name(daemon: Libvirtd) -> None:
    found = await asyncio.to_thread(find_guest, daemon.qemu_pid(NAME))
    assert found is not None
    assert [(o.manager, o.name, o.uri) for o in found.owners] == [
        (Manager.LIBVIRT, NAME, "qemu:///system")
    ]
    async with await Monitor.connect(parse_target(daemon.target(NAME))) as monitor:
        assert monitor.identity.pid == found.pid
        assert monitor.abilities.asks
        assert monitor.abilities.descriptors
        assert not monitor.abilities.direct
    by_uuid = daemon.target(daemon.virsh("domuuid", NAME))
    async with await Monitor.connect(parse_target(by_uuid)) as monitor:
        assert monitor.identity.pid == found.pid


async def test_a_domain_that_is_not_there(daemon: Libvirtd) -> None:
    with pytest.raises(TargetUnreachable, match="no domain"):
        await Monitor.connect(parse_target(daemon.target("nobody")))


async def test_what_a_killed_agent_left_is_put_back_by_the_next(daemon: Libvirtd) -> None:
    async with started_verb("watch", daemon.target(NAME), "--probes", "trace") as killed:
        await killed.ready()
        assert await asyncio.to_thread(traced, daemon)
        await killed.signalled(signal.SIGKILL)
    assert await asyncio.to_thread(traced, daemon)
    await asyncio.to_thread(agrees, daemon)
    async with attach(daemon.target(NAME), probes=()) as agent:
        assert agent.source == "trace"
    assert not await asyncio.to_thread(traced, daemon)


@pytest.mark.full
async def test_libvirtd_is_restarted_meanwhile(daemon: Libvirtd) -> None:
    async with started_verb("watch", daemon.target(NAME), "--probes", "trace") as watch:
        await watch.ready()
        await daemon.restart()
        ran = await watch.end(30)
    assert ran.code == 3
    assert "the connection to libvirt broke" in ran.err
    await asyncio.to_thread(agrees, daemon)
    async with attach(daemon.target(NAME), probes=()) as agent:
        assert agent.source == "trace"
    assert not await asyncio.to_thread(traced, daemon)


@pytest.mark.full
async def test_a_libvirtd_that_hangs_holds_nobody_up(daemon: Libvirtd) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.05)
            ticks += 1

    stopped = daemon.pid()
    ticking = asyncio.create_task(tick())
    try:
        async with attach(daemon.target(NAME), probes=()) as agent:
            os.kill(stopped, signal.SIGSTOP)
            with pytest.raises(DeadlineExceeded, match="query-status"):
                await agent.monitor.execute("query-status", deadline=0.5)
            async with asyncio.timeout(patience(20)):
                lost = await agent.wait_lost()
            began = asyncio.get_running_loop().time()
        assert isinstance(lost, TargetLost)
        assert asyncio.get_running_loop().time() - began < patience(7)
        assert ticks > 20
        assert agent.unrestored  # and told
    finally:
        ticking.cancel()
        os.kill(stopped, signal.SIGCONT)
    await asyncio.to_thread(agrees, daemon)
    async with attach(daemon.target(NAME), probes=()) as agent:
        assert agent.unrestored == []
    assert not await asyncio.to_thread(traced, daemon)


@pytest.mark.full
async def test_the_log_is_handed_over_where_libvirt_has_it_in_a_pipe() -> None:
    with libvirtd(log_daemon=True) as daemon:
        daemon.create(domain_xml(NAME, accel=ACCEL))
        pid = daemon.qemu_pid(NAME)
        async with attach(daemon.target(NAME), probes=()) as agent:
            assert agent.source == "trace", agent.remarks
            assert len(our_logs(pid)) == 1
            await asyncio.to_thread(agrees, daemon)
        assert agent.unrestored == []
        async with asyncio.timeout(patience(10)):
            while our_logs(pid):  # noqa: ASYNC110 (QEMU closes it when RCU has come round)
                await asyncio.sleep(0.02)


def our_logs(pid: int) -> list[str]:
    """What QEMU has open of ours."""
    process = Process.read(pid)
    assert process is not None
    return [f.link for f in process.file_descriptors() or () if "qmp-memlistener" in f.link]


@pytest.mark.full
async def test_a_domain_of_the_driver_in_our_own_process(daemon: Libvirtd) -> None:
    """After `daemon`, which has found out what QEMU can do."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, str(REAPING), sys.executable, "-m", "tests.support.embedded_domain"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await child.communicate()
    assert child.returncode == 0, err.decode()
    found = json.loads(out)
    assert found["source"] == "trace"
    assert found["written"] == found["seen"] == 20
    assert found["pid"] == found["qemu"]
    assert found["running"]
    assert daemon.virsh("domstate", NAME) == "running"
