"""Merges what all probes saw into stalls, each with its witnesses and its cause.

Pure: no clocks, no tasks.  Observations, commands and the records of transitions go in; `release`
hands out the stalls that are decided.  A window is decided when every probe has delivered what
ended before it: a probe says so with `advance`.  A probe that does not get on (a ping may wait for
minutes) holds the others up for `PATIENCE_NS` or `BACKLOG` windows at most; what it saw is then
decided later.  What one window or record costs does not depend on how many there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import count
from operator import attrgetter

import msgspec

from ..memslots import OpKind
from ..probes import HostWait, Observation, StallKind
from ..records import (
    CommandRecord,
    GuestState,
    QmpEvent,
    Record,
    SlotOp,
    StallCause,
    StallCauseType,
    StallRecord,
    TransitionRecord,
)
from .causes import DirtyLogging, decide
from .evidence import KEEP_NS, TRACE, Evidence, Stall, Undecided, overlap, together, witness
from .pairing import INTERPOSER, Issued, Pairing, TracedOp, Updates, merge
from .windows import Timed, missing_window, trace_windows

__all__ = ["BACKLOG", "PATIENCE_NS", "Timeline"]

PATIENCE_NS = 3_000_000_000
BACKLOG = 50_000
"""So many windows wait to be decided at most, and so many transitions."""
_LIMIT = 8192
_END = 1 << 62

# what others are decided by comes first
_ORDER = (
    StallKind.COMMIT,
    StallKind.SLOT_UPDATE,
    StallKind.VCPU_INHIBIT,
    StallKind.MISSING,
    StallKind.VCPU_PAUSE,
    StallKind.BQL_HOLD,
    StallKind.BQL_WAIT,
    StallKind.MAIN_LOOP,
    StallKind.VCPU_GAP,
)

_PARTS = (StallKind.COMMIT, StallKind.SLOT_UPDATE, StallKind.VCPU_INHIBIT, StallKind.MISSING)


class Timeline:
    """Stalls of one guest.  `stamp_bound_ns` is how late the times of trace lines may be."""

    def __init__(self, *, stamp_bound_ns: int) -> None:
        self._stamp_bound_ns = stamp_bound_ns
        self._reached: dict[str, int] = {}
        self._open = Undecided()
        self._evidence = Evidence()
        self._logging = DirtyLogging()
        self._pairing = Pairing()
        self._issued = Issued()
        self._transitions: deque[TransitionRecord] = deque()
        self._ops_of: dict[int, list[TracedOp]] = {}
        self._silent: deque[TransitionRecord] = deque()
        self._stops: deque[GuestState] = deque(maxlen=256)
        self._sizes: dict[tuple[int, int], int] = {}
        self._incident_of: dict[int, int] = {}
        self._next_incident = count(1)
        self._records: list[Record] = []

    # -- what goes in ------------------------------------------------------------------------

    def expect(self, probe: str, t_ns: int) -> None:
        """Wait for this probe from now on."""
        self._reached[probe] = t_ns

    def forget(self, probe: str) -> None:
        self._reached.pop(probe, None)

    def advance(self, probe: str, t_ns: int) -> None:
        """The probe has delivered every window that ended before `t_ns`."""
        if probe in self._reached:
            self._reached[probe] = max(self._reached[probe], t_ns)

    def observe(self, observations: Iterable[Observation]) -> None:
        """Windows that a probe saw."""
        for seen in sorted(observations, key=attrgetter("start_ns")):
            stall = Stall(seen, witness(seen.probe))
            self._open.add(stall)
            if seen.kind is StallKind.SLOT_UPDATE and seen.update is not None:
                self._pairing.ioctl(stall)

    def host_waits(self, waits: Iterable[HostWait]) -> None:
        """When threads had to wait for a CPU."""
        for wait in waits:
            self._evidence.add_host_wait(wait)

    def carried_out(self, asked: list[Observation], windows: list[Observation]) -> None:
        """What came of one transaction whose operations were issued instead of QEMU's."""
        traced = TRACE in self._reached
        for stall in self._issued.carried_out(asked, windows, self._sizes, traced=traced):
            self._open.add(stall)

    def command(self, span: CommandRecord) -> None:
        """A command that was seen."""
        ours = any(
            other.probe == "agent" and overlap(*_span(other), *_span(span)) * 2 >= _length(span)
            for other in self._evidence.commands(*_span(span))
        )
        self._evidence.add_command(span)
        self._logging.command(span)
        if span.probe != "agent" and not ours:
            self._records.append(span)

    def record(self, record: Record) -> None:
        """A record of the map or the guest; those that do not matter here are ignored."""
        match record:
            case TransitionRecord():
                self._transitions.append(record)
                self._ops_of[record.seq] = []
            case SlotOp(predicted=False):
                traced = TracedOp(record)
                if record.transition is not None:
                    self._ops_of.setdefault(record.transition, []).append(traced)
                self._pairing.traced(traced)
                if INTERPOSER in self._reached:
                    self._issued.traced(traced)
            case QmpEvent():
                self._logging.event(record)
            case GuestState(running=False):
                self._stops.append(record)

    def know_slot(self, as_id: int, gpa: int, size: int) -> None:
        """The size of the slot that begins there, so that a delete shows how much went away."""
        self._sizes[as_id, gpa] = size

    def lost(self, probe: str) -> None:
        """The probe missed something: operations can no longer be paired by their order."""
        if probe in (TRACE, "uprobes"):
            self._pairing.clear()
        if probe in (TRACE, INTERPOSER):
            self._issued.clear()

    # -- what comes out ----------------------------------------------------------------------

    @property
    def more(self) -> bool:
        """After `release` or `finish`: more is decided than was handed out."""
        return self._open.more

    @property
    def pending(self) -> bool:
        """Something has come in that is not handed out yet."""
        return bool(self._open or self._records or self._transitions)

    @property
    def waiting(self) -> int:
        """Windows that are not decided yet."""
        return len(self._open)

    def release(self, now_ns: int) -> list[Record]:
        """The commands and stalls that are decided by now, stalls in order of their beginning.

        When that are many, the first of them: then there is `more`.
        """
        horizon = max(min(self._reached.values(), default=now_ns), now_ns - PATIENCE_NS)
        if len(self._open) > BACKLOG:
            horizon = max(horizon, self._open.median_ns())
        if len(self._transitions) > BACKLOG:
            horizon = max(horizon, self._transitions[len(self._transitions) // 2].t_ns)
        return self._release(horizon)

    def strays(self) -> tuple[list[SlotOp], list[Observation]]:
        """Traced operations that uprobes did not see, and ioctls that they saw and that were not
        traced, each once.  Nothing as long as one of the two is not there.

        Without uprobes, forged or lost lines could not be distinguished from others.
        """
        self._pairing.pair()
        if not {TRACE, "uprobes"} <= self._reached.keys():
            return [], []
        ops, ioctls = self._pairing.strays(min(self._reached[TRACE], self._reached["uprobes"]))
        return ops, [stall.seen for stall in ioctls]

    def finish(self) -> list[Record]:
        """The same when nothing more will come: it is all there once there is no `more`."""
        return self._release(_END)

    def _release(self, horizon: int) -> list[Record]:
        self._pairing.pair()
        self._issued.pair()
        self._from_trace(horizon)
        ready, horizon = self._open.take(horizon)
        self._issued.know(ready)
        by_kind: dict[StallKind, list[Stall]] = {kind: [] for kind in _ORDER}
        for stall in sorted(ready, key=_start):
            by_kind[stall.seen.kind].append(stall)
        updates = Updates(by_kind[StallKind.SLOT_UPDATE])
        self._logging.explain(by_kind[StallKind.SLOT_UPDATE])
        decided: list[Stall] = []
        for kind in _ORDER:
            stalls = by_kind[kind]
            if kind is StallKind.COMMIT:
                self._know_commits(stalls, updates, horizon)
            elif kind is StallKind.MISSING:
                stalls = stalls + self._missing(by_kind[StallKind.COMMIT], updates)
            for stall in merge([s for s in stalls if not s.superseded], self._evidence):
                self._decide(stall)
                decided.append(stall)
        decided.sort(key=_start)
        records, self._records = self._records, []
        records += [self._to_record(s) for s in decided]
        if horizon < _END:
            self._evidence.forget(horizon - KEEP_NS)
            self._issued.forget(horizon - KEEP_NS)
        while len(self._incident_of) > _LIMIT:
            del self._incident_of[next(iter(self._incident_of))]
        return records

    def _decide(self, stall: Stall) -> None:
        partner = decide(stall, self._evidence)
        if stall.seen.kind is StallKind.VCPU_PAUSE:
            stall.cause = self._stop_cause(stall)
        if partner is not None:
            stall.incident = partner.incident
            both = together(partner.witnesses, stall.witnesses)
            partner.witnesses = stall.witnesses = both
        elif stall.transition in self._incident_of:
            stall.incident = self._incident_of[stall.transition]
        else:
            stall.incident = next(self._next_incident)
        if stall.transition is not None:
            self._incident_of.setdefault(stall.transition, stall.incident)
        self._evidence.add(stall)

    # -- slot operations: ioctl and trace line are one ---------------------------------------

    def _from_trace(self, horizon: int) -> None:
        """Windows of the operations whose ioctls no other probe saw."""
        while self._transitions and self._transitions[0].t_ns <= horizon:
            transition = self._transitions.popleft()
            ops = self._ops_of.pop(transition.seq, [])
            if not all(traced.ioctl is not None for traced in ops):
                lines = [traced.op for traced in ops]
                windows = trace_windows(transition.t_ns, lines, self._stamp_bound_ns)
                for i, seen in enumerate(windows):
                    if i >= len(ops) or ops[i].ioctl is None:
                        self._open.add(Stall(seen, witness(TRACE), transition=transition.seq))
            elif not ops and transition.merged == 1:
                self._silent.append(transition)

    def _know_commits(self, commits: list[Stall], updates: Updates, horizon: int) -> None:
        """A commit is part of the transition whose operations it issued, or that it alone fits."""
        for commit in commits:
            mine = updates.inside(commit)
            known = {u.transition for u in mine if u.transition is not None}
            if len(known) == 1:
                commit.transition = known.pop()
            commit.logs = bool(mine) and all(u.logs for u in mine)
            if commit.logs:
                commit.why_logs = mine[0].why_logs
            for update in mine:
                commit.witnesses = together(commit.witnesses, update.witnesses)
                update.commit = commit
        self._match_silent(commits, horizon)

    def _match_silent(self, commits: list[Stall], horizon: int) -> None:
        """Transitions without slot operations: the one commit in which the line was printed."""
        if not self._silent:
            return
        silent = list(self._silent)
        times = [transition.t_ns for transition in silent]
        fitting: dict[int, list[Stall]] = defaultdict(list)
        bounds = [max(self._stamp_bound_ns, transition.late_ns or 0) for transition in silent]
        bound = max(bounds)
        for commit in commits:
            if commit.transition is None:
                end_ns = commit.seen.end_ns
                low = bisect_left(times, commit.seen.start_ns)
                high = bisect_right(times, end_ns + bound)
                for at in range(low, high):
                    if times[at] <= end_ns + bounds[at]:
                        fitting[at].append(commit)
        left: deque[TransitionRecord] = deque()
        for at, transition in enumerate(silent):
            found = [c for c in fitting.get(at, ()) if c.transition is None]
            if len(found) == 1:
                found[0].transition = transition.seq
                found[0].witnesses = together(found[0].witnesses, witness(TRACE))
            elif not found and horizon < transition.t_ns + PATIENCE_NS:
                left.append(transition)
        self._silent = left

    def _missing(self, commits: list[Stall], updates: Updates) -> list[Stall]:
        """Missing windows from the ioctls of each commit."""
        found = []
        for commit in commits:
            timed: list[Timed] = []
            mine = updates.inside(commit)
            if any(update.superseded for update in mine):
                continue  # what was asked for is not what was done
            for update in mine:
                op = update.line or update.seen.update
                if op is None:
                    continue
                slot = (op.as_id, op.gpa)
                if op.op is not OpKind.DELETE:
                    self._sizes[slot] = op.size
                elif not op.size:
                    op = msgspec.structs.replace(op, size=self._sizes.pop(slot, 0))
                timed.append((op, update.seen.start_ns, update.seen.end_ns))
            window = missing_window(timed, commit.seen.probe)
            if window is not None:
                found.append(Stall(window, commit.witnesses, commit, transition=commit.transition))
        return found

    # -- the rest ------------------------------------------------------------------------------

    def _stop_cause(self, stall: Stall) -> StallCause:
        seen = stall.seen
        for span in self._evidence.commands(seen.start_ns - 1, seen.start_ns + 1):
            if span.name == "stop":
                return StallCause(StallCauseType.COMMAND, "stop", stall.length_ns)
        slack = self._stamp_bound_ns
        for state in reversed(self._stops):
            if seen.start_ns - slack <= state.t_ns <= seen.end_ns + slack:
                return StallCause(StallCauseType.STOP, state.status, stall.length_ns)
        return StallCause(StallCauseType.STOP, None, stall.length_ns)

    def _to_record(self, stall: Stall) -> StallRecord:
        seen = stall.seen
        return StallRecord(
            kind=seen.kind,
            start_ns=seen.start_ns,
            end_ns=seen.end_ns,
            at_least_ns=seen.at_least_ns,
            at_most_ns=seen.at_most_ns,
            probe=seen.probe,
            witnesses=sorted(stall.witnesses),
            thread=seen.thread,
            site=seen.site,
            cause=stall.cause,
            incident=stall.incident,
            during=self._during(stall),
            handoffs=seen.handoffs,
        )

    def _during(self, stall: Stall) -> list[int]:
        """Transitions whose windows share time with the stall.

        Of what lies inside a commit there is but one, whatever the error of its times: the BQL
        admits one commit at a time.
        """
        if stall.seen.kind in _PARTS and stall.transition is not None:
            return [stall.transition]
        start, end = stall.seen.start_ns, stall.seen.end_ns
        found = {
            other.transition
            for kind in (StallKind.COMMIT, StallKind.SLOT_UPDATE)
            for other in self._evidence.overlapping(kind, start, end)
            if other.transition is not None
        }
        return sorted(found)


def _start(stall: Stall) -> int:
    return stall.seen.start_ns


def _span(command: CommandRecord) -> tuple[int, int]:
    return command.start_ns, command.end_ns


def _length(command: CommandRecord) -> int:
    return max(1, command.end_ns - command.start_ns)
