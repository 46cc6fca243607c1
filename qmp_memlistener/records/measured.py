"""What probes measured: stall windows, commands, counters, the summary at the end, and a count.

Lines of `watch --json` and of a recording beside those of `records`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from .records import Lost, OpenEnum, Reconciled, Record, SlotOp, TransitionRecord

__all__ = [
    "CommandRecord",
    "GuestFailure",
    "GuestReset",
    "MeasurementRecord",
    "PossibleViolation",
    "ProbeState",
    "ProbesRecord",
    "StallCause",
    "StallCauseType",
    "StallKind",
    "StallRecord",
    "StallStatistics",
    "SummaryRecord",
    "Tally",
    "Violation",
]


class StallKind(OpenEnum):
    """The kinds of stall window.

    MAIN_LOOP: in-band QMP waits.  BQL_WAIT: a thread waits for the big QEMU lock.  BQL_HOLD: a
    thread has it.  COMMIT: memory_region_transaction_commit runs.  SLOT_UPDATE: one
    KVM_SET_USER_MEMORY_REGION (or REGION2) ioctl.  VCPU_INHIBIT: ioctls of vCPUs are kept out
    (accel_ioctl_inhibit_begin, QEMU 8.0 and later).  VCPU_PAUSE: from STOP to RESUME.  VCPU_GAP:
    the guest itself saw time go by without running.  MISSING: RAM that is there before and after
    a commit had no slot.
    """

    MAIN_LOOP = "main_loop"
    BQL_WAIT = "bql_wait"
    BQL_HOLD = "bql_hold"
    COMMIT = "commit"
    SLOT_UPDATE = "slot_update"
    VCPU_INHIBIT = "vcpu_inhibit"
    VCPU_PAUSE = "vcpu_pause"
    VCPU_GAP = "vcpu_gap"
    MISSING = "missing"


class StallCauseType(OpenEnum):
    """What kind of thing made a stall, and what `StallCause.ref` is then.

    TRANSITION: its `seq`.  SLOT_OP: slot operations without a transition, such as dirty logging;
    `"AS:SLOT"` or words.  COMMAND: the name of a command.  AGENT: that of a command of ours.
    STOP: the status in which the guest was stopped, None when it is not known.  SCHEDULER: the
    host gave the thread no CPU; None.  UNKNOWN: None.
    """

    TRANSITION = "transition"
    SLOT_OP = "slot_op"
    COMMAND = "command"
    AGENT = "agent"
    STOP = "stop"
    SCHEDULER = "scheduler"
    UNKNOWN = "unknown"


class StallCause(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What made a stall, where that was seen and not merely near it in time.

    `explained_ns` is how much of the stall this accounts for, at least.
    """

    type: StallCauseType
    ref: int | str | None
    explained_ns: int | None = None


class StallRecord(Record, frozen=True, kw_only=True, tag="stall", gc=False):
    """One stall window.

    It lies inside `[start_ns, end_ns)` and was at least `at_least_ns`, at most `at_most_ns` long.
    `probe` saw it best; `witnesses` are all probes that saw it or a part of what made it, `probe`
    included.  Stalls that belong together have the same `incident`.  `during` lists transitions
    that were under way meanwhile, whether or not they made it.
    """

    kind: StallKind
    start_ns: int
    end_ns: int
    at_least_ns: int
    at_most_ns: int
    probe: str
    witnesses: list[str]
    thread: str | None
    site: str | None
    cause: StallCause | None
    incident: int
    during: list[int] = msgspec.field(default_factory=list)
    handoffs: int | None = None


class CommandRecord(Record, frozen=True, kw_only=True, tag="command", gc=False):
    """A QMP or HMP command that QEMU's main loop carried out.

    It began at `start_ns`, was still running at `busy_until_ns`, and had ended at `end_ns`.
    """

    name: str
    start_ns: int
    busy_until_ns: int
    end_ns: int
    probe: str


class MeasurementRecord(Record, frozen=True, kw_only=True, tag="measurement"):
    """Numbers over a span of time that are no windows: counters of a probe before and after."""

    probe: str
    start_ns: int
    end_ns: int
    values: dict[str, int | float | str]


class ProbeState(msgspec.Struct, frozen=True):
    """A probe of this attachment: active, or why not."""

    name: str
    measures: list[StallKind]
    active: bool
    reason: str | None
    remedy: str | None
    resolution_ns: int
    cost: str


class ProbesRecord(Record, frozen=True, kw_only=True, tag="probes"):
    """Which probes are active from now on."""

    t_ns: int
    probes: list[ProbeState]

    def add_to(self, known: dict[str, ProbeState]) -> None:
        """Keep of each probe that it was active at some time, else why it is not."""
        for state in self.probes:
            if state.active or state.name not in known or not known[state.name].active:
                known[state.name] = state


class GuestFailure(Record, frozen=True, kw_only=True, tag="guest_failure"):
    """The guest died, and what is known of why.

    `status` is QEMU's RunState (`internal-error`); `reset` in recordings of former versions, which
    have no `guest_reset`.  For a vCPU found stopped at memory
    that a transition took away: `cpu`, its instruction pointer `ip` (a guest-virtual address), the
    guest-physical `gpa` of what it could not reach, and the `transition`.  `proven` says that the
    address lies in RAM that had no slot during that transition; otherwise `what` is only what
    came before.
    """

    t_ns: int
    status: str
    what: str
    proven: bool
    transition: int | None
    cpu: int | None = None
    ip: int | None = None
    gpa: int | None = None


class GuestReset(Record, frozen=True, kw_only=True, tag="guest_reset"):
    """The machine was reset, and what is known of why; that is no failure as such.

    `reason` is QEMU's ShutdownCause (`guest-reset`, `host-qmp-system-reset`), `guest` whether the
    guest made it.  `shutdown`: QEMU is set not to reset, and ends instead.  `what` says in
    words what is known.  `possible` is a suspicion that nothing proves, with what speaks for it,
    and `transition` the change that it is about; both are None for most resets.
    """

    t_ns: int
    reason: str | None
    guest: bool | None
    what: str
    shutdown: bool = False
    possible: str | None = None
    transition: int | None = None


class Violation(Record, frozen=True, kw_only=True, tag="violation"):
    """A limit was exceeded for certain or a frozen guest's map changed; `what` in words.

    `kind` is the stall's kind or `transition`; `limit_ns`, `found_ns` (at least) and `found_max_ns`
    (at most) are None for a transition.
    """

    t_ns: int
    kind: str
    what: str
    ref: int | None
    limit_ns: int | None
    found_ns: int | None
    found_max_ns: int | None = None


class PossibleViolation(Record, frozen=True, kw_only=True, tag="possible_violation"):
    """A stall that may have exceeded its limit: at least `found_ns` long, at most `found_max_ns`.

    The other keys are as in `violation`.
    """

    t_ns: int
    kind: str
    what: str
    ref: int | None
    limit_ns: int
    found_ns: int
    found_max_ns: int


class StallStatistics(msgspec.Struct, frozen=True):
    """Stalls of one kind and cause.

    `cause` is the cause's type (`unknown` when there is none).  Lengths are `at_most_ns`, so what
    is stated was not longer; those with `min` in their names are `at_least_ns`, so it was not
    shorter (None in recordings of former versions).  `histogram` counts by length: entry i counts
    lengths in `[bounds_ns[i], bounds_ns[i + 1])`, the last one all from `bounds_ns[-1]` on.
    """

    kind: StallKind
    cause: StallCauseType
    count: int
    total_ns: int
    p50_ns: int
    p90_ns: int
    p99_ns: int
    max_ns: int
    bounds_ns: list[int]
    histogram: list[int]
    total_min_ns: int | None = None
    p50_min_ns: int | None = None
    p90_min_ns: int | None = None
    p99_min_ns: int | None = None
    max_min_ns: int | None = None
    bounds_min_ns: list[int] = []
    histogram_min: list[int] = []


class SummaryRecord(Record, frozen=True, kw_only=True, tag="summary"):
    """Statistics over `[start_ns, end_ns)`; `transitions` and `stalls` are how many were seen.

    `probes`: those that measured, and why others did not; empty in recordings of former versions.
    """

    start_ns: int
    end_ns: int
    transitions: int
    stalls: int
    statistics: list[StallStatistics]
    probes: list[ProbeState] = msgspec.field(default_factory=list)


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
