"""From windows to observations: names, call sites, and what is too short to be told.

Called in the reader's thread.  When to look and where to deliver is `probe`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...records import CommandRecord
from ..model import Observation, StallKind
from .calls import CommandSpan, Window
from .names import Strings, ThreadNames

__all__ = ["FLOOR_NS", "QUERY_FLOOR_NS", "Observer"]

FLOOR_NS = 100_000
"""Shorter waits, holds and commits without slot updates are counted, not told."""

QUERY_FLOOR_NS = 1_000_000
"""Shorter commands that only ask (query-*) are not told: somebody may ask all the time."""

_EVERYBODY = (StallKind.VCPU_INHIBIT, StallKind.VCPU_PAUSE)
"""All vCPUs stall in these, whichever thread brought it about."""

_FLOORED = (StallKind.COMMIT, StallKind.BQL_WAIT, StallKind.BQL_HOLD)


@dataclass(slots=True)
class _Short:
    count: int = 0
    total_ns: int = 0


@dataclass(slots=True)
class Observer:
    """Makes observations for `probe`; `must_see` lowers the floor of a kind."""

    probe: str
    names: ThreadNames
    must_see: Mapping[StallKind, int]
    _short: dict[StallKind, _Short] = field(default_factory=lambda: {k: _Short() for k in _FLOORED})

    def observe(self, windows: list[Window], strings: Strings) -> list[Observation]:
        """The windows that are worth telling; commits inside others never are."""
        return [self._observation(w, strings) for w in windows if not w.inner and self._long(w)]

    @property
    def floor_ns(self) -> int:
        """Shorter commits without slot updates are not told."""
        return min(FLOOR_NS, self.must_see.get(StallKind.COMMIT, FLOOR_NS))

    def add_short_commits(self, count: int, total_ns: int) -> None:
        """The reader has counted some and made no windows of them."""
        short = self._short[StallKind.COMMIT]
        short.count += count
        short.total_ns += total_ns

    def commands(self, commands: list[CommandSpan], strings: Strings) -> list[CommandRecord]:
        """The commands that are worth telling, and whose name can be read."""
        found = []
        for command in commands:
            name = strings.command(command.info) if command.info else "hmp"
            start, end = command.start_ns, command.end_ns
            asks = name is not None and name.startswith("query-")
            if name is not None and not (asks and end - start < QUERY_FLOOR_NS):
                found.append(
                    CommandRecord(
                        name=name, start_ns=start, busy_until_ns=end, end_ns=end, probe=self.probe
                    )
                )
        return found

    def counts(self) -> dict[str, int | float | str]:
        """How many windows of each kind were not told, and their time in all."""
        values: dict[str, int | float | str] = {}
        for kind, short in self._short.items():
            values[f"short_{kind}"] = short.count
            values[f"short_{kind}_ns"] = short.total_ns
        return values

    def _long(self, window: Window) -> bool:
        short = self._short.get(window.kind)
        if short is None or window.updates:
            return True
        length = window.end_ns - window.start_ns
        if length >= min(FLOOR_NS, self.must_see.get(window.kind, FLOOR_NS)):
            return True
        short.count += 1
        short.total_ns += length
        return False

    def _observation(self, window: Window, strings: Strings) -> Observation:
        length = window.end_ns - window.start_ns
        everybody = window.kind in _EVERYBODY
        return Observation(
            window.kind,
            window.start_ns,
            window.end_ns,
            min(window.at_least_ns, length),
            length,
            self.probe,
            thread=None if everybody else self.names[window.tid],
            tid=None if everybody else window.tid,
            site=strings.site(window.site) if window.site is not None else None,
            update=window.update,
            handoffs=window.handoffs,
        )
