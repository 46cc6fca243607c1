#!/usr/bin/env python3
"""Unpack other QEMU versions beside the installed one, without touching the system.

    $ python tools/side_by_side.py              # 10.0 and 11.1
    $ python tools/side_by_side.py --list
    $ python tools/side_by_side.py 10.0 --also qemu-system-modules-spice    # qxl too

Each version comes from the Debian suites named in RELEASES together with every library that it
needs, the C library included, so a QEMU newer than the machine's Debian runs as well.  apt runs
with a private configuration (own lists, cache, sources and an empty package status); it works for
any user.  The archive is the one that the machine's own apt sources name.  The packages are
unpacked with `dpkg-deb -x`, nothing is installed and no maintainer script runs.  The unpacked
binaries get their own loader and a DT_RPATH (patchelf), so they are started in place, by their
own name, with no wrapper and no LD_LIBRARY_PATH.

A version lies in `DIR/<VERSION>/`; it is there when `qemu.json` is there, which is written last:

    {"version": "10.0.2", "binary": "…/qemu-system-x86_64", "aarch64": "…/qemu-system-aarch64",
     "args": ["-L", …], "env": {"QEMU_MODULE_DIR": …}, "packages": [...]}

Start it with `args` and `env`: firmware and modules (virtio-vga and others) are found by them.

Exit codes: 0 all versions are there, 1 one of them does not run, 2 usage, 4 the archive, the
suite or a tool is missing.  The other versions are done all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import releases
from tools.private_apt import Apt, Unavailable, machine_archive, run
from tools.releases import Broken, Release, say

__all__ = ["RELEASES", "cache_dir", "main"]

PACKAGES = ("qemu-system-x86", "qemu-system-arm", "seabios", "ipxe-qemu", "patchelf")
BINARIES = ("qemu-system-x86_64", "qemu-system-aarch64")
DATA_DIRS = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
TRIPLET = "x86_64-linux-gnu"
KEPT = (
    *(f"usr/bin/{name}" for name in BINARIES),
    *("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe"),
    *(f"usr/lib/{TRIPLET}", f"lib/{TRIPLET}"),
)


RELEASES: Mapping[str, Release] = {
    "10.0": Release("10.0", "bookworm-backports", "bookworm"),
    "11.1": Release("11.1", "trixie-backports", "trixie"),
}


def cache_dir() -> Path:
    """Where versions are kept: QMP_MEMLISTENER_QEMUS, else the user's cache directory."""
    return releases.cache_dir("QMP_MEMLISTENER_QEMUS", "qemu")


# Unpacking.


def loader(root: Path) -> Path:
    """The dynamic loader below `root`; packages of older suites keep it in /lib."""
    for top in ("usr/lib", "lib"):
        path = root / top / TRIPLET / "ld-linux-x86-64.so.2"
        if path.exists():
            return path
    raise Broken(f"no dynamic loader below {root}")


def library_dirs(root: Path) -> list[Path]:
    """Directories that hold shared libraries which the loader has to find below `root`."""
    return [d for top in ("usr/lib", "lib") if (d := root / top / TRIPLET).is_dir()]


def patch(root: Path, home: Path) -> None:
    """Make the binaries below `root` use the loader and libraries below `home`, its later place.

    DT_RPATH, not RUNPATH: it also counts for the libraries' own needs, for modules, and it wins
    over LD_LIBRARY_PATH.  patchelf comes from the same suite and runs under the same loader.
    """
    dirs = library_dirs(root)
    final_loader = home / loader(root).relative_to(root)
    rpath = ":".join(str(home / d.relative_to(root)) for d in dirs)
    tool = [str(loader(root)), "--library-path", ":".join(map(str, dirs))]
    tool.append(str(root / "usr/bin/patchelf"))
    for name in BINARIES:
        what = ["--set-interpreter", str(final_loader), "--force-rpath", "--set-rpath", rpath]
        run([*tool, *what, str(root / "usr/bin" / name)])


def blind(root: Path) -> None:
    """Hide the installed QEMU's modules from the binaries below `root`.

    QEMU looks in QEMU_MODULE_DIR and then always in the directory it was configured with
    (util/module.c); a module of another build there is complained about and then missed, and
    `-device help` aborts.  The configured path becomes one that never exists, of equal length.
    """
    configured = f"\0/usr/lib/{TRIPLET}/qemu\0".encode()
    nowhere = b"\0" + b"/nonexistent".ljust(len(configured) - 2, b"-") + b"\0"
    for name in BINARIES:
        path = root / "usr/bin" / name
        data = path.read_bytes()
        path.write_bytes(data.replace(configured, nowhere))


def keep(root: Path, chosen: Path) -> None:
    """Move what a QEMU reads from `root` to `chosen`: 130 of 480 MB, less than half the files."""
    for name in KEPT:
        if (root / name).exists():
            (chosen / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).rename(chosen / name)


# Trying out.


def reported_version(binary: Path) -> str:
    m = re.search(r"version (\d+(?:\.\d+)+)", run([str(binary), "--version"]))
    if m is None:
        raise Broken(f"{binary} does not tell its version")
    return m[1]


def boots(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """Start a stopped guest and ask it over QMP; returns the version that it tells.

    Raises Unavailable when it does not start and Broken when it answers nonsense.
    """
    asks = ("qmp_capabilities", "query-version", "quit")
    script = "".join(json.dumps({"execute": name}) + "\n" for name in asks)
    common = ["-nodefaults", "-display", "none", "-m", "64", "-S", "-qmp", "stdio"]
    for line in run([*argv, *common], env=env, stdin=script).splitlines():
        answer = json.loads(line).get("return")
        if isinstance(answer, dict) and "qemu" in answer:
            v = answer["qemu"]
            return f"{v['major']}.{v['minor']}.{v['micro']}"
    raise Broken(f"{argv[0]} gave no answer over QMP")


def try_out(home: Path, label: str) -> dict[str, object]:
    """Start what lies below `home` for real and return the contents of its qemu.json.

    Raises Broken.
    """
    x86, arm = (home / "usr/bin" / name for name in BINARIES)
    args = [a for d in DATA_DIRS if (home / d).is_dir() for a in ("-L", str(home / d))]
    modules = home / "usr/lib" / TRIPLET / "qemu"
    modules.mkdir(parents=True, exist_ok=True)
    env = {"QEMU_MODULE_DIR": str(modules)}
    try:
        for binary in (x86, arm):
            run([str(binary), "-device", "help"], env=env)
            for line in run([str(loader(home)), "--list", str(binary)]).splitlines():
                if "=>" in line and str(home) not in line:
                    raise Broken(f"{binary.name} uses a library of the system: {line.strip()}")
        version = reported_version(x86)
        if not version.startswith(f"{label}."):
            raise Broken(f"{x86} is version {version}, not {label}")
        for accel in ("kvm", "tcg"):
            if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
                say(label, "not tried under -accel kvm: /dev/kvm is not usable by this user")
                continue
            told = boots([str(x86), *args, "-M", "pc", "-accel", accel], env)
            say(label, f"a guest answers over QMP under -accel {accel}: {told}")
        boots([str(arm), *args, "-M", "virt", "-accel", "tcg"], env)
    except Unavailable as exc:
        raise Broken(str(exc)) from exc
    return {
        "version": version,
        "binary": str(x86),
        "aarch64": str(arm),
        "args": args,
        "env": env,
    }


# One version from start to end.


def present(home: Path, packages: Sequence[str] = ()) -> str | None:
    """The version below `home`, or None when it is absent, moved, or lacks one of `packages`."""
    try:
        known = json.loads((home / "qemu.json").read_text())
        if not set(packages) <= set(known["packages"]):
            return None
        binary = Path(known["binary"])
        if binary != home / "usr/bin" / BINARIES[0] or reported_version(binary) != known["version"]:
            return None
        return str(known["version"])
    except (OSError, ValueError, KeyError, TypeError, Unavailable, Broken):
        return None


def unpack(release: Release, top: Path, also: Sequence[str]) -> None:
    """Fetch, unpack, patch and try out one version.  Raises Unavailable and Broken."""
    archive = machine_archive([r.base for r in RELEASES.values()])
    label, home = release.label, top / release.label
    packages = sorted({*PACKAGES, *also})
    with tempfile.TemporaryDirectory(prefix=f".{label}.", dir=top) as scratch:
        say(label, f"reading the lists of {release.base} and {release.suite}")
        apt = Apt(Path(scratch) / "apt", archive, release.suite, release.base)
        apt.update()
        offered = apt.versions("qemu-system-x86")
        exact = [v for v in offered if v.split(":")[-1].startswith(f"{label}.")]
        if not exact:
            raise Unavailable(f"the archive has no QEMU {label}, only {', '.join(offered)}")
        pinned = [f"{p}={exact[0]}" if p.startswith("qemu-system-") else p for p in packages]
        count, size = apt.closure(pinned)
        say(label, f"downloading {count} packages, {size / 1e6:.0f} MB, QEMU {exact[0]}")
        debs = apt.download(pinned)
        if len(debs) != count:
            raise Unavailable(f"{len(debs)} of {count} packages arrived")
        say(label, "unpacking")
        root = Path(scratch) / "root"
        for deb in debs:
            run(["dpkg-deb", "-x", str(deb), str(root)])
        patch(root, home)
        blind(root)
        chosen = Path(scratch) / "chosen"
        keep(root, chosen)
        if home.exists():
            home.rename(Path(scratch) / "old")
        chosen.rename(home)
        known = {**try_out(home, label), "packages": packages}
        note = Path(scratch) / "qemu.json"
        note.write_text(json.dumps(known, indent=1) + "\n")
        note.rename(home / "qemu.json")
    say(label, f"ready: QEMU {known['version']} in {home}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="side_by_side.py",
        description="Unpack other QEMU versions beside the installed one.",
        epilog="example: python tools/side_by_side.py 10.0",
    )
    parser.add_argument("version", nargs="*", help=f"of {', '.join(RELEASES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="say what is there and change nothing")
    parser.add_argument("--dir", type=Path, default=None, help=f"default: {cache_dir()}")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="one more package",
    )
    args = parser.parse_args(argv)
    for label in args.version:
        if label not in RELEASES:
            parser.error(f"unknown version {label}, known: {', '.join(RELEASES)}")
    top: Path = (args.dir or cache_dir()).absolute()

    def known(label: str, packages: Sequence[str] = ()) -> str | None:
        version = present(top / label, packages)
        return None if version is None else f"QEMU {version}"

    if args.list:
        return releases.show(RELEASES, top, known)
    return releases.make(
        args.version or RELEASES,
        top,
        lambda label: known(label, (*PACKAGES, *args.also)),
        lambda label: unpack(RELEASES[label], top, args.also),
    )


if __name__ == "__main__":
    sys.exit(main())
