"""Which QEMUs there are on this machine, and whether KVM works with one.

Holds the list (`find_qemus`) and the probe (`kvm_usable`); both block for a moment.  Starting a
guest that lasts is in `launch`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..errors import InputError, MissingPrerequisite

__all__ = ["KvmProbe", "QemuBuild", "find_qemu", "find_qemus", "kvm_usable"]

# 64 KiB whose reset vector asks for a reset: mov al, 0xfe; out 0x64, al; hlt
_RESET_ROM = b"\x00" * 0xFFF0 + bytes.fromhex("b0fee664f4").ljust(16, b"\x00")


@dataclass(frozen=True, slots=True)
class QemuBuild:
    """A QEMU to run: the installed one, or one unpacked beside it by tools/side_by_side.py.

    `args` and `env` are what it needs to find its own data and modules.
    """

    version: str
    binary: str
    aarch64_binary: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KvmProbe:
    """Whether KVM works with a given QEMU, and if not, why not.  True when it does."""

    usable: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.usable


def kvm_usable(qemu: str | QemuBuild = "qemu-system-x86_64", *, timeout: float = 10.0) -> KvmProbe:
    """Try it: open /dev/kvm, then let a vCPU of `qemu` run three instructions that end QEMU.

    Blocks for about a tenth of a second; use `in_thread` (host.bounded) from a running loop.
    """
    build = qemu if isinstance(qemu, QemuBuild) else QemuBuild("", qemu)
    binary = shutil.which(build.binary)
    if binary is None:
        return KvmProbe(False, f"{build.binary} is not installed")
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return KvmProbe(False, f"/dev/kvm: {exc.strerror}")
    with tempfile.NamedTemporaryFile(prefix="qmp-memlistener-", suffix=".rom") as rom:
        rom.write(_RESET_ROM)
        rom.flush()
        argv = [binary, *build.args, "-machine", "pc", "-accel", "kvm", "-m", "16M", "-bios"]
        argv += [rom.name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
                env={**os.environ, **build.env},
            )
        except subprocess.TimeoutExpired:
            return KvmProbe(False, f"{binary} starts with -accel kvm but its vCPU does not run")
        except OSError as exc:
            return KvmProbe(False, f"{binary}: {exc.strerror}")
    if done.returncode != 0:
        return KvmProbe(False, done.stderr.strip() or f"{binary} ended with {done.returncode}")
    return KvmProbe(True)


class _Description(msgspec.Struct):
    """qemu.json as tools/side_by_side.py writes it; it may have more than is needed."""

    version: str
    binary: str
    aarch64: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}


def find_qemus() -> list[QemuBuild]:
    """Every QEMU for x86-64 guests on this machine, oldest version first; the installed one wins.

    Looks at PATH, then at `DIR/<VERSION>/qemu.json`, DIR being $QMP_MEMLISTENER_QEMUS or
    `qmp-memlistener/qemu` in the user's cache.  Raises InputError for a description that is not
    one.  Blocks while the installed QEMU prints its version.
    """
    found: dict[str, QemuBuild] = {}
    installed = shutil.which("qemu-system-x86_64")
    if installed is not None:
        version = _installed_version(installed)
        found[version] = QemuBuild(version, installed, shutil.which("qemu-system-aarch64"))
    for path in sorted(_side_by_side_dir().glob("*/qemu.json")):
        try:
            known = msgspec.json.decode(path.read_bytes(), type=_Description)
        except (OSError, msgspec.MsgspecError) as exc:
            raise InputError(
                f"{path} does not describe a QEMU: {exc}",
                remedy=f"remove {path.parent} and run tools/side_by_side.py again",
            ) from exc
        if shutil.which(known.binary) is not None:
            build = QemuBuild(known.version, known.binary, known.aarch64, known.args, known.env)
            found.setdefault(known.version, build)
    return sorted(found.values(), key=lambda b: [int(n) for n in re.findall(r"\d+", b.version)])


def find_qemu(version: str | None = None) -> QemuBuild:
    """The oldest QEMU that is here, or the oldest whose version begins so.

    Raises MissingPrerequisite when there is none, and what `find_qemus` raises.
    """
    builds = find_qemus()
    if not builds:
        raise MissingPrerequisite(
            "no qemu-system-x86_64 is installed",
            remedy="install the Debian package qemu-system-x86 (and seabios)",
        )
    if version is None:
        return builds[0]
    for build in builds:
        if build.version.startswith(version):
            return build
    raise MissingPrerequisite(
        f"QEMU {version} is not here; there are {', '.join(b.version for b in builds)}",
        remedy="`make qemus` in a checkout unpacks other versions beside the installed one",
    )


def _side_by_side_dir() -> Path:
    named = os.environ.get("QMP_MEMLISTENER_QEMUS")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache or Path.home() / ".cache") / "qmp-memlistener" / "qemu"


def _installed_version(binary: str) -> str:
    try:
        said = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=10.0, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    match = re.search(r"version (\d+(?:\.\d+)+)", said)
    return match[1] if match else "unknown"
