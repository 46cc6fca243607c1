"""From the text of a snapshot to the maps of the address spaces that KVM has slots for."""

from __future__ import annotations

from ..errors import ProtocolViolation
from ..memslots import ADDRESS_SPACES
from ..topology import MemoryMap, read_maps

__all__ = ["maps_of"]


def maps_of(text: str) -> dict[int, MemoryMap]:
    """Maps by KVM's address-space id.

    Raises MtreeError for text that no QEMU prints, ProtocolViolation when there is no `memory`.
    """
    maps = read_maps(text, list(ADDRESS_SPACES))
    if "memory" not in maps:
        raise ProtocolViolation("`info mtree` shows no address space `memory`")
    return {ADDRESS_SPACES[name]: m for name, m in maps.items()}
