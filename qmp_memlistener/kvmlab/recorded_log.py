"""Slot operations from a log that is no recording: `kvm_set_user_memory` lines among other text.

Time stamps, other trace events, a guest's console, CRLF and a last line that is cut off do not
matter.  `inputs.traces` reads a line, whatever form a backend or a log collector gave it; what the
operations mean is in `replay_history`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ..errors import InputError
from ..inputs import TraceLine, open_input, read_trace_line
from ..memslots import Order
from .recorded_ops import Recorded, RecordedOp, Remarks

__all__ = ["read_log"]

_PIECE = 64 * 1024
_OVERLAP = 1024  # longer than a line of interest
_SHOWN = 120


def read_log(path: str) -> Recorded:
    """The operations of a log of QEMU 7.2 to 11.1.

    `flatview_new` lines mark commits: QEMU makes the new views first, one for each root, and calls
    its listeners then (`memory_region_transaction_commit`, system/memory.c), so a root that comes
    again, or a view behind an operation, begins a commit.  So does a BAR that is mapped or
    a memory device that is plugged, which QEMU does under the lock that a commit holds.

    Up to 9.0 the line is `Slot#N` with the address space in N, from 9.1 on `AddrSpace#A Slot#N`:
    then the order of 8.0 is certain.  Raises InputError when the file cannot be read, when it has
    slot operations and none of them can be, and when several QEMUs wrote it.
    """
    reader = _Reader()
    with open_input(path) as file:
        for number, line in _lines(file):
            reader.line(number, line)
    if not reader.ops and reader.unreadable is not None:
        number, text = reader.unreadable
        raise InputError(
            f"{path}, line {number} is a slot operation in a form that is not known: {text!r}",
            remedy="give the text of QEMU's log backend, of scripts/simpletrace.py, or of perf "
            "script, unchanged",
        )
    if len(reader.pids) > 1:
        pids = ", ".join(map(str, sorted(reader.pids)[:8]))
        raise InputError(
            f"{path} has slot operations of {len(reader.pids)} processes ({pids})",
            remedy="give the lines of one of them alone: the slots of a guest are its own",
        )
    order = Order.V8_0 if reader.split_slot else None
    return Recorded("log", None, order, reader.marked, tuple(reader.ops), (), {}, reader.remarks)


class _Reader:
    """Lines to operations; knows where commits begin."""

    def __init__(self) -> None:
        self.ops: list[RecordedOp] = []
        self.remarks = Remarks("line")
        self.split_slot = False
        self.marked = False
        self.pids: set[int] = set()
        self.unreadable: tuple[int, str] | None = None
        self._mark = 0
        self._roots: set[int] = set()
        self._open = False  # the commit has had an operation

    def line(self, number: int, line: bytes) -> None:
        told = read_trace_line(line, cut=not line.endswith(b"\n"))
        if told is None:
            return
        if told.event == "slot":
            self._operation(number, line, told)
        elif told.event == "flatview_new":
            if self._open or told.root in self._roots:
                self._begin()
            self.marked = True
            self._roots.add(told.root)
        elif self._open:
            self._begin()

    def _operation(self, number: int, line: bytes, told: TraceLine) -> None:
        if not told.usable:
            self.remarks.add("a slot operation cannot be read and is left out", number)
            if self.unreadable is None:
                self.unreadable = number, line.strip()[-_SHOWN:].decode("utf-8", "replace")
            return
        self.split_slot |= told.split
        self._open = True
        if told.pid is not None:
            self.pids.add(told.pid)
        self.ops.append(
            RecordedOp(
                number,
                told.as_id,
                told.slot,
                told.gpa,
                told.size,
                told.flags,
                told.ret,
                told.ua,
                self._mark,
            )
        )

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
