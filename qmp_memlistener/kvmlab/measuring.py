"""What one update of a machine's slots does to its guest, and many of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ..distribution import Distribution
from .executor import ExecutionResult
from .machine import Machine

__all__ = ["BEATS", "Totals", "Update", "measure"]

BEATS = 32
"""Heartbeats of each vCPU before and after an update: the same for all, so that gaps compare."""


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """One update.  Times in ns, as in `ExecutionResult`; `gap_ns` is what the guest noticed itself.

    `hole` exits are accesses to what is not RAM, `spurious` ones those to RAM that should be there.
    """

    gap_ns: int
    took_ns: int
    calls_ns: int
    missing_ns: int
    stall_ns: int
    spurious: int = 0
    hole: int = 0
    internal_errors: int = 0
    shutdowns: int = 0
    ids_changed: bool = False
    pages_changed: int = 0
    pages_lost: int = 0

    @property
    def hit(self) -> bool:
        """The guest met memory that was missing."""
        return self.spurious + self.internal_errors + self.shutdowns > 0


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Updates together."""

    updates: int = 0
    hit: int = 0
    spurious: int = 0
    hole: int = 0
    internal_errors: int = 0
    shutdowns: int = 0
    ids_changed: int = 0
    pages_changed: int = 0
    pages_lost: int = 0
    guest_gap: Distribution = Distribution()
    update: Distribution = Distribution()
    ioctl: Distribution = Distribution()
    missing: Distribution = Distribution()
    vcpu_stall: Distribution = Distribution()

    @classmethod
    def of(cls, updates: Sequence[Update]) -> Totals:
        counted = {name: sum(getattr(u, name) for u in updates) for name in _COUNTED}
        return cls(
            updates=len(updates),
            hit=sum(u.hit for u in updates),
            guest_gap=Distribution.of([u.gap_ns for u in updates]),
            update=Distribution.of([u.took_ns for u in updates]),
            ioctl=Distribution.of([u.calls_ns for u in updates]),
            missing=Distribution.of([u.missing_ns for u in updates]),
            vcpu_stall=Distribution.of([u.stall_ns for u in updates]),
            **counted,
        )

    def as_json(self) -> dict[str, object]:
        """Counts and distributions (in us) under the keys of `lab race --json`."""
        names = ("guest_gap", "update", "ioctl", "missing", "vcpu_stall")
        return {
            "spurious_exits": self.spurious,
            "internal_errors": self.internal_errors + self.shutdowns,
            "deaths": {"internal_error": self.internal_errors, "shutdown": self.shutdowns},
            "hole_exits": self.hole,
            **{f"{name}_us": getattr(self, name).as_us() for name in names},
        }


_COUNTED = (
    *("spurious", "hole", "internal_errors", "shutdowns"),
    *("ids_changed", "pages_changed", "pages_lost"),
)


def measure(
    machine: Machine,
    act: Callable[[], ExecutionResult],
    *,
    ids_changed: bool = False,
    unless: Callable[[int], bool] = lambda _vcpu: False,
) -> tuple[Update, ExecutionResult]:
    """Let the vCPUs run, `act`, let them run again; those that died go on afterwards.

    `unless` is true of a vCPU that waits at a hole and cannot beat.  Raises OperationFailed.
    """
    machine.wait_beats(BEATS, unless=unless)
    machine.forget_gaps()
    machine.wait_beats(BEATS, unless=unless)
    before = machine.exits()
    executed = act()
    machine.wait_beats(BEATS, unless=unless)
    after = machine.exits()
    update = Update(
        gap_ns=machine.longest_gap_ns(),
        took_ns=executed.took_ns,
        calls_ns=executed.calls_ns,
        missing_ns=executed.missing_ns,
        stall_ns=executed.stall_ns,
        spurious=after.spurious - before.spurious,
        hole=after.hole - before.hole,
        internal_errors=after.internal_errors - before.internal_errors,
        shutdowns=after.shutdowns - before.shutdowns,
        ids_changed=ids_changed and bool(executed.deleted),
    )
    if machine.revive():
        machine.wait_beats(1)
    return update, executed
