"""PCI addresses and the host-bridge registers that reshape guest memory.

Only names and numbers: the pulse guest (`pulse`) and the qtest client (`qtest`) write them.
Register meanings are those of QEMU's models: i440FX in hw/pci-host/i440fx.c and pam.c, Q35 in
hw/pci-host/q35.c and include/hw/pci-host/q35.h (same offsets in 7.2 and 10.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "COMMAND",
    "COMMAND_MEMORY",
    "CONFIG_ADDRESS",
    "CONFIG_DATA",
    "HOST_BRIDGE",
    "I440FX",
    "PAM_RAM",
    "PAM_ROM",
    "Q35",
    "HostBridge",
    "PciAddress",
]

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC

COMMAND = 0x04
COMMAND_MEMORY = 0x2

PAM_RAM = 0x3
"""Segment attribute: reads and writes go to RAM.  Shift by 4 for the upper half of a register."""
PAM_ROM = 0x1
"""Segment attribute: reads go to RAM, writes to PCI; QEMU shows it as read-only RAM."""


class PciAddress(NamedTuple):
    """One PCI function."""

    bus: int
    device: int
    function: int = 0

    @property
    def bdf(self) -> int:
        """`bus << 8 | device << 3 | function`."""
        return self.bus << 8 | self.device << 3 | self.function

    def config_address(self, register: int) -> int:
        """Value for port 0xcf8 that selects `register`; its data port is 0xcfc + register % 4."""
        return 0x80000000 | self.bdf << 8 | (register & 0xFC)

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.device:02x}.{self.function}"


HOST_BRIDGE = PciAddress(0, 0)


@dataclass(frozen=True, slots=True)
class HostBridge:
    """Offsets of the registers of a host bridge; None where the chip has no such register.

    `pam` is the first of seven PAM registers: number 0 has BIOS area 0xf0000-0xfffff in its upper
    half, numbers 1 to 6 two 16 KiB segments each from 0xc0000 on, the lower one in the lower half.
    `smram` bit 6 (D_OPEN) opens RAM behind 0xa0000-0xbffff, bit 3 enables SMRAM; `esmramc` bit 0
    enables TSEG (needs SMRAM enabled), bits 1-2 its size; `pciexbar` is 64 bits wide, bit 0
    enables the window, which covers RAM when placed over it.
    """

    pam: int
    smram: int
    esmramc: int | None
    pciexbar: int | None


I440FX = HostBridge(pam=0x59, smram=0x72, esmramc=None, pciexbar=None)
Q35 = HostBridge(pam=0x90, smram=0x9D, esmramc=0x9E, pciexbar=0x60)
