"""Host memory behind a mirror's slots: a sparse file for each RAM block, as long as slots need it.

The lab's blocks have nothing of the guest's in them: what is written there the lab wrote itself, to
find out what is shown where (`stamp`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..memslots import Slot
from ..memslots.slots import Backing
from .execution import BlockName
from .host_memory import PAGE

__all__ = ["Blocks"]

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
    """The memory of each RAM block, by name and owner.

    A block keeps what was written to it while no slot shows it, as a guest's RAM does.  Of blocks
    that no slot shows, the last `_UNUSED` are kept.
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
        """What is in a block; zeros where nobody wrote.  Raises OSError."""
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
