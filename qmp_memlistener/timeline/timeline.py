"""Merges what all probes saw into stalls, each with its witnesses and its cause.

Pure: no clocks, no tasks.  Observations, commands and the records of transitions go in; `release`
hands out the stalls that are decided.  A window is decided when every probe has delivered what
ended before it: a probe says so with `advance`.  A probe that does not get on (a ping may wait for
minutes) holds the others up for `PATIENCE_NS` at most; what it saw is then decided later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import count

from ..probes import CommandSpan, Kind, Observation
from ..recording import (
    CommandRecord,
    GuestState,
    Record,
    SlotOp,
    StallCause,
    StallRecord,
    TransitionRecord,
)
from .causes import decide
from .evidence import KEEP_NS, Evidence, Stall, overlap
from .windows import TimedOp, missing_window, trace_windows

__all__ = ["PATIENCE_NS", "Timeline"]

PATIENCE_NS = 3_000_000_000
TRACE = "trace"
_LIMIT = 8192
"""Unmatched ioctls or operations kept: one of the two sides may be absent altogether."""

# what others are decided by comes first
_ORDER = (
    Kind.COMMIT,
    Kind.SLOT_UPDATE,
    Kind.VCPU_INHIBIT,
    Kind.MISSING,
    Kind.VCPU_PAUSE,
    Kind.BQL_HOLD,
    Kind.BQL_WAIT,
    Kind.MAIN_LOOP,
    Kind.VCPU_GAP,
)


class Timeline:
    """Stalls of one guest.  `stamp_bound_ns` is how late the times of trace lines may be."""

    def __init__(self, *, stamp_bound_ns: int) -> None:
        self._stamp_bound_ns = stamp_bound_ns
        self._reached: dict[str, int] = {}
        self._open: list[Stall] = []
        self._evidence = Evidence()
        self._ioctls: deque[Stall] = deque()
        self._ops: deque[SlotOp] = deque()
        self._matched: dict[int, Stall] = {}
        self._transitions: deque[TransitionRecord] = deque()
        self._ops_of: dict[int, list[SlotOp]] = {}
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
        """Nothing more comes from it."""
        self._reached.pop(probe, None)

    def advance(self, probe: str, t_ns: int) -> None:
        """The probe has delivered every window that ended before `t_ns`."""
        if probe in self._reached:
            self._reached[probe] = max(self._reached[probe], t_ns)

    def observe(self, observations: Iterable[Observation]) -> None:
        """Windows that a probe saw."""
        for seen in sorted(observations, key=lambda o: o.start_ns):
            stall = Stall(seen, {seen.probe})
            self._open.append(stall)
            if seen.kind is Kind.SLOT_UPDATE and seen.update is not None:
                self._ioctls.append(stall)
        while len(self._ioctls) > _LIMIT:
            self._ioctls.popleft()

    def command(self, span: CommandSpan) -> None:
        """A command that was seen."""
        ours = any(
            other.probe == "agent" and overlap(*_span(other), *_span(span)) * 2 >= _length(span)
            for other in self._evidence.commands(*_span(span))
        )
        self._evidence.add_command(span)
        if span.probe != "agent" and not ours:
            self._records.append(
                CommandRecord(
                    name=span.name,
                    start_ns=span.start_ns,
                    busy_until_ns=span.busy_until_ns,
                    end_ns=span.end_ns,
                    probe=span.probe,
                )
            )

    def record(self, record: Record) -> None:
        """A record of the map or the guest; those that do not matter here are ignored."""
        match record:
            case TransitionRecord():
                self._transitions.append(record)
                self._ops_of[record.seq] = []
            case SlotOp(predicted=False):
                self._ops.append(record)
                if record.transition is not None:
                    self._ops_of.setdefault(record.transition, []).append(record)
                if len(self._ops) > _LIMIT:
                    self._ops.popleft()
            case GuestState(running=False):
                self._stops.append(record)

    def know_slot(self, as_id: int, gpa: int, size: int) -> None:
        """The size of the slot that begins there, so that a delete tells how much went away."""
        self._sizes[as_id, gpa] = size

    def lost(self, probe: str) -> None:
        """The probe missed something: operations can no longer be paired by their order."""
        if probe in (TRACE, "uprobes"):
            self._ioctls.clear()
            self._ops.clear()

    # -- what comes out ----------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Something has come in that is not handed out yet."""
        return bool(self._open or self._records or self._transitions)

    def release(self, now_ns: int) -> list[Record]:
        """The commands and stalls that are decided by now, stalls in order of their beginning."""
        horizon = min(self._reached.values(), default=now_ns)
        return self._release(max(horizon, now_ns - PATIENCE_NS))

    def finish(self) -> list[Record]:
        """Everything that is left; nothing more will come."""
        return self._release(1 << 63)

    def _release(self, horizon: int) -> list[Record]:
        self._pair()
        self._from_trace(horizon)
        ready = [s for s in self._open if s.seen.end_ns <= horizon]
        self._open = [s for s in self._open if s.seen.end_ns > horizon]
        by_kind: dict[Kind, list[Stall]] = {kind: [] for kind in _ORDER}
        for stall in sorted(ready, key=lambda s: s.seen.start_ns):
            by_kind[stall.seen.kind].append(stall)
        decided: list[Stall] = []
        for kind in _ORDER:
            stalls = by_kind[kind]
            if kind is Kind.COMMIT:
                self._know_commits(stalls, by_kind[Kind.SLOT_UPDATE], horizon)
            elif kind is Kind.MISSING:
                stalls = stalls + self._missing(by_kind[Kind.COMMIT], by_kind[Kind.SLOT_UPDATE])
            for stall in self._merge(stalls):
                self._decide(stall)
                decided.append(stall)
        decided.sort(key=lambda s: s.seen.start_ns)
        records, self._records = self._records, []
        records += [self._to_record(s) for s in decided]
        if horizon < 1 << 62:
            self._forget(horizon - KEEP_NS)
        return records

    def _decide(self, stall: Stall) -> None:
        partner = decide(stall, self._evidence)
        if stall.seen.kind is Kind.VCPU_PAUSE:
            stall.cause = self._stop_cause(stall)
        if partner is not None:
            stall.incident = partner.incident
            partner.witnesses |= stall.witnesses
            stall.witnesses |= partner.witnesses
        elif stall.transition in self._incident_of:
            stall.incident = self._incident_of[stall.transition]
        else:
            stall.incident = next(self._next_incident)
        if stall.transition is not None:
            self._incident_of.setdefault(stall.transition, stall.incident)
        self._evidence.add(stall)

    # -- slot operations: ioctl and trace line are one ---------------------------------------

    def _pair(self) -> None:
        """Pair traced operations with ioctls that were seen: by content, in QEMU's order."""
        self._ioctls = deque(sorted(self._ioctls, key=lambda s: s.seen.start_ns))
        left: deque[SlotOp] = deque()
        for op in self._ops:
            key = (op.as_id, op.slot, op.gpa, op.op == "delete")
            found = next(
                (s for s in self._ioctls if _key(s) == key and s.seen.start_ns <= op.t_ns), None
            )
            if found is None:
                left.append(op)
                continue
            self._ioctls.remove(found)
            found.transition = op.transition
            found.logs = op.transition is None
            found.witnesses.add(TRACE)
            if op.op == "delete":
                found.deleted_size = op.size
            if op.transition is not None:
                self._matched[id(op)] = found
        self._ops = left

    def _from_trace(self, horizon: int) -> None:
        """Windows of the operations whose ioctls no other probe saw."""
        while self._transitions and self._transitions[0].t_ns <= horizon:
            transition = self._transitions.popleft()
            ops = self._ops_of.pop(transition.seq, [])
            seen_better = [self._matched.pop(id(op), None) is not None for op in ops]
            if not all(seen_better):
                windows = trace_windows(transition.t_ns, ops, self._stamp_bound_ns)
                for i, seen in enumerate(windows):
                    if i >= len(ops) or not seen_better[i]:
                        self._open.append(Stall(seen, {TRACE}, transition=transition.seq))
            elif not ops and transition.merged == 1:
                self._silent.append(transition)

    def _know_commits(self, commits: list[Stall], updates: list[Stall], horizon: int) -> None:
        """A commit is part of the transition whose operations it issued, or that it alone fits."""
        for commit in commits:
            mine = _inside(commit, updates)
            known = {u.transition for u in mine if u.transition is not None}
            if len(known) == 1:
                commit.transition = known.pop()
            commit.logs = bool(mine) and all(u.logs for u in mine)
            for update in mine:
                commit.witnesses |= update.witnesses
        self._match_silent(commits, horizon)

    def _match_silent(self, commits: list[Stall], horizon: int) -> None:
        """Transitions without slot operations: the one commit in which the line was printed."""
        left: deque[TransitionRecord] = deque()
        for transition in self._silent:
            t_ns = transition.t_ns
            fitting = [
                c
                for c in commits
                if c.transition is None
                and c.seen.start_ns <= t_ns
                and t_ns - self._stamp_bound_ns <= c.seen.end_ns
            ]
            if len(fitting) == 1:
                fitting[0].transition = transition.seq
                fitting[0].witnesses.add(TRACE)
            elif not fitting and horizon < t_ns + PATIENCE_NS:
                left.append(transition)
        self._silent = left

    def _missing(self, commits: list[Stall], updates: list[Stall]) -> list[Stall]:
        """Missing windows from the ioctls of each commit."""
        found = []
        for commit in commits:
            timed = []
            for update in _inside(commit, updates):
                seen = update.seen
                if seen.update is None:
                    continue
                slot = (seen.update.as_id, seen.update.gpa)
                if seen.update.size:
                    self._sizes[slot] = size = seen.update.size
                else:
                    size = update.deleted_size or self._sizes.pop(slot, 0)
                timed.append(
                    TimedOp(
                        "add" if seen.update.size else "delete",
                        seen.update.as_id,
                        seen.update.gpa,
                        size,
                        seen.update.hva,
                        seen.start_ns,
                        seen.end_ns,
                    )
                )
            window = missing_window(timed, commit.seen.probe)
            if window is not None:
                found.append(Stall(window, set(commit.witnesses), transition=commit.transition))
        return found

    # -- several probes, one stall -------------------------------------------------------------

    def _merge(self, stalls: list[Stall]) -> list[Stall]:
        """Windows of one kind that several probes saw: the narrowest stands for all.

        One whose twin was decided before has been told already.
        """
        kept: list[Stall] = []
        for stall in stalls:
            seen = stall.seen
            told = self._evidence.overlapping(seen.kind, seen.start_ns, seen.end_ns)
            if any(_twins(t, stall) for t in told):
                continue
            twin = next((k for k in reversed(kept[-32:]) if _twins(k, stall)), None)
            if twin is None:
                kept.append(stall)
                continue
            twin.witnesses |= stall.witnesses
            twin.transition = twin.transition if twin.transition is not None else stall.transition
            if _uncertainty(stall) < _uncertainty(twin):
                twin.seen = stall.seen
        return kept

    # -- the rest ------------------------------------------------------------------------------

    def _stop_cause(self, stall: Stall) -> StallCause:
        seen = stall.seen
        for span in self._evidence.commands(seen.start_ns - 1, seen.start_ns + 1):
            if span.name == "stop":
                return StallCause("command", "stop", stall.length_ns)
        slack = self._stamp_bound_ns
        for state in reversed(self._stops):
            if seen.start_ns - slack <= state.t_ns <= seen.end_ns + slack:
                return StallCause("stop", state.status, stall.length_ns)
        return StallCause("stop", None, stall.length_ns)

    def _to_record(self, stall: Stall) -> StallRecord:
        seen = stall.seen
        return StallRecord(
            kind=str(seen.kind),
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
        """Transitions whose windows share time with the stall."""
        start, end = stall.seen.start_ns, stall.seen.end_ns
        found = {
            other.transition
            for kind in (Kind.COMMIT, Kind.SLOT_UPDATE)
            for other in self._evidence.overlapping(kind, start, end)
            if other.transition is not None
        }
        return sorted(found)

    def _forget(self, before_ns: int) -> None:
        self._evidence.forget(before_ns)
        while len(self._incident_of) > _LIMIT:
            del self._incident_of[next(iter(self._incident_of))]
        while self._ioctls and self._ioctls[0].seen.end_ns < before_ns:
            self._ioctls.popleft()
        while self._ops and self._ops[0].t_ns < before_ns:
            self._ops.popleft()


def _span(command: CommandSpan) -> tuple[int, int]:
    return command.start_ns, command.end_ns


def _length(command: CommandSpan) -> int:
    return max(1, command.end_ns - command.start_ns)


def _key(stall: Stall) -> tuple[int, int, int, bool] | None:
    update = stall.seen.update
    if update is None:
        return None
    return (update.as_id, update.slot, update.gpa, update.size == 0)


def _inside(commit: Stall, updates: list[Stall]) -> list[Stall]:
    """The ioctls that a commit issued, in order: those of its thread in its time."""
    start, end = commit.seen.start_ns, commit.seen.end_ns
    return [
        u
        for u in updates
        if u.seen.probe != TRACE
        and u.seen.tid == commit.seen.tid
        and start <= u.seen.start_ns
        and u.seen.end_ns <= end
    ]


def _uncertainty(stall: Stall) -> int:
    """How little is known of where it was and how long it was."""
    seen = stall.seen
    return (seen.end_ns - seen.start_ns) - 2 * seen.at_least_ns + seen.at_most_ns


def _twins(one: Stall, other: Stall) -> bool:
    """Two probes saw the same stall of the same victim."""
    a, b = one.seen, other.seen
    shared = overlap(a.start_ns, a.end_ns, b.start_ns, b.end_ns)
    if a.probe == b.probe or not shared:
        return False
    if a.kind is Kind.SLOT_UPDATE:
        return _key(one) == _key(other)
    if a.kind is Kind.MISSING:
        return one.transition is not None and one.transition == other.transition
    if a.kind is Kind.BQL_WAIT:
        fits = a.at_least_ns <= b.at_most_ns and b.at_least_ns <= a.at_most_ns
        return a.site == b.site and fits
    if a.kind is Kind.VCPU_PAUSE or a.thread == b.thread:
        return shared * 2 >= min(one.length_ns, other.length_ns)
    return False
