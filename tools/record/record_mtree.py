#!/usr/bin/env python3
"""Record `info mtree` of throw-away guests together with QEMU's own flat view as the oracle.

    $ python tools/side_by_side.py                 # once, for the versions beside the installed one
    $ python tools/record/record_mtree.py --list
    $ python tools/record/record_mtree.py --only 'q35-*-kvm-*' --version 10.0

Writes `tests/conformance/mtree/<version>/<machine>-<set>-<accel>-<state>.json.gz`; the README
there tells the format.  All outputs of a sample show the same state: the guest is stopped, and
the tree is read before and after and must be equal.  `info mtree -f` leaks FlatViews, which is
why only guests that are thrown away are recorded.

Exit codes: 0 all recorded, 1 a sample that the version should offer was not recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.record._guest import (
    SAMPLES,
    Action,
    Guest,
    GuestError,
    Qemu,
    Step,
    config,
    die_by_sigterm,
    kvm_usable,
    outb,
    parse_arguments,
    qtest,
    say,
    seabios,
    steady,
    write_sample,
)

__all__ = ["Scenario", "main", "scenarios"]

MIB, GIB = 1 << 20, 1 << 30
ALWAYS = (" -o", " -o -D", " -f -o")
FIRST = ("", " -D", " -f")  # say nothing that the others do not; kept where they cost little
DISPATCH = " -f -d -o -D"
BIG = 40_000
TRIES = 5


# What leads from one recorded state to the next.


def reset(_: Guest) -> None:
    """The state that `-S` leaves: no guest instruction has run."""


def settled(g: Guest) -> None:
    """Firmware that boots no disk has run until the map no longer changes."""
    g.execute("cont")
    steady(lambda: g.hmp("info mtree -o -D"), times=6)
    g.execute("stop")


def plug(driver: str, size: int = 0, **properties: object) -> Action:
    """device_add, on a memory backend of `size` bytes when that is not 0."""

    def act(g: Guest) -> None:
        memdev = {}
        if size:
            memdev = {"memdev": f"m-{properties['id']}"}
            backend = {"qom-type": "memory-backend-ram", "id": memdev["memdev"], "size": size}
            g.execute("object-add", **backend, share=True)
        g.execute("device_add", driver=driver, **memdev, **properties)

    return act


def pam(machine: str, *values: int) -> Action:
    """All seven PAM registers, `values` in turn (hw/pci-host/pam.c)."""
    first = {"pc": 0x59, "q35": 0x90}[machine]
    return config(0, *((first + i, values[i % len(values)]) for i in range(7)))


def bar2(slot: int, address: int) -> Action:
    """Map BAR 2, a 64-bit one, anew: memory decoding off, address, decoding on."""
    return config(slot, (4, 0), (0x18, address | 0xC), (0x1C, 0), (4, 2), width=4)


RESET: Step = ("reset", reset)
BOOTED: tuple[Step, ...] = (RESET, ("seabios", seabios))
SETTLED: tuple[Step, ...] = (RESET, ("firmware", settled))
VGA_MODES: tuple[Step, ...] = (
    ("chain4", outb((0x3C4, 2), (0x3C5, 15), (0x3C4, 4), (0x3C5, 14), (0x3CE, 6), (0x3CF, 5))),
    ("planar", outb((0x3C4, 4), (0x3C5, 6))),
)


# Machines and device sets.


@dataclass(frozen=True, slots=True)
class Scenario:
    """A machine with a device set, and the states to record one after the other in one guest."""

    machine: str
    set: str
    args: str = ""
    steps: tuple[Step, ...] = BOOTED
    options: str = ""
    arch: str = "x86_64"
    accels: tuple[str, ...] = ("kvm", "tcg")
    since: tuple[int, int] = (0, 0)
    dispatch: bool = False

    def sample(self, accel: str, state: str) -> str:
        return f"{self.machine}-{self.set}-{accel}-{state}"

    def argv(self, accel: str) -> list[str]:
        parts = f"-machine {self.machine}{self.options} -accel {accel}"
        if "-m " not in self.args:
            parts += " -m 128"
        if any(action is seabios for _, action in self.steps):
            parts += " -drive if=none,id=boot,format=raw,file={tmp}/boot.img"
            parts += " -device ide-hd,drive=boot,bootindex=0"
        return f"{parts} {self.args}".split()


HOT = "-m 128,slots=8,maxmem=8G"
NUMA = (
    "-m 6G -smp 2 -object memory-backend-ram,id=n0,size=2G -object memory-backend-ram,id=n1,size=4G"
    " -numa node,nodeid=0,cpus=0,memdev=n0 -numa node,nodeid=1,cpus=1,memdev=n1"
)
FLASH = (
    "-drive if=pflash,format=raw,readonly=on,file={tmp}/flash0.img"
    " -drive if=pflash,format=raw,file={tmp}/flash1.img"
)
MISC = (
    "-chardev null,id=ch -device edu -device pci-testdev -device vmxnet3 -device rtl8139"
    " -device pcnet -device intel-hda -device lsi53c895a -device ich9-usb-ehci1"
    " -device i6300esb -device pvpanic -device isa-debugcon,iobase=0x402,chardev=ch"
    " -device vmcoreinfo"
    " -device virtio-balloon-pci -device virtio-rng-pci -device sdhci-pci -device ramfb"
)
NVME = "-blockdev null-co,node-name=null0 -device nvme,serial=1,drive=null0"
IVSHMEM = "-object memory-backend-ram,id={0},size={1},share=on -device ivshmem-plain,memdev={0}"
NVDIMM = "-object memory-backend-ram,id=nv0,size=64M -device nvdimm,memdev=nv0,label-size=128K"
DIMM = "-object memory-backend-ram,id=d0,size=256M -device pc-dimm,memdev=d0"
VMEM = (
    "-object memory-backend-ram,id=vm0,size=1G"
    " -device virtio-mem-pci,memdev=vm0,requested-size=256M,id=vmem0"
)
CXL = (
    "-m 128,slots=8,maxmem=8G -object memory-backend-ram,id=cm,size=256M,share=on"
    " -object memory-backend-ram,id=lsa,size=256M,share=on"
    " -device pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.1"
    " -device cxl-rp,port=0,bus=cxl.1,id=crp,chassis=0,slot=2"
    " -device cxl-type3,bus=crp,memdev=cm,lsa=lsa,id=c0"
    " -machine cxl-fmw.0.targets.0=cxl.1,cxl-fmw.0.size=4G"
)


def root_ports(count: int) -> str:
    """PCIe root ports rp0… on bus pcie.0, eight to a slot, from slot 4 on."""
    return " ".join(
        f"-device pcie-root-port,bus=pcie.0,id=rp{i},chassis={i + 1},addr={4 + i // 8:x}.{i % 8}"
        f",multifunction={'on' if i % 8 == 0 else 'off'}"
        for i in range(count)
    )


def pc_and_q35(machine: str) -> Iterator[Scenario]:
    """Device sets that both PC machines take."""
    smram = {"pc": 0x72, "q35": 0x9D}[machine]
    yield Scenario(machine, "plain", dispatch=True)
    yield Scenario(machine, "smp4-5g", "-smp 4 -m 5G")
    yield Scenario(machine, "numa", NUMA)
    yield Scenario(machine, "smm-off", options=",smm=off")
    yield Scenario(machine, "split-irqchip", options=",kernel-irqchip=split", accels=("kvm",))
    pams = {
        "open": (0x33,),
        "read-only": (0x11,),
        "write-only": (0x22,),
        "mixed": (0x30, 0x13, 0x21, 0x02),
        "closed": (0,),
    }
    steps = tuple((name, pam(machine, *values)) for name, values in pams.items())
    yield Scenario(machine, "pam", steps=steps)
    smrams = {"closed": 0x0A, "open": 0x4A, "data-closed": 0x2A, "off": 0x02}
    steps = tuple((name, config(0, (smram, value))) for name, value in smrams.items())
    yield Scenario(machine, "smram", "-device VGA", steps)
    for display in ("VGA", "cirrus-vga", "qxl-vga", "virtio-vga", "bochs-display"):
        modes = VGA_MODES if display == "VGA" else ()
        yield Scenario(machine, display.lower(), f"-device {display}", (*BOOTED, *modes))
    for nic in ("e1000", "e1000e", "virtio-net-pci"):
        yield Scenario(machine, nic, f"-device {nic}")
    yield Scenario(machine, "nvme-xhci", f"{NVME} -device qemu-xhci -device usb-tablet")
    yield Scenario(machine, "misc", MISC)
    yield Scenario(machine, "ivshmem", IVSHMEM.format("iv0", "1M"))
    yield Scenario(machine, "dimm", f"{HOT} {DIMM}")
    yield Scenario(machine, "nvdimm", f"{HOT} {NVDIMM}", options=",nvdimm=on")
    yield Scenario(machine, "virtio-mem", f"{HOT} {VMEM}")
    slots = f"{HOT} {VMEM},dynamic-memslots=on"
    yield Scenario(machine, "virtio-mem-slots", slots, since=(8, 2))
    command_mode = ("command-mode", qtest("writeb 0xfffa0000 0x90"))
    yield Scenario(machine, "pflash", FLASH, (RESET, command_mode, BOOTED[1]))
    dimms = (
        ("dimm", plug("pc-dimm", 256 * MIB, id="dimm0")),
        ("dimm2", plug("pc-dimm", GIB, id="dimm1")),
        ("nvdimm", plug("nvdimm", 64 * MIB, id="nvdimm0")),
        BOOTED[1],
    )
    yield Scenario(machine, "hotplug", HOT, dimms, options=",nvdimm=on")
    bars = " ".join(
        IVSHMEM.format(name, size) + f",addr={slot}"
        for name, size, slot in (("big", "16M", "10"), ("small", "4M", "11"))
    )
    steps = (
        ("big", bar2(0x10, 0xE0000000)),
        ("apart", bar2(0x11, 0xE4000000)),
        ("small-in-front", bar2(0x11, 0xE0400000)),
        ("big-in-front", bar2(0x10, 0xE0000000)),
        ("behind-ram", bar2(0x10, 0x07000000)),
    )
    yield Scenario(machine, "bars", bars, steps)


def pc_only() -> Iterator[Scenario]:
    bridges = (
        "-device pci-bridge,id=b1,chassis_nr=1,addr=8 -device pci-bridge,id=b2,bus=b1,chassis_nr=2"
        ",addr=1 -device e1000,bus=b2,addr=2 -device VGA,bus=b1,addr=3"
    )
    hot = (
        ("ivshmem", plug("ivshmem-plain", MIB, id="iv0", addr="10")),
        ("bar", bar2(0x10, 0xE0000000)),
        ("virtio-mem", plug("virtio-mem-pci", GIB, id="vm0", addr="11")),
    )
    yield Scenario("pc", "bridges", bridges)
    yield Scenario("pc", "hot-pci", HOT, hot)
    yield Scenario("isapc", "plain", "-device isa-vga -device ne2k_isa")
    yield Scenario("none", "plain", steps=(RESET,))
    yield Scenario("microvm", "plain", steps=SETTLED)
    mmio = "-device virtio-net-device -device virtio-rng-device -m 5G"
    yield Scenario("microvm", "virtio-mmio", mmio, SETTLED)
    yield Scenario("microvm", "pcie", "-device e1000e", SETTLED, options=",pcie=on,ioapic2=on")


def q35_only() -> Iterator[Scenario]:
    tsegs = {
        "1m": (0x9E, 1), "2m": (0x9E, 3), "8m": (0x9E, 5), "extended": (0x9E, 7),
        "high-smram": (0x9E, 0x81), "off": (0x9E, 0),
    }  # fmt: skip
    smram: Step = ("smram", config(0, (0x9D, 0x0A)))
    sizes = ((name, config(0, write)) for name, write in tsegs.items())
    yield Scenario("q35", "tseg", steps=(smram, *sizes))
    mmcfg = {
        "usual": 0xB0000001, "over-ram": 0x10000001, "over-ram-128m": 0x10000003,
        "over-ram-64m": 0x10000005, "moved": 0x20000005, "disabled": 0,
    }  # fmt: skip
    steps = tuple((name, config(0, (0x60, v), width=4)) for name, v in mmcfg.items())
    yield Scenario("q35", "pciexbar", "-m 1G", steps)
    yield Scenario("q35", "root-ports-32", root_ports(32))
    behind = (
        f"{root_ports(4)} -device e1000e,bus=rp0 -device virtio-net-pci,bus=rp1"
        f" {NVME},bus=rp2"
    )  # fmt: skip
    plugged = ("plugged", plug("ivshmem-plain", MIB, id="iv0", bus="rp3"))
    yield Scenario("q35", "root-ports", behind, (*BOOTED, plugged))
    pxb = "-device pxb-pcie,id=pxb,bus_nr=64 -device pcie-root-port,id=prp,bus=pxb,chassis=9"
    yield Scenario("q35", "pxb", f"{pxb} -device e1000e,bus=prp")
    bridge = "-device pcie-pci-bridge,id=pb -device e1000,bus=pb,addr=2"
    yield Scenario("q35", "pci-bridge", bridge)
    split = ",kernel-irqchip=split"
    remap = f"-device intel-iommu,intremap=on {IVSHMEM.format('iv0', '1M')}"
    yield Scenario("q35", "intel-iommu", remap, options=split, accels=("kvm",))
    yield Scenario("q35", "intel-iommu", "-device intel-iommu -device e1000e", accels=("tcg",))
    yield Scenario("q35", "amd-iommu", "-device amd-iommu -device e1000e", accels=("tcg",))
    yield Scenario("q35", "virtio-iommu", "-device virtio-iommu-pci -device e1000e")
    yield Scenario("q35", "cxl", CXL, options=",cxl=on", accels=("tcg",))


def arm() -> Iterator[Scenario]:
    def virt(name: str, args: str, options: str = "", *steps: Step) -> Scenario:
        args = f"-cpu cortex-a57 {args}"
        return Scenario("virt", name, args, (RESET, *steps), options, "aarch64", ("tcg",))

    dimm = ("dimm", plug("pc-dimm", 256 * MIB, id="dimm0"))
    yield virt("plain", "")
    yield virt("gicv3-smp4-5g", "-smp 4 -m 5G", ",gic-version=3")
    yield virt("secure", "", ",secure=on,virtualization=on,gic-version=3")
    yield virt("smmu", "-device e1000e", ",iommu=smmuv3")
    yield virt("root-ports", f"{root_ports(8)} -device virtio-net-pci,bus=rp0")
    yield virt("dimm", f"{HOT} -bios {{tmp}}/quiet.bin", ",acpi=on", dimm)
    yield virt("virtio-mem", f"{HOT} {VMEM}")
    yield virt("devices", f"-device VGA -device virtio-rng-device {IVSHMEM.format('iv0', '1M')}")
    yield virt("pflash", f"-drive if=pflash,format=raw,file={{tmp}}/flash64.img {NVME}")
    yield Scenario("sbsa-ref", "plain", "-m 1G", (RESET,), arch="aarch64", accels=("tcg",))
    yield Scenario("raspi3b", "plain", "-m 1G", (RESET,), arch="aarch64", accels=("tcg",))


def scenarios() -> list[Scenario]:
    return [*pc_and_q35("pc"), *pc_only(), *pc_and_q35("q35"), *q35_only(), *arm()]


# Recording.


def outputs(g: Guest, *, first: bool, dispatch: bool) -> dict[str, str]:
    """The outputs of one state; raises GuestError when the map does not stand still."""
    for _ in range(TRIES):
        before = g.hmp("info mtree -o -D")
        options = (*ALWAYS, *(FIRST if first and len(before) < BIG else ()))
        options += (DISPATCH,) if first and dispatch else ()
        texts = {f"info mtree{o}": g.hmp(f"info mtree{o}") for o in options}
        texts["info ramblock"] = g.hmp("info ramblock")
        if before == texts["info mtree -o -D"] == g.hmp("info mtree -o -D"):
            return texts
    raise GuestError("the map changes under a stopped guest")


def record(qemu: Qemu, scenario: Scenario, accel: str, only: str) -> int:
    """Record the states of one guest; the number of bytes written.  Raises GuestError."""
    argv, total = scenario.argv(accel), 0
    with Guest(qemu, argv, arch=scenario.arch) as g:
        for i, (state, action) in enumerate(scenario.steps):
            name = scenario.sample(accel, state)
            action(g)
            if not fnmatch(name, only):
                continue
            document = {
                "name": name,
                "version": qemu.version,
                "machine": scenario.machine,
                "arch": scenario.arch,
                "accel": accel,
                "args": argv,
                "state": state,
                "outputs": outputs(g, first=i == 0, dispatch=scenario.dispatch),
            }
            size = write_sample(SAMPLES / "mtree" / qemu.label / f"{name}.json.gz", document)
            say(f"{qemu.label}  {name}  {size} bytes")
            total += size
    return total


def absent(qemu: Qemu, scenario: Scenario) -> str | None:
    """Why this QEMU cannot be asked for that scenario, or None."""
    if tuple(map(int, qemu.label.split("."))) < scenario.since:
        return f"only since {scenario.since[0]}.{scenario.since[1]}"
    if f"\n{scenario.machine} " not in qemu.help("machine", scenario.arch):
        return f"no machine {scenario.machine}"
    known = qemu.help("device", scenario.arch)
    argv = scenario.args.split()
    for flag, value in pairwise(argv):
        device = value.split(",")[0]
        if flag == "-device" and f'"{device}"' not in known:
            return f"no device {device}"
    return None


def last_line(exc: GuestError) -> str:
    """QEMU says why it gave up last."""
    return str(exc).strip().splitlines()[-1]


def main(argv: Sequence[str] | None = None) -> int:
    args, qemus = parse_arguments("Record info mtree of throw-away guests.", argv)
    die_by_sigterm()
    if not kvm_usable():
        say("no samples under -accel kvm: /dev/kvm is not usable by this user")

    total, failures = 0, 0
    for qemu in qemus:
        for scenario in scenarios():
            for accel in scenario.accels:
                names = [scenario.sample(accel, state) for state, _ in scenario.steps]
                if not any(fnmatch(n, args.only) for n in names):
                    continue
                reason = absent(qemu, scenario)
                if reason or args.list or (accel == "kvm" and not kvm_usable()):
                    say(f"{qemu.label}  {' '.join(names)}" + (f"  ({reason})" if reason else ""))
                    continue
                try:
                    total += record(qemu, scenario, accel, args.only)
                except GuestError as exc:
                    failures += 1
                    say(f"{qemu.label}  {names[0]}… NOT RECORDED: {last_line(exc)}")
    say(f"{total} bytes written, {failures} guests failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
