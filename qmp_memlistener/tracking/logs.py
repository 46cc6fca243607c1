"""A raw QEMU log as the tracker takes it: `kvm_set_user_memory` lines among other text, to commits.

Time stamps, other trace events, a guest's console, CRLF and a last line that is cut off do not
matter: `inputs.traces` reads a line, whatever form a backend or a log collector gave it.  Which
operations were one commit and what they did to the slots is the tracker's to say, as for a guest
that is watched.  What was there before the log began is in `beginning`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import BinaryIO

from ..errors import InputError
from ..inputs import TraceLine, open_input, read_trace_line
from ..memslots import OpKind, Order, Rules
from ..records import SlotOp
from ..text import quoted
from .commits import Commit, CommitGrouper
from .guesses import counts_from_zero, log_switches
from .live_slots import LiveSlot, LiveSlots
from .replaying import BackedOp, FileKind, Remarks, Traced

__all__ = ["read_log"]

_PIECE = 64 * 1024
_OVERLAP = 1024  # longer than a line of interest
_SHOWN = 120


def read_log(path: str) -> Traced:
    """The operations of a log of QEMU 7.2 to 11.1; their `t_ns` is the number of the line.

    Up to 9.0 the line is `Slot#N` with the address space in N, from 9.1 on `AddrSpace#A Slot#N`:
    then the order of 8.0 is certain.  Otherwise it is taken for that of 7.2, unless a commit that
    `flatview_new` lines mark goes back in address after it has changed flags.

    Raises InputError when the file cannot be read, when it has slot operations and none of them can
    be, and when several QEMUs wrote it.
    """
    reader = _Reader()
    with open_input(path) as file:
        for number, line in _lines(file):
            reader.line(number, line)
    if not reader.found and reader.unreadable is not None:
        number, text = reader.unreadable
        raise InputError(
            f"{path}, line {number} is a slot operation in an unknown form: {quoted(text)}",
            remedy="give the text of QEMU's log backend, of scripts/simpletrace.py, or of perf "
            "script, unchanged",
        )
    if len(reader.pids) > 1:
        pids = ", ".join(map(str, sorted(reader.pids)[:8]))
        raise InputError(
            f"{path} has slot operations of {len(reader.pids)} processes ({pids})",
            remedy="give the lines of one of them alone: the slots of a guest are its own",
        )
    order = Order.V8_0 if reader.split else Order.V7_2
    commits = reader.commits(order, ())
    if any(map(_queued, commits)):
        order = Order.V8_0
    elif commits and order is Order.V7_2:
        reader.remarks.add("its lines are those of QEMU 7.2 to 9.0; 7.2 is assumed")
    ops = _backed(commits)
    if not counts_from_zero(ops):
        ops = _backed(reader.commits(order, log_switches(ops, marked=reader.marked)))
    return Traced(FileKind.LOG, None, order, ops, (), {}, reader.remarks)


class _Reader:
    """Lines to what the tracker takes."""

    def __init__(self) -> None:
        self.remarks = Remarks("line")
        self.found = False
        self.marked = False
        self.split = False
        self.pids: set[int] = set()
        self.unreadable: tuple[int, str] | None = None
        self._events: list[SlotOp | tuple[int, int] | None] = []

    def line(self, number: int, line: bytes) -> None:
        parsed = read_trace_line(line, cut=not line.endswith(b"\n"))
        if parsed is None:
            return
        if parsed.event == "slot":
            self._operation(number, line, parsed)
        elif parsed.event == "flatview_new":
            self.marked = True
            self._events.append((number, parsed.root))
        elif self._events and self._events[-1] is not None:
            self._events.append(None)

    def _operation(self, number: int, line: bytes, parsed: TraceLine) -> None:
        if not parsed.usable:
            self.remarks.add("a slot operation cannot be read and is left out", number)
            if self.unreadable is None:
                self.unreadable = number, line.strip()[-_SHOWN:].decode("utf-8", "replace")
            return
        self.found = True
        self.split |= parsed.split
        if parsed.pid is not None:
            self.pids.add(parsed.pid)
        self._events.append(
            SlotOp(
                t_ns=number,
                as_id=parsed.as_id,
                slot=parsed.slot,
                op=OpKind.ADD if parsed.size else OpKind.DELETE,
                gpa=parsed.gpa,
                size=parsed.size,
                flags=parsed.flags,
                ret=parsed.ret,
                hva=parsed.ua,
            )
        )

    def commits(self, order: Order, slots: Sequence[LiveSlot]) -> list[Commit]:
        """What the tracker makes of it when `slots` are there at the beginning.

        A BAR that is mapped or a memory device that is plugged ends a commit too: QEMU does that
        under the lock that a commit holds.
        """
        grouper = CommitGrouper(LiveSlots.of(slots, Rules(order)), order, keep_slots=False)
        for event in self._events:
            if isinstance(event, SlotOp):
                grouper.slot_operation(event)
            elif event is not None:
                grouper.view_rebuilt(*event)
            else:
                grouper.close()
        return [commit for commit in grouper.take() if commit.ops]


def _backed(commits: Iterable[Commit]) -> list[list[BackedOp]]:
    return [[(op, None) for op in commit.ops] for commit in commits]


def _queued(commit: Commit) -> bool:
    """Its order is none of 7.2's: it goes back after it has changed flags."""
    return bool(commit.roots) and any(
        a.op is OpKind.FLAGS
        and b.op is not OpKind.FLAGS
        and (b.as_id, b.op is not OpKind.DELETE, b.gpa) <= (a.as_id, True, a.gpa)
        for a, b in pairwise(commit.ops)
    )


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; of one that has no end in sight the last pieces."""
    number, before = 1, b""
    while piece := file.readline(_PIECE):
        yield number, before + piece
        if piece.endswith(b"\n"):
            number, before = number + 1, b""
        else:
            before = piece[-_OVERLAP:]
