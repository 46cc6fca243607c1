"""What a Linux guest sees: parsers of its /proc and /sys, and the commands that print them.

Pure: text in, values out.  `linux_guest` runs the commands.  Text that a kernel does not print
raises InputError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from qmp_memlistener.errors import InputError
from qmp_memlistener.guests.pci import PciAddress

__all__ = [
    "BLOCK_COMMAND",
    "MEMINFO_COMMAND",
    "MEMORY_COMMAND",
    "NET_COMMAND",
    "PCI_COMMAND",
    "Bar",
    "BlockDevice",
    "MemoryBlocks",
    "NetDevice",
    "PciDevice",
    "parse_block",
    "parse_meminfo",
    "parse_memory",
    "parse_net",
    "parse_pci",
]

PCI_COMMAND = "cat /proc/bus/pci/devices"
MEMINFO_COMMAND = "cat /proc/meminfo"
MEMORY_COMMAND = (
    "cd /sys/devices/system/memory && cat block_size_bytes; grep -sH . memory*/state; true"
)
NET_COMMAND = "cd /sys/class/net && grep -sH . */address; true"
BLOCK_COMMAND = "cd /sys/block && grep -sH . */size; true"

_BARS = 6
_BAR_IO = 0x1
_PORTS = 0x10000  # an IDE function's legacy ports lack the low bit (quirk_ide, drivers/pci/probe.c)
_SECTOR = 512  # /sys/block/*/size counts these, whatever the device's own block is


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory BAR: the guest placed it at `[start, start + size)`."""

    number: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A PCI function; `driver` is the one that drives it, None while there is none."""

    address: PciAddress
    vendor: int
    device: int
    bars: tuple[Bar, ...]
    driver: str | None


@dataclass(frozen=True, slots=True)
class NetDevice:
    """A network interface other than the loopback; `mac` is in lower case."""

    name: str
    mac: str


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """A disk or a pmem device; `size` is bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class MemoryBlocks:
    """Memory as the kernel plugs it: `online` and `present` blocks of `size` bytes each."""

    size: int
    online: int
    present: int

    @property
    def online_bytes(self) -> int:
        return self.online * self.size


def parse_pci(text: str) -> tuple[PciDevice, ...]:
    """/proc/bus/pci/devices, in the order of addresses.

    Columns (show_device, drivers/pci/proc.c): bus and devfn, vendor and device, interrupt, then
    seven starts (with the BAR's low bits) and seven sizes, of which the last is the ROM, then the
    driver.
    """
    return tuple(sorted(map(_pci_device, _lines(text)), key=lambda d: d.address))


def _pci_device(line: str) -> PciDevice:
    fields = line.split("\t")
    try:
        bdf, ids = int(fields[0], 16), int(fields[1], 16)
        starts = [int(f, 16) for f in fields[3 : 3 + _BARS]]
        sizes = [int(f, 16) for f in fields[10 : 10 + _BARS]]
        driver = fields[17].strip()
    except (IndexError, ValueError):
        raise InputError(f"not a line of /proc/bus/pci/devices: {line!r}") from None
    bars = tuple(
        Bar(number, start & ~0xF, size)
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
        if size and not start & _BAR_IO and start >= _PORTS
    )
    address = PciAddress(bdf >> 8, bdf >> 3 & 0x1F, bdf & 7)
    return PciDevice(address, ids >> 16, ids & 0xFFFF, bars, driver or None)


def parse_meminfo(text: str) -> int:
    """MemTotal of /proc/meminfo in bytes: what is online, less what the kernel took at boot."""
    found = re.search(r"^MemTotal: +(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise InputError("no MemTotal in /proc/meminfo")
    return int(found[1]) << 10


def parse_memory(text: str) -> MemoryBlocks:
    """The output of MEMORY_COMMAND: the size of a block in hexadecimal, then each one's state."""
    lines = list(_lines(text))
    try:
        size = int(lines[0], 16)
    except (IndexError, ValueError):
        raise InputError("no block_size_bytes in /sys/devices/system/memory") from None
    states = [state for _, state in _grepped("\n".join(lines[1:]))]
    return MemoryBlocks(size, states.count("online"), len(states))


def parse_net(text: str) -> tuple[NetDevice, ...]:
    """The output of NET_COMMAND, in the order of names."""
    return tuple(NetDevice(name, mac) for name, mac in sorted(_grepped(text)) if name != "lo")


def parse_block(text: str) -> tuple[BlockDevice, ...]:
    """The output of BLOCK_COMMAND, in the order of names; devices without a medium are left out."""
    found = []
    for name, sectors in sorted(_grepped(text)):
        if not sectors.isdecimal():
            raise InputError(f"not the size of a block device: {sectors!r}")
        if int(sectors):
            found.append(BlockDevice(name, int(sectors) * _SECTOR))
    return tuple(found)


def _grepped(text: str) -> Iterator[tuple[str, str]]:
    """`NAME/file:VALUE` lines of `grep -sH . */file`."""
    for line in _lines(text):
        path, colon, value = line.partition(":")
        if not colon:
            raise InputError(f"not a file and its value: {line!r}")
        yield PurePosixPath(path).parts[0] if path else "", value


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.strip())
