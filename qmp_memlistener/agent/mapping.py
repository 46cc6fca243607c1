"""What is read from the text of a snapshot: the maps that KVM has slots for, and who may do DMA."""

from __future__ import annotations

import re

from ..errors import ProtocolViolation
from ..memslots import ADDRESS_SPACES
from ..topology import MemoryMap, read_maps

__all__ = ["BusMasters", "maps_of"]

_BUS_MASTER = re.compile(r"alias bus master @.*?( \[disabled\])? owner:\{dev id=([^}]*)\}")


def maps_of(text: str) -> dict[int, MemoryMap]:
    """Maps by KVM's address-space id.

    Raises MtreeError for text that no QEMU prints, ProtocolViolation when there is no `memory`.
    """
    maps = read_maps(text, list(ADDRESS_SPACES))
    if "memory" not in maps:
        raise ProtocolViolation("`info mtree` shows no address space `memory`")
    return {ADDRESS_SPACES[name]: m for name, m in maps.items()}


class BusMasters:
    """When drivers of the guest took their PCI devices, from the texts of successive snapshots.

    The alias `bus master` of a device is enabled while its command register lets it do DMA
    (pci_init_bus_master and pci_default_write_config, hw/pci/pci.c).  Linux leaves that to drivers
    (pci_set_master): of virtio-net, virtio-blk, virtio-rng and nvme it was enabled exactly when a
    driver was bound, of e1000 and ivshmem without a driver never (Linux 6.1; 7.2.22, 10.0.2,
    11.1.3).  Only devices with an id are known.
    """

    def __init__(self) -> None:
        self._off: dict[str, int] = {}
        self._on: dict[str, int] = {}

    def take(self, text: str, start_ns: int, end_ns: int) -> None:
        """A snapshot, made between these times."""
        found = {m[2]: m[1] is None for m in _BUS_MASTER.finditer(text)}
        self._on = {name: self._on.get(name, end_ns) for name, on in found.items() if on}
        for name, on in found.items():
            if not on:
                self._off[name] = start_ns
        self._off = {name: t_ns for name, t_ns in self._off.items() if name in found}

    def taken(self, device: str) -> tuple[int | None, int] | None:
        """When it was last seen without a driver (None: never) and first with one; None: it has
        none, or that is not known."""
        on = self._on.get(device)
        return None if on is None else (self._off.get(device), on)
