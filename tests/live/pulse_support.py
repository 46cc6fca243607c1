"""A booted pulse guest with one monitor connected.  Maps are read with `info mtree -o`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from qemu.qmp import QMPClient

from qmp_memlistener.guests import (
    I440FX,
    Q35,
    GuestSpec,
    High,
    LaunchedGuest,
    Pulse,
    QemuBuild,
    boot_args,
    launch,
)
from qmp_memlistener.topology import FlatRange, FlatView, Kind, read_map
from tests.support.live import why_no_kvm

__all__ = ["BRIDGES", "EVERYTHING", "MEMORY", "Vm", "accels", "kind", "machines", "running"]

MEMORY = 512 << 20  # room for a 256 MiB MMCONFIG window over RAM
EVERYTHING = High.CODE | High.DATA | High.TABLES
BRIDGES = {"pc": I440FX, "q35": Q35}
accels = pytest.mark.parametrize("accel", [pytest.param("kvm", marks=pytest.mark.kvm), "tcg"])
machines = pytest.mark.parametrize("machine", ["pc", "q35"])


class Vm:
    """A booted pulse guest with one monitor connected."""

    def __init__(self, guest: LaunchedGuest, pulse: Pulse, qmp: QMPClient) -> None:
        self.guest = guest
        self.pulse = pulse
        self.qmp = qmp

    async def execute(self, command: str, **arguments: object) -> object:
        async with asyncio.timeout(10):
            return await self.qmp.execute(command, arguments)

    async def view(self) -> FlatView:
        text = await self.execute("human-monitor-command", **{"command-line": "info mtree -o"})
        assert isinstance(text, str)
        return read_map(text).view

    async def at(self, address: int) -> FlatRange | None:
        return (await self.view()).lookup(address)

    async def status(self) -> object:
        answer = await self.execute("query-status")
        assert isinstance(answer, dict)
        return answer["status"]


@asynccontextmanager
async def running(
    build: QemuBuild,
    machine: str,
    accel: str,
    *args: str,
    smp: int = 1,
    disk: bool = False,
    qtest: bool = False,
) -> AsyncIterator[Vm]:
    if accel == "kvm" and (reason := why_no_kvm(build.binary)):
        pytest.skip(f"KVM is not usable: {reason}")
    spec = GuestSpec(
        machine=machine,
        accel=accel,
        memory=MEMORY,
        smp=smp,
        args=(*boot_args("disk" if disk else "rom"), *args),
        qtest=qtest,
    )
    async with launch(spec.on(build)) as guest:
        assert guest.ram is not None
        qmp = QMPClient("test")
        async with asyncio.timeout(10):
            await qmp.connect(str(guest.monitors[0]))
        try:
            with Pulse(guest.ram) as pulse:
                header = await pulse.wait_ready()
                assert header.booted_by == ("disk" if disk else "rom")
                assert header.live_cpus == smp
                yield Vm(guest, pulse, qmp)
        finally:
            async with asyncio.timeout(10):
                await qmp.disconnect()


def kind(found: FlatRange | None) -> Kind | None:
    return None if found is None else found.kind
