"""The lab's guest programs: what the host and vm-images/lab/probe.s agree on.

A guest lives in a private slot that nothing but the lab touches: code, a report page for each vCPU,
tables of addresses, page tables.  `Private` lays it out in host memory.  What the guest works on
lies outside.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import StrEnum
from functools import cache

from ..errors import InputError
from ..guests.images import find_built_image
from . import x86
from .memory import PAGE, HostMemory

__all__ = ["MAX_VCPUS", "GuestKind", "Private", "Report", "code"]

COUNT = 0x00
LAST_TSC = 0x08
MAX_GAP = 0x10
MAX_GAP_TSC = 0x18
TABLE = 0x20
IN_USE = 0x28
GENERATION = 0x30

GAP = 0x000
DATA = 0x080
WRITER = 0x100
SIZE = 0x200

MAX_VCPUS = 16

_LARGE_PAGE = 2 << 20
_CODE = 0x1000
_REPORTS = 0x2000
_SCRATCH = _REPORTS + MAX_VCPUS * PAGE
_TABLES = 0x20000
_TABLE_BYTES = 0x4000
_PAGE_TABLES = _TABLES + MAX_VCPUS * 2 * _TABLE_BYTES
MAX_ADDRESSES = _TABLE_BYTES // 8 - 1


class GuestKind(StrEnum):
    """What a guest does, and so what it notices.

    gap        only counts heartbeats: what stops a vCPU
    data       reads and writes words of RAM that stays
    writer     sweeps all RAM that stays with a generation number a page: dirty logs
    code       runs code that lies in the slot
    pagetable  has its page tables in the slot, so that CR3 points at memory that vanishes; goes
               through so many pages that it walks them all the time
    """

    DATA = "data"
    WRITER = "writer"
    CODE = "code"
    PAGETABLE = "pagetable"
    GAP = "gap"


@cache
def code() -> bytes:
    """The programs.  Raises MissingPrerequisite when the image is nowhere."""
    image = find_built_image("lab", "probe.img").read_bytes()
    if len(image) != SIZE:
        raise InputError(
            f"the lab's guest image has {len(image)} bytes, not {SIZE}",
            remedy="build it with `make -C vm-images/lab`, or install the package again",
        )
    return image


class _Word:
    """A word of a report page.  Each read or write is one of 8 bytes."""

    def __init__(self, offset: int) -> None:
        self._index = offset // 8

    def __get__(self, report: Report, owner: type | None = None) -> int:
        return report.words[report.at + self._index]

    def __set__(self, report: Report, value: int) -> None:
        report.words[report.at + self._index] = value


class Report:
    """A vCPU's report page, as the host sees it.

    `count` heartbeats so far; `max_gap` ticks of the longest time between two of them since it was
    set to 0; `table` is the gpa of the addresses to go through next, `table_in_use` of the present.
    """

    count = _Word(COUNT)
    last_tsc = _Word(LAST_TSC)
    max_gap = _Word(MAX_GAP)
    table = _Word(TABLE)
    table_in_use = _Word(IN_USE)

    def __init__(self, memory: HostMemory, offset: int) -> None:
        self.words = memory.words
        self.at = offset // 8


class Private:
    """The private slot's memory for `vcpus` vCPUs, mapped at `gpa` of the guest.

    The guest reaches addresses below `gibibytes` GiB, this slot among them.
    """

    def __init__(self, gpa: int, vcpus: int, gibibytes: int) -> None:
        """Raises InputError for more than the lab can do, OperationFailed when there is no room."""
        if not 1 <= vcpus <= MAX_VCPUS:
            raise InputError(
                f"the lab has room for 1 to {MAX_VCPUS} vCPUs, not {vcpus}",
                remedy=f"use at most {MAX_VCPUS}",
            )
        if gpa % _LARGE_PAGE:
            raise InputError(f"the lab's own slot at {gpa:#x}", remedy="use multiples of 2 MiB")
        if not 1 <= gibibytes <= x86.MAX_GIB or gpa >= gibibytes * x86.GIB:
            raise InputError(
                f"the lab's guests reach 1 to {x86.MAX_GIB} GiB, not {gibibytes}",
                remedy="place memory below that",
            )
        self.gpa = gpa
        self.size = self.size_for(gibibytes)
        self._gibibytes = gibibytes
        self.memory = HostMemory(self.size, "private")
        self.memory.write(_CODE, code())
        self.memory.write(_PAGE_TABLES, self.page_tables(gpa + _PAGE_TABLES))
        self.memory.populate()
        self.reports = [Report(self.memory, _REPORTS + i * PAGE) for i in range(vcpus)]
        self._half = [0] * vcpus

    @staticmethod
    def size_for(gibibytes: int) -> int:
        """Bytes of the slot."""
        return _PAGE_TABLES + x86.TABLE_BYTES + gibibytes * PAGE

    @property
    def code_gpa(self) -> int:
        return self.gpa + _CODE

    @property
    def cr3(self) -> int:
        return self.gpa + _PAGE_TABLES

    def page_tables(self, at: int, aliases: int = 0) -> bytes:
        """Page tables that map the same, to be placed at gpa `at`.

        And behind it `aliases` GiB of pages of 2 MiB that all show the beginning of this slot.
        """
        return x86.tables(at, self._gibibytes, aliases, self.gpa)

    def scratch_aliases(self, vcpu: int, aliases: int) -> list[int]:
        """Addresses of the vCPU's scratch word, one in each of those pages."""
        first = self._gibibytes * x86.GIB + self.scratch_gpa(vcpu) - self.gpa
        return [first + page * _LARGE_PAGE for page in range(aliases * 512)]

    def report_gpa(self, vcpu: int) -> int:
        return self.gpa + _REPORTS + vcpu * PAGE

    def scratch_gpa(self, vcpu: int) -> int:
        """A word of the vCPU's own to read and write, in this slot."""
        return self.gpa + _SCRATCH + vcpu * 64

    def set_table(self, vcpu: int, addresses: Sequence[int]) -> int:
        """Write the table that is not in use and name it; its gpa.

        An odd address stands for the even one below, which is only read.  The vCPU goes through it
        from its next pass on (`Report.table_in_use`).  Raises InputError for too many.
        """
        assert 0 not in addresses, "0 ends a table"
        assert addresses, "a pass without a word to touch makes no heartbeat"
        if len(addresses) > MAX_ADDRESSES:
            raise InputError(
                f"{len(addresses)} addresses for a vCPU, there is room for {MAX_ADDRESSES}",
                remedy="give fewer",
            )
        self._half[vcpu] ^= 1
        offset = _TABLES + (2 * vcpu + self._half[vcpu]) * _TABLE_BYTES
        entries = (*addresses, 0)
        self.memory.write(offset, struct.pack(f"<{len(entries)}Q", *entries))
        self.reports[vcpu].table = self.gpa + offset
        return self.gpa + offset

    def close(self) -> None:
        self.memory.close()
