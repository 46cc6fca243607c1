"""aarch64 `virt` under TCG with a Linux guest: its map, its transitions, plug, unplug, resize."""

from __future__ import annotations

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.guests.linux import ARM64_LABEL, LinuxSpec
from qmp_memlistener.memslots import PlanStrategy, plan
from qmp_memlistener.topology import Kind
from qmp_memlistener.updates.settings import UpdateOptions
from tests.support.linux import booted_linux
from tests.support.linux_views import PciDevice
from tests.support.live import QEMUS, Commits, Seen, attach_bare, builds
from tests.support.verbs import run_verb

pytestmark = [pytest.mark.qemu, pytest.mark.full]

MIB = 1 << 20
RAM = 0x4000_0000
PATIENT = UpdateOptions(wait_s=60.0)


@builds([q for q in QEMUS if q.aarch64_binary][-1:])
@pytest.mark.asyncio
async def test_a_guest_for_arm64_is_seen_and_changed(build: QemuBuild, seen: Seen) -> None:
    backend = "memory-backend-ram,id=m1,size=16M"
    spec = LinuxSpec(machine="virt", pulse_us=None, virtio_mem=512 * MIB, args=("-object", backend))
    async with booted_linux(build, spec, ARM64_LABEL) as vm:
        target = f"unix:{vm.guest.guest.monitors[1]}"
        shown = await run_verb("show", target, "--json")
        assert shown.code == 0, shown.err
        (document,) = shown.documents
        blocks = document["ram_blocks"]
        assert isinstance(blocks, list)
        assert RAM in [m["start"] for b in blocks for m in b["mapped"]]

        async with attach_bare(target, on_record=seen) as agent:
            commits = Commits()
            agent.register(commits)
            assert agent.source == "trace"
            (ram,) = [r for r in agent.map.view if r.name == "mach-virt.ram"]
            assert (ram.start, ram.size) == (RAM, spec.memory)
            assert {r.kind for r in agent.map.view if "flash" in r.name} == {Kind.ROMD}

            plugged = await agent.hotplug(
                "ivshmem-plain", id="iv0", memdev="m1", options=PATIENT, properties={"bus": "rp0"}
            )
            assert (plugged.outcome, plugged.reason) == ("done", None)
            # the guest has the device behind its port when it has placed both BARs

            async def behind_ports() -> list[PciDevice]:
                return [d for d in await vm.guest.pci_devices() if d.address.bus]

            (device,) = await vm.guest.until(behind_ports, lambda f: bool(f) and len(f[0].bars) > 1)
            await agent.settle()
            appeared = [r for t in seen.transitions for r in t.ram_appeared]
            assert [r.size for r in appeared] == [16 * MIB]
            assert appeared[0].start in [b.start for b in device.bars]
            (change,) = [t for t in commits.transitions if any(r.name == "m1" for r in t.added)]
            steps = plan(change.before, change.after, PlanStrategy.QEMU, rules=agent.rules)
            assert [(op.gpa, op.size) for op in steps.ops] == [(appeared[0].start, 16 * MIB)]

            online = (await vm.guest.memory_blocks()).online_bytes
            grown = await agent.resize("+128M", strategy="hole", options=PATIENT)
            assert (grown.outcome, grown.reason) == ("done", None)
            await vm.guest.until(
                vm.guest.memory_blocks, lambda m: m.online_bytes == online + 128 * MIB
            )
            refused = await agent.resize("+256M", options=PATIENT)
            assert refused.outcome == "failed"
            assert "acpi-ged" in str(refused.reason)

            gone = await agent.unplug("iv0", options=PATIENT)
            assert (gone.outcome, gone.reason) == ("done", None)
            await agent.settle()
            assert [r.size for t in seen.transitions for r in t.ram_vanished] == [16 * MIB]
            seen.check_nothing_wrong()
