"""Removing backends, and waiting until QEMU has freed their memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from ..errors import DeadlineExceeded
from ..qmp import Command, Monitor
from ..qmp.guest import count_ram_blocks, read_backends, read_migration
from .model import Role
from .pause.migrating import WAIT

__all__ = ["count_memory_backends", "remove", "wait_freed"]

_SETUP_S = 10.0
_SETUP_POLL_S = 0.005
_FREED_S = 2.0
_FREED_POLL_S = 0.01


async def remove(monitor: Monitor, command: Command, *, deadline: float = 10.0) -> None:
    """Send a command that removes a backend; a memory backend not while a migration is set up.

    Under TCG that stops QEMU for good: the thread of the migration has the lock of the list of RAM
    blocks and gives the BQL away meanwhile, and the main loop, with the BQL, waits for that lock
    (ram_init_bitmaps in migration/ram.c; do_run_on_cpu; qemu_ram_free and qemu_ram_alloc, 7.2).
    What begins between the question and the command cannot be excluded.  Raises DeadlineExceeded
    after a while, and as `Monitor.execute`.
    """
    if command.name == Role.OBJECT.remove_command:
        await _await_set_up(monitor)
    await monitor.execute(command.name, command.arguments, deadline=deadline)


async def _await_set_up(monitor: Monitor) -> None:
    until = time.monotonic() + _SETUP_S
    while await read_migration(monitor) == "setup":
        if time.monotonic() > until:
            raise DeadlineExceeded(
                f"a migration has been set up for {_SETUP_S:g} s: no object was removed meanwhile",
                remedy=WAIT,
            )
        await asyncio.sleep(_SETUP_POLL_S)


async def count_memory_backends(monitor: Monitor, removals: Iterable[Command]) -> int:
    """How many of these commands remove a memory backend.  Raises TargetError."""
    ids = {
        command.arguments.get("id")
        for command in removals
        if command.name == Role.OBJECT.remove_command and command.arguments is not None
    }
    return len((await read_backends(monitor)).keys() & ids) if ids else 0


async def wait_freed(monitor: Monitor, most: int) -> bool:
    """Wait until there are `most` RAM blocks; False when it takes longer than two seconds.

    `object-del` returns before: the block goes with the last FlatView that shows it, by RCU.
    Whoever plugs the same device again in between makes QEMU 7.2 abort ('RAMBlock "…" already
    registered', qemu_ram_set_idstr of softmmu/physmem.c; seen with ivshmem-plain).
    """
    end = time.monotonic() + _FREED_S
    while True:
        count = await count_ram_blocks(monitor)
        if count is None or count <= most:
            return True
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(_FREED_POLL_S)
