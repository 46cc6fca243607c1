"""The file that holds QEMU's functions, and the checks before a probe is put there.

Nothing here changes anything in QEMU: the kernel is asked to open an event that cannot be, and says
first whether we might.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from ...errors import MissingPrerequisite
from ...host.elf import ElfFile, read_elf
from ..model import ProbeUnavailable
from .functions import ROLES, SYMBOLS, Func, kinds_of, resolve_roles
from .perf import Architecture, architecture, open_dummy, open_uprobe, uprobe_pmu

__all__ = ["Program", "examine", "explain", "forbidden"]


@dataclass(frozen=True, slots=True)
class Program:
    """A QEMU that can be probed: `path` as we and the kernel reach its file."""

    arch: Architecture
    pmu: int
    path: str
    roles: dict[Func, tuple[str, int]]


def examine(pid: int) -> Program:
    """Whether and where the process can be probed.  Raises ProbeUnavailable with the remedy."""
    arch, pmu = _kernel()
    try:
        os.close(open_dummy(arch, pid)[0])
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
    except OSError as error:
        raise explain(error, pid) from error
    _check_privilege(arch, pmu, pid)
    try:
        path, elf = _program(pid)
    except MissingPrerequisite as error:
        raise ProbeUnavailable(error.message, remedy=error.remedy) from error
    if elf.machine != arch.elf_machine:
        raise ProbeUnavailable(f"QEMU is a program for {elf.machine}, not for this host")
    roles = resolve_roles(elf.offsets)
    if not kinds_of(roles):
        names = ", ".join(info.symbols[0] for info in ROLES.values())
        raise ProbeUnavailable(
            f"QEMU's program file exports none of the functions to probe ({names})",
            remedy="use a QEMU built as usual: they are exported for its modules",
        )
    return Program(arch, pmu, path, roles)


def _kernel() -> tuple[Architecture, int]:
    if sys.platform != "linux":
        raise ProbeUnavailable("uprobes exist on Linux only", remedy="run on QEMU's Linux host")
    arch = architecture()
    if arch is None:
        raise ProbeUnavailable(
            f"uprobes on {platform.machine()} hosts are not supported",
            remedy="use the other probes; x86-64 hosts are supported",
        )
    pmu = uprobe_pmu()
    if pmu is None:
        raise ProbeUnavailable(
            "this kernel has no uprobe events",
            remedy="it takes Linux 4.17 or later, built with CONFIG_UPROBE_EVENTS; "
            "in a container /sys must be mounted",
        )
    return arch, pmu


def _check_privilege(arch: Architecture, pmu: int, pid: int) -> None:
    """Ask for a probe in a file with no name: refused as invalid, unless refused as forbidden.

    perf_uprobe_event_init (kernel/events/core.c) looks at the privilege before the name.
    """
    try:
        fd, _ = open_uprobe(arch, pmu, b"", 0, pid)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise forbidden() from error
    else:
        os.close(fd)


def _program(pid: int) -> tuple[str, ElfFile]:
    """The executable, or what a dynamic loader that was started in its place has loaded."""
    exe = f"/proc/{pid}/exe"
    elf = read_elf(exe, SYMBOLS)
    if not elf.offsets:
        for path in _mapped(pid):
            try:
                other = read_elf(path, SYMBOLS)
            except MissingPrerequisite:
                continue
            if other.offsets:
                return path, other
    return exe, elf


def _mapped(pid: int) -> list[str]:
    """Files of that name which it has mapped as code, as we reach them."""
    found: dict[str, None] = {}
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(None, 5)
                if len(fields) == 6 and "x" in fields[1] and "qemu" in os.path.basename(fields[5]):
                    found[f"/proc/{pid}/root{fields[5]}"] = None
    except OSError:
        pass
    return list(found)


_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def forbidden() -> ProbeUnavailable:
    """We lack the privilege."""
    try:
        paranoid = f" (kernel.perf_event_paranoid is {_PARANOID.read_text().strip()})"
    except OSError:
        paranoid = ""
    return ProbeUnavailable(
        f"the kernel does not let this user probe QEMU{paranoid}",
        remedy="run as root, or give the program CAP_PERFMON and run it as QEMU's user; "
        "in a container both must hold on the host",
    )


def explain(error: OSError, pid: int) -> ProbeUnavailable:
    """The error that a refused system call becomes."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return forbidden()
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ProbeUnavailable(
            f"QEMU {pid} has more threads than this process may have files open for",
            remedy="raise the limit with `ulimit -n`",
        )
    if error.errno in (errno.ESRCH, errno.ENOENT):
        return ProbeUnavailable(f"QEMU {pid} went away while it was being probed")
    return ProbeUnavailable(f"the kernel refused to probe QEMU {pid}: {error.strerror}")
