"""Plugging, unplugging and resizing guests without drivers, and what is refused beforehand.

What a guest with drivers does about it is in `test_update_linux`, what happens when commands fail
in `test_updates_faults`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmp_memlistener import Outcome, attach
from qmp_memlistener.errors import GuestFrozen
from qmp_memlistener.guests import HOST_BRIDGE, PAM_RAM, High, QemuBuild
from qmp_memlistener.qmp import Monitor
from qmp_memlistener.records import Recording, SlotOp, StallRecord, SummaryRecord
from qmp_memlistener.updates.model import Addition, Intent, Plug, Resize, Role, Unplug
from qmp_memlistener.updates.options import parse_addition
from qmp_memlistener.updates.settings import UpdateOptions
from tests.support.live import QEMUS, Vm, attach_bare, best_accel, booted, builds, cases, qmp
from tests.support.verbs import started_verb

pytestmark = pytest.mark.qemu

MIB = 1 << 20
DIMMS = ("-m", "slots=4,maxmem=4G")
SHORT = UpdateOptions(wait_s=0.3)
NETDEV = parse_addition(Role.NETDEV, "hubport,id=n0,hubid=1")


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These guests give no sign."""
    monkeypatch.setattr("qmp_memlistener.updates.guest_response.QUIET_S", 0.05)
    monkeypatch.setattr("qmp_memlistener.updates.guest_response.FIRST_SIGN_S", 0.1)


def device(text: str) -> Addition:
    return parse_addition(Role.DEVICE, text)


def memory(name: str, size: str = "16M") -> Addition:
    return parse_addition(Role.OBJECT, f"memory-backend-ram,id={name},size={size},share=on")


def plug(text: str, *backends: Addition) -> Plug:
    return Plug(device(text), backends)


def names(outcome: Outcome) -> list[str]:
    return [phase.name for phase in outcome.phases]


async def status(monitor: Monitor) -> str:
    answer = await monitor.execute("query-status")
    assert isinstance(answer, dict)
    return str(answer["status"])


async def things(monitor: Monitor) -> set[str]:
    """The ids of objects, devices and block nodes; what `info network` prints."""
    found = {str(await monitor.execute("human-monitor-command", {"command-line": "info network"}))}
    for path in ("/objects", "/machine/peripheral"):
        answer = await monitor.execute("qom-list", {"path": path})
        assert isinstance(answer, list)
        found |= {child["name"] for child in answer if child["type"].startswith("child<")}
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    assert isinstance(nodes, list)
    return found | {node["node-name"] for node in nodes}


# -- what is done --------------------------------------------------------------------------------


@cases()
@pytest.mark.asyncio
async def test_devices_come_under_direct_and_pause(
    build: QemuBuild, accel: str, tmp_path: Path
) -> None:
    file = tmp_path / "recording"
    outcomes = []
    probes = ("runstate", "trace")
    async with (
        booted(build, accel, "pc", *DIMMS) as vm,
        qmp(vm.guest.monitors[2]) as monitor,
        attach(vm.target, probes=probes, guarded=True, record=str(file)) as agent,
    ):
        for strategy in ("direct", "pause"):
            for kind, backend in (
                ("ivshmem-plain,id={0},memdev={0}b", memory(f"iv-{strategy}b")),
                ("pc-dimm,id={0},memdev={0}b", memory(f"dimm-{strategy}b", "128M")),
                (
                    "virtio-net-pci,id={0},netdev={0}b",
                    parse_addition(Role.NETDEV, f"hubport,id=net-{strategy}b,hubid=1"),
                ),
            ):
                intent = plug(kind.format(backend.id[:-1]), backend)
                outcome = await agent.update(intent, strategy, SHORT)
                check_plugged(outcome, intent)
                outcomes.append(outcome)
                assert intent.device.id in await things(monitor)
        assert await status(monitor) == "running"
    check_recording(file, outcomes)


def check_plugged(outcome: Outcome, intent: Plug) -> None:
    assert (outcome.outcome, outcome.reason, outcome.remedy) == ("done", None, None)
    found = names(outcome)
    assert (found[0], found[-1]) == ("prepared", "settled")
    assert "accepted" in found
    starts = [phase.start_ns for phase in outcome.phases]
    assert starts == sorted(starts)
    assert (outcome.guest_state.before, outcome.guest_state.after) == ("running", "running")
    pauses = [s for s in outcome.stalls if s.kind == "vcpu_pause"]
    assert len(pauses) == (outcome.strategy == "pause")
    if intent.device.type == "pc-dimm":
        (op,) = outcome.slot_ops
        assert (op.op, op.size) == ("add", 128 * MIB)
        (realised,) = (p for p in outcome.phases if p.name == "realised")
        assert len(realised.transitions) == 1
    else:
        assert outcome.slot_ops == []  # nobody has mapped its BARs


def check_recording(file: Path, outcomes: list[Outcome]) -> None:
    recording = Recording(str(file))
    records = list(recording)
    assert not recording.truncated
    assert recording.header.source.startswith("trace")
    assert isinstance(records[-1], SummaryRecord)
    ops = [op for op in records if isinstance(op, SlotOp)]
    assert [op for outcome in outcomes for op in outcome.slot_ops] == ops
    told = {s.incident for outcome in outcomes for s in outcome.stalls}
    assert told <= {s.incident for s in records if isinstance(s, StallRecord)}


@cases()
@pytest.mark.asyncio
async def test_unplugging_says_what_it_waits_for(build: QemuBuild, accel: str) -> None:
    async with (
        booted(build, accel, "pc", *DIMMS) as vm,
        attach_bare(vm.target, guarded=True) as agent,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        for intent in (plug("virtio-rng-pci,id=rng0"), plug("pc-dimm,id=dimm0,memdev=m0", MEMORY)):
            assert (await agent.update(intent, "direct", SHORT)).outcome == "done"
            name = intent.device.id
            for strategy in ("direct", "pause"):
                outcome = await agent.unplug(name, strategy=strategy, backends=True, options=SHORT)
                if strategy == "pause" and outcome.outcome == "failed":
                    # QEMU remembers that it has asked, for some seconds (since 6.1, for PCI)
                    assert "unplug" in str(outcome.reason)
                else:
                    assert outcome.outcome == "partial"
                    assert outcome.reason == (
                        f"{name} is still there: the guest was asked and has not answered"
                    )
                    assert outcome.remedy is not None
                    assert "--wait" in outcome.remedy
                assert outcome.guest_state.after == "running"
        assert {"rng0", "dimm0", "m0"} < await things(monitor)


MEMORY = memory("m0", "128M")


@builds()
@pytest.mark.asyncio
async def test_what_has_left_but_is_not_freed_is_told_apart(build: QemuBuild) -> None:
    """A vCPU that spins under TCG lets RCU free nothing."""
    usb = ("-device", "qemu-xhci", "-device", "usb-tablet,id=u0")
    async with (
        booted(build, "tcg", "pc", *usb) as vm,
        attach_bare(vm.target, trace=False) as agent,
        qmp(vm.guest.monitors[1]) as monitor,
    ):
        outcome = await agent.unplug("u0", options=UpdateOptions(wait_s=0))
        assert "u0" not in await things(monitor)
        assert outcome.outcome == "partial"
        assert outcome.reason is not None
        assert outcome.reason.startswith("u0 left the guest, and QEMU has not freed it yet")


@builds()
@pytest.mark.parametrize("strategy", ["direct", "pause"])
@pytest.mark.asyncio
async def test_a_paused_guest_stays_paused(build: QemuBuild, strategy: str) -> None:
    async with (
        booted(build, best_accel(build), "pc", *DIMMS) as vm,
        attach_bare(vm.target, guarded=True) as agent,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        await monitor.execute("stop")
        events = monitor.events()
        outcome = await agent.resize("+128M", strategy=strategy)
        assert (outcome.outcome, outcome.reason) == ("done", None)
        assert outcome.guest_state.before == outcome.guest_state.after == "paused"
        assert any("does not run" in note for note in outcome.notes)
        assert [op.size for op in outcome.slot_ops] == [128 * MIB]
        assert await status(monitor) == "paused"
        events.close()
        assert "RESUME" not in [event.name async for event in events]
        await monitor.execute("cont")
        await vm.pulse.wait_beats(10)


# -- what is refused -----------------------------------------------------------------------------

OCCUPIED = (
    *("-object", "memory-backend-ram,id=m0,size=16M", "-object", "rng-builtin,id=rng"),
    *("-blockdev", "null-co,node-name=b0", "-device", "virtio-rng-pci,id=d0"),
    *("-netdev", "hubport,id=n0,hubid=1", "-netdev", "user,id=n1,restrict=on"),
    *("-netdev", "user,id=n2,restrict=on", "-device", "virtio-net-pci,netdev=n2"),
)
REFUSED: dict[str, list[tuple[Intent, str, str, str]]] = {
    "pc": [
        (plug("pc-dimm,id=x,memdev=m0"), "direct", "no free slot", "slots=N"),
        (Resize("+", 256 * MIB), "pause", "no free slot", "slots=N"),
        (Resize("+", 256 * MIB), "hole", "no virtio-mem device", "virtio-mem-pci"),
        (plug("pc-dimm,id=x,memdev=m0"), "hole", "cannot fill a hole", "virtio-mem-pci"),
        (plug("no-such-device,id=x"), "direct", "no-such-device", "help"),
        (plug("virtio-rng-pci,id=d0"), "direct", "a device called d0", "another id"),
        (plug("ivshmem-plain,id=x,memdev=m0", memory("m0")), "pause", "an object called m0", "id"),
        (plug("virtio-net-pci,id=x,netdev=n0", NETDEV), "direct", "backend called n0", "id"),
        *(
            (
                plug("virtio-net-pci,id=x", parse_addition(Role.NETDEV, f"hubport,id={n},hubid=1")),
                "direct",
                f"a network backend called {n}",
                "another id",
            )
            for n in ("n1", "n2")
        ),
        (
            plug("virtio-blk-pci,id=x", parse_addition(Role.BLOCKDEV, "null-co,node-name=b0")),
            "direct",
            "a block node called b0",
            "another id",
        ),
        (Unplug("none"), "pause", "no device none", "id"),
        (plug("virtio-gpu-pci,id=x"), "direct", "cannot be plugged", "start the guest with it"),
    ],
    "q35": [
        (plug("virtio-rng-pci,id=x"), "direct", "no free PCIe root port", "pcie-root-port"),
        (plug("nvdimm,id=x,memdev=m0"), "direct", "takes no NVDIMM", "nvdimm=on"),
    ],
}


@builds()
@pytest.mark.parametrize("machine", list(REFUSED))
@pytest.mark.asyncio
async def test_what_cannot_be_is_said_before_anything_is_touched(
    build: QemuBuild, machine: str
) -> None:
    async with (
        booted(build, best_accel(build), machine, *OCCUPIED) as vm,
        attach_bare(vm.target, guarded=True) as agent,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        before = await things(monitor)
        for intent, strategy, words, remedy in REFUSED[machine]:
            outcome = await agent.update(intent, strategy, SHORT)
            assert outcome.outcome == "refused", (intent, outcome)
            assert words in str(outcome.reason)
            assert remedy in str(outcome.remedy)
            assert (outcome.phases, outcome.slot_ops, outcome.transitions) == ([], [], 0)
            assert outcome.guest_state.after == "running"
        assert await things(monitor) == before


@builds()
@pytest.mark.asyncio
async def test_a_device_of_the_same_name_as_a_backend_is_none(build: QemuBuild) -> None:
    """QEMU keeps them apart."""
    async with (
        booted(build, best_accel(build)) as vm,
        attach_bare(vm.target) as agent,
    ):
        outcome = await agent.update(
            plug("virtio-net-pci,id=n0,netdev=n0", NETDEV), "direct", SHORT
        )
        assert (outcome.outcome, outcome.reason) == ("done", None)


@builds()
@pytest.mark.asyncio
async def test_without_a_monitor_for_the_guard_nothing_is_paused(build: QemuBuild) -> None:
    async with (
        booted(build, best_accel(build), "pc", *DIMMS, monitors=1) as vm,
        attach_bare(vm.target, guarded=True) as agent,
    ):
        before = await things(agent.monitor)
        outcome = await agent.resize("+128M", strategy="pause")
        assert outcome.outcome == "refused"
        assert "no monitor for the guard" in str(outcome.reason)
        assert "--guard-monitor" in str(outcome.remedy)
        assert await things(agent.monitor) == before
        assert (await agent.resize("+128M", options=SHORT)).outcome == "partial"


@builds()
@pytest.mark.asyncio
async def test_a_frozen_guest_is_left_alone(build: QemuBuild) -> None:
    async with booted(build, best_accel(build), "pc", *DIMMS) as vm:
        async with started_verb("watch", vm.target, "--freeze", "--probes", "none") as watch:
            await watch.ready()
            with pytest.raises(GuestFrozen):
                async with attach_bare(f"unix:{vm.guest.monitors[1]}") as agent:
                    await agent.resize("+128M")
        async with attach_bare(vm.target) as agent:
            assert (await agent.resize("+128M", options=SHORT)).outcome == "partial"


@builds()
@pytest.mark.parametrize("job", ["blockdev-backup", "blockdev-mirror"])
@pytest.mark.asyncio
async def test_a_guest_with_a_block_job_is_not_paused(build: QemuBuild, job: str) -> None:
    nodes = (
        *("-blockdev", "null-co,node-name=from,size=67108864,read-zeroes=off"),
        *("-blockdev", "null-co,node-name=to,size=67108864"),
    )
    arguments = {"job-id": "j", "device": "from", "target": "to", "sync": "full", "speed": 1}
    async with (
        booted(build, best_accel(build), "pc", *DIMMS, *nodes) as vm,
        attach_bare(vm.target, guarded=True) as agent,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        await monitor.execute(job, arguments)
        before = await things(monitor)
        outcome = await agent.resize("+128M", strategy="pause")
        assert outcome.outcome == "refused"
        assert job.removeprefix("blockdev-") in str(outcome.reason)
        assert "--strategy direct" in str(outcome.remedy)
        assert await things(monitor) == before
        direct = await agent.resize("+128M", strategy="direct", options=SHORT)
        assert direct.outcome == "partial", "this guest answers for no memory"
        await monitor.execute("block-job-cancel", {"device": "j", "force": True})


# vCPUs are kept out while slots are replaced since 8.0
RACING = [b for b in QEMUS if int(b.version.split(".")[0]) < 8]


@cases("kvm", of=RACING)
@pytest.mark.asyncio
async def test_a_guest_that_has_died_is_left_alone(build: QemuBuild, accel: str) -> None:
    async with (
        booted(build, accel, "pc", *DIMMS, smp=2) as vm,
        qmp(vm.guest.monitors[2]) as monitor,
    ):
        await let_it_die(vm, monitor)
        before = await things(monitor)
        async with attach_bare(vm.target, guarded=True) as agent:
            for strategy in ("direct", "pause"):
                outcome = await agent.resize("+128M", strategy=strategy)
                assert outcome.outcome == "refused"
                assert "internal-error" in str(outcome.reason)
                assert outcome.guest_state.after == "internal-error"
        assert await things(monitor) == before


async def let_it_die(vm: Vm, monitor: Monitor) -> None:
    """CPU 1 has its code in memory whose slot CPU 0 replaces again and again."""
    await vm.pulse.place(1, High.CODE)
    async with asyncio.timeout(60):
        while await status(monitor) != "internal-error":
            await vm.pulse.toggle(
                HOST_BRIDGE, vm.bridge.pam, (PAM_RAM << 4, 0), 200, period=100, unit="turns"
            )
            await asyncio.sleep(0.2)
