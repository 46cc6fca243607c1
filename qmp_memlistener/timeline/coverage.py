"""Which kinds of stall were measured when: what separates "no stall" from "not measured".  Pure.

A span counts as measured only if one probe measured that kind all the time and lost nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..probes import Observation, StallKind
from ..records import SlotOp
from .pairing import SLACK_NS

__all__ = ["Coverage", "one_sided"]

_KEPT = 1024
"""Changes and losses remembered of each probe; what lies before counts as not measured."""


@dataclass(slots=True)
class _Covered:
    """`changes`: from when on which kinds were measured.  `gaps`: when something was lost."""

    changes: deque[tuple[int, frozenset[StallKind]]] = field(
        default_factory=lambda: deque(maxlen=_KEPT)
    )
    gaps: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    reached_ns: int = 0

    def kinds(self, start_ns: int, end_ns: int) -> frozenset[StallKind]:
        if any(start < end_ns and end > start_ns for start, end in self.gaps):
            return frozenset()
        found: frozenset[StallKind] | None = None
        for since, kinds in reversed(self.changes):
            if since < end_ns:
                found = kinds if found is None else found & kinds
            if since <= start_ns:
                return found or frozenset()
        return frozenset()


class Coverage:
    """What the probes of one attachment measured.  Times are not before those given earlier."""

    def __init__(self) -> None:
        self._probes: dict[str, _Covered] = {}

    def knows(self, probe: str) -> bool:
        """Something was said of this probe."""
        return probe in self._probes

    def measures_now(self, probe: str) -> bool:
        """It measures something."""
        covered = self._probes.get(probe)
        return covered is not None and bool(covered.changes[-1][1])

    def measures(self, probe: str, kinds: Iterable[StallKind], t_ns: int) -> None:
        """From now on `probe` measures these kinds, and no others."""
        covered = self._probes.setdefault(probe, _Covered())
        wanted = frozenset(kinds)
        if not covered.changes or covered.changes[-1][1] != wanted:
            covered.changes.append((t_ns, wanted))

    def advance(self, probe: str, t_ns: int) -> None:
        """Everything up to then was delivered."""
        covered = self._probes.get(probe)
        if covered is not None:
            covered.reached_ns = max(covered.reached_ns, t_ns)

    def lost(self, probe: str, t_ns: int) -> None:
        """Something was missed since the probe's last advance."""
        covered = self._probes.get(probe)
        if covered is not None:
            covered.gaps.append((min(covered.reached_ns, t_ns), t_ns + 1))

    def measured_by(self, probe: str, start_ns: int, end_ns: int) -> frozenset[StallKind]:
        """The kinds that this probe measured during all of `[start_ns, end_ns)`."""
        covered = self._probes.get(probe)
        return frozenset() if covered is None else covered.kinds(start_ns, end_ns)

    def measured(self, start_ns: int, end_ns: int) -> frozenset[StallKind]:
        """The kinds that one probe or another measured during all of `[start_ns, end_ns)`."""
        end_ns = max(end_ns, start_ns + 1)
        return frozenset[StallKind]().union(
            *(c.kinds(start_ns, end_ns) for c in self._probes.values())
        )


def one_sided(
    ops: Sequence[SlotOp], ioctls: Sequence[Observation], coverage: Coverage
) -> Iterator[str]:
    """What trace lines or uprobes alone tell of although the other witness saw everything then.

    `ops` and `ioctls` are `Timeline.strays`.
    """
    measured = coverage.measured_by
    forged = [
        op
        for op in ops
        if StallKind.SLOT_UPDATE in measured("uprobes", op.t_ns - SLACK_NS, op.t_ns)
    ]
    if forged:
        yield (
            f"slot operations in QEMU's log that no uprobe saw: {len(forged)} "
            f"(the first: {forged[0]}); does another process write to that log?"
        )
    untold = [
        seen
        for seen in ioctls
        if StallKind.SLOT_UPDATE in measured("trace", seen.start_ns, seen.end_ns + SLACK_NS)
    ]
    if untold:
        at = untold[0].update
        first = f"slot {at.slot} at {at.gpa:#x}, size {at.size:#x}" if at is not None else "?"
        yield (
            f"slot operations that uprobes saw and QEMU's log lacks: {len(untold)} "
            f"(the first: {first})"
        )
