"""Linux guests that refuse an update, or do a part of it; and the events of a device's parts.

Updates that a Linux guest goes along with are in `test_update_linux`.
"""

from __future__ import annotations

import pytest

from qmp_memlistener import Outcome, Strategy
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.guests.linux import LinuxSpec
from qmp_memlistener.records import QmpEvent
from qmp_memlistener.updates.model import Plug, Role, Unplug
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.settings import UpdateOptions
from tests.support.linux import LinuxVm, booted_linux
from tests.support.live import QEMUS, Seen, attach_bare, builds

pytestmark = [pytest.mark.qemu, pytest.mark.full]

MIB = 1 << 20
PATIENT = UpdateOptions(wait_s=30.0)


def follow(vm: LinuxVm) -> str:
    """The monitor that the test itself does not use."""
    return f"unix:{vm.guest.guest.monitors[1]}"


def phase_end(outcome: Outcome, name: str) -> int:
    (found,) = [p.end_ns for p in outcome.phases if p.name == name]
    return found


@builds(QEMUS[:2])
@pytest.mark.asyncio
async def test_parts_of_a_device_and_memory_that_the_kernel_keeps(
    build: QemuBuild, seen: Seen
) -> None:
    """Of a DIMM above 4 GiB a kernel with little else takes memory that it cannot move."""
    spec = LinuxSpec(
        machine="pc", pulse_us=None, kernel_args=("memhp_default_state=online_kernel",)
    )
    async with (
        booted_linux(build, spec) as vm,
        attach_bare(follow(vm), guarded=True, on_record=seen) as agent,
    ):
        netdev = parse_addition(Role.NETDEV, "hubport,id=b0,hubid=7")
        plug = Plug(parse_addition(Role.DEVICE, "virtio-net-pci,id=d0,netdev=b0"), (netdev,))
        plugged = await agent.update(plug, Strategy.PAUSE, PATIENT)
        assert (plugged.outcome, plugged.reason) == ("done", None)
        order = ["prepared", "accepted", "guest_told", "guest_acts", "settled"]
        assert [p.name for p in plugged.phases if p.name in order] == order
        (bound,) = [p for p in plugged.phases if p.name == "driver_bound"]
        assert bound.start_ns <= bound.end_ns <= phase_end(plugged, "settled")

        # QEMU tells of the device's parts first; they are not the device
        gone = await agent.update(Unplug("d0", (netdev,)), Strategy.DIRECT, PATIENT)
        assert (gone.outcome, gone.reason) == ("done", None)
        told = [e for e in seen.of(QmpEvent) if e.event == "DEVICE_DELETED"]
        paths = [str(e.data["path"]).removeprefix("/machine/peripheral/") for e in told]
        assert paths == ["d0/virtio-backend", "d0"]
        assert phase_end(gone, "guest_acts") >= told[-1].t_ns

        blocks = (await vm.guest.memory_blocks()).online_bytes
        assert (await agent.resize("+256M", options=PATIENT)).outcome == "done"
        await vm.guest.until(vm.guest.memory_blocks, lambda m: m.online_bytes == blocks + 256 * MIB)
        await vm.guest.check("dd if=/dev/zero of=/tmp/use bs=1M count=64 2>&1")
        kept = await agent.resize("-256M", strategy="pause", options=PATIENT)
        assert kept.outcome == "refused"
        assert kept.reason is not None
        assert kept.reason.startswith("the guest refused ")
        assert "qml-dimm0" in kept.reason
        assert kept.remedy is not None
        assert kept.guest_state.after == "running"
        assert (await vm.guest.memory_blocks()).online_bytes == blocks + 256 * MIB

        # Linux takes whole blocks only, and its _OST says success
        odd = parse_addition(Role.OBJECT, "memory-backend-ram,id=b1,size=100M")
        plug = Plug(parse_addition(Role.DEVICE, "pc-dimm,id=d1,memdev=b1"), (odd,))
        refused = await agent.update(plug, Strategy.DIRECT, PATIENT)
        assert refused.outcome == "partial"
        assert "100 MiB" in str(refused.reason)
        assert seen.of(QmpEvent)[-1].data["info"]["status"] == 0
        assert (await vm.guest.memory_blocks()).online_bytes == blocks + 256 * MIB


@builds(QEMUS[:1])
@pytest.mark.asyncio
async def test_memory_in_use_comes_back_in_part(build: QemuBuild) -> None:
    """There is no other room for what a file system in memory holds."""
    spec = LinuxSpec(machine="pc", memory=256 * MIB, pulse_us=None, virtio_mem=512 * MIB)
    async with booted_linux(build, spec) as vm, attach_bare(follow(vm)) as agent:
        grown = await agent.resize("+512M", strategy="hole", options=PATIENT)
        assert (grown.outcome, grown.reason) == ("done", None)
        await vm.guest.check(
            "mkdir -p /full && mount -t tmpfs -o size=400m none /full && "
            "dd if=/dev/zero of=/full/use bs=1M count=400 2>&1",
            timeout=60,
        )
        shrunk = await agent.resize("-512M", strategy="hole", options=UpdateOptions(wait_s=3.0))
        assert shrunk.outcome == "partial"
        assert shrunk.reason is not None
        assert "vmem0 has " in shrunk.reason
        assert "of 0 MiB" in shrunk.reason
        assert shrunk.slot_ops == []
        await vm.guest.check("rm /full/use")
        # Linux tries again in 50 s (virtio_mem_retry), or when it is asked for another size
        asked = await agent.resize("+128M", strategy="hole", options=PATIENT)
        assert (asked.outcome, asked.reason) == ("done", None)
