#!/usr/bin/env python3
"""Build the Linux guest from Debian packages, without root and without installing anything.

    $ python vm-images/linux/build.py            # 6.1
    $ python vm-images/linux/build.py 6.12
    $ python vm-images/linux/build.py --list

A kernel of Debian's cloud flavour, busybox-static, the modules of MODULES with what they need, the
scripts beside this file, and the pulse program where there is a C compiler.  Packages are fetched
by apt with a configuration of its own (tools/private_apt.py) from the archive that the machine's
apt sources name, and unpacked with `dpkg-deb -x`; no maintainer script runs.

What was fetched stays in `DIR/<LABEL>/parts`.  From then on a build needs no network and takes
well under a second; it does nothing when nothing has changed.  An image is there when `linux.json`
is there, which is written last:

    {"label": "6.1", "release": "6.1.0-50-cloud-amd64", "version": "6.1.176-1",
     "kernel": "…/vmlinuz", "initramfs": "…/initramfs", "modules": [...], "builtin": [...],
     "pulse": true, "why_no_pulse": null, "packages": {...}, "recipe": …}

Exit codes: 0 the image is there, 1 the packages are not what they should be, 2 usage, 4 the
archive, the suite or a tool is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tools import releases  # noqa: E402 - needs the path
from tools.private_apt import Apt, Unavailable, machine_archive, run  # noqa: E402
from tools.releases import Broken, Release, say  # noqa: E402

__all__ = ["MODULES", "RELEASES", "cache_dir", "main"]

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
LAYOUT = HERE.parent / "pulse" / "layout.inc"

RELEASES: Mapping[str, Release] = {
    "6.1": Release("6.1", "bookworm", "bookworm"),
    "6.12": Release("6.12", "bookworm-backports", "bookworm"),
}


def cache_dir() -> Path:
    """Where images are kept: QMP_MEMLISTENER_LINUX, else the user's cache directory."""
    return releases.cache_dir("QMP_MEMLISTENER_LINUX", "linux")


# Parts, out of Debian packages.


def module_name(path: Path) -> str:
    """As the kernel calls it: `virtio-rng.ko.xz` is virtio_rng."""
    return path.name.split(".ko")[0].replace("-", "_")


def module_code(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def needs_of(code: bytes) -> list[str]:
    """Modules that a module needs: `depends=a,b` in its .modinfo, where every entry ends in NUL."""
    found = re.search(rb"\0depends=([^\0]*)\0", code)
    if found is None:
        raise Broken("a module does not tell what it depends on")
    return [name for name in found[1].decode().replace("-", "_").split(",") if name]


def in_order(wanted: Iterable[str], available: Mapping[str, bytes]) -> list[str]:
    """`wanted` and all that they need, each after what it needs."""
    order: dict[str, None] = {}

    def add(name: str) -> None:
        if name not in order:
            for need in needs_of(available[name]):
                add(need)
            order[name] = None

    for name in wanted:
        add(name)
    return list(order)


class _Modules(dict[str, bytes]):
    """Code of the modules below a directory, by name, read when asked for."""

    def __init__(self, top: Path) -> None:
        super().__init__()
        self._files = {module_name(p): p for p in top.rglob("*.ko*")}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __missing__(self, name: str) -> bytes:
        if name not in self._files:
            raise Broken(f"the package has no module {name}")
        code = self[name] = module_code(self._files[name])
        return code


def fetch(release: Release, parts: Path, scratch: Path) -> None:
    """Get the packages and keep of them what an image is made of, in `parts`."""
    label = release.label
    archive = machine_archive([r.base for r in RELEASES.values()])
    say(label, f"reading the lists of {release.suite}")
    apt = Apt(scratch / "apt", archive, release.suite, release.base)
    apt.update()
    offered = apt.versions("linux-image-cloud-amd64")
    exact = [v for v in offered if v.startswith(f"{label}.")]
    if not exact:
        raise Unavailable(f"the archive has no kernel {label}, only {', '.join(offered) or 'none'}")
    names = apt.depends(f"linux-image-cloud-amd64={exact[0]}")
    if len(names) != 1:
        raise Broken(f"linux-image-cloud-amd64 {exact[0]} depends on {names}, not on one kernel")
    busybox = apt.versions("busybox-static")
    if not busybox:
        raise Unavailable("the archive has no busybox-static")
    packages = {names[0]: exact[0], "busybox-static": busybox[-1]}
    say(label, "downloading " + ", ".join(f"{n} {v}" for n, v in packages.items()))
    debs = apt.fetch([f"{name}={version}" for name, version in packages.items()])
    root = scratch / "root"
    for deb in debs:
        run(["dpkg-deb", "-x", str(deb), str(root)])

    kernel_release = names[0].removeprefix("linux-image-")
    trees = (root / top / "modules" / kernel_release for top in ("usr/lib", "lib"))
    tree = next((t for t in trees if t.is_dir()), None)
    if tree is None:
        raise Broken(f"{names[0]} holds no modules")
    builtin = {module_name(Path(p)) for p in (tree / "modules.builtin").read_text().split()}
    available = _Modules(tree)
    missing = [m for m in MODULES if m not in builtin and m not in available]
    if missing:
        raise Broken(f"{names[0]} lacks {', '.join(missing)}")
    order = in_order([m for m in MODULES if m not in builtin], available)

    new = scratch / "parts"
    (new / "modules").mkdir(parents=True)
    for name in order:
        (new / "modules" / f"{name}.ko").write_bytes(available[name])
    shutil.copyfile(root / "boot" / f"vmlinuz-{kernel_release}", new / "vmlinuz")
    shutil.copyfile(root / "bin" / "busybox", new / "busybox")
    known = {
        "release": kernel_release,
        "version": exact[0],
        "packages": packages,
        "wanted": list(MODULES),
        "modules": order,
        "builtin": [m for m in MODULES if m in builtin],
    }
    (new / "parts.json").write_text(json.dumps(known, indent=1) + "\n")
    if parts.exists():
        parts.rename(scratch / "old")
    new.rename(parts)


def parts_of(parts: Path) -> dict[str, object] | None:
    """What was fetched earlier, None when that is nothing or has other modules than we want."""
    try:
        known = json.loads((parts / "parts.json").read_text())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and known.get("wanted") == list(MODULES) else None


# The pulse program.


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
        run([cc, *C_FLAGS, "-include", str(header), "-o", str(program), str(HERE / "pulse.c")])
    except Unavailable as exc:
        return b"", f"the pulse program could not be compiled: {exc}"
    return program.read_bytes(), None


# The initramfs.


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the initramfs; `device` is a character device's number."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def cpio(entries: Iterable[Entry]) -> bytes:
    """An archive in the format that the kernel unpacks (newc, its initramfs/buffer-format.rst)."""
    out = bytearray()
    for number, e in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = e.name.encode() + b"\0"
        fields = (number, e.mode, 0, 0, 1, 0, len(e.data), 0, 0, *e.device, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % f for f in fields) + name
        out += bytes(-len(out) % 4) + e.data
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(parts: Path, order: Sequence[str], program: bytes) -> bytes:
    def entries() -> Iterator[Entry]:
        for name in ("bin", "dev", "lib", "lib/modules"):
            yield Entry(name, 0o40755)
        # Process 1 has a console before it has mounted anything.
        yield Entry("dev/console", 0o20600, device=(5, 1))
        yield Entry("bin/busybox", 0o100755, (parts / "busybox").read_bytes())
        for name in SCRIPTS:
            yield Entry(f"bin/{name}", 0o100755, (HERE / name).read_bytes())
        if program:
            yield Entry("bin/pulse-beat", 0o100755, program)
        for name in order:
            code = (parts / "modules" / f"{name}.ko").read_bytes()
            yield Entry(f"lib/modules/{name}.ko", 0o100644, code)
        listing = "".join(f"{name}.ko\n" for name in order).encode()
        yield Entry("lib/modules/order", 0o100644, listing)
        yield Entry("init", 0o100755, (HERE / "init").read_bytes())

    return cpio(entries())


# One image from start to end.


def recipe() -> str:
    """Changes when something does that an image is made of, the packages apart."""
    digest = hashlib.sha256(repr((MODULES, C_FLAGS, compiler())).encode())
    for path in (Path(__file__), LAYOUT, HERE / "pulse.c", *(HERE / n for n in ("init", *SCRIPTS))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def present(home: Path) -> dict[str, object] | None:
    """What linux.json in `home` says, when all that it names is there."""
    try:
        known = json.loads((home / "linux.json").read_text())
        files = [Path(known[name]) for name in ("kernel", "initramfs")]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if all(p.parent == home and p.is_file() for p in files) else None


def build(release: Release, top: Path) -> None:
    """Fetch what is missing and write the image.  Raises Unavailable and Broken."""
    label, home = release.label, top / release.label
    home.mkdir(exist_ok=True)
    parts = home / "parts"
    with tempfile.TemporaryDirectory(prefix=f".{label}.", dir=top) as name:
        scratch = Path(name)
        if parts_of(parts) is None:
            fetch(release, parts, scratch)
        known = parts_of(parts)
        assert known is not None
        order = known["modules"]
        assert isinstance(order, list)
        program, why = pulse_program(scratch)
        files = {"vmlinuz": (parts / "vmlinuz").read_bytes()}
        files["initramfs"] = initramfs(parts, order, program)
        image = {
            "label": label,
            **{n: known[n] for n in ("release", "version", "packages", "modules", "builtin")},
            "kernel": str(home / "vmlinuz"),
            "initramfs": str(home / "initramfs"),
            "pulse": why is None,
            "why_no_pulse": why,
            "recipe": recipe(),
        }
        files["linux.json"] = (json.dumps(image, indent=1) + "\n").encode()
        for file, data in files.items():
            (scratch / file).write_bytes(data)
            (scratch / file).rename(home / file)
    say(label, f"ready: {known['release']} in {home}")
    if why is not None:
        say(label, f"without pulse: {why}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="build.py",
        description="Build the Linux guest from Debian packages.",
        epilog="example: python vm-images/linux/build.py 6.1",
    )
    parser.add_argument("label", nargs="*", help=f"of {', '.join(RELEASES)} (default: 6.1)")
    parser.add_argument("--list", action="store_true", help="say what is there and change nothing")
    parser.add_argument("--dir", type=Path, default=None, help=f"default: {cache_dir()}")
    args = parser.parse_args(argv)
    for label in args.label:
        if label not in RELEASES:
            parser.error(f"unknown kernel {label}, known: {', '.join(RELEASES)}")
    top: Path = (args.dir or cache_dir()).absolute()

    def there(label: str) -> str | None:
        image = present(top / label)
        return None if image is None else str(image["release"])

    def up_to_date(label: str) -> str | None:
        image = present(top / label)
        return there(label) if image is not None and image.get("recipe") == recipe() else None

    if args.list:
        return releases.show(RELEASES, top, there)
    return releases.make(
        args.label or ["6.1"], top, up_to_date, lambda label: build(RELEASES[label], top)
    )


if __name__ == "__main__":
    sys.exit(main())
