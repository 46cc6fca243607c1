"""What happens to a guest anyway, while a strategy is applied inside its QEMU.

CPU 1 and those after it have their code in the slot that CPU 0's toggles of PAM delete; what they
and CPU 0 read has to be right at each step.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    Q35,
    GuestSpec,
    High,
    HostBridge,
    LaunchedGuest,
    PciAddress,
    Pulse,
    boot_args,
    launch,
)
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.steer import Mode, State
from tests.support.any_monitor import AnyMonitor
from tests.support.host import patience
from tests.support.live import qmp, skip_without_kvm
from tests.support.steer import NEEDS, STEERED, boots, state, steer
from tools.soak_migration import migrated_pair

pytestmark = [*NEEDS, pytest.mark.asyncio]
STRATEGIES = pytest.mark.parametrize(
    "strategy", ["hole", pytest.param("hole --strict", marks=pytest.mark.full)]
)
MIB = 1 << 20
TOGGLES = 40
PATTERN = 0x5AC3_96E1


@dataclass(slots=True)
class Steered:
    """A pulse guest under a strategy, and a monitor for the test."""

    guest: LaunchedGuest
    pulse: Pulse
    bridge: HostBridge
    monitor: Monitor

    @property
    def state(self) -> State:
        return state(self.guest)

    @property
    def boots(self) -> int:
        return boots(self.pulse)

    async def toggles(self, count: int = TOGGLES) -> None:
        """Toggle PAM; every CPU goes on, and each transition went through the interposer."""
        before, boots = self.state, self.boots
        toggle = await self.pulse.toggle(
            HOST_BRIDGE, self.bridge.pam, (PAM_RAM << 4, 0), count, period=20
        )
        assert await toggle.wait(patience(30)) == count
        await self.lives(boots)
        now = self.state
        # the first changes nothing when PAM was open already
        assert now.transactions - before.transactions >= count - 1
        assert now.gave_up == before.gave_up == 0
        assert now.mode is not Mode.OBSERVE

    async def lives(self, boots: int) -> None:
        header = self.pulse.header()
        assert header is not None
        for cpu in range(header.live_cpus):
            await self.pulse.wait_beats(2, cpu, patience(5))
        assert await self.status() == "running"
        assert self.boots == boots

    async def restarted(self, boots: int) -> None:
        await self.monitor.execute("system_reset")
        await self.pulse.wait_for(lambda: self.boots > boots, patience(20), lambda: "a reset")
        await self.pulse.wait_ready()

    async def status(self) -> str:
        value = await self.monitor.execute("query-status")
        assert isinstance(value, dict)
        return str(value["status"])

    async def until(self, wanted: str) -> None:
        """Until the guest is in this state; its events are not listened to here."""
        async with asyncio.timeout(patience(20)):
            while await self.status() != wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def off(self) -> None:
        """QEMU's own slots again, and the guest goes on."""
        ran = await steer(self.guest, "off")
        assert ran.code == 0, ran.err
        now = self.state
        assert (now.mode, now.hooked, now.slots) == (Mode.OFF, False, now.pieces)
        await self.lives(self.boots)


@asynccontextmanager
async def steered(
    strategy: str,
    machine: str = "pc",
    args: Sequence[str] = (),
    *,
    memory: int = 256 * MIB,
    smp: int = 2,
) -> AsyncIterator[Steered]:
    skip_without_kvm(STEERED[-1], "kvm")
    spec = GuestSpec(
        machine=machine, accel="kvm", memory=memory, smp=smp, args=(*boot_args(), *args)
    )
    async with launch(spec.on(STEERED[-1])) as guest:
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready()
            for cpu in range(1, smp):
                await pulse.place(cpu, High.CODE)
            ran = await steer(guest, *strategy.split())
            assert ran.code == 0, ran.err
            async with qmp(guest.monitors[1]) as monitor:
                yield Steered(guest, pulse, Q35 if machine == "q35" else I440FX, monitor)


@STRATEGIES
async def test_smram_over_vga_shows_the_right_one_of_two(strategy: str) -> None:
    """The slot of RAM from 0 on, where CPU 0 has its own code."""
    async with steered(strategy, args=("-device", "VGA")) as it:
        pulse, smram = it.pulse, it.bridge.smram
        boots = it.boots
        for turn in range(75):
            await pulse.write_config(HOST_BRIDGE, smram, 0x4A, 1)
            if turn == 0:
                await pulse.poke(0xA0000, PATTERN, 4)
            assert await pulse.peek(0xA0000, 4) == PATTERN
            await pulse.write_config(HOST_BRIDGE, smram, 0x0A, 1)
            assert await pulse.peek(0xA0000, 4) != PATTERN
        await it.lives(boots)
        assert it.state.transactions >= 150
        await it.toggles()
        await it.off()


@STRATEGIES
async def test_tseg_and_mmconfig_hide_the_ram_behind_them(strategy: str) -> None:
    memory = 512 * MIB
    async with steered(strategy, "q35", memory=memory) as it:
        pulse, bridge = it.pulse, it.bridge
        assert bridge.esmramc is not None
        assert bridge.pciexbar is not None
        boots = it.boots
        tseg, window = memory - 0x1000, 256 * MIB
        await pulse.write_config(HOST_BRIDGE, bridge.smram, 0x0A, 1)  # no TSEG without G_SMRAME
        for address in (tseg, window):
            await pulse.poke(address, PATTERN, 4)
        for _ in range(10):
            await pulse.write_config(HOST_BRIDGE, bridge.esmramc, 0x01, 1)
            assert await pulse.peek(tseg, 4) != PATTERN
            await pulse.write_config(HOST_BRIDGE, bridge.esmramc, 0x00, 1)
            assert await pulse.peek(tseg, 4) == PATTERN
            await pulse.write_config(HOST_BRIDGE, bridge.pciexbar, window | 1, 8)
            # what MMCONFIG shows there: vendor and device of the host bridge
            assert await pulse.peek(window, 4) == await pulse.read_config(HOST_BRIDGE, 0, 4)
            await pulse.write_config(HOST_BRIDGE, bridge.pciexbar, 0, 8)
            assert await pulse.peek(window, 4) == PATTERN
        await it.lives(boots)
        await it.toggles()
        await it.off()


@STRATEGIES
async def test_a_reset_and_what_comes_after_it(strategy: str) -> None:
    async with steered(strategy) as it:
        for _ in range(3):
            await it.toggles(9)  # PAM is left open
            await it.restarted(it.boots)
            await it.pulse.place(1, High.CODE)
        await it.toggles()
        await it.off()


@STRATEGIES
@pytest.mark.full
async def test_four_cpus(strategy: str) -> None:
    async with steered(strategy, smp=4) as it:
        await it.toggles()
        await it.off()


@STRATEGIES
async def test_a_cpu_that_is_plugged_is_kept_out_as_well(strategy: str) -> None:
    async with steered(strategy, args=("-smp", "2,maxcpus=4")) as it:
        vcpus = it.state.vcpus
        for core in (2, 3):
            topology: dict[str, object] = {"socket-id": 0, "core-id": core, "thread-id": 0}
            topology |= {"driver": "qemu64-x86_64-cpu", "id": f"cpu{core}"}
            await it.monitor.execute("device_add", topology)
            await it.toggles(10)
        assert it.state.vcpus == vcpus + 2
        await it.toggles()
        await it.off()


@STRATEGIES
async def test_devices_come_and_go(strategy: str) -> None:
    """As ACPI has a guest eject them: docs/specs/acpi_mem_hotplug.rst and acpi_pci_hotplug.rst."""
    async with steered(strategy, args=("-m", "slots=4,maxmem=2G")) as it:
        execute, pulse = it.monitor.execute, it.pulse
        for turn in range(3):
            ram = {"qom-type": "memory-backend-ram", "id": f"m{turn}", "size": 16 * MIB}
            await execute("object-add", ram)
            await execute("device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": f"m{turn}"})
            nic = {"driver": "virtio-net-pci", "id": "nic", "addr": "5"}
            await execute("device_add", nic)
            await it.toggles(10)
            boots = it.boots
            for bar in (1, 4):
                await pulse.map_bar(PciAddress(0, 5), bar, 0xE000_0000 + bar * MIB)
            await it.lives(boots)
            await it.toggles(10)
            await pulse.port_out(0xAE10, 0, 4)
            await pulse.port_out(0xAE08, 1 << 5, 4)
            await pulse.port_out(0xA00, 0, 4)
            await pulse.port_out(0xA14, 0x8, 1)
            await it.toggles(10)
            async with asyncio.timeout(patience(20)):
                while {"dimm", "nic"} & await devices(it.monitor):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        await it.off()


async def devices(monitor: Monitor) -> set[str]:
    found = await monitor.execute("qom-list", {"path": "/machine/peripheral"})
    assert isinstance(found, list)
    return {str(child["name"]) for child in found}


@STRATEGIES
@pytest.mark.full
async def test_a_snapshot_is_saved_and_loaded(strategy: str, tmp_path: Path) -> None:
    async with steered(strategy) as it:
        job = _Jobs(it.monitor)
        disk = str(tmp_path / "disk.qcow2")
        await job.run("blockdev-create", options={"driver": "file", "filename": disk, "size": 0})
        file = {"driver": "file", "filename": disk, "node-name": "file"}
        await it.monitor.execute("blockdev-add", file)
        qcow2 = {"driver": "qcow2", "file": "file"}
        await job.run("blockdev-create", options={**qcow2, "size": 64 * MIB})
        await it.monitor.execute("blockdev-add", {**qcow2, "node-name": "disk"})
        where = {"tag": "one", "vmstate": "disk", "devices": ["disk"]}
        await it.pulse.poke(64 * MIB, PATTERN, 4)
        await it.toggles(9)
        await job.run("snapshot-save", **where)
        boots = it.boots
        await it.pulse.poke(64 * MIB, 1, 4)
        await it.toggles(10)
        await it.monitor.execute("stop")
        await job.run("snapshot-load", **where)
        await it.monitor.execute("cont")
        assert await it.pulse.peek(64 * MIB, 4) == PATTERN
        assert it.boots == boots
        await it.toggles()
        await it.off()


class _Jobs:
    """Jobs of QEMU, one after the other (qapi/job.json)."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._numbers = itertools.count()

    async def run(self, command: str, **arguments: object) -> None:
        name = f"job{next(self._numbers)}"
        await self._monitor.execute(command, {"job-id": name, **arguments}, deadline=patience(20))
        async with asyncio.timeout(patience(20)):
            while True:
                jobs = await self._monitor.execute("query-jobs")
                assert isinstance(jobs, list)
                (job,) = (each for each in jobs if each["id"] == name)
                if job["status"] == "concluded":
                    break
                await asyncio.sleep(0.02)
        assert "error" not in job, job
        await self._monitor.execute("job-dismiss", {"id": name})


@pytest.mark.parametrize(
    "strategy",
    ["hole", *(pytest.param(s, marks=pytest.mark.full) for s in ("hole --strict", "inhibit"))],
)
async def test_a_migration_out_and_in(strategy: str) -> None:
    skip_without_kvm(STEERED[-1], "kvm")
    async with migrated_pair(STEERED[-1], "kvm") as pair:
        ran = await steer(pair.source, *strategy.split())
        assert ran.code == 0, ran.err
        toggle = await pair.pulse.toggle(
            HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), 1_000_000, period=20
        )
        await pair.pulse.wait_for(lambda: toggle.done > 20, patience(20), lambda: "toggles")
        await pair.at_source.execute("migrate", {"uri": pair.uri})
        async with asyncio.timeout(patience(60)):
            while await _status(pair.at_destination) != "running":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert state(pair.source).gave_up == 0
        ran = await steer(pair.destination, *strategy.split(), monitor=1)
        assert ran.code == 0, ran.err
        assert pair.destination.ram is not None
        with Pulse(pair.destination.ram) as pulse:
            done = pulse.toggles_done()
            await pulse.wait_for(
                lambda: pulse.toggles_done() > done + 20, patience(20), lambda: "toggles"
            )
        now = state(pair.destination)
        assert now.transactions >= 20
        assert now.gave_up == 0


async def _status(monitor: AnyMonitor | Monitor) -> str:
    value = await monitor.execute("query-status")
    assert isinstance(value, dict)
    return str(value["status"])
