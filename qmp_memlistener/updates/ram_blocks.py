"""Waiting until QEMU has freed the RAM blocks of backends that were removed.

`object-del` returns before: the block goes with the last FlatView that shows it, by RCU.  Whoever
plugs the same device again in between makes QEMU 7.2 abort ('RAMBlock "…" already registered',
qemu_ram_set_idstr of softmmu/physmem.c; seen with ivshmem-plain).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

import msgspec

from ..errors import CommandFailed
from ..qmp import Monitor, hmp
from .guest_view import ask

__all__ = ["count_blocks", "memory_backends", "wait_freed"]

DEADLINE_S = 2.0
_POLL_S = 0.01


class _Memdev(msgspec.Struct):
    id: str = ""


async def memory_backends(monitor: Monitor, ids: Collection[str]) -> int:
    """How many of these objects are memory backends.  Raises TargetError."""
    known = {m.id for m in await ask(monitor, "query-memdev", list[_Memdev], [])}
    return len(known & set(ids))


async def count_blocks(monitor: Monitor) -> int | None:
    """The RAM blocks there are; None when this QEMU does not tell.  Raises TargetError."""
    try:
        text = await hmp(monitor, "info ramblock")
    except CommandFailed:
        return None
    return sum(" 0x" in line for line in text.splitlines())


async def wait_freed(monitor: Monitor, most: int) -> bool:
    """Wait until there are `most` blocks; False when it takes longer than `DEADLINE_S`."""
    end = time.monotonic() + DEADLINE_S
    while True:
        count = await count_blocks(monitor)
        if count is None or count <= most:
            return True
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(_POLL_S)
