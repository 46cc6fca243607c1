"""Where PCI devices can be plugged while a guest runs: what is read of its buses is what QEMU does.

No guest runs in these QEMUs; how a bus is chosen is in tests/unit/updates/test_pci_plans.py.
"""

from __future__ import annotations

import pytest

from qmp_memlistener.errors import CommandFailed
from qmp_memlistener.guests import GuestSpec, QemuBuild, launch
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.qmp.guest_devices import PciBus, read_buses, slot_text
from qmp_memlistener.updates.model import Plug, Role
from qmp_memlistener.updates.options import parse_addition
from tests.support.live import attach_bare, builds, qmp

pytestmark = pytest.mark.qemu

OFF = ("-device", "pcie-root-port,id=off,chassis=1,hotplug=off")
SHARED = ("-device", "pcie-root-port,id=p,chassis=5", "-device", "pcie-pci-bridge,id=b,bus=p")
PORTS = (
    *OFF,
    *("-device", "pcie-root-port,id=full,chassis=2", "-device", "virtio-rng-pci,bus=full"),
    *("-device", "pcie-root-port,id=up,chassis=3", "-device", "x3130-upstream,id=sw,bus=up"),
    *("-device", "xio3130-downstream,id=down,bus=sw,chassis=4"),
    *SHARED,
    *("-device", "i82801b11-bridge,id=old", "-device", "pxb-pcie,id=px,bus_nr=40"),
    *("-device", "pcie-root-port,id=far,bus=px,chassis=6"),
)
BRIDGES = (
    *("-device", "pci-bridge,id=b,chassis_nr=3,shpc=on"),
    *("-device", "pci-bridge,id=c,chassis_nr=4,shpc=off,bus=b,addr=2"),
)
NATIVE = "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"
MACHINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pc": ("pc", BRIDGES),
    "pc, SHPC": ("pc", (*BRIDGES, "-global", f"PIIX4_PM.{NATIVE.partition('.')[2]}")),
    "pc, root off": ("pc", (*BRIDGES, "-global", "PIIX4_PM.acpi-root-pci-hotplug=off")),
    "pc, no ACPI": ("pc,acpi=off", BRIDGES),
    "q35": ("q35", PORTS),
    "q35, native": ("q35", (*PORTS, "-global", NATIVE)),
    "microvm": ("microvm,pcie=on", ("-device", "pcie-root-port,id=p,chassis=1")),
}


async def plugged(monitor: Monitor, bus: PciBus, name: str) -> str | None:
    """QEMU's refusal."""
    addr = slot_text((bus.free or 0, 0))
    device = {"driver": "virtio-rng-pci", "id": name, "bus": bus.name, "addr": addr}
    try:
        await monitor.execute("device_add", device)
    except CommandFailed as error:
        return error.desc
    return None


@builds()
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.asyncio
async def test_what_is_read_is_what_qemu_does(build: QemuBuild, machine: str) -> None:
    kind, args = MACHINES[machine]
    spec = GuestSpec(machine=kind, accel="tcg", shared_memory=False, args=("-S", *args))
    async with launch(spec.on(build)) as guest, qmp(guest.monitors[0]) as monitor:
        before = await read_buses(monitor)
        assert before[0].bridge is None
        taking = []
        for number, bus in enumerate(before):
            if bus.free is not None:
                refusal = await plugged(monitor, bus, f"d{number}")
                assert (refusal is None) is (bus.refusal is None), (bus, refusal)
            if bus.free is not None and bus.refusal is None:
                taking.append(bus.name)
        after = {bus.name: bus for bus in await read_buses(monitor)}
        for bus in before:
            new = after[bus.name].taken.keys() - bus.taken.keys()
            assert new == ({(bus.free, 0)} if bus.name in taking else set())
        assert taking


@builds()
@pytest.mark.asyncio
async def test_the_port_that_takes_a_device_then_the_bridge(
    build: QemuBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One device a port, many behind a bridge, none where hotplug is off; then it is refused."""
    monkeypatch.setattr("qmp_memlistener.updates.guest_response.QUIET_S", 0.0)
    args = (*OFF, *SHARED, "-device", "pcie-root-port,id=free,chassis=9")
    spec = GuestSpec(machine="q35", accel="tcg", shared_memory=False, args=("-S", *args))
    async with (
        launch(spec.on(build)) as guest,
        attach_bare(f"unix:{guest.monitors[0]}", trace=False) as agent,
    ):
        for number in range(3):
            device = parse_addition(Role.DEVICE, f"virtio-rng-pci,id=d{number}")
            outcome = await agent.update(Plug(device))
            assert outcome.outcome == "done", outcome
        buses = {bus.name: bus for bus in await read_buses(agent.monitor)}
        assert list(buses["off"].taken.values()) == []
        assert len(buses["free"].taken) == 1
        refused = await agent.update(
            Plug(parse_addition(Role.DEVICE, "virtio-rng-pci,id=x,bus=off"))
        )
        assert refused.outcome == "refused"
        assert "off has hotplug=off" in str(refused.reason)
