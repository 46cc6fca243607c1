"""Limits on stalls and transitions: what `watch --max-stall` and `--freeze` check.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import MissingPrerequisite
from ..probes import StallKind
from ..records import (
    PossibleViolation,
    ProbeState,
    Record,
    StallRecord,
    TransitionRecord,
    Violation,
)

__all__ = ["FREEZE_LIMIT_NS", "Limits"]

FREEZE_LIMIT_NS = 5_000_000
"""In a freeze, the limit for kinds of stall without one of their own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`stalls` are limits by kind; `frozen`: no transition at all, `default_ns` for other kinds.

    A stall violates a limit when it was certainly longer: its `at_least_ns` counts.  One that may
    have been longer, by its `at_most_ns`, is reported as possible.
    """

    stalls: Mapping[StallKind, int] = field(default_factory=dict)
    frozen: bool = False
    default_ns: int | None = None

    @classmethod
    def freeze(cls, stalls: Mapping[StallKind, int]) -> Limits:
        """No transition, and no stall longer than its limit or `FREEZE_LIMIT_NS`."""
        return cls(stalls, frozen=True, default_ns=FREEZE_LIMIT_NS)

    def __bool__(self) -> bool:
        return bool(self.stalls) or self.frozen

    def require_measured(self, probes: Sequence[ProbeState]) -> None:
        """Raise MissingPrerequisite when no active probe measures what has a limit of its own."""
        measured = {kind for probe in probes if probe.active for kind in probe.measures}
        unmeasured = [str(kind) for kind in self.stalls if kind not in measured]
        if not unmeasured:
            return
        would = [p for p in probes if not p.active and not set(unmeasured).isdisjoint(p.measures)]
        raise MissingPrerequisite(
            f"no active probe measures {' or '.join(unmeasured)}, which has a limit: it could "
            f"be exceeded unseen ({'; '.join(f'{p.name}: {p.reason}' for p in would)})",
            remedy="; ".join(dict.fromkeys(p.remedy for p in would if p.remedy))
            or f"let {' or '.join(p.name for p in would)} measure (`--probes`), or drop that limit",
        )

    def check(self, record: Record) -> Violation | PossibleViolation | None:
        """The violation that this record is, or may be."""
        match record:
            case TransitionRecord() if self.frozen:
                return Violation(
                    t_ns=record.t_ns,
                    kind="transition",
                    what=f"transition #{record.seq} while the guest is frozen",
                    ref=record.seq,
                    limit_ns=None,
                    found_ns=None,
                )
            case StallRecord():
                limit = self.stalls.get(record.kind, self.default_ns)
                if limit is None or record.at_most_ns <= limit:
                    return None
                who = f" of {record.thread}" if record.thread else ""
                verdict = Violation if record.at_least_ns > limit else PossibleViolation
                return verdict(
                    t_ns=record.start_ns,
                    kind=record.kind,
                    what=f"{record.kind}{who}",
                    ref=record.incident,
                    limit_ns=limit,
                    found_ns=record.at_least_ns,
                    found_max_ns=record.at_most_ns,
                )
        return None
