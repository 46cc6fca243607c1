"""What it means when the kernel refuses a uprobe, and what to do about it."""

from __future__ import annotations

import errno
from pathlib import Path

from ..model import ProbeUnavailable

__all__ = ["explain", "forbidden"]

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
