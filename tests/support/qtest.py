"""A client of QEMU's qtest protocol: port and memory accesses without any guest code.

Holds: connect, typed accesses, PCI configuration through 0xcf8/0xcfc.  Stops before: interrupt
interception, the clock, device paths.

Works beside `-accel kvm` and `-accel tcg`; QEMU needs `-qtest unix:PATH,server=on,wait=off` (and
`-qtest-log none`, or every line lands on its stderr).  Accesses run in QEMU's main loop with
the BQL held, so each one is a main-thread transition when it changes the map.  The protocol is
documented at the top of QEMU's system/qtest.c (softmmu/qtest.c in 7.2).  A malformed line makes
QEMU abort, which is why there is no method to send text.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Self

from qmp_memlistener.errors import CommandFailed, DeadlineExceeded, TargetLost, TargetUnreachable
from qmp_memlistener.guests.pci import CONFIG_ADDRESS, CONFIG_DATA, PciAddress

__all__ = ["QTest"]

_SUFFIX = {1: "b", 2: "w", 4: "l", 8: "q"}


class QTest:
    """One connection; commands are answered one at a time, in order.

    Every method raises DeadlineExceeded when QEMU does not answer within `timeout` seconds (the
    connection is then closed: a late answer would be taken for the next one's), TargetLost when
    the connection is gone, CommandFailed when QEMU refuses, ValueError for numbers that do not fit.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout: float
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._timeout = timeout
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, path: str | Path, *, timeout: float = 5.0) -> Self:
        """Connect to the socket QEMU listens on; `timeout` (seconds) holds for each command too.

        Raises TargetUnreachable or DeadlineExceeded.
        """
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(str(path))
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"qtest socket {path} did not accept within {timeout:g} s",
                remedy="a qtest socket serves one client at a time",
            ) from exc
        except OSError as exc:
            raise TargetUnreachable(
                f"cannot connect to qtest socket {path}: {exc.strerror or exc}",
                remedy="start QEMU with -qtest unix:PATH,server=on,wait=off -qtest-log none",
            ) from exc
        return cls(reader, writer, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; QEMU goes on and accepts the next client."""
        self._writer.close()
        try:
            async with asyncio.timeout(self._timeout):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass

    async def port_in(self, port: int, width: int) -> int:
        """Read an I/O port, `width` 1, 2 or 4 bytes."""
        _check("port", port, 0x10000)
        return await self._number(f"in{_suffix(width, 4)} {port:#x}")

    async def port_out(self, port: int, value: int, width: int) -> None:
        """Write an I/O port, `width` 1, 2 or 4 bytes."""
        _check("port", port, 0x10000)
        _check("value", value, 1 << 8 * width)
        await self._command(f"out{_suffix(width, 4)} {port:#x} {value:#x}")

    async def outb(self, port: int, value: int) -> None:
        await self.port_out(port, value, 1)

    async def outw(self, port: int, value: int) -> None:
        await self.port_out(port, value, 2)

    async def outl(self, port: int, value: int) -> None:
        await self.port_out(port, value, 4)

    async def inb(self, port: int) -> int:
        return await self.port_in(port, 1)

    async def inw(self, port: int) -> int:
        return await self.port_in(port, 2)

    async def inl(self, port: int) -> int:
        return await self.port_in(port, 4)

    async def memory_read(self, address: int, width: int) -> int:
        """Read guest-physical memory (RAM or MMIO) with one access of 1, 2, 4 or 8 bytes."""
        _check("address", address, 1 << 64)
        return await self._number(f"read{_suffix(width, 8)} {address:#x}")

    async def memory_write(self, address: int, value: int, width: int) -> None:
        """Write guest-physical memory with one access of 1, 2, 4 or 8 bytes."""
        _check("address", address, 1 << 64)
        _check("value", value, 1 << 8 * width)
        await self._command(f"write{_suffix(width, 8)} {address:#x} {value:#x}")

    async def readl(self, address: int) -> int:
        return await self.memory_read(address, 4)

    async def readq(self, address: int) -> int:
        return await self.memory_read(address, 8)

    async def writel(self, address: int, value: int) -> None:
        await self.memory_write(address, value, 4)

    async def writeq(self, address: int, value: int) -> None:
        await self.memory_write(address, value, 8)

    async def read_config(self, function: PciAddress, register: int, width: int) -> int:
        """Read a configuration register, `width` 1, 2 or 4, not crossing a dword.

        Selecting and accessing are two port writes: a guest that uses 0xcf8 at the same moment
        (the pulse guest while it obeys a command) can come in between.
        """
        port = _config_port(register, width)
        await self.outl(CONFIG_ADDRESS, function.config_address(register))
        return await self.port_in(port, width)

    async def write_config(
        self, function: PciAddress, register: int, value: int, width: int
    ) -> None:
        """Write a configuration register; see `read_config`."""
        port = _config_port(register, width)
        _check("value", value, 1 << 8 * width)
        await self.outl(CONFIG_ADDRESS, function.config_address(register))
        await self.port_out(port, value, width)

    async def _number(self, command: str) -> int:
        answer = await self._command(command)
        try:
            return int(answer, 16)
        except ValueError:
            raise CommandFailed(f"qtest {command}", "qtest", f"answered {answer!r}") from None

    async def _command(self, command: str) -> str:
        """Send one line, return what follows `OK`."""
        async with self._lock:
            if self._writer.is_closing():
                raise TargetLost("the qtest connection is closed")
            try:
                async with asyncio.timeout(self._timeout):
                    self._writer.write(command.encode() + b"\n")
                    await self._writer.drain()
                    answer = await self._answer()
            except TimeoutError as exc:
                self._writer.close()
                raise DeadlineExceeded(
                    f"QEMU did not answer qtest {command!r} within {self._timeout:g} s"
                ) from exc
            except OSError as exc:
                raise TargetLost(f"the qtest connection broke at {command!r}: {exc}") from exc
            except BaseException:
                self._writer.close()
                raise
        word, _, rest = answer.partition(" ")
        if word != "OK":
            raise CommandFailed(f"qtest {command}", "qtest", answer)
        return rest

    async def _answer(self) -> str:
        while True:
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                raise TargetLost("QEMU closed the qtest connection")
            text = line.decode(errors="replace").strip()
            if not text.startswith("IRQ "):
                return text


def _suffix(width: int, widest: int) -> str:
    if width not in _SUFFIX or width > widest:
        raise ValueError(f"no access is {width} bytes wide here")
    return _SUFFIX[width]


def _check(what: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise ValueError(f"{what} {value:#x} is not below {limit:#x}")


def _config_port(register: int, width: int) -> int:
    _check("register", register, 0x100)
    if (register & 3) + width > 4:
        raise ValueError(f"{width} bytes at register {register:#x} cross a dword")
    return CONFIG_DATA + (register & 3)
