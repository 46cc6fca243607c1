"""Linux guests out of Debian packages: what building one is, whatever is in it.

A kernel of Debian's cloud flavour, busybox-static, modules with what they need and an init script;
what else an image has is up to its `Kind` (vm-images/*/build.py).  Packages are fetched by apt with
a configuration of its own (private_apt) from the archive that the machine's apt sources name, and
unpacked with `dpkg-deb -x`; no maintainer script runs.

What was fetched stays in `DIR/<LABEL>/parts`.  From then on a build needs no network and takes
well under a second; it does nothing when nothing has changed.  An image is there when `<NAME>.json`
is there, which is written last and names kernel, initramfs, modules and packages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tools.cpio
from tools import releases
from tools.cpio import Entry, cpio, directories
from tools.kernel_modules import Modules, built_in, in_order
from tools.private_apt import Apt, Unavailable, machine_archive, run
from tools.releases import Broken, Release, say

__all__ = ["RELEASES", "Kind", "Made", "main"]

RELEASES: Mapping[str, Release] = {
    "6.1": Release("6.1", "bookworm", "bookworm"),
    "6.12": Release("6.12", "bookworm-backports", "bookworm"),
    "6.1-arm64": Release("6.1-arm64", "bookworm", "bookworm", "arm64"),
}
BUSYBOX = "busybox-static"


@dataclass(frozen=True, slots=True)
class Made:
    """A kind's own files of the initramfs, what the description says of them, and remarks."""

    entries: Iterable[Entry]
    facts: Mapping[str, object]
    remarks: Sequence[str] = ()


def _nothing(_root: Path, _parts: Path) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True)
class Kind:
    """A guest and how it is made.

    `name` is the guest's directory in vm-images, that of its images in the user's cache, which
    `variable` overrides, and the description's.  Beside the kernel and busybox it needs `packages`,
    all of the base suite.  `keep(root, parts)` takes from the packages unpacked in `root` what an
    image is made of, beside the kernel, and returns the versions of what it got elsewhere; when
    `kept` changes, packages are fetched again.  `make(release, parts, scratch)` is called
    for each build; an image is built again when `sources`, the init script among them, or
    `settings` change.  Both may raise Unavailable and Broken.
    """

    name: str
    variable: str
    modules: tuple[str, ...]
    init: Path
    make: Callable[[Release, Path, Path], Made]
    architectures: tuple[str, ...] = ("amd64",)
    sources: tuple[Path, ...] = ()
    settings: str = ""
    packages: tuple[str, ...] = ()
    keep: Callable[[Path, Path], Mapping[str, str]] = _nothing
    kept: tuple[str, ...] = ()

    def cache_dir(self) -> Path:
        """Where images are kept: what the variable says, else in the user's cache directory."""
        return releases.cache_dir(self.variable, self.name)

    @property
    def releases(self) -> Mapping[str, Release]:
        """Those that there are images of."""
        return {n: r for n, r in RELEASES.items() if r.architecture in self.architectures}

    @property
    def wanted(self) -> list[str]:
        """What parts are made for: other parts are of no use."""
        return [*self.modules, *self.packages, *self.kept]

    def recipe(self) -> str:
        """Changes when something does that an image is made of, the packages apart."""
        digest = hashlib.sha256(repr((self.modules, self.settings)).encode())
        ours = (Path(__file__), Path(tools.cpio.__file__))
        for path in (*ours, self.init, *self.sources):
            digest.update(path.read_bytes())
        return digest.hexdigest()


# Parts, out of Debian packages.


def choose(apt: Apt, kind: Kind, release: Release) -> tuple[str, dict[str, str]]:
    """The kernel's package, and the versions of all packages.  Raises Unavailable and Broken."""
    newest, series = f"linux-image-cloud-{release.architecture}", release.series
    offered = apt.versions(newest)
    exact = next((v for v in offered if v.startswith(f"{series}.")), None)
    if exact is None:
        has = ", ".join(offered) or "none"
        raise Unavailable(f"the archive has no kernel {series}, only {has}")
    kernel = apt.depends(f"{newest}={exact}")
    if len(kernel) != 1:
        raise Broken(f"{newest} {exact} depends on {kernel}, not on one kernel")
    chosen = {kernel[0]: exact}
    for name in (BUSYBOX, *kind.packages):
        versions = apt.versions(name)
        if not versions:
            raise Unavailable(f"the archive has no {name}")
        chosen[name] = versions[-1]  # the base suite's, which is the older one
    return kernel[0], chosen


def fetch(kind: Kind, release: Release, parts: Path, scratch: Path) -> None:
    """Get the packages and keep of them what an image is made of, in `parts`."""
    label = release.label
    archive = machine_archive([r.base for r in RELEASES.values()])
    say(label, f"reading the lists of {release.suite}")
    apt = Apt(
        *(scratch / "apt", archive, release.suite, release.base), architecture=release.architecture
    )
    apt.update()
    kernel, packages = choose(apt, kind, release)
    say(label, "downloading " + ", ".join(f"{n} {v}" for n, v in packages.items()))
    root = scratch / "root"
    for deb in apt.fetch([f"{name}={version}" for name, version in packages.items()]):
        run(["dpkg-deb", "-x", str(deb), str(root)])

    kernel_release = kernel.removeprefix("linux-image-")
    trees = (root / top / "modules" / kernel_release for top in ("usr/lib", "lib"))
    tree = next((t for t in trees if t.is_dir()), None)
    if tree is None:
        raise Broken(f"{kernel} holds no modules")
    builtin, available = built_in(tree), Modules(tree)
    missing = [m for m in kind.modules if m not in builtin and m not in available]
    if missing:
        raise Broken(f"{kernel} lacks {', '.join(missing)}")
    order = in_order([m for m in kind.modules if m not in builtin], available)

    new = scratch / "parts"
    (new / "modules").mkdir(parents=True)
    for name in order:
        (new / "modules" / f"{name}.ko").write_bytes(available[name])
    shutil.copyfile(root / "boot" / f"vmlinuz-{kernel_release}", new / "vmlinuz")
    shutil.copyfile(root / "bin" / "busybox", new / "busybox")
    known = {
        "release": kernel_release,
        "version": packages[kernel],
        "packages": {**packages, **kind.keep(root, new)},
        "wanted": kind.wanted,
        "modules": order,
        "builtin": [m for m in kind.modules if m in builtin],
    }
    (new / "parts.json").write_text(json.dumps(known, indent=1) + "\n")
    if parts.exists():
        parts.rename(scratch / "old")
    new.rename(parts)


def parts_of(kind: Kind, parts: Path) -> dict[str, object] | None:
    """What was fetched earlier, None when that is nothing or was fetched for something else."""
    try:
        known = json.loads((parts / "parts.json").read_text())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and known.get("wanted") == kind.wanted else None


# One image from start to end.


def initramfs(kind: Kind, parts: Path, order: Sequence[str], own: Iterable[Entry]) -> bytes:
    def files() -> Iterator[Entry]:
        # Process 1 has a console before it has mounted anything.
        yield Entry("dev/console", 0o20600, device=(5, 1))
        yield Entry("bin/busybox", 0o100755, (parts / "busybox").read_bytes())
        for name in order:
            code = (parts / "modules" / f"{name}.ko").read_bytes()
            yield Entry(f"lib/modules/{name}.ko", 0o100644, code)
        listing = "".join(f"{name}.ko\n" for name in order).encode()
        yield Entry("lib/modules/order", 0o100644, listing)
        yield Entry("init", 0o100755, kind.init.read_bytes())
        yield from own

    entries = list(files())
    return cpio([*directories(e.name for e in entries), *entries])


def present(kind: Kind, home: Path) -> dict[str, object] | None:
    """What the description in `home` says, when all that it names is there."""
    try:
        known = json.loads((home / f"{kind.name}.json").read_text())
        files = [Path(known[name]) for name in ("kernel", "initramfs")]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if all(p.parent == home and p.is_file() for p in files) else None


def build(kind: Kind, release: Release, top: Path) -> None:
    """Fetch what is missing and write the image.  Raises Unavailable and Broken."""
    label, home = release.label, top / release.label
    home.mkdir(exist_ok=True)
    parts = home / "parts"
    with tempfile.TemporaryDirectory(prefix=f".{label}.", dir=top) as name:
        scratch = Path(name)
        if parts_of(kind, parts) is None:
            fetch(kind, release, parts, scratch)
        known = parts_of(kind, parts)
        assert known is not None
        order = known["modules"]
        assert isinstance(order, list)
        made = kind.make(release, parts, scratch)
        files = {"vmlinuz": (parts / "vmlinuz").read_bytes()}
        files["initramfs"] = initramfs(kind, parts, order, made.entries)
        image = {
            "label": label,
            **{n: known[n] for n in ("release", "version", "packages", "modules", "builtin")},
            "kernel": str(home / "vmlinuz"),
            "initramfs": str(home / "initramfs"),
            **made.facts,
            "recipe": kind.recipe(),
        }
        files[f"{kind.name}.json"] = (json.dumps(image, indent=1) + "\n").encode()
        for file, data in files.items():
            (scratch / file).write_bytes(data)
            (scratch / file).rename(home / file)
    say(label, f"ready: {known['release']} in {home}")
    for remark in made.remarks:
        say(label, remark)


def main(kind: Kind, description: str, argv: Sequence[str] | None = None) -> int:
    """The command line of a build script; returns its exit code."""
    known = kind.releases
    parser = argparse.ArgumentParser(
        prog="build.py",
        description=description,
        epilog=f"example: python vm-images/{kind.name}/build.py 6.1",
    )
    parser.add_argument("label", nargs="*", help=f"of {', '.join(known)} (default: 6.1)")
    parser.add_argument("--list", action="store_true", help="say what is there and change nothing")
    parser.add_argument("--dir", type=Path, default=None, help=f"default: {kind.cache_dir()}")
    args = parser.parse_args(argv)
    for label in args.label:
        if label not in known:
            parser.error(f"unknown kernel {label}, known: {', '.join(known)}")
    top: Path = (args.dir or kind.cache_dir()).absolute()

    def there(label: str) -> str | None:
        image = present(kind, top / label)
        return None if image is None else str(image["release"])

    def up_to_date(label: str) -> str | None:
        image = present(kind, top / label)
        good = image is not None and image.get("recipe") == kind.recipe()
        return there(label) if good else None

    if args.list:
        return releases.show(known, top, there)
    return releases.make(
        args.label or ["6.1"], top, up_to_date, lambda label: build(kind, known[label], top)
    )
