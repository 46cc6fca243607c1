"""Where in its file a program keeps the functions that it exports.

Uses the dynamic symbol table through its hash table, so that a stripped binary (which keeps both)
is as good as any and 14,000 symbols cost no more than ten.  Nothing is read but the file; which
functions matter is `functions`' business.

The file may be anybody's, and may say anything of itself: tables of 2**32 entries, chains that
lead back to themselves.  Whatever a file makes us do, it is read for it: so what is read is bounded
(QEMU's takes 20,000 to 60,000 reads of 0.3 MB in all), and with it time and memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, cast

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.hash import ELFHashTable, GNUHashTable

from ..errors import MissingPrerequisite
from .files import open_foreign

__all__ = ["ElfFile", "read_elf"]

_MOST_READS = 300_000
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ElfFile:
    """A program file: its machine (`EM_X86_64`) and where the functions asked for begin in it.

    `offsets` are offsets in the file by symbol name; functions it does not export are left out.
    """

    machine: str
    offsets: dict[str, int]


def read_elf(path: str, names: Iterable[str]) -> ElfFile:
    """Look up `names`.  Raises MissingPrerequisite: unreadable, no ELF file, no dynamic symbols."""
    try:
        with open(open_foreign(path), "rb") as file:
            return _read(cast("BinaryIO", _Metered(file)), names)
    except OSError as error:
        raise MissingPrerequisite(
            f"QEMU's program file cannot be read: {path}: {error.strerror}",
            remedy="run as root or as the user that QEMU runs as",
        ) from error
    except (ELFError, ConstructError, ValueError, LookupError, TypeError, struct.error) as error:
        raise MissingPrerequisite(
            f"QEMU's program file is not as ELF files are: {error}"
        ) from error


class _Metered:
    """What pyelftools needs of a file, as long as it asks for less than the bounds."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._reads = 0
        self._bytes = 0

    def read(self, size: int = -1) -> bytes:
        """Raises ELFError when it has been too much."""
        self._reads += 1
        if size < 0 or size > _MOST_BYTES - self._bytes or self._reads > _MOST_READS:
            raise ELFError("its tables are larger than any program's")
        data = self._file.read(size)
        self._bytes += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _read(file: BinaryIO, names: Iterable[str]) -> ElfFile:
    elf = ELFFile(file)
    machine = str(elf["e_machine"])
    symbols = _hash_table(elf)
    loaded = [
        (int(s["p_vaddr"]), int(s["p_filesz"]), int(s["p_offset"]))
        for s in elf.iter_segments("PT_LOAD")
    ]
    offsets = {}
    for name in names:
        symbol = symbols.get_symbol(name)
        if symbol is None or symbol["st_info"]["type"] != "STT_FUNC":
            continue
        address = int(symbol["st_value"])
        for start, size, offset in loaded:
            if start <= address < start + size:
                offsets[name] = address - start + offset
    return ElfFile(machine, offsets)


def _hash_table(elf: ELFFile) -> GNUHashTable | ELFHashTable:
    """The hash table that the dynamic segment names: it is there without section headers too."""
    for segment in elf.iter_segments("PT_DYNAMIC"):
        if not isinstance(segment, DynamicSegment):
            continue
        _, gnu = segment.get_table_offset("DT_GNU_HASH")
        if gnu is not None:
            return GNUHashTable(elf, gnu, segment)
        _, plain = segment.get_table_offset("DT_HASH")
        if plain is not None:
            return ELFHashTable(elf, plain, None, segment)
    raise MissingPrerequisite(
        "QEMU's program file has no dynamic symbols, so its functions cannot be found",
        remedy="use a QEMU that is linked dynamically, as distributions and the default build do",
    )
