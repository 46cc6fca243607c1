"""What records add up to: counted as they come, for `watch`, `record` and `report`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..records import (
    GuestFailure,
    Lost,
    PossibleViolation,
    ProbesRecord,
    ProbeState,
    Reconciled,
    Record,
    SlotOp,
    StallRecord,
    TransitionRecord,
    Violation,
)

__all__ = ["Tally"]


@dataclass
class Tally:
    """`compared`: traced slots were compared with predicted ones, which differed `differences`
    times.  `probes` are those that were named, in their last state."""

    transitions: int = 0
    slot_ops: int = 0
    stalls: int = 0
    violations: int = 0
    possible_violations: int = 0
    failures: int = 0
    lost: int = 0
    compared: bool = False
    differences: int = 0
    probes: dict[str, ProbeState] = field(default_factory=dict)

    def note(self, record: Record) -> None:
        """Count one more."""
        if isinstance(record, StallRecord):  # most are
            self.stalls += 1
            return
        match record:
            case TransitionRecord():
                self.transitions += 1
            case SlotOp():
                self.slot_ops += 1
            case Violation():
                self.violations += 1
            case PossibleViolation():
                self.possible_violations += 1
            case GuestFailure():
                self.failures += 1
            case Reconciled():
                self.compared = True
                self.differences += not record.equal
            case ProbesRecord():
                record.add_to(self.probes)
            case Lost():
                self.lost += 1
