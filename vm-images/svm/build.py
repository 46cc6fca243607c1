#!/usr/bin/env python3
"""Build the SVM guest from Debian packages, without root and without installing anything.

    $ python vm-images/svm/build.py            # 6.1
    $ python vm-images/svm/build.py 6.1 6.12
    $ python vm-images/svm/build.py --list

A kernel, busybox, kvm-amd and what it needs, and a Python with msgspec.  How the packages are got
and where the image is kept is told in tools/guest_image.py; msgspec comes by pip, as a wheel for
that Python whatever runs this script.  Python and its library are trimmed, compiled, and tried out
here with their own C library.  The description is `svm.json`:

    {"label": "6.1", "release": "6.1.0-50-cloud-amd64", "version": "6.1.176-1",
     "kernel": "…/vmlinuz", "initramfs": "…/initramfs", "modules": [...], "builtin": [...],
     "magic": "a70d0d0a", "packages": {...}, "recipe": …}

`magic` is what Python's compiled files begin with.  Our package is not part of the image: it is
added when the guest is booted (qmp_memlistener/guests/svm.py).

Exit codes: 0 the image is there, 1 the packages are not what they should be, 2 usage, 4 the
archive, the package index or a tool is missing.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tools.cpio import Entry  # noqa: E402 - needs the path
from tools.guest_image import Kind, Made, main  # noqa: E402
from tools.private_apt import Unavailable, run  # noqa: E402
from tools.releases import Broken, Release  # noqa: E402

__all__ = ["MODULES", "SVM"]

# kvm_amd for the guest's own KVM; the others bring results out.
MODULES = ("kvm_amd", "virtio_pci", "virtio_console")

HOLD = HERE / "hold.py"
PYTHON = "3.11"
STDLIB = f"usr/lib/python{PYTHON}"
LIBS = "lib/x86_64-linux-gnu"
SITE = "site"
PACKAGES = (
    *(f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib"),
    *("libc6", "libexpat1", "libffi8", "zlib1g"),
)
WHEEL = "msgspec>=0.19"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
LOADER = "ld-linux-x86-64.so.2"
LIBRARIES = (
    *("libc.so.6", "libm.so.6", "libexpat.so.1", "libffi.so.8", "libz.so.1"),
    # Empty since glibc 2.34, still named by what was linked before.
    *("libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1"),
)
# Extension modules that need no further library, the rest is left out.
EXTENSIONS = (
    *("_asyncio", "_contextvars", "_ctypes", "_decimal", "_json", "_lsprof", "_multiprocessing"),
    *("_posixshmem", "_queue", "_typing", "_zoneinfo", "mmap", "resource", "termios"),
)
# Of the standard library: tests, documents, and what is no use without the network or a terminal.
LEFT_OUT = (
    *("test", "unittest", "pydoc_data", "pydoc.py", "turtle.py", "sitecustomize.py"),
    *("ensurepip", "venv", "lib2to3", "distutils", "idlelib", "tkinter", "curses", "dbm"),
    *("sqlite3", "email", "html", "http", "mailbox.py", "wsgiref", "xml", "xmlrpc"),
)
TRIED = "asyncio, argparse, ctypes, fcntl, json, mmap, random, statistics, threading, msgspec"
PIP_TIMEOUT_S = 300.0


# Out of the packages.


def library(root: Path, name: str) -> Path:
    """A shared library below `root`; packages keep it in /lib or in /usr/lib."""
    for top in (LIBS, f"usr/{LIBS}"):
        if (root / top / name).is_file():
            return root / top / name
    raise Broken(f"the packages hold no {name}")


def kept_of_stdlib(stdlib: Path) -> Iterator[Path]:
    """Files of the standard library that go into the image, relative to it."""
    for path in sorted(stdlib.rglob("*")):
        name = path.relative_to(stdlib)
        if name.parts[0] in LEFT_OUT or not path.is_file():
            continue
        if path.suffix == ".py" or path.name.split(".")[0] in EXTENSIONS:
            yield name


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    shutil.copymode(source, target)


def unpack_wheel(downloads: Path, site: Path) -> str:
    """msgspec by pip, unpacked in `site`; returns its version.

    Raises Unavailable when pip, the package index or such a wheel is missing.
    """
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    argv += ["--no-deps", "--only-binary=:all:", "--implementation=cp", "--dest", str(downloads)]
    argv += [f"--python-version={PYTHON}", f"--abi=cp{PYTHON.replace('.', '')}"]
    argv += [f"--platform={name}" for name in PLATFORMS]
    try:
        run([*argv, WHEEL], timeout=PIP_TIMEOUT_S)
    except Unavailable as exc:
        raise Unavailable(f"pip cannot download {WHEEL} for Python {PYTHON}: {exc}") from exc
    (wheel,) = downloads.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith((".py", ".so"))]
        archive.extractall(site, names)
    return wheel.name.split("-")[1]


def python(root: Path, *arguments: str) -> str:
    """What the image's Python prints when it is run here, with its own loader and libraries."""
    libs = root / LIBS
    start = [str(libs / LOADER), "--library-path", str(libs), str(root / "usr/bin/python3")]
    try:
        return run([*start, "-I", "-B", *arguments])
    except Unavailable as exc:
        raise Broken(f"the Python of the image does not run: {exc}") from exc


def keep(root: Path, parts: Path) -> Mapping[str, str]:
    """Python, trimmed and compiled, as `parts/root`."""
    kept = parts / "root"
    copy(root / f"usr/bin/python{PYTHON}", kept / "usr/bin/python3")
    for name in (*LIBRARIES, LOADER):
        copy(library(root, name), kept / LIBS / name)
    stdlib = root / STDLIB
    for path in kept_of_stdlib(stdlib):
        copy(stdlib / path, kept / STDLIB / path)
    version = unpack_wheel(parts / "wheel", kept / SITE)
    shutil.rmtree(parts / "wheel")
    # A file compiled once here is one less to be compiled at each boot by an emulated CPU, and one
    # that carries its own name need not be looked for beside its source.
    flags = ("-q", "-b", "--invalidation-mode=unchecked-hash", "-s", str(kept), "-p", "/")
    python(kept, "-m", "compileall", *flags, str(kept / STDLIB), str(kept / SITE))
    for source in kept.rglob("*.py"):
        source.unlink()
    site = str(kept / SITE)
    python(kept, "-c", f"import sys; sys.path.append({site!r}); import {TRIED}")
    return {WHEEL.split(">")[0]: version}


# For each build.


def make(_release: Release, parts: Path, _scratch: Path) -> Made:
    root = parts / "root"
    entries = [
        Entry(str(path.relative_to(root)), 0o100755, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    ]
    entries.append(Entry("bin/hold.py", 0o100644, HOLD.read_bytes()))
    # Where every program looks for it.
    loader = f"/{LIBS}/{LOADER}".encode()
    entries.append(Entry(f"lib64/{LOADER}", 0o120777, loader))
    magic = (root / STDLIB / "os.pyc").read_bytes()[:4]
    return Made(entries, {"magic": magic.hex()})


SVM = Kind(
    name="svm",
    variable="QMP_MEMLISTENER_SVM",
    modules=MODULES,
    init=HERE / "init",
    make=make,
    sources=(Path(__file__), HOLD),
    packages=PACKAGES,
    keep=keep,
    kept=(WHEEL, *LIBRARIES, *EXTENSIONS, *(f"without {name}" for name in LEFT_OUT)),
)

if __name__ == "__main__":
    sys.exit(main(SVM, "Build the SVM guest from Debian packages."))
