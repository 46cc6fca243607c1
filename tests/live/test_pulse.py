"""The pulse guest, the launcher and the qtest client on every QEMU here, under KVM and TCG.

Maps are read with `info mtree -o`, never with -f.  Times are reported by benchmarks, not here.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from qmp_memlistener.errors import (
    InputError,
    MissingPrerequisite,
    OperationFailed,
    TargetLost,
    TargetUnreachable,
)
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    Q35,
    Guest,
    GuestSpec,
    High,
    HostBridge,
    PciAddress,
    Pulse,
    QemuBuild,
    QTest,
    boot_args,
    find_qemus,
    kvm_usable,
    launch,
)
from qmp_memlistener.topology import FlatRange, FlatView, Kind, read_map

pytestmark = pytest.mark.qemu

MEMORY = 512 << 20  # room for a 256 MiB MMCONFIG window over RAM
EVERYTHING = High.CODE | High.DATA | High.TABLES
QEMUS = find_qemus()
BRIDGES = {"pc": I440FX, "q35": Q35}

builds = pytest.mark.parametrize(
    "build",
    QEMUS
    or [pytest.param(None, marks=pytest.mark.skip(reason="qemu-system-x86_64 is not installed"))],
    ids=lambda b: b.version if b else "none",
)
accels = pytest.mark.parametrize("accel", [pytest.param("kvm", marks=pytest.mark.kvm), "tcg"])
machines = pytest.mark.parametrize("machine", ["pc", "q35"])


@functools.cache
def why_no_kvm(binary: str) -> str:
    build = next(b for b in QEMUS if b.binary == binary)
    return kvm_usable(build).reason


class Vm:
    """A booted pulse guest with one monitor connected."""

    def __init__(self, guest: Guest, pulse: Pulse, qmp: QMPClient) -> None:
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


@builds
@accels
@machines
@pytest.mark.parametrize("smp", [1, 2])
@pytest.mark.asyncio
async def test_every_cpu_beats_wherever_its_parts_lie(
    build: QemuBuild, accel: str, machine: str, smp: int
) -> None:
    async with running(build, machine, accel, smp=smp) as vm:
        pulse = vm.pulse
        for cpu in range(smp):
            before = pulse.heartbeat(cpu)
            assert await pulse.wait_beats(50, cpu) >= before.count + 50
            assert pulse.heartbeat(cpu).last_tsc > before.last_tsc
            for high in (High.CODE, High.DATA, High.TABLES, EVERYTHING, High.NOTHING):
                await pulse.place(cpu, high)
                state = pulse.cpu_state(cpu)
                assert state.alive
                assert state.high == high
                await pulse.wait_beats(50, cpu)
            assert pulse.heartbeat(cpu).count > before.count
        # The mailbox went along, and nothing faulted on the way.
        assert await pulse.read_config(HOST_BRIDGE, 0, 2) == 0x8086
        header = pulse.header()
        assert header is not None
        assert header.boots == 1


@builds
@accels
@machines
@pytest.mark.asyncio
async def test_boots_from_disk_through_the_bios(build: QemuBuild, accel: str, machine: str) -> None:
    async with running(build, machine, accel, smp=2, disk=True) as vm:
        for cpu in range(2):
            await vm.pulse.wait_beats(50, cpu)
        # The BIOS has copied itself into RAM and locked it: nobody did that without firmware.
        found = await vm.at(0xF0000)
        assert found is not None
        assert (found.kind, found.name) == (Kind.ROM, "pc.ram")


@builds
@accels
@machines
@pytest.mark.asyncio
async def test_register_writes_change_the_map(build: QemuBuild, accel: str, machine: str) -> None:
    bridge = BRIDGES[machine]
    async with running(build, machine, accel, "-device", "VGA") as vm:
        pulse = vm.pulse
        await pam_changes_the_map(vm, bridge, accel)
        # Without SMM (KVM that cannot, QEMU >= 10) Q35 leaves out SMRAM and TSEG, and the
        # default of ESMRAMC with them (`has_smm_ranges` in hw/pci-host/q35.c).
        esmramc = bridge.esmramc
        smm = esmramc is None or await pulse.read_config(HOST_BRIDGE, esmramc, 1) != 0
        if smm:
            # RAM behind the VGA window opens and closes.
            await pulse.write_config(HOST_BRIDGE, bridge.smram, 0x4A, 1)
            assert kind(await vm.at(0xA0000)) is Kind.RAM
            await pulse.write_config(HOST_BRIDGE, bridge.smram, 0x0A, 1)
            assert kind(await vm.at(0xA0000)) is Kind.IO
        if esmramc is not None and smm:
            assert kind(await vm.at(MEMORY - 1)) is Kind.RAM
            await pulse.write_config(HOST_BRIDGE, esmramc, 0x01, 1)
            tseg = await vm.at(MEMORY - 1)
            assert tseg is not None
            assert (tseg.kind, tseg.start) == (Kind.IO, MEMORY - (1 << 20))
            await pulse.write_config(HOST_BRIDGE, esmramc, 0x00, 1)
            assert kind(await vm.at(MEMORY - 1)) is Kind.RAM
        if bridge.pciexbar is not None:
            await pulse.write_config(HOST_BRIDGE, bridge.pciexbar, 0x1000_0001, 8)
            window = await vm.at(0x1000_0000)
            assert window is not None
            assert (window.kind, window.start, window.size) == (Kind.IO, 256 << 20, 256 << 20)
            # The guest sees it too: configuration space of 00:00.0 in place of RAM.
            assert await pulse.peek(0x1000_0000, 2) == 0x8086
            await pulse.write_config(HOST_BRIDGE, bridge.pciexbar, 0, 8)
            assert kind(await vm.at(0x1000_0000)) is Kind.RAM


async def pam_changes_the_map(vm: Vm, bridge: HostBridge, accel: str) -> None:
    """The BIOS area and one 16 KiB segment through all that PAM can say."""
    pulse = vm.pulse
    for register, address, shift in ((bridge.pam, 0xF0000, 4), (bridge.pam + 1, 0xC4000, 4)):
        await pulse.write_config(HOST_BRIDGE, register, 0, 1)
        closed = await vm.at(address)
        assert closed is None or closed.name != "pc.ram"
        await pulse.write_config(HOST_BRIDGE, register, 0x3 << shift, 1)
        opened = await vm.at(address)
        assert opened is not None
        assert (opened.kind, opened.name) == (Kind.RAM, "pc.ram")
        await pulse.poke(address, 0xA5A5_0001, 4)
        await pulse.write_config(HOST_BRIDGE, register, 0x1 << shift, 1)
        locked = await vm.at(address)
        assert locked is not None
        assert (locked.kind, locked.name) == (Kind.ROM, "pc.ram")
        # QEMU's slot flags follow the region, not the read-only alias: KVM lets this write pass.
        if accel == "tcg":
            await pulse.poke(address, 0, 4)
        assert await pulse.peek(address, 4) == 0xA5A5_0001
        await pulse.write_config(HOST_BRIDGE, register, 0, 1)
        assert await vm.at(address) == closed


@builds
@accels
@machines
@pytest.mark.asyncio
async def test_a_bar_of_a_hotplugged_device_is_mapped_and_unmapped(
    build: QemuBuild, accel: str, machine: str
) -> None:
    port = ("-device", "pcie-root-port,id=rp0,slot=1,addr=3") if machine == "q35" else ()
    async with running(build, machine, accel, *port) as vm:
        pulse = vm.pulse
        await vm.execute(
            "object-add", **{"qom-type": "memory-backend-ram", "id": "m0", "size": 1 << 20}
        )
        where: dict[str, object] = {"addr": "5"}
        device = PciAddress(0, 5)
        if machine == "q35":
            # What a BIOS does for a root port: bus numbers, a window, decoding.
            where = {"bus": "rp0"}
            device = PciAddress(1, 0)
            await pulse.write_config(PciAddress(0, 3), 0x18, 0x010100, 4)
            await pulse.write_config(PciAddress(0, 3), 0x20, 0xFE10_FE00, 4)
            await pulse.write_config(PciAddress(0, 3), 0x04, 0x0006, 2)
        with pytest.raises(OperationFailed, match="no such device"):
            await pulse.map_bar(device, 2, 0xFE00_0000)
        await vm.execute("device_add", driver="ivshmem-plain", id="iv0", memdev="m0", **where)
        assert await pulse.read_config(device, 0, 4) == 0x1110_1AF4
        assert await vm.at(0xFE00_0000) is None
        await pulse.map_bar(device, 2, 0xFE00_0000)
        mapped = await vm.at(0xFE00_0000)
        assert mapped is not None
        assert (mapped.kind, mapped.start, mapped.size) == (Kind.RAM, 0xFE00_0000, 1 << 20)
        await pulse.poke(0xFE00_0FF8, 0x1122_3344_5566_7788, 8)
        assert await pulse.peek(0xFE00_0FF8, 8) == 0x1122_3344_5566_7788
        await pulse.unmap_bar(device)
        assert await vm.at(0xFE00_0000) is None
        if machine == "pc":
            await pulse.map_bar(device, 2, 0x20_0000_0000)
            assert kind(await vm.at(0x20_0000_0000)) is Kind.RAM


@builds
@accels
@machines
@pytest.mark.asyncio
async def test_a_toggle_writes_as_often_as_asked(
    build: QemuBuild, accel: str, machine: str
) -> None:
    pam = BRIDGES[machine].pam
    async with running(build, machine, accel, smp=2) as vm:
        pulse = vm.pulse
        await pulse.place(1, High.DATA)
        toggle = await pulse.toggle(HOST_BRIDGE, pam, (0x30, 0x00), 41, period=20)
        assert await toggle.wait() == 41
        log = toggle.writes()
        assert log.lost == 0
        assert [w.index for w in log.writes] == list(range(41))
        assert [w.value for w in log.writes] == [0x30, 0x00] * 20 + [0x30]
        stamps = [t for w in log.writes for t in (w.begin_tsc, w.begin_tsc + w.ticks)]
        assert stamps == sorted(stamps)
        opened = await vm.at(0xF0000)
        assert opened is not None
        assert (opened.kind, opened.name) == (Kind.RAM, "pc.ram")
        await pulse.wait_beats(50, 1)

        # By ticks, with a pause between the writes; another is refused meanwhile; stopped early.
        slow = await pulse.toggle(
            HOST_BRIDGE, pam, (0x00, 0x30), 1 << 40, period=2_000_000, unit="ticks"
        )
        await pulse.wait_for(lambda: slow.done >= 3, 10, lambda: "three writes")
        with pytest.raises(OperationFailed, match="not finished"):
            await pulse.toggle(HOST_BRIDGE, pam, (0x00, 0x30), 1)
        with pytest.raises(OperationFailed, match="not finished"):
            await pulse.place(0, High.DATA)
        done = await slow.stop()
        await pulse.wait_beats(50)
        assert slow.done == done
        writes = slow.writes().writes
        for one, following in itertools.pairwise(writes):
            assert following.begin_tsc - (one.begin_tsc + one.ticks) >= 2_000_000


async def many_gaps(pulse: Pulse, cpu: int) -> None:
    await pulse.wait_for(lambda: pulse.heartbeat(cpu).gaps > 300, 10, lambda: "gaps")


@builds
@accels
@pytest.mark.asyncio
async def test_gaps_above_the_threshold_are_kept(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel, smp=2) as vm:
        pulse = vm.pulse
        for cpu in range(2):
            # Every beat is a gap of at least a tick: the ring fills and wraps.
            await pulse.reset(cpu, threshold=0)
            await many_gaps(pulse, cpu)
            await pulse.reset(cpu, threshold=1 << 50)
            beat = pulse.heartbeat(cpu)
            assert (beat.gaps, beat.threshold) == (0, 1 << 50)
            assert pulse.gaps(cpu).gaps == ()
            await pulse.wait_beats(50, cpu)
            after = pulse.heartbeat(cpu)
            assert after.gaps == 0
            assert after.max_gap > 0
            assert beat.reset_tsc < after.max_gap_tsc <= pulse.heartbeat(cpu).last_tsc

        # Stopped: frozen and readable.  Then the stop itself is a gap where the TSC went on.
        await vm.execute("stop")
        frozen = pulse.heartbeat()
        assert pulse.heartbeat() == frozen
        await vm.execute("cont")
        await pulse.wait_beats(50)
        assert pulse.heartbeat().count > frozen.count


@builds
@accels
@pytest.mark.asyncio
async def test_the_gap_ring_holds_the_latest_gaps(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel) as vm:
        pulse = vm.pulse
        await pulse.reset(threshold=0)
        await many_gaps(pulse, 0)
        await vm.execute("stop")
        log = pulse.gaps()
        beat = pulse.heartbeat()
        assert len(log.gaps) + log.lost == beat.gaps
        assert len(log.gaps) == 127
        assert [g.count for g in log.gaps] == sorted({g.count for g in log.gaps})
        for one, following in itertools.pairwise(log.gaps):
            assert following.end_tsc - following.ticks >= one.end_tsc
        assert max(g.ticks for g in log.gaps) <= beat.max_gap


@builds
@accels
@pytest.mark.asyncio
async def test_a_reset_boots_the_guest_again(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel, smp=2) as vm:
        await vm.pulse.place(1, EVERYTHING)
        await vm.execute("system_reset")

        def again() -> bool:
            header = vm.pulse.header()
            return header is not None and header.boots == 2 and header.ready

        await vm.pulse.wait_for(again, 20, lambda: "its second boot")
        assert vm.pulse.cpu_state(1).high == High.NOTHING
        await vm.pulse.wait_beats(50, 1)


@builds
@accels
@pytest.mark.asyncio
async def test_the_clock_agrees_with_a_round_trip(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel) as vm:
        clock = await vm.pulse.calibrate(0.1)
        assert clock.error_ns > 0
        first = await vm.pulse.port_out(0x80, 1, 1)
        second = await vm.pulse.port_out(0x80, 2, 1)
        assert first.begin_tsc < first.end_tsc < second.begin_tsc < second.end_tsc
        assert clock.to_ns(second.begin_tsc) > clock.to_ns(first.begin_tsc)


@builds
@pytest.mark.asyncio
async def test_refusals_leave_the_guest_beating(build: QemuBuild) -> None:
    async with running(build, "pc", "tcg") as vm:
        pulse = vm.pulse
        for refused in (
            pulse.command(99),
            pulse.read_config(HOST_BRIDGE, 0x59, 2),
            pulse.read_config(HOST_BRIDGE, 0x100, 1),
            pulse.port_in(0x10000, 1),
            pulse.peek(1 << 32, 4),
            pulse.map_bar(HOST_BRIDGE, 6, 0xFE000000),
            pulse.unmap_bar(PciAddress(0, 31)),
        ):
            with pytest.raises(OperationFailed, match="refused"):
                await refused
        with pytest.raises(OperationFailed, match="no such device or CPU"):
            await pulse.command(10, 1, 0)
        await pulse.wait_beats(50)
        assert await pulse.port_in(0x61, 1) is not None


@builds
@accels
@pytest.mark.asyncio
async def test_qtest_reshapes_a_running_guest(build: QemuBuild, accel: str) -> None:
    async with running(build, "pc", accel, smp=2, qtest=True) as vm:
        assert vm.guest.qtest is not None
        async with await QTest.connect(vm.guest.qtest) as qtest:
            assert await qtest.read_config(HOST_BRIDGE, 0, 4) == 0x1237_8086
            await qtest.write_config(HOST_BRIDGE, I440FX.pam, 0x30, 1)
            assert kind(await vm.at(0xF0000)) is Kind.RAM
            await qtest.writeq(0xF0000, 0x0123_4567_89AB_CDEF)
            assert await qtest.readq(0xF0000) == 0x0123_4567_89AB_CDEF
            assert await vm.pulse.peek(0xF0000, 8) == 0x0123_4567_89AB_CDEF
            await qtest.write_config(HOST_BRIDGE, I440FX.pam, 0x00, 1)
            assert kind(await vm.at(0xF0000)) is not Kind.RAM
            with pytest.raises(ValueError, match="value"):
                await qtest.outb(0x80, 0x100)
            with pytest.raises(ValueError, match="wide"):
                await qtest.port_in(0x80, 8)
            with pytest.raises(ValueError, match="cross"):
                await qtest.read_config(HOST_BRIDGE, 0x5B, 2)
        await vm.pulse.wait_beats(50, 1)
        # QEMU takes the next client.
        async with await QTest.connect(vm.guest.qtest) as qtest:
            assert await qtest.inl(0xCF8) == HOST_BRIDGE.config_address(I440FX.pam)


@builds
@pytest.mark.asyncio
async def test_qtest_notices_that_qemu_is_gone(build: QemuBuild) -> None:
    async with launch(GuestSpec(accel="tcg", qtest=True, args=boot_args()).on(build)) as guest:
        assert guest.qtest is not None
        async with await QTest.connect(guest.qtest) as qtest:
            assert await qtest.inw(0xCFC) >= 0
            guest.process.kill()
            await guest.process.wait()
            with pytest.raises(TargetLost):
                await qtest.inb(0x80)
            with pytest.raises(TargetLost):
                await qtest.inb(0x80)
        with pytest.raises(TargetUnreachable):
            await QTest.connect(guest.qtest)


def gone(guest: Guest) -> bool:
    assert guest.ram is not None
    return not guest.running and not guest.directory.exists() and not guest.ram.exists()


@builds
@pytest.mark.asyncio
async def test_launch_cleans_up_after_an_exception_and_a_cancellation(build: QemuBuild) -> None:
    spec = GuestSpec(accel="tcg", memory=16 << 20, args=boot_args(), monitors=3).on(build)
    started: asyncio.Queue[Guest] = asyncio.Queue()

    async def fail() -> None:
        async with launch(spec) as failing:
            started.put_nowait(failing)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    guest = started.get_nowait()
    assert len(guest.monitors) == 3
    assert gone(guest)

    async def hold() -> None:
        async with launch(spec) as held:
            started.put_nowait(held)
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    async with asyncio.timeout(10):
        guest = await started.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(guest)


@builds
@pytest.mark.asyncio
async def test_launch_notices_a_guest_that_was_killed(build: QemuBuild) -> None:
    async with launch(GuestSpec(accel="tcg", args=boot_args()).on(build)) as guest:
        guest.process.kill()
        await guest.process.wait()
        assert not guest.running
    assert gone(guest)


@builds
@pytest.mark.asyncio
async def test_launch_tells_why_qemu_did_not_start(
    build: QemuBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    mkstemp = tempfile.mkstemp

    def remember(prefix: str, suffix: str, dir: Path) -> tuple[int, str]:  # noqa: A002 (mkstemp's)
        handle, name = mkstemp(prefix=prefix, suffix=suffix, dir=dir)
        made.append(Path(name))
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", remember)
    with pytest.raises(OperationFailed, match="no-such-device"):
        async with launch(GuestSpec(accel="tcg", args=("-device", "no-such-device")).on(build)):
            pass
    assert len(made) == 1
    assert not os.path.exists(made[0])  # noqa: ASYNC240 (a look at tmpfs)


@builds
@pytest.mark.asyncio
async def test_launch_without_shared_memory_or_monitors(build: QemuBuild) -> None:
    spec = GuestSpec(accel="tcg", monitors=0, shared_memory=False, args=boot_args())
    async with launch(spec.on(build)) as guest:
        assert guest.ram is None
        assert guest.monitors == ()
        assert guest.running


@pytest.mark.asyncio
async def test_a_missing_binary_is_a_missing_prerequisite() -> None:
    with pytest.raises(MissingPrerequisite, match="qemu-system-none") as caught:
        async with launch(GuestSpec(binary="qemu-system-none")):
            pass
    assert caught.value.remedy
    assert kvm_usable("qemu-system-none").reason == "qemu-system-none is not installed"


def test_side_by_side_qemus_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMP_MEMLISTENER_QEMUS", str(tmp_path))
    installed = find_qemus()
    for version, binary in (("99.0", "/bin/true"), ("98.1", "/no/such/binary")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "qemu.json").write_text(
            f'{{"version": "{version}.1", "binary": "{binary}", "aarch64": null,'
            ' "args": ["-L", "/x"], "env": {"QEMU_MODULE_DIR": "/y"}, "packages": []}'
        )
    (tmp_path / "unfinished").mkdir()
    assert find_qemus() == [
        *installed,
        QemuBuild("99.0.1", "/bin/true", None, ("-L", "/x"), {"QEMU_MODULE_DIR": "/y"}),
    ]
    (tmp_path / "unfinished" / "qemu.json").write_text("{")
    with pytest.raises(InputError, match="unfinished"):
        find_qemus()
