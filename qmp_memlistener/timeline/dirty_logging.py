"""Why dirty logging was switched on or off, as far as that was seen.  Pure.

A migration and a dirty-rate measurement switch it for all migratable RAM in one commit
(memory_global_dirty_log_start, system/memory.c), some time after their command, in a thread of
their own.  A display switches it for its own memory alone: one slot is never taken for theirs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter

from ..records import CommandRecord, QmpEvent, SlotOp
from .evidence import Stall

__all__ = ["DirtyLogging"]

_COMMANDS = {"migrate": "migration", "calc-dirty-rate": "dirty-rate measurement"}
_BEGINS = ("setup", "active")
_LOG_DIRTY = 1
_GLOBAL = 2
_KEPT = 64


class DirtyLogging:
    """Who last asked for it, by time."""

    def __init__(self) -> None:
        self._asked: list[tuple[int, str]] = []

    def command(self, span: CommandRecord) -> None:
        """A command that was seen."""
        if span.name in _COMMANDS:
            self._ask(span.start_ns, _COMMANDS[span.name])

    def event(self, event: QmpEvent) -> None:
        """A QMP event; QEMU sends MIGRATION where that capability is on."""
        if event.event == "MIGRATION" and event.data.get("status") in _BEGINS:
            self._ask(event.t_ns, "migration")

    def _ask(self, t_ns: int, why: str) -> None:
        self._asked.append((t_ns, why))
        self._asked.sort(key=itemgetter(0))
        del self._asked[:-_KEPT]

    def explain(self, stalls: Iterable[Stall]) -> None:
        """Tell those that only change flags why; what one thread does at once belongs together.

        The commit itself may not have been seen: QEMU makes a thread for each of these.
        """
        of_thread: dict[int | None, list[Stall]] = {}
        for stall in stalls:
            if stall.logs and stall.seen.update is not None:
                of_thread.setdefault(stall.seen.tid, []).append(stall)
        for mine in of_thread.values():
            changed = [s.seen.update for s in mine if s.seen.update is not None]
            why = self._words(mine[0].seen.start_ns, changed)
            for stall in mine:
                stall.why_logs = why

    def _words(self, t_ns: int, updates: Sequence[SlotOp]) -> str:
        slots = {(u.as_id, u.slot) for u in updates}
        at = bisect_right(self._asked, t_ns, key=itemgetter(0))
        if at and len(slots) >= _GLOBAL:
            return f"dirty logging ({self._asked[at - 1][1]})"
        on = {bool(u.flags & _LOG_DIRTY) for u in updates}
        return (
            f"dirty logging switched {'on' if on == {True} else 'off' if on == {False} else 'over'}"
        )
