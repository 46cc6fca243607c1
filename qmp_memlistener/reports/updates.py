"""What came of an update, in words: the outcome, its phases, its stalls, the operations.

Nothing is printed here, and text that a guest chose is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..records import SummaryRecord
from ..text import count_text
from ..timeline.summary import Statistics
from ..updates.model import Outcome, Phase, PhaseName, Placed, mib
from .lengths import duration_text
from .summary import probes_lines, summary_lines

__all__ = ["outcome_lines"]

_PHASES = {
    PhaseName.PREPARED: "backends made",
    PhaseName.ACCEPTED: "command carried out",
    PhaseName.REALISED: "map changed by QEMU",
    PhaseName.GUEST_TOLD: "until the guest reacted",
    PhaseName.GUEST_ACTS: "the guest's part",
    PhaseName.DRIVER_BOUND: "driver bound",
    PhaseName.SETTLED: "quiet since",
}


def outcome_lines(outcome: Outcome, what: str, *, width: int = 80) -> Iterator[str]:
    """Lines without line ends; `what` says in words what was wanted."""
    yield f"{outcome.outcome}: {what} (strategy {outcome.strategy})"
    if outcome.reason is not None:
        yield f"  {outcome.reason}"
    if outcome.remedy is not None:
        yield f"  remedy: {outcome.remedy}"
    for placed in outcome.placed:
        yield f"  {_where(placed)}"
    for note in outcome.notes:
        yield f"  note: {note}"
    state = outcome.guest_state
    yield f"  guest: {state.before} before, {state.after} after"
    if not outcome.phases:
        return
    yield ""
    start = outcome.phases[0].start_ns
    for phase in outcome.phases:
        yield f"  {_phase(phase, start)}"
    slots = {(op.as_id, op.slot) for op in outcome.slot_ops}
    predicted = any(op.predicted for op in outcome.slot_ops)
    yield (
        f"  {count_text(len(outcome.slot_ops), 'slot operation')}"
        f"{' (predicted)' if predicted else ''} on {count_text(len(slots), 'slot')}, "
        f"{count_text(outcome.transitions, 'transition')}"
    )
    for line in probes_lines(outcome.probes, width=width - 2) if outcome.probes else ():
        yield f"  {line}"
    if outcome.stalls:
        yield ""
        yield from summary_lines(_summary(outcome), width=width, charts=False)


def _where(placed: Placed) -> str:
    """`r0: virtio-rng-pci on the bus p1 (PCIE), addr 0.0, PCI 01:00.0`."""
    on = "" if placed.bus is None else f" on the bus {placed.bus} ({placed.bus_type})"
    parts = [f"{placed.id}: {placed.driver}{on}"]
    parts += [f"{name} {value}" for name, value in placed.address.items()]
    if placed.pci is not None:
        parts.append(f"PCI {placed.pci}")
    if (memory := placed.memory) is not None:
        last = memory.start + memory.size - 1
        parts.append(f"memory {memory.start:#x}-{last:#x} ({mib(memory.size)})")
    if placed.requested is not None and placed.size is not None:
        parts.append(f"the guest has {mib(placed.size)} of {mib(placed.requested)} requested")
    return ", ".join(parts)


def _phase(phase: Phase, start: int) -> str:
    words = _PHASES.get(phase.name, phase.name)
    at, took = phase.start_ns - start, phase.end_ns - phase.start_ns
    parts = []
    if phase.transitions:
        parts.append(count_text(len(phase.transitions), "transition"))
    if phase.stalls:
        parts.append(count_text(len(phase.stalls), "stall"))
    return (
        f"{duration_text(at):>8}  {words:<24}{duration_text(took):>8}  {', '.join(parts)}".rstrip()
    )


def _summary(outcome: Outcome) -> SummaryRecord:
    return Statistics(outcome.stalls).summary(
        start_ns=outcome.phases[0].start_ns,
        end_ns=max(p.end_ns for p in outcome.phases),
        transitions=outcome.transitions,
    )
