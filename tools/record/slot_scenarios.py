"""The scenarios of record_slots.py: guests, and the steps that reshape their memory maps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from tools.record._guest import Action, Guest, GuestError, Step, config, outb, qtest, seabios

__all__ = ["TRACE", "Scenario", "nothing", "scenarios"]

MIB = 1 << 20
LOGGED_S = 8
TRACE = "-D {tmp}/trace -trace kvm_set_user_memory -trace flatview_new"


def nothing(_: Guest) -> None:
    """What QEMU did before the first command."""


def qmp(command: str, **arguments: object) -> Action:
    def act(g: Guest) -> None:
        g.execute(command, **arguments)

    return act


def backend(name: str, size: int) -> Action:
    kind = {"qom-type": "memory-backend-ram", "id": name, "size": size, "share": True}
    return qmp("object-add", **kind)


def reset(g: Guest) -> None:
    g.events.clear()
    g.execute("system_reset")
    g.wait_event("RESET")


def eject(device: str, *writes: str) -> Action:
    """What a guest does when asked to let go of a device, and QEMU taking it away."""

    def act(g: Guest) -> None:
        g.events.clear()
        for line in writes:
            g.qtest(line)
        g.wait_event("DEVICE_DELETED", device=device)

    return act


def eject_dimm(slot: int, device: str) -> Action:
    """ACPI memory hotplug: selector, then the eject bit (docs/specs/acpi_mem_hotplug)."""
    return eject(device, f"outl 0xa00 {slot}", "outb 0xa14 0x8")


def migration(*statuses: str) -> Action:
    """Wait until query-migrate tells one of `statuses`."""

    def act(g: Guest) -> None:
        end = time.monotonic() + 30
        while True:
            told = g.execute("query-migrate")
            status = told.get("status") if isinstance(told, dict) else None
            if status in statuses:
                return
            if time.monotonic() > end:
                raise GuestError(f"migration is {status}, not {' or '.join(statuses)}")
            time.sleep(0.02)

    return act


def then(*actions: Action) -> Action:
    def act(g: Guest) -> None:
        for action in actions:
            action(g)

    return act


# Scenarios.


@dataclass(frozen=True, slots=True)
class Scenario:
    """A machine, its arguments and the steps to record."""

    machine: str
    name: str
    steps: tuple[Step, ...]
    args: str = ""
    options: str = ""

    @property
    def sample(self) -> str:
        return f"{self.machine}-{self.name}"

    def argv(self) -> list[str]:
        memory = "" if "-m " in self.args else "-m 128"
        parts = f"-machine {self.machine}{self.options} -accel kvm {memory} {TRACE} {self.args}"
        return parts.split()


def writes(slot: int, pairs: Iterator[tuple[int, int]], width: int = 1) -> tuple[Step, ...]:
    return tuple(
        (f"{reg:#04x}={value:#04x}", config(slot, (reg, value), width=width))
        for reg, value in pairs
    )


def pam_values(first: int) -> Iterator[tuple[int, int]]:
    """Every mode of the first two registers, the usual ones of the rest, then all of them open."""
    regs = range(first, first + 7)
    yield from ((first, v) for v in (0x10, 0x20, 0x30, 0x00))
    yield from ((first + 1, v) for v in (0x11, 0x22, 0x33, 0x31, 0x13, 0x03, 0x30, 0x00))
    for reg in regs[2:]:
        yield from ((reg, v) for v in (0x33, 0x11, 0x00))
    yield from ((reg, 0x33) for reg in regs)
    yield from ((reg, 0x11) for reg in regs)
    yield from ((reg, 0x00) for reg in reversed(regs))


def smram_values(reg: int) -> Iterator[tuple[int, int]]:
    """Enabled and closed, open, data closed, off, locked (hw/pci-host/i440fx.c, q35.c)."""
    return ((reg, v) for v in (0x0A, 0x4A, 0x0A, 0x2A, 0x0A, 0x02, 0x42, 0x02))


def vga_steps(slot: int) -> tuple[Step, ...]:
    return (
        ("bar0-map", config(slot, (0x10, 0xE0000008), (4, 3), width=4)),
        ("all-planes", outb((0x3C4, 2), (0x3C5, 15))),
        ("chain4", outb((0x3C4, 4), (0x3C5, 14))),
        ("window-64k", outb((0x3CE, 6), (0x3CF, 5))),
        ("window-128k", outb((0x3CE, 6), (0x3CF, 1))),
        ("window-b8000", outb((0x3CE, 6), (0x3CF, 13))),
        ("window-a0000", outb((0x3CE, 6), (0x3CF, 5))),
        ("vbe-on", qtest("outw 0x1ce 4", "outw 0x1d0 0x1")),
        ("vbe-bank-1", qtest("outw 0x1ce 5", "outw 0x1d0 1")),
        ("vbe-off", qtest("outw 0x1ce 4", "outw 0x1d0 0")),
        ("planar", outb((0x3C4, 4), (0x3C5, 6))),
        ("chain4-again", outb((0x3C4, 4), (0x3C5, 14))),
        ("rom-map", config(slot, (0x30, 0xFEB00001), width=4)),
        ("rom-unmap", config(slot, (0x30, 0xFEB00000), width=4)),
        ("bar0-move", config(slot, (0x10, 0xE2000008), width=4)),
        ("decoding-off", config(slot, (4, 0), width=4)),
        ("decoding-on", config(slot, (4, 3), width=4)),
        ("reset", reset),
    )


def dimm_steps() -> tuple[Step, ...]:
    def plug(i: int, mib: int) -> Iterator[Step]:
        yield f"backend{i}", backend(f"m{i}", mib * MIB)
        yield f"plug{i}", qmp("device_add", driver="pc-dimm", id=f"dimm{i}", memdev=f"m{i}")

    return (
        *plug(0, 256),
        *plug(1, 128),
        ("ask-unplug0", qmp("device_del", id="dimm0")),
        ("eject0", eject_dimm(0, "dimm0")),
        ("backend-del0", qmp("object-del", id="m0")),
        *plug(2, 64),
        ("reset", reset),
        ("ask-unplug1", qmp("device_del", id="dimm1")),
        ("eject1", eject_dimm(1, "dimm1")),
    )


def bar2_steps(slot: int, bus: int = 0) -> Iterator[Step]:
    """BAR 2 of an ivshmem-plain, memory decoding, moves; the BAR stays mapped at the end."""

    def at(*pairs: tuple[int, int]) -> Action:
        return config(slot, *pairs, width=4, bus=bus)

    yield "bar2-low", at((0x18, 0xE000000C))
    yield "bar2-high", at((0x1C, 0))
    yield "decoding-on", at((4, 2))
    yield "decoding-off", at((4, 0))
    yield "decoding-on-again", at((4, 2))
    yield "bar2-move", at((0x18, 0xE080000C))
    yield "bar2-behind-ram", at((0x18, 0x0400000C))
    yield "bar2-back", at((0x18, 0xE000000C))


def ivshmem_steps(machine: str) -> tuple[Step, ...]:
    """Plug, map, move, unplug, twice.  On q35 it sits behind a root port, which is set up first."""
    plug_to, slot, bus, base = {
        "pc": ({"addr": "10"}, 0x10, 0, 0xAE00),
        "q35": ({"bus": "rp"}, 0, 1, 0xCC0),
    }[machine]
    steps: list[Step] = []
    if machine == "q35":
        steps = [
            ("bridge-buses", config(4, (0x18, 0x00010100), width=4)),
            ("bridge-window", config(4, (0x20, 0x0000FFF0), (0x24, 0xE0F1E001), width=4)),
            ("bridge-window-high", config(4, (0x28, 0), (0x2C, 0), width=4)),
            ("bridge-on", config(4, (4, 6), width=4)),
        ]
    for i in (0, 1):
        device = {"driver": "ivshmem-plain", "id": f"iv{i}", "memdev": f"m{i}"}
        # Bus selector, then the eject register with the slot's bit (docs/specs/acpi_pci_hotplug).
        gone = eject(f"iv{i}", f"outl {base + 0x10:#x} 0", f"outl {base + 8:#x} {1 << slot:#x}")
        steps += [
            (f"backend{i}", backend(f"m{i}", MIB << i)),
            (f"plug{i}", qmp("device_add", **device, **plug_to)),
            *((f"{name}{i}", action) for name, action in bar2_steps(slot, bus)),
            (f"ask-unplug{i}", qmp("device_del", id=f"iv{i}")),
            (f"eject{i}", gone),
            (f"backend-del{i}", qmp("object-del", id=f"m{i}")),
        ]
    return tuple(steps)


def migration_steps(pam: int) -> tuple[Step, ...]:
    """Dirty logging goes on and off, and slots come and go while it is on; VGA sits in slot 2."""
    slow = qmp("migrate-set-parameters", **{"max-bandwidth": 4096})
    fast = qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 30})
    start = qmp("migrate", uri="exec:cat >/dev/null")
    cancel = then(qmp("migrate_cancel"), migration("cancelled", "failed"))
    return (
        ("cont", qmp("cont")),
        ("start-running", then(slow, start, migration("active"))),
        ("pam-open", config(0, (pam + 1, 0x33))),
        ("pam-read-only", config(0, (pam + 1, 0x11))),
        ("bar0-unmap", config(2, (4, 0), width=4)),
        ("bar0-map", config(2, (4, 3), width=4)),
        ("pam-closed", config(0, (pam + 1, 0x00))),
        ("cancel-running", cancel),
        ("stop", qmp("stop")),
        ("start-stopped", then(start, migration("active"))),
        ("cancel-stopped", cancel),
        ("cont-again", qmp("cont")),
        ("complete", then(fast, start, migration("completed"))),
    )


def measuring(g: Guest) -> None:
    """Log all migratable RAM for some seconds (7.2 knows no other unit)."""
    g.execute("calc-dirty-rate", **{"calc-time": LOGGED_S, "mode": "dirty-bitmap"})
    dirty_rate(g, "measuring")


def measured(g: Guest) -> None:
    dirty_rate(g, "measured")


def dirty_rate(g: Guest, status: str) -> None:
    end = time.monotonic() + 3 * LOGGED_S
    while True:
        told = g.execute("query-dirty-rate")
        if isinstance(told, dict) and told.get("status") == status:
            return
        if time.monotonic() > end:
            raise GuestError(f"the dirty rate is not {status}")
        time.sleep(0.02)


def logged_steps() -> Iterator[Step]:
    """RAM comes while a dirty-rate measurement runs (QEMU plugs nothing while it migrates).

    A write to PAM follows each plug, for the commit that it makes.
    """
    devices: tuple[dict[str, object], ...] = (
        {"driver": "pc-dimm"},
        {"driver": "nvdimm"},
        {"driver": "nvdimm", "label-size": 128 << 10},
        {"driver": "virtio-mem-pci", "requested-size": 64 * MIB},
        {"driver": "pc-dimm"},
        {"driver": "virtio-pmem-pci"},
        {"driver": "ivshmem-plain", "addr": "10"},
    )
    yield "cont", qmp("cont")
    for i in range(len(devices)):
        yield f"backend{i}", backend(f"m{i}", 128 * MIB)
    yield "measure", measuring
    for i, device in enumerate(devices):
        name = f"plug{i}-{device['driver']}"
        yield name, qmp("device_add", id=f"d{i}", memdev=f"m{i}", **device)
        if device["driver"] == "ivshmem-plain":
            bar2 = ((0x18, 0xE000000C), (0x1C, 0), (4, 2))
            yield f"bar2-map{i}", config(0x10, *bar2, width=4)
        yield f"pam{i}", config(0, (0x5A, 0x00 if i % 2 else 0x33))
    yield "measured", measured


def pc_and_q35(machine: str) -> Iterator[Scenario]:
    pam, smram = {"pc": (0x59, 0x72), "q35": (0x90, 0x9D)}[machine]
    opened = writes(0, iter([(pam + 1, 0x33), (pam + 2, 0x31)]))
    dirty = (*opened, ("reset", reset))
    hot = "-m 128,slots=4,maxmem=4G"
    port = "-device pcie-root-port,id=rp,bus=pcie.0,addr=4,chassis=1" if machine == "q35" else ""
    yield Scenario(machine, "pam", writes(0, pam_values(pam)))
    yield Scenario(machine, "smram", writes(0, smram_values(smram)), "-device VGA")
    yield Scenario(machine, "reset", (*dirty, ("reset-again", reset)))
    yield Scenario(machine, "vga", vga_steps(2), "-device VGA,addr=2")
    yield Scenario(machine, "dimm", dimm_steps(), hot)
    yield Scenario(machine, "ivshmem", ivshmem_steps(machine), f"{hot} {port}")
    bar0 = (("bar0-map", config(2, (0x10, 0xE0000008), (4, 3), width=4)),)
    quiet = f"-bios {{tmp}}/quiet.bin -device VGA,addr=2 {hot}"
    yield Scenario(machine, "migration", (*bar0, *migration_steps(pam)), quiet)
    rom = (
        ("rom-map", config(2, (0x30, 0xFEB00001), (4, 2), width=4)),
        ("small-rom-map", config(3, (0x30, 0xFEB10801), (4, 2), width=4)),
        ("rom-move", config(2, (0x30, 0xFEB20001), width=4)),
        ("small-rom-unmap", config(3, (0x30, 0xFEB10800), width=4)),
        ("rom-unmap", config(2, (4, 0), width=4)),
    )
    roms = (
        "-device virtio-rng-pci,addr=2,romfile={tmp}/rom8k.bin"
        " -device virtio-rng-pci,addr=3,romfile={tmp}/rom2k.bin"
    )
    yield Scenario(machine, "rom", rom, roms)
    flash = (
        "-drive if=pflash,format=raw,readonly=on,file={tmp}/flash0.img"
        " -drive if=pflash,format=raw,file={tmp}/flash1.img"
    )
    modes = (
        ("flash1-command", qtest("writeb 0xfffa0000 0x90")),
        ("flash1-array", qtest("writeb 0xfffa0000 0xff")),
        ("flash0-command", qtest("writeb 0xfffc0000 0x70")),
        ("flash1-command-too", qtest("writeb 0xfffa0000 0x90")),
        ("reset", reset),
    )
    yield Scenario(machine, "pflash", modes, flash)
    disk = (
        "-drive if=none,id=boot,format=raw,file={tmp}/boot.img"
        " -device ide-hd,drive=boot,bootindex=0 -device VGA"
    )
    boot = (("boot", seabios), ("reset", reset), ("boot-again", seabios))
    yield Scenario(machine, "seabios", boot, disk)
    numa = (
        "-m 5G,slots=4,maxmem=16G -smp 2 -object memory-backend-ram,id=n0,size=2G"
        " -object memory-backend-ram,id=n1,size=3G"
        " -numa node,nodeid=0,cpus=0,memdev=n0 -numa node,nodeid=1,cpus=1,memdev=n1"
    )
    yield Scenario(machine, "numa", (*dirty, *dimm_steps()), numa)


def q35_only() -> Iterator[Scenario]:
    tseg = (
        *((0x9D, 0x0A), (0x9E, 0x01), (0x9E, 0x03), (0x9E, 0x05), (0x9E, 0x07), (0x9E, 0x00)),
        *((0x9E, 0x81), (0x9D, 0x4A), (0x9D, 0x02), (0x9D, 0x0A), (0x9E, 0x03)),
    )
    yield Scenario("q35", "tseg", (*writes(0, iter(tseg)), ("reset", reset)))
    # 256, 128 and 64 MiB, in RAM, across its end, outside, and off.
    bars = (
        *(0xB0000001, 0x10000001, 0x10000003, 0x10000005, 0x14000005, 0x30000001),
        *(0xB0000001, 0x00000001, 0xB0000001, 0xB0000000, 0x20000005, 0, 0x10000003),
    )
    pciexbar = writes(0, iter([(0x60, value) for value in bars]), width=4)
    yield Scenario("q35", "pciexbar", (*pciexbar, ("reset", reset)), "-m 896")
    smbase = ((0x9C, 0xFF), (0x9C, 0x01), (0x9C, 0x02))
    yield Scenario("q35", "smbase", (*writes(0, iter(smbase)), ("reset", reset)))


def pc_only() -> Iterator[Scenario]:
    args = "-bios {tmp}/quiet.bin -m 128,slots=4,maxmem=8G"
    yield Scenario("pc", "logged", tuple(logged_steps()), args, ",nvdimm=on")


def scenarios() -> list[Scenario]:
    return [*pc_and_q35("pc"), *pc_only(), *pc_and_q35("q35"), *q35_only()]
