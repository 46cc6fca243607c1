"""Slot operations from a raw QEMU log: `kvm_set_user_memory` lines among whatever else is there.

Time stamps, other trace events, a guest's console, CRLF and a last line that is cut off do not
matter: a line counts from the name of its event on.  What the operations mean is in
`replay_history`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ..errors import InputError
from ..memslots import Order
from ..monitor.trace_lines import TraceDecoder
from ..monitor.trace_records import (
    BarMapping,
    FlatViewChange,
    FlatViewEvent,
    MemoryDeviceEvent,
    SlotOp,
)
from .recorded_ops import Recorded, RecordedOp, Remarks

__all__ = ["read_log"]

_PIECE = 64 * 1024
_OVERLAP = 1024  # longer than a line of interest

_SLOT = b"kvm_set_user_memory "
_COMMITS = (
    b"flatview_new 0x",
    b"pci_update_mappings_add ",
    b"pci_update_mappings_del ",
    b"memory_device_pre_plug ",
    b"memory_device_plug ",
    b"memory_device_unplug ",
)


def read_log(path: str) -> Recorded:
    """The operations of a log of QEMU 7.2 to 11.1.

    `flatview_new` lines mark commits: QEMU makes the new views first, one for each root, and calls
    its listeners then (`memory_region_transaction_commit`, system/memory.c), so a root that comes
    again, or a view behind an operation, begins a commit.  So does a BAR that is mapped or
    a memory device that is plugged, which QEMU does under the lock that a commit holds.

    Up to 9.0 the line is `Slot#N` with the address space in N, from 9.1 on `AddrSpace#A Slot#N`:
    then the order of 8.0 is certain.  Raises InputError when the file cannot be read.
    """
    reader = _Reader()
    try:
        with open(path, "rb") as file:
            for number, line in _lines(file):
                reader.line(number, line)
    except OSError as exc:
        raise InputError(
            f"{path} cannot be read: {exc.strerror}",
            remedy="name a recording or a QEMU log that is there and that you may read",
        ) from exc
    order = Order.V8_0 if reader.split_slot else None
    return Recorded("log", None, order, reader.marked, tuple(reader.ops), (), {}, reader.remarks)


class _Reader:
    """Lines to operations; knows where commits begin."""

    def __init__(self) -> None:
        self.ops: list[RecordedOp] = []
        self.remarks = Remarks("line")
        self.split_slot = False
        self.marked = False
        self._decoder = TraceDecoder()
        self._mark = 0
        self._roots: set[int] = set()
        self._open = False  # the commit has had an operation

    def line(self, number: int, line: bytes) -> None:
        at = line.rfind(_SLOT)
        if at >= 0:
            self._operation(number, line[at:])
            return
        for event in _COMMITS:
            at = line.rfind(event)
            if at >= 0:
                self._commit(line[at:])
                return

    def _operation(self, number: int, line: bytes) -> None:
        if not line.startswith((_SLOT + b"Slot#", _SLOT + b"AddrSpace#")):
            return  # somebody switches the event on
        for record in self._decode(line):
            if isinstance(record, SlotOp):
                self.split_slot |= line.startswith(_SLOT + b"AddrSpace#")
                self._open = True
                self.ops.append(_op(record, number, self._mark))
                return
        self.remarks.add("a slot operation cannot be read and is left out", number)

    def _commit(self, line: bytes) -> None:
        for record in self._decode(line):
            match record:
                case FlatViewEvent(change=FlatViewChange.NEW):
                    if self._open or record.root in self._roots:
                        self._begin()
                    self.marked = True
                    self._roots.add(record.root)
                case BarMapping() | MemoryDeviceEvent():
                    if self._open:
                        self._begin()

    def _decode(self, line: bytes) -> list[object]:
        # a number may go on behind the end of a file, unless it is 0
        whole = line.endswith((b"\n", b" ret=0"))
        self._decoder.reset()
        return [*self._decoder.feed(line.rstrip() + b"\n", 0)] if whole else []

    def _begin(self) -> None:
        self._mark += 1
        self._roots.clear()
        self._open = False


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; of one that has no end in sight the last pieces."""
    number, before = 1, b""
    while piece := file.readline(_PIECE):
        yield number, before + piece
        if piece.endswith(b"\n"):
            number, before = number + 1, b""
        else:
            before = piece[-_OVERLAP:]


def _op(record: SlotOp, number: int, mark: int) -> RecordedOp:
    return RecordedOp(
        number,
        record.as_id,
        record.slot,
        record.gpa,
        record.size,
        record.flags,
        record.ret,
        record.ua,
        mark,
    )
