"""Guests of libvirt's are changed by libvirt: what it shows afterwards is what QEMU has."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from qmp_memlistener import attach
from qmp_memlistener.agent import Agent
from qmp_memlistener.errors import CommandFailed
from qmp_memlistener.guests import Pulse
from qmp_memlistener.qmp import Command, Reply
from qmp_memlistener.updates.model import Outcome, Result, Role
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.settings import UpdateOptions
from tests.support.host import patience
from tests.support.libvirt import ACCEL, Libvirtd, domain_xml, libvirtd, needs_libvirt
from tests.support.verbs import run_verb

pytestmark = [pytest.mark.qemu, needs_libvirt, pytest.mark.asyncio]

NAME = "updated"
MIB = 1 << 20
QUICK = UpdateOptions(wait_s=0.5)  # nobody in this guest reacts by itself
PCI_EJECT, PCI_SELECT = 0xAE08, 0xAE10  # docs/specs/acpi_pci_hotplug.rst
DIMM_SELECT, DIMM_CONTROL, DIMM_EJECT = 0xA00, 0xA14, 0x8  # docs/specs/acpi_mem_hotplug.rst


@pytest.fixture(scope="module")
def daemon() -> Iterator[Libvirtd]:
    with libvirtd() as daemon:
        daemon.create(domain_xml(NAME, accel=ACCEL))
        yield daemon


@asynccontextmanager
async def attached(daemon: Libvirtd) -> AsyncIterator[tuple[Agent, Pulse]]:
    async with attach(daemon.target(NAME), probes=()) as agent:
        with Pulse(daemon.ram(NAME)) as pulse:
            await pulse.wait_ready()
            yield agent, pulse


async def devices(daemon: Libvirtd, kind: str) -> dict[str, ET.Element]:
    """Of one kind, as libvirt shows them, by alias."""
    xml = await asyncio.to_thread(daemon.virsh, "dumpxml", NAME)
    found = {}
    for device in ET.fromstring(xml).iterfind(f"./devices/{kind}"):
        alias = device.find("alias")
        assert alias is not None
        found[alias.attrib["name"]] = device
    return found


async def ids(daemon: Libvirtd, driver: str) -> list[str]:
    """Of the DIMMs or PCI devices that QEMU has."""
    command = json.dumps({"execute": "qom-list", "arguments": {"path": "/machine/peripheral"}})
    text = await asyncio.to_thread(daemon.virsh, "qemu-monitor-command", NAME, command)
    return [p["name"] for p in json.loads(text)["return"] if p["type"] == f"child<{driver}>"]


async def unplugged(
    agent: Agent, name: str, eject: Callable[[], Awaitable[object]], patch: pytest.MonkeyPatch
) -> Outcome:
    """Unplug; the guest ejects it when libvirt has asked for it."""
    pipeline = agent.monitor.pipeline

    async def then_eject(
        commands: Sequence[Command], *, deadline: float = 10.0
    ) -> list[Reply | CommandFailed]:
        replies = await pipeline(commands, deadline=deadline)
        if any(c.name == "detach-device" for c in commands):
            await eject()
        return replies

    with patch.context() as patched:
        patched.setattr(agent.monitor, "pipeline", then_eject)
        return await agent.unplug(name, options=UpdateOptions(wait_s=patience(5)))


async def test_a_device_comes_and_goes_by_libvirt(
    daemon: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = (
        f"memory-backend-file,id=m0,size=1M,share=on,mem-path=/dev/shm/{daemon.directory.name}"
    )
    async with attached(daemon) as (agent, pulse):
        plugged = await agent.hotplug(
            "ivshmem-plain",
            id="iv0",
            memdev="m0",
            backends=[parse_addition(Role.OBJECT, backend)],
            options=QUICK,
            properties={"addr": "0x5"},
        )
        assert plugged.outcome is Result.DONE, plugged.reason
        assert any("ua-iv0" in note for note in plugged.notes)
        (shmem,) = (await devices(daemon, "shmem")).items()
        assert shmem[0] == "ua-iv0"
        address = shmem[1].find("address")
        assert address is not None
        assert address.attrib["slot"] == "0x05"
        assert [(p.id, p.pci) for p in plugged.placed] == [("ua-iv0", "00:05.0")]

        async def eject() -> None:
            await pulse.port_out(PCI_SELECT, 0, 4)
            await pulse.port_out(PCI_EJECT, 1 << 5, 4)

        gone = await unplugged(agent, "ua-iv0", eject, monkeypatch)
        assert gone.outcome is Result.DONE, gone.reason
        assert await devices(daemon, "shmem") == {}
        assert await ids(daemon, "ivshmem-plain") == []


@pytest.mark.full
async def test_memory_grows_and_shrinks_by_libvirt(
    daemon: Libvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with attached(daemon) as (agent, pulse):
        for number in (1, 2):
            grown = await agent.resize("+128M", options=QUICK)
            assert grown.outcome is Result.PARTIAL  # nobody in the guest takes it
            assert sum(t.size for t in grown.slot_ops if t.op == "add") == 128 * MIB
            shown = await devices(daemon, "memory")
            assert len(shown) == number
            assert sorted(shown) == sorted(await ids(daemon, "pc-dimm"))
        (last,) = (p.id for p in grown.placed)

        async def eject() -> None:
            await pulse.port_out(DIMM_SELECT, 1, 4)
            await pulse.port_out(DIMM_CONTROL, DIMM_EJECT, 1)

        gone = await unplugged(agent, last, eject, monkeypatch)
        assert gone.outcome is Result.DONE, gone.reason
        assert list(await devices(daemon, "memory")) == await ids(daemon, "pc-dimm")
        assert last not in await devices(daemon, "memory")


async def test_what_libvirt_would_not_know_of_is_not_done(daemon: Libvirtd) -> None:
    target = daemon.target(NAME)
    odd = await run_verb("hotplug", target, "--device", "nvme,id=x,serial=1")
    assert odd.code == 1
    assert "does not plug a nvme" in odd.out + odd.err
    assert await ids(daemon, "nvme") == []
    before = await devices(daemon, "memory")
    compared = await run_verb("compare", target, "+128M", "--repeat", "1")
    assert compared.code == 1
    assert "nothing was touched" in compared.err
    assert (await devices(daemon, "memory")).keys() == before.keys()


async def test_a_pause_is_libvirts_and_ends(daemon: Libvirtd) -> None:
    async with attached(daemon) as (agent, _):
        events: list[str] = []
        agent.monitor.subscribe(lambda event: events.append(event.name))
        plugged = await agent.hotplug(
            "virtio-rng-pci",
            id="ua-rng",
            rng="r",
            strategy="pause",
            backends=[parse_addition(Role.OBJECT, "rng-random,id=r,filename=/dev/urandom")],
            options=replace(QUICK, max_pause_s=patience(5)),
        )
        assert plugged.outcome is Result.DONE, plugged.reason
        assert plugged.guest_state.after == "running"
        assert [e for e in events if e in ("STOP", "RESUME")] == ["STOP", "RESUME"]
    assert "ua-rng" in await devices(daemon, "rng")
    assert await asyncio.to_thread(daemon.virsh, "domstate", NAME) == "running"


async def runs(daemon: Libvirtd) -> None:
    """Until the guest runs again, as libvirt sees it."""
    async with asyncio.timeout(patience(30)):
        while await asyncio.to_thread(daemon.virsh, "domstate", NAME) != "running":  # noqa: ASYNC110
            await asyncio.sleep(0.1)


HOLDS = """
import asyncio, sys
from qmp_memlistener.qmp import Monitor, parse_target
from qmp_memlistener.updates.pause import paused_guest
from qmp_memlistener.updates.pause.guard import ResumeGuard

async def main():
    async with await Monitor.connect(parse_target(sys.argv[1])) as monitor:
        async with await ResumeGuard.start(
            [monitor.target], monitor.identity, max_pause_s=60
        ) as guard, paused_guest(monitor, guard, deadline=10):
            print("paused", flush=True)
            await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.full
async def test_a_guest_whose_agent_is_killed_in_a_pause_is_resumed(daemon: Libvirtd) -> None:
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDS, daemon.target(NAME)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert agent.stdout is not None
    try:
        async with asyncio.timeout(patience(30)):
            assert await agent.stdout.readline() == b"paused\n"
        assert await asyncio.to_thread(daemon.virsh, "domstate", NAME) == "paused"
    finally:
        agent.kill()
        await agent.wait()
    await runs(daemon)


@pytest.mark.full
async def test_libvirtd_is_restarted_in_a_pause(daemon: Libvirtd) -> None:
    """The guard's connection is made anew."""
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDS, daemon.target(NAME)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert agent.stdout is not None
    try:
        async with asyncio.timeout(patience(30)):
            assert await agent.stdout.readline() == b"paused\n"
        await daemon.restart()
    finally:
        agent.kill()
        await agent.wait()
    await runs(daemon)
