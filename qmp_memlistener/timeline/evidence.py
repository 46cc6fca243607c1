"""What the timeline remembers: the latest windows and commands, and which of them overlap a span.

Pure.  Windows come in the order in which they are decided, which is that of their ends but for a
few that were late.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..probes import CommandSpan, Kind, Observation
from ..recording import StallCause

__all__ = ["KEEP_NS", "Evidence", "Stall", "overlap"]

KEEP_NS = 30_000_000_000
"""A window that ended longer ago than this plays no part in deciding another."""

_UNKNOWN = StallCause("unknown", None)


@dataclass(slots=True, eq=False)
class Stall:
    """A stall window on its way to a record.

    `transition` is the transition that it is a part of, `deleted_size` the size of the slot that
    its ioctl deleted; both where that is known for a fact.
    """

    seen: Observation
    witnesses: set[str] = field(default_factory=set)
    transition: int | None = None
    deleted_size: int | None = None
    logs: bool = False  # its ioctl is traced, and is no part of a transition
    cause: StallCause = _UNKNOWN
    incident: int = 0

    @property
    def length_ns(self) -> int:
        """The estimate that causes are weighed against: the middle of the bracket."""
        return max(1, (self.seen.at_least_ns + self.seen.at_most_ns) // 2)


def overlap(one_start: int, one_end: int, start: int, end: int) -> int:
    """Length of what two spans share."""
    return max(0, min(one_end, end) - max(one_start, start))


class Evidence:
    """Windows by kind, and commands, of the last `KEEP_NS`."""

    def __init__(self) -> None:
        self._windows: dict[Kind, list[Stall]] = defaultdict(list)
        self._commands: list[CommandSpan] = []

    def add(self, stall: Stall) -> None:
        """Remember a window."""
        insort(self._windows[stall.seen.kind], stall, key=_end)

    def add_command(self, span: CommandSpan) -> None:
        """Remember a command."""
        insort(self._commands, span, key=_command_end)

    def overlapping(self, kind: Kind, start_ns: int, end_ns: int) -> Iterator[Stall]:
        """Windows of one kind that share time with `[start_ns, end_ns)`."""
        windows = self._windows[kind]
        for at in range(bisect_right(windows, start_ns, key=_end), len(windows)):
            if windows[at].seen.start_ns < end_ns:
                yield windows[at]

    def commands(self, start_ns: int, end_ns: int) -> Iterator[CommandSpan]:
        """Commands that were under way in `[start_ns, end_ns)`."""
        spans = self._commands
        for at in range(bisect_right(spans, start_ns, key=_command_end), len(spans)):
            if spans[at].start_ns < end_ns:
                yield spans[at]

    def forget(self, before_ns: int) -> None:
        """Drop what ended before."""
        for windows in self._windows.values():
            del windows[: bisect_right(windows, before_ns, key=_end)]
        del self._commands[: bisect_right(self._commands, before_ns, key=_command_end)]


def _end(stall: Stall) -> int:
    return stall.seen.end_ns


def _command_end(span: CommandSpan) -> int:
    return span.end_ns
