#!/usr/bin/env python3
"""Build the Linux guest from Debian packages, without root and without installing anything.

    $ python vm-images/linux/build.py            # 6.1
    $ python vm-images/linux/build.py 6.12
    $ python vm-images/linux/build.py 6.1-arm64      # for qemu-system-aarch64
    $ python vm-images/linux/build.py --list

A kernel, busybox, the modules of MODULES, the scripts beside this file, and the pulse program where
there is a C compiler.  How the packages are got and where the image is kept is told in
tools/guest_image.py; the description is `linux.json`:

    {"label": "6.1", "release": "6.1.0-50-cloud-amd64", "version": "6.1.176-1",
     "kernel": "…/vmlinuz", "initramfs": "…/initramfs", "modules": [...], "builtin": [...],
     "pulse": true, "why_no_pulse": null, "packages": {...}, "recipe": …}

Exit codes: 0 the image is there, 1 the packages are not what they should be, 2 usage, 4 the
archive, the suite or a tool is missing.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tools.cpio import Entry  # noqa: E402 - needs the path
from tools.guest_image import Kind, Made, main  # noqa: E402
from tools.private_apt import Unavailable, run  # noqa: E402
from tools.releases import Release  # noqa: E402

__all__ = ["LINUX", "MODULES"]

# What a hotplug test wants.  PCIe and ACPI hotplug of devices and memory are built into Debian's
# kernels (HOTPLUG_PCI_PCIE, HOTPLUG_PCI_ACPI, ACPI_HOTPLUG_MEMORY, MEMORY_HOTREMOVE).
MODULES = (
    *("virtio_pci", "virtio_net", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console"),
    *("virtio_rng", "virtio_mem", "virtio_balloon", "virtio_pmem"),
    *("nfit", "nd_pmem", "device_dax"),
)
COMPILERS = ("cc", "gcc", "clang")
C_FLAGS = (
    *("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-s"),
    *("-ffreestanding", "-static", "-nostdlib", "-no-pie", "-fno-pie"),
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
    *("-Wl,--build-id=none", "-Wl,-z,noexecstack"),
)
SCRIPTS = ("agent", "pulse", "workload")
PROGRAM = HERE / "pulse.c"
LAYOUT = HERE.parent / "pulse" / "layout.inc"


def compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def pulse_program(scratch: Path) -> tuple[bytes, str | None]:
    """The program, or why there is none.  Its layout is that of the bare-metal guest."""
    cc = compiler()
    if cc is None:
        return b"", f"no C compiler ({', '.join(COMPILERS)}) was found when the image was built"
    numbers = re.findall(r"^\.set (\w+), (\w+)$", LAYOUT.read_text(), re.MULTILINE)
    header, program = scratch / "layout.h", scratch / "pulse-beat"
    header.write_text("".join(f"#define {name} {value}\n" for name, value in numbers))
    try:
        run([cc, *C_FLAGS, "-include", str(header), "-o", str(program), str(PROGRAM)])
    except Unavailable as exc:
        return b"", f"the pulse program could not be compiled: {exc}"
    return program.read_bytes(), None


def make(release: Release, _parts: Path, scratch: Path) -> Made:
    entries = [Entry(f"bin/{name}", 0o100755, (HERE / name).read_bytes()) for name in SCRIPTS]
    if release.architecture == "amd64":
        program, why = pulse_program(scratch)
    else:
        program, why = b"", "the pulse program is for x86-64"  # rdtsc, and its system calls
    if program:
        entries.append(Entry("bin/pulse-beat", 0o100755, program))
    remarks = [] if why is None else [f"without pulse: {why}"]
    return Made(entries, {"pulse": why is None, "why_no_pulse": why}, remarks)


LINUX = Kind(
    name="linux",
    variable="QMP_MEMLISTENER_LINUX",
    modules=MODULES,
    init=HERE / "init",
    make=make,
    architectures=("amd64", "arm64"),
    sources=(Path(__file__), LAYOUT, PROGRAM, *(HERE / name for name in SCRIPTS)),
    settings=repr((C_FLAGS, compiler())),
)

if __name__ == "__main__":
    sys.exit(main(LINUX, "Build the Linux guest from Debian packages."))
