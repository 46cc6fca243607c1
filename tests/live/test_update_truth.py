"""What an update claims is what was seen: who did what, where it went, what cannot be known.

No guest with drivers runs here; those are in `test_updates_linux`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from qmp_memlistener import Agent, Outcome
from qmp_memlistener.guests import GuestSpec, QemuBuild, launch
from qmp_memlistener.updates import guest_response
from qmp_memlistener.updates.model import Plug, Range, Role
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.settings import UpdateOptions
from tests.live.verbs_support import one_build
from tests.support.live import attach_bare, builds

pytestmark = pytest.mark.qemu

MIB = 1 << 20
GIB = 1 << 30
MEMORY = ("-m", "64,slots=4,maxmem=4G")
BUSES = (
    *("-device", "virtio-scsi-pci,id=scsi", "-device", "qemu-xhci,id=usb"),
    *("-device", "virtio-serial-pci,id=serial"),
)


@asynccontextmanager
async def attached(
    build: QemuBuild, *args: str, machine: str = "pc", trace: bool = False
) -> AsyncIterator[Agent]:
    """A guest in its firmware, which has no driver for anything."""
    spec = GuestSpec(machine=machine, accel="tcg", shared_memory=False, args=args)
    async with (
        launch(spec.on(build)) as guest,
        attach_bare(f"unix:{guest.monitors[0]}", trace=trace) as agent,
    ):
        yield agent


async def plug(
    agent: Agent, device: str, *memory: str, options: UpdateOptions | None = None
) -> Outcome:
    backends = tuple(parse_addition(Role.OBJECT, f"memory-backend-ram,{m}") for m in memory)
    return await agent.update(
        Plug(parse_addition(Role.DEVICE, device), backends), "direct", options
    )


def names(outcome: Outcome) -> set[str]:
    return {phase.name for phase in outcome.phases}


@builds()
@pytest.mark.asyncio
async def test_devices_that_give_no_sign_are_not_waited_for(build: QemuBuild) -> None:
    """They are realised, and that the guest's part was not seen is said."""
    async with attached(build, *BUSES) as agent:
        await agent.monitor.execute(
            "blockdev-add", {"driver": "null-co", "node-name": "b0", "read-zeroes": True}
        )
        began = time.monotonic()
        for device, bus, kind in (
            ("scsi-hd,id=d0,drive=b0,bus=scsi.0,lun=3", "scsi.0", "SCSI"),
            ("usb-tablet,id=d1", "usb.0", "usb-bus"),
            ("virtserialport,id=d2,name=x", "serial.0", "virtio-serial-bus"),
        ):
            outcome = await plug(agent, device, options=UpdateOptions(wait_s=60.0))
            assert (outcome.outcome, outcome.reason) == ("done", None)
            (note,) = outcome.notes
            assert note.startswith("realised in QEMU; what the guest does with it is unknown")
            (placed,) = outcome.placed
            assert (placed.bus, placed.bus_type, placed.pci) == (bus, kind, None)
            assert not names(outcome) & {"guest_told", "guest_acts", "driver_bound"}
            if "lun" in device:
                assert placed.address["lun"] == 3
        assert time.monotonic() - began < guest_response.FIRST_SIGN_S * 2
        gone = await agent.unplug("d0")
        assert gone.outcome == "done"
        assert "guest_told" not in names(gone), "QEMU takes it out without the guest"


@builds()
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.asyncio
async def test_a_stopped_guest_has_not_reacted(build: QemuBuild, trace: bool) -> None:
    """What appears in the map is QEMU's own doing, with and without trace events."""
    async with attached(build, "-S", *MEMORY, trace=trace) as agent:
        for device, memory in (
            ("pc-dimm,id=d0,memdev=m0", "id=m0,size=128M"),
            ("virtio-pmem-pci,id=d1,memdev=m1", "id=m1,size=128M"),
        ):
            outcome = await plug(agent, device, memory)
            assert outcome.outcome == "done"
            assert not names(outcome) & {"guest_told", "guest_acts"}
            assert outcome.transitions
            (placed,) = outcome.placed
            start = 4 * GIB if device.startswith("pc-dimm") else None
            assert placed.memory is not None
            assert placed.memory == Range(start or placed.memory.start, 128 * MIB)


@one_build
@pytest.mark.asyncio
async def test_our_own_dimm_is_no_reaction_of_a_running_guest(
    build: QemuBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that does not answer has been given memory, and does not use it for all we know."""
    monkeypatch.setattr(guest_response, "FIRST_SIGN_S", 0.3)
    async with attached(build, *MEMORY) as agent:
        plugged = await plug(agent, "pc-dimm,id=d0,memdev=m0", "id=m0,size=128M")
        assert plugged.outcome == "done"
        assert plugged.notes == ["the guest has not reacted: it may have no driver"]
        grown = await agent.resize("+128M")
        assert grown.outcome == "partial"
        assert "128 MiB were given, and the guest has not answered" in str(grown.reason)
        for outcome in (plugged, grown):
            assert "realised" in names(outcome)
            assert not names(outcome) & {"guest_told", "guest_acts"}


@one_build
@pytest.mark.asyncio
async def test_a_dimm_that_linux_takes_no_part_of(
    build: QemuBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size, or its address after another one of odd size; Linux reports success all the same
    (see test_updates_linux)."""
    monkeypatch.setattr(guest_response, "FIRST_SIGN_S", 0.1)
    async with attached(build, *MEMORY) as agent:
        odd = await plug(agent, "pc-dimm,id=d0,memdev=m0", "id=m0,size=100M")
        assert odd.outcome == "partial"
        assert "100 MiB at 0x100000000" in str(odd.reason)
        after = await plug(agent, "pc-dimm,id=d1,memdev=m1,addr=0x106400000", "id=m1,size=128M")
        assert after.outcome == "partial"
        assert "128 MiB at 0x106400000" in str(after.reason)
        assert "unplug it" in str(after.remedy)


@one_build
@pytest.mark.asyncio
async def test_memory_that_was_asked_for_and_not_taken(build: QemuBuild) -> None:
    async with attached(build, "-m", "64,maxmem=1G") as agent:
        short = UpdateOptions(wait_s=0.3)
        device = "virtio-mem-pci,id=v0,memdev=m0,requested-size="
        backend = "id=m0,size=256M"
        refused = await plug(agent, device + "512M", backend)
        assert refused.outcome == "refused"
        assert "requested-size is 512 MiB, and the memory behind v0 has 256" in str(refused.reason)
        taken = await plug(agent, device + "128M", backend, options=short)
        assert taken.outcome == "partial"
        assert "v0 has 0 of 128 MiB" in str(taken.reason)
        (placed,) = taken.placed
        assert (placed.size, placed.requested) == (0, 128 * MIB)
        assert placed.memory is not None
        assert placed.memory.size == 256 * MIB
        room = await plug(agent, "virtio-mem-pci,id=v1,memdev=m1", "id=m1,size=1G")
        assert room.outcome == "refused"
        assert "room for 704 MiB" in str(room.reason)


@builds()
@pytest.mark.asyncio
async def test_a_machine_without_device_memory(build: QemuBuild) -> None:
    """QEMU 7.2 realises virtio-mem there, and no guest ever sees it."""
    args = (*MEMORY, "-device", "pcie-root-port,id=p,chassis=1")
    async with attached(build, *args, machine="microvm,pcie=on") as agent:
        for device in ("virtio-mem-pci,id=v0,memdev=m0,bus=p", "pc-dimm,id=v0,memdev=m0"):
            outcome = await plug(agent, device, "id=m0,size=128M")
            assert outcome.outcome == "refused"
            assert "microvm has no device memory" in str(outcome.reason)
            assert "q35" in str(outcome.remedy)
