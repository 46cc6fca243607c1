"""What must be left as it was: trace events, logs, files; and waiting for what QEMU writes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from pathlib import Path

import pytest

from qmp_memlistener.errors import CommandFailed
from qmp_memlistener.qmp import Monitor
from tests.support.host import patience

__all__ = [
    "BASE",
    "enabled_events",
    "file_has",
    "flush_rcu",
    "left_behind",
    "live_views",
    "log_targets",
]

BASE = Path(f"/dev/shm/qmp-memlistener-{os.geteuid()}")


async def enabled_events(monitor: Monitor) -> frozenset[str]:
    """The trace events that are on."""
    found = await monitor.execute("trace-event-get-state", {"name": "*"})
    assert isinstance(found, list)
    return frozenset(str(event["name"]) for event in found if event["state"] == "enabled")


def log_targets(pid: int) -> list[str]:
    """Where the descriptors of a process lead: standard error, and all regular files."""
    found = [f"2: {os.readlink(f'/proc/{pid}/fd/2')}"]
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISREG(os.stat(entry.path).st_mode):
                found.append(os.readlink(entry.path))
    return sorted(found)


def left_behind(pid: int) -> list[str]:
    """What the agent keeps on disk about this QEMU."""
    if not BASE.exists():
        return []
    return sorted(name for name in os.listdir(BASE) if name.startswith(f"{pid}-"))


async def flush_rcu(monitor: Monitor) -> None:
    """Return when QEMU has freed every view that is no longer in use, and logged that.

    A `device_add` that fails waits for all RCU callbacks (`drain_call_rcu`, qdev-monitor.c of 7.2
    to 11.1).  A vCPU that spins under TCG would make it wait for ever, so the guest is stopped.
    """
    await monitor.execute("stop")
    with pytest.raises(CommandFailed):
        await monitor.execute("device_add", {"driver": "no-such-device"})
    await monitor.execute("cont")


def live_views(log: Path) -> tuple[int, int]:
    """From a log with `-trace flatview_new -trace flatview_destroy` since the start: the views
    created so far, and how many of them there still are."""
    data = log.read_bytes()
    created = data.count(b"flatview_new ")
    return created, created - data.count(b"flatview_destroy ")


async def file_has(path: Path, text: bytes, times: int = 1) -> None:
    """Until a file that another process writes has `text` so often; at most ten seconds."""

    def has() -> bool:
        return path.exists() and path.read_bytes().count(text) >= times

    async with asyncio.timeout(patience(10)):
        while not has():  # noqa: ASYNC110 (who writes it does not tell us)
            await asyncio.sleep(0.005)
