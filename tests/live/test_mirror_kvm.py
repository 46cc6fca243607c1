"""A lab VM's real slots in step with a real guest: what a guest of the lab reads, is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmp_memlistener import check_guest, mirroring
from qmp_memlistener.agent import Agent
from qmp_memlistener.errors import MissingPrerequisite, TargetLost
from qmp_memlistener.guests import (
    GuestSpec,
    PciAddress,
    Pulse,
    QemuBuild,
    boot_args,
    launch,
)
from qmp_memlistener.kvmlab import Kvm
from qmp_memlistener.kvmlab.backend import KvmBackend
from qmp_memlistener.memslots import Slot, SlotTable, slot_table
from qmp_memlistener.memslots.slots import Backing
from qmp_memlistener.mirror.mirror import Mirror
from qmp_memlistener.qmp import Monitor, take_snapshot
from qmp_memlistener.topology import read_map
from qmp_memlistener.updates.model import Strategy
from tests.support.host import patience
from tests.support.live import (
    QEMUS,
    Seen,
    Vm,
    attach_bare,
    best_accel,
    booted,
    builds,
    cases,
    qmp,
    silenced,
    skip_without_kvm,
)

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.asyncio]

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
BAR = 0xE000_0000
DEVICE = PciAddress(0, 5)
DIMM_SELECT, DIMM_CONTROL, DIMM_EJECT = 0xA00, 0xA14, 0x8
ARGS = (
    *("-m", "slots=4,maxmem=2G"),
    *("-object", f"memory-backend-ram,id=m0,size={MIB}"),
    *("-device", "ivshmem-plain,id=iv0,memdev=m0,addr=5"),
)
strategies = pytest.mark.parametrize("strategy", list(Strategy))


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """For the lab; the guest may run without it."""
    try:
        opened = Kvm()
    except MissingPrerequisite as exc:
        pytest.skip(f"{exc.message}: {exc.remedy}")
    with opened:
        yield opened
    assert left_of_labs() == []


@dataclass(slots=True)
class Mirrored:
    """A guest, its agent, and a lab VM that mirrors it; `monitor` is the test's own."""

    agent: Agent
    monitor: Monitor
    mirror: Mirror
    lab: KvmBackend

    async def in_step(self) -> None:
        """Slots and memory of the lab are the guest's, as a fresh snapshot has it."""
        assert await check_guest(self.mirror, self.agent) == ()
        report = self.mirror.report()
        assert (report.why_not, report.rebuilt, report.dropped) == (None, 0, 0)
        view = read_map((await take_snapshot(self.monitor)).text).view
        shown = slot_table(view, self.agent.rules)
        for gpa in places(shown):
            slot = shown.at(0, gpa)
            if slot is None:
                assert self.lab.read(gpa) is None, f"{gpa:#x} is no memory of the guest's"
            else:
                assert self.behind(gpa, slot) == expected(gpa, slot)
        assert self.lab.verify().good

    def behind(self, gpa: int, slot: Slot) -> Backing | None:
        """What a guest of the lab finds at `gpa`, if that is where `slot` says."""
        there = expected(gpa, slot)
        self.lab.memory.stamp((there.block, there.owner), there.offset)
        word = self.lab.read(gpa)
        return self.lab.memory.stamped(word) if word is not None else None

    def finds(self, gpa: int) -> str | None:
        """The RAM block that a guest of the lab finds at a page."""
        slot = next((s for s in self.lab.slots() if any(a <= gpa < b for a, b in s.mapped)), None)
        behind = self.behind(gpa, slot) if slot is not None else None
        if behind is None:
            assert self.lab.read(gpa) is None
        return behind.block if behind is not None else None


def expected(gpa: int, slot: Slot) -> Backing:
    return Backing(slot.block, slot.owner, (slot.offset or 0) + gpa - slot.gpa)


def places(table: SlotTable) -> list[int]:
    """Pages of each slot of the guest's, at its ends and anywhere, and those around it."""
    anywhere = random.Random(len(table))
    found: set[int] = set()
    for slot in table.slots(0):
        pages = slot.size // PAGE
        some = {0, pages - 1, *(anywhere.randrange(pages) for _ in range(6))}
        found |= {slot.gpa + page * PAGE for page in some} | {slot.gpa - PAGE, slot.end}
    return sorted(gpa for gpa in found if 0 <= gpa < 512 * GIB)


async def status(monitor: Monitor) -> object:
    value = await monitor.execute("query-status")
    assert isinstance(value, dict)
    return value["status"]


async def reset(pulse: Pulse, monitor: Monitor) -> None:
    """Reset the guest, and wait until it is up again."""
    before = pulse.header()
    assert before is not None

    def again() -> bool:
        header = pulse.header()
        return header is not None and header.entry_tsc != before.entry_tsc and header.ready

    await monitor.execute("system_reset")
    await pulse.wait_for(again, 60, lambda: "its second boot")


@asynccontextmanager
async def mirrored(
    vm: Vm, kvm: Kvm, strategy: Strategy, seen: Seen, *, vcpus: int = 0
) -> AsyncIterator[Mirrored]:
    with KvmBackend(kvm, vcpus=vcpus) as lab:
        async with (
            qmp(vm.guest.monitors[-1]) as monitor,
            attach_bare(vm.target, on_record=seen) as agent,
            mirroring(agent, lab, strategy) as mirror,
        ):
            yield Mirrored(agent, monitor, mirror, lab)


@cases()
@strategies
async def test_a_lab_vm_follows_all_that_changes_a_map(
    build: QemuBuild, accel: str, strategy: Strategy, kvm: Kvm, seen: Seen
) -> None:
    async with (
        booted(build, accel, "pc", *ARGS, monitors=4) as vm,
        mirrored(vm, kvm, strategy, seen, vcpus=1) as m,
    ):
        await m.in_step()
        at_first = m.lab.kvm_slots()
        assert m.finds(0xF0000) == "pc.bios"
        await vm.open_pam()
        await m.in_step()
        assert m.finds(0xF0000) == "pc.ram"
        await vm.close_pam()
        await m.in_step()
        await vm.toggle(11, period_ms=2)
        await m.in_step()
        assert m.finds(0xF0000) == "pc.ram"
        if strategy is Strategy.HOLE:
            assert m.lab.kvm_slots() == at_first, "not one of KVM's slots was touched"
            assert m.lab.facts().slot_ioctls == len(at_first) + 2 * m.lab.facts().grown
        else:
            assert m.lab.facts().grown == m.lab.facts().placed == 0

        await m.monitor.execute(
            "object-add", {"qom-type": "memory-backend-ram", "id": "d0", "size": 16 * MIB}
        )
        await m.monitor.execute("device_add", {"driver": "pc-dimm", "id": "d", "memdev": "d0"})
        await m.in_step()
        assert m.finds(4 * GIB) == "d0"
        await vm.pulse.map_bar(DEVICE, 2, BAR)
        await m.in_step()
        assert m.finds(BAR) == "m0"
        await vm.pulse.unmap_bar(DEVICE)
        await m.in_step()
        assert m.finds(BAR) is None
        await vm.pulse.port_out(DIMM_SELECT, 0, 4)
        await vm.pulse.port_out(DIMM_CONTROL, DIMM_EJECT, 1)
        await m.in_step()
        assert m.finds(4 * GIB) is None

        await reset(vm.pulse, m.monitor)
        await m.in_step()
        assert await status(m.monitor) == "running"
        (beats,) = m.lab.beats()
        assert beats > 0
        facts = m.lab.facts()
    report = m.mirror.report()
    assert (report.in_step, report.differences, report.notes) == (True, [], [])
    assert report.unpaused == 0
    assert (report.exposed > 0) == (strategy is Strategy.DIRECT)
    assert report.pauses.count == (report.updates.count if strategy is Strategy.PAUSE else 0)
    if strategy is Strategy.DIRECT:
        assert facts.holds.count == 0, "its vCPUs run, as QEMU's did up to 7.2"
    else:
        assert facts.holds.count > 0


@cases(of=[*QEMUS[:1], *QEMUS[1:][-1:]])
async def test_a_boot_through_the_bios_and_a_reset_are_followed(
    build: QemuBuild, accel: str, kvm: Kvm, seen: Seen, tmp_path: Path
) -> None:
    """From before the first instruction, under `hole`, with a display whose memory is logged.

    Takes its time under software KVM, so each QEMU has one machine to boot.
    """
    skip_without_kvm(build, accel)
    machine = "pc" if build == QEMUS[0] else "q35"
    spec = GuestSpec(
        machine=machine, accel=accel, args=(*boot_args("disk"), "-S", "-device", "VGA"), monitors=3
    )
    async with launch(spec.on(silenced(build, tmp_path))) as guest:
        assert guest.ram is not None
        with KvmBackend(kvm) as lab, Pulse(guest.ram) as pulse:
            async with (
                qmp(guest.monitors[-1]) as monitor,
                attach_bare(f"unix:{guest.monitors[0]}", on_record=seen) as agent,
                mirroring(agent, lab, Strategy.HOLE) as mirror,
            ):
                m = Mirrored(agent, monitor, mirror, lab)
                await m.in_step()
                await monitor.execute("cont")
                await pulse.wait_ready(timeout=patience(30.0))
                await m.in_step()
                booted_once = mirror.report()
                assert booted_once.holes_unmarked >= 1
                assert m.finds(0xF0000) == "pc.ram", "shadow RAM"
                await reset(pulse, monitor)
                await m.in_step()
                assert mirror.report().transitions > booted_once.transitions
                logged = {s.block for s in lab.slots() if s.logged}
                assert logged == {"vga.vram"}
            assert mirror.report().notes == []


@builds()
async def test_dirty_pages_that_hole_keeps_and_direct_loses(
    build: QemuBuild, kvm: Kvm, seen: Seen
) -> None:
    """Two lab VMs mirror one guest, side by side; their own guests have written to RAM."""
    pages = frozenset(MIB + n * PAGE for n in range(256))
    kept: dict[Strategy, frozenset[int]] = {}
    async with (
        booted(build, best_accel(build)) as vm,
        attach_bare(vm.target, on_record=seen) as agent,
    ):
        with KvmBackend(kvm) as direct, KvmBackend(kvm) as hole:
            labs = {Strategy.DIRECT: direct, Strategy.HOLE: hole}
            mirrors = {s: Mirror(lab, strategy=s) for s, lab in labs.items()}
            for mirror in mirrors.values():
                agent.register(mirror)
            await agent.settle()
            ram = agent.map.view.lookup(MIB)
            assert ram is not None
            for s, lab in labs.items():
                await mirrors[s].log_start(ram)
                assert all(lab.write(page, b"written!") for page in pages)
            await vm.open_pam()
            await vm.close_pam()
            await agent.settle()
            for s, lab in labs.items():
                assert await check_guest(mirrors[s], agent) == ()
                kept[s] = lab.dirty_pages()
                assert lab.read(MIB) == b"written!"
            for mirror in mirrors.values():
                await agent.unregister(mirror)
    assert kept == {Strategy.DIRECT: frozenset(), Strategy.HOLE: pages}


@builds(QEMUS[:1])
@strategies
async def test_a_guest_that_is_killed_leaves_nothing_of_the_lab(
    build: QemuBuild, strategy: Strategy, kvm: Kvm, seen: Seen
) -> None:
    async with booted(build, best_accel(build), "pc", *ARGS, monitors=4) as vm:
        async with mirrored(vm, kvm, strategy, seen, vcpus=1) as m:
            toggling = asyncio.create_task(vm.toggle(10_000, period_ms=5))
            await seen.wait_for(lambda: len(seen.transitions) > 5)
            vm.guest.process.kill()
            assert isinstance(await asyncio.wait_for(m.agent.wait_lost(), 10), TargetLost)
            toggling.cancel()
        report = m.mirror.report()
        assert report.in_step
        assert any("not compared at the end" in note for note in report.notes)
    assert left_of_labs() == []


def left_of_labs() -> list[str]:
    """Threads, descriptors and mappings of lab VMs in this process."""
    found = [t.name for t in threading.enumerate() if t.name.startswith("vcpu-")]
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    found += Path("/proc/self/maps").read_text().splitlines()
    return [name for name in found if re.search(r"^vcpu-|kvm-v|memfd:qmp-memlistener", name)]


@builds(QEMUS[:1])
async def test_a_lab_that_drifts_is_found_and_put_right(
    build: QemuBuild, kvm: Kvm, seen: Seen
) -> None:
    async with (
        booted(build, best_accel(build), monitors=4) as vm,
        mirrored(vm, kvm, Strategy.HOLE, seen) as m,
    ):
        slot = next(s for s in m.lab.slots() if s.block == "pc.ram")
        m.lab.set_hole(slot, 2 * MIB, 3 * MIB)
        assert m.lab.read(2 * MIB) is None
        (found,) = await check_guest(m.mirror, m.agent)
        assert (found.start, found.end, found.found) == (2 * MIB, 3 * MIB, None)
        assert not m.mirror.in_step
        await m.mirror.resync(read_map((await take_snapshot(m.monitor)).text))
        assert await check_guest(m.mirror, m.agent) == ()
        assert m.finds(2 * MIB) == "pc.ram"
        assert m.lab.verify().good
