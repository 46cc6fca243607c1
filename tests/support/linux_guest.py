"""A Linux guest that takes commands, and what it sees.

`boot_linux` is that of the package; the parsers of what the guest prints are in `linux_views`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import TypeVar

from qmp_memlistener.errors import DeadlineExceeded, OperationFailed
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.guests import linux as package
from qmp_memlistener.guests.linux import BOOT_TIMEOUT, LinuxImage, LinuxSpec
from tests.support import linux_views
from tests.support.linux_console import Console, Outcome
from tests.support.linux_views import BlockDevice, MemoryBlocks, NetDevice, PciDevice

__all__ = ["LinuxGuest", "boot_linux"]

_POLL = 0.1  # seconds between two looks of the guest at itself; each look costs it some forks

T = TypeVar("T")


@asynccontextmanager
async def boot_linux(
    image: LinuxImage,
    spec: LinuxSpec | None = None,
    build: QemuBuild | None = None,
    *,
    timeout: float = BOOT_TIMEOUT,
    wait: bool = True,
) -> AsyncIterator[LinuxGuest]:
    """The package's `boot_linux`, of a guest that takes commands."""
    async with package.boot_linux(
        image, spec, build, timeout=timeout, wait=wait, port=Console
    ) as guest:
        yield LinuxGuest(*(getattr(guest, f.name) for f in fields(guest)))


@dataclass(frozen=True, slots=True)
class LinuxGuest(package.LinuxGuest):
    """A running Linux guest that takes commands.

    Methods that ask the guest raise what `run` raises, and OperationFailed when its command fails.
    """

    async def run(self, command: str, timeout: float = 10.0) -> Outcome:
        """`status, text = await guest.run("cat /proc/meminfo")`; a shell runs it, as root.

        Standard error is part of the text.  Raises DeadlineExceeded (the command is killed after
        `timeout` seconds), OperationFailed when the guest boots meanwhile, TargetLost when QEMU
        ends.
        """
        assert isinstance(self.agent, Console)
        return await self.agent.run(command, timeout)

    async def check(self, command: str, timeout: float = 10.0) -> str:
        """What a command prints.  Raises OperationFailed unless its exit status is 0."""
        status, text = await self.run(command, timeout)
        if status:
            raise OperationFailed(
                f"{command!r} failed in the Linux guest ({status}): {text[-400:]}"
            )
        return text

    async def until(
        self, look: Callable[[], Awaitable[T]], true: Callable[[T], bool], timeout: float = 20.0
    ) -> T:
        """Look again and again until `true` of it, and return that.

        Raises DeadlineExceeded that tells the last look.
        """
        seen: list[T] = []
        try:
            async with asyncio.timeout(timeout):
                while True:
                    seen[:] = [await look()]
                    if true(seen[0]):
                        return seen[0]
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            last = seen[0] if seen else "nothing"
            raise DeadlineExceeded(
                f"the Linux guest still sees {last} after {timeout:g} s"
            ) from None

    async def memory_total(self) -> int:
        """MemTotal in bytes."""
        return linux_views.parse_meminfo(await self.check(linux_views.MEMINFO_COMMAND))

    async def memory_blocks(self) -> MemoryBlocks:
        """Blocks of memory that are online; they change by exactly what was plugged."""
        return linux_views.parse_memory(await self.check(linux_views.MEMORY_COMMAND))

    async def pci_devices(self) -> tuple[PciDevice, ...]:
        """PCI functions with their BARs and drivers, by address."""
        return linux_views.parse_pci(await self.check(linux_views.PCI_COMMAND))

    async def net_devices(self) -> tuple[NetDevice, ...]:
        """Network interfaces but the loopback, by name."""
        return linux_views.parse_net(await self.check(linux_views.NET_COMMAND))

    async def block_devices(self) -> tuple[BlockDevice, ...]:
        """Disks and pmem devices, by name."""
        return linux_views.parse_block(await self.check(linux_views.BLOCK_COMMAND))

    async def set_workload(self, on: bool) -> None:
        """Keep every CPU and a part of the memory busy, or no longer."""
        await self.check(f"workload {'start' if on else 'stop'}")

    async def set_pulse(self, on: bool, period_us: int = 1000) -> None:
        """Let the CPUs beat, `period_us` apart (0: all the time that is left), or no longer.

        A pulse that runs goes on as it is.  `Pulse(page).wait_ready()` waits until it beats.
        """
        await self.check(f"pulse start {period_us}" if on else "pulse stop")
