"""Host memory behind slots: memfds, and the addresses at which they are mapped for a guest.

`HostMemory` is mapped twice, once for the guest and once for us: the guest's mapping may be
protected, unmapped and mapped over; ours is always there, so reading what a guest wrote cannot
fail.  `Blocks` are the files of a mirror's RAM blocks, mapped where its slots show them.  A
`Reservation` is anonymous memory where nothing can be reached.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import OperationFailed
from ..memslots import Slot
from ..memslots.slots import Backing
from . import system
from .system import Closing
from .x86 import PAGE

__all__ = ["PAGE", "BlockName", "Blocks", "HostMemories", "HostMemory", "Reservation", "hva_of"]

BlockName = tuple[str | None, str | None]
"""Name and owner of what backs a slot."""


class Reservation:
    """`size` bytes of address space in which memory can be placed at fixed addresses.

    No other mapping of this process can come in between.
    """

    def __init__(self, size: int) -> None:
        """Raises OperationFailed when there is no room for it."""
        self.size = size
        flags = system.MAP_PRIVATE | system.MAP_ANONYMOUS | system.MAP_NORESERVE
        try:
            self.hva = system.mmap(size, system.PROT_NONE, flags)
        except OSError as exc:
            raise _no_memory(size, exc) from exc
        self._open = True

    def place(self, offset: int, size: int, file: int, at: int, protection: int) -> None:
        """`[at, at + size)` of `file` appears at `offset`; what was there goes, in one step."""
        system.mmap(
            size,
            protection,
            system.MAP_SHARED | system.MAP_FIXED | system.MAP_NORESERVE,
            file,
            at,
            self.hva + offset,
        )

    def clear(self, offset: int, size: int) -> None:
        """Nothing can be reached at `[offset, offset + size)` any more."""
        flags = system.MAP_PRIVATE | system.MAP_ANONYMOUS | system.MAP_NORESERVE
        system.mmap(size, system.PROT_NONE, flags | system.MAP_FIXED, address=self.hva + offset)

    def close(self) -> None:
        if self._open:
            self._open = False
            system.munmap(self.hva, self.size)


class HostMemory(Closing):
    """`size` bytes of shared memory, in whole pages; pages come when they are touched."""

    def __init__(self, size: int, name: str = "lab") -> None:
        """Raises OperationFailed when the host has no room."""
        self.size = size
        self.fd = -1
        self._maps: list[int] = []
        both = system.PROT_READ | system.PROT_WRITE
        try:
            self.fd = os.memfd_create(f"qmp-memlistener-{name}", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
            for _ in range(2):
                flags = system.MAP_SHARED | system.MAP_NORESERVE
                self._maps.append(system.mmap(size, both, flags, self.fd))
        except OSError as exc:
            self.close()
            raise _no_memory(size, exc) from exc
        self.hva, self._own = self._maps
        self.bytes = memoryview((ctypes.c_ubyte * size).from_address(self._own)).cast("B")
        self.words = self.bytes.cast("Q") if size % 8 == 0 else memoryview(b"")

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data

    def populate(self) -> None:
        """Bring all pages in now, in both mappings.  Raises OperationFailed."""
        try:
            for address in self._maps:
                system.madvise(address, self.size, system.MADV_POPULATE_WRITE)
        except OSError as exc:
            raise _no_memory(self.size, exc) from exc

    def close(self) -> None:
        """The views must not be used afterwards."""
        maps, self._maps = self._maps, []
        for address in maps:
            system.munmap(address, self.size)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


HostMemories = Mapping[BlockName, HostMemory]


def hva_of(memories: HostMemories, slot: Slot) -> int:
    """Where the slot's first byte lies in our address space."""
    return memories[slot.block, slot.owner].hva + (slot.offset or 0)


_UNUSED = 64  # blocks that no slot shows any more and that are kept all the same
_MAGIC = 0xA5
_PAGE_BITS, _BLOCK_BITS = 36, 20


@dataclass(slots=True)
class _Block:
    """A memfd; holes in it cost nothing."""

    fd: int
    number: int
    size: int = 0


class Blocks:
    """A mirror's memory of each RAM block, by name and owner: a sparse file, as long as slots need.

    Nothing of the guest's is in it: what is written there the lab wrote itself, to find out what is
    shown where (`stamp`).  A block keeps what was written to it while no slot shows it, as a
    guest's RAM does.  Of blocks that no slot shows, the last `_UNUSED` are kept.
    """

    def __init__(self) -> None:
        self._blocks: dict[BlockName, _Block] = {}  # the one used last is the last
        self._names: dict[int, BlockName] = {}
        self._made = 0

    def reach(self, name: BlockName, end: int) -> int:
        """The file of a block, at least `end` bytes long.  Raises OSError."""
        block = self._blocks.pop(name, None)
        if block is None:
            fd = os.memfd_create("qmp-memlistener-mirror", os.MFD_CLOEXEC)
            block = _Block(fd, self._made)
            self._names[self._made] = name
            self._made += 1
        self._blocks[name] = block
        if end > block.size:
            os.ftruncate(block.fd, end)
            block.size = end
        return block.fd

    def read(self, name: BlockName, offset: int, size: int) -> bytes:
        """What is in a block; zeros where nothing was written.  Raises OSError."""
        return os.pread(self.reach(name, offset + size), size, offset)

    def write(self, name: BlockName, offset: int, data: bytes) -> None:
        """Raises OSError."""
        os.pwrite(self.reach(name, offset + len(data)), data, offset)

    def stamp(self, name: BlockName, offset: int) -> None:
        """Write into the first word of the page at `offset` which page it is.  Raises OSError."""
        self.reach(name, offset + PAGE)
        number = self._blocks[name].number % (1 << _BLOCK_BITS)
        word = (_MAGIC << _BLOCK_BITS | number) << _PAGE_BITS | offset // PAGE
        self.write(name, offset, word.to_bytes(8, "little"))

    def stamped(self, data: bytes) -> Backing | None:
        """Which page `data`, the first word of one, is from; None when it has no stamp of ours."""
        word = int.from_bytes(data, "little")
        number = word >> _PAGE_BITS & (1 << _BLOCK_BITS) - 1
        if word >> _PAGE_BITS + _BLOCK_BITS != _MAGIC or number not in self._names:
            return None
        return Backing(*self._names[number], (word & (1 << _PAGE_BITS) - 1) * PAGE)

    def let_go(self, name: BlockName, slots: Iterable[Slot]) -> None:
        """A slot of a block went; forget the oldest of too many blocks that no slot shows."""
        last = self._blocks.pop(name, None)
        if last is not None:
            self._blocks[name] = last
        if len(self._blocks) <= _UNUSED:
            return
        used = {(s.block, s.owner) for s in slots}
        unused = [name for name in self._blocks if name not in used]
        for name in unused[: max(len(unused) - _UNUSED, 0)]:
            block = self._blocks.pop(name)
            os.close(block.fd)
            del self._names[block.number]

    def close(self) -> None:
        for block in self._blocks.values():
            os.close(block.fd)
        self._blocks.clear()
        self._names.clear()


def _no_memory(size: int, exc: OSError) -> OperationFailed:
    return OperationFailed(
        f"no room for {size} bytes of guest memory: {exc.strerror}",
        remedy="use less RAM, or free memory on the host",
    )
