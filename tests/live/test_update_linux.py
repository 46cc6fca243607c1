"""Plugging, unplugging and resizing a Linux guest under each strategy that applies.

One time each; `tools/soak_hotplug.py` does it many times over and looks for what is left behind.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from qmp_memlistener import Agent, Outcome, Strategy, attach
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.guests.linux import LinuxSpec
from qmp_memlistener.qmp.guest import count_ram_blocks
from qmp_memlistener.updates.model import Plug, Role, Unplug
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.settings import UpdateOptions
from tests.support.linux import LinuxVm, booted_linux
from tests.support.linux_guest import LinuxGuest
from tests.support.live import QEMUS, builds

pytestmark = pytest.mark.qemu

MIB = 1 << 20
PATIENT = UpdateOptions(wait_s=30.0)
PROBES = ("runstate", "trace")
MACHINES = pytest.mark.parametrize(
    "machine", [pytest.param("pc", marks=pytest.mark.full), pytest.param("q35")]
)


@dataclass(frozen=True)
class Card:
    """A PCI device, what it stands on, and whether its driver can be seen."""

    device: str
    role: Role
    backend: str
    virtio: bool


CARDS = (
    Card("virtio-net-pci,id=d0,netdev=b0", Role.NETDEV, "hubport,id=b0,hubid=7", True),
    Card(
        "virtio-blk-pci,id=d0,drive=b0",
        Role.BLOCKDEV,
        "null-co,node-name=b0,size=1M,read-zeroes=on",
        True,
    ),
    Card(
        "ivshmem-plain,id=d0,memdev=b0",
        Role.OBJECT,
        "memory-backend-ram,id=b0,size=16M,share=on",
        False,
    ),
)


def names(outcome: Outcome) -> list[str]:
    return [phase.name for phase in outcome.phases]


def paused(outcome: Outcome) -> int:
    return sum(s.kind == "vcpu_pause" for s in outcome.stalls)


async def follow(vm: LinuxVm) -> str:
    """The monitor that the test itself does not use."""
    return f"unix:{vm.guest.guest.monitors[1]}"


async def sees(linux: LinuxGuest) -> tuple[int, int, int, int]:
    """PCI functions, bytes of memory, disks and network devices, as the guest has them."""
    return (
        len(await linux.pci_devices()),
        (await linux.memory_blocks()).online_bytes,
        len(await linux.block_devices()),
        len(await linux.net_devices()),
    )


@pytest.mark.full
@builds(of=QEMUS[:2])
@MACHINES
@pytest.mark.asyncio
async def test_cards(build: QemuBuild, machine: str) -> None:
    """Every card under every strategy: the guest sees it come and go, and has its driver."""
    async with booted_linux(build, LinuxSpec(machine=machine)) as vm:
        before = await sees(vm.guest)
        async with attach(await follow(vm), guarded=True, probes=PROBES) as agent:
            for card in CARDS:
                for strategy in Strategy:
                    await plug_and_unplug(vm, agent, card, strategy)
                    assert await sees(vm.guest) == before


async def plug_and_unplug(vm: LinuxVm, agent: Agent, card: Card, strategy: Strategy) -> None:
    backend = parse_addition(card.role, card.backend)
    blocks = await count_ram_blocks(vm.monitor)
    plug = Plug(parse_addition(Role.DEVICE, card.device), (backend,))
    plugged = await agent.update(plug, strategy, PATIENT)
    assert (plugged.outcome, plugged.reason) == ("done", None)
    assert plugged.guest_state.after == "running"
    assert paused(plugged) == (strategy is Strategy.PAUSE)
    found = names(plugged)
    assert found[0] == "prepared"
    assert found[-1] == "settled"
    assert "guest_acts" in found
    assert ("driver_bound" in found) is card.virtio
    starts = [p.start_ns for p in plugged.phases]
    assert starts == sorted(starts)
    assert plugged.transitions
    moved = [note for note in plugged.notes if "bridge window" in note]
    assert moved == (["no bridge window moved"] if strategy is Strategy.HOLE else [])
    await vm.check_bars()
    out = Strategy.DIRECT if strategy is Strategy.HOLE else strategy
    gone = await agent.update(Unplug("d0", (backend,)), out, PATIENT)
    assert (gone.outcome, gone.reason) == ("done", None)
    assert "guest_acts" in names(gone)
    # what is not freed makes QEMU abort when the same device is plugged again
    assert await count_ram_blocks(vm.monitor) == blocks


@builds(of=QEMUS[:2])
@MACHINES
@pytest.mark.asyncio
async def test_memory(build: QemuBuild, machine: str) -> None:
    """A DIMM comes and goes; an NVDIMM comes, and QEMU itself refuses to take it out."""
    async with booted_linux(build, LinuxSpec(machine=machine)) as vm:
        before = (await vm.guest.memory_blocks()).online_bytes
        async with attach(await follow(vm), guarded=True, probes=PROBES) as agent:
            for strategy in (Strategy.DIRECT, Strategy.PAUSE):
                grown = await agent.resize("+256M", strategy=strategy, options=PATIENT)
                assert (grown.outcome, grown.reason) == ("done", None)
                assert paused(grown) == (strategy is Strategy.PAUSE)
                assert [(op.op, op.size) for op in grown.slot_ops] == [("add", 256 * MIB)]
                await vm.guest.until(
                    vm.guest.memory_blocks, lambda m: m.online_bytes == before + 256 * MIB
                )
                shrunk = await agent.resize("-256M", strategy=strategy, options=PATIENT)
                assert (shrunk.outcome, shrunk.reason) == ("done", None)
                await vm.guest.until(vm.guest.memory_blocks, lambda m: m.online_bytes == before)
            backend = parse_addition(Role.OBJECT, "memory-backend-ram,id=b0,size=128M")
            plug = Plug(parse_addition(Role.DEVICE, "nvdimm,id=d0,memdev=b0"), (backend,))
            plugged = await agent.update(plug, Strategy.PAUSE, PATIENT)
            assert (plugged.outcome, plugged.reason) == ("done", None)
            refused = await agent.unplug("d0", options=PATIENT)
            assert refused.outcome == "failed"
            assert refused.reason is not None
            assert "nvdimm" in refused.reason
            assert refused.guest_state.after == "running"


@builds(of=QEMUS[:2])
@pytest.mark.asyncio
async def test_virtio_mem(build: QemuBuild) -> None:
    """Inside its region nothing moves; what the guest has not done yet is partial, and goes on."""
    async with (
        booted_linux(build, LinuxSpec(machine="pc", virtio_mem=512 * MIB)) as vm,
        attach(await follow(vm), probes=PROBES) as agent,
    ):
        grown = await agent.resize("+256M", strategy="hole", options=PATIENT)
        assert (grown.outcome, grown.reason) == ("done", None)
        assert (grown.transitions, grown.slot_ops) == (0, [])
        assert "guest_acts" in names(grown)
        hurried = await agent.resize("-256M", strategy="hole", options=UpdateOptions(wait_s=0))
        assert hurried.outcome == "partial"
        assert hurried.reason is not None
        assert "vmem0 has" in hurried.reason
        waited = await agent.resize("=512M", strategy="hole", options=PATIENT)
        assert (waited.outcome, waited.reason) == ("done", None)
        began = time.monotonic()
        same = await agent.resize("=512M", strategy="hole", options=PATIENT)
        assert (same.outcome, same.notes) == ("done", ["the guest has that much already"])
        assert time.monotonic() - began < PATIENT.wait_s / 2, "there was nothing to wait for"
        too_much = await agent.resize("+1G", strategy="hole")
        assert too_much.outcome == "refused"
        assert too_much.reason is not None
        assert "cannot grow by 1024 MiB" in too_much.reason
