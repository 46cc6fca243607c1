"""Guests of libvirt's: watched through it, and as they were afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from qmp_memlistener import attach
from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, Pulse
from tests.support.libvirt import Libvirtd, domain_xml, libvirtd, needs_libvirt
from tests.support.live import Seen, why_no_kvm

pytestmark = [pytest.mark.qemu, needs_libvirt, pytest.mark.asyncio]

NAME = "pulse one"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Libvirtd]:
    with libvirtd() as daemon:
        accel = "qemu" if why_no_kvm("/usr/bin/qemu-system-x86_64") else "kvm"
        daemon.create(domain_xml(NAME, accel=accel))
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
