"""Which stall was made by what: the rules.  Pure.

A cause is stated only where something is known to have blocked the very thread that stalled for at
least half of the stall.  That two things happened at the same time is not enough.

- `slot_update`, `vcpu_inhibit`, `missing` and nested work belong to the commit of the same thread
  that they lie in; a commit belongs to the transition whose operations it issued.
- A thread that holds the BQL is busy with the commits and commands that it runs meanwhile.
- A thread that waits for the BQL waits for whoever holds it: the cause of that hold is its cause.
- The main loop does not serve while the main thread runs a command or a commit, or waits for the
  BQL, or while any thread holds the BQL (util/main-loop.c: it takes it before it dispatches).
- A vCPU does not run the guest while its own thread commits, holds or waits for the BQL, nor while
  vCPUs are paused or kept out of ioctls (accel/accel-blocker.c waits until all have left).
- The host's scheduler is the cause where nothing of these is and the thread had no CPU for half of
  the stall.  Not where a transition was under way that this very thread may have made: a thread
  that works in the kernel loses its CPU there, too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter

from ..probes import StallKind
from ..records import CommandRecord, QmpEvent, SlotOp, StallCause, StallCauseType
from .evidence import Evidence, Stall, overlap, together, witness

__all__ = ["DirtyLogging", "decide"]

SHARE = 0.5
"""A cause accounts for at least this part of a stall."""
MAIN = "main"

_COMMANDS = {"migrate": "migration", "calc-dirty-rate": "dirty-rate measurement"}
_BEGINS = ("setup", "active")
_LOG_DIRTY = 1
_GLOBAL = 2
_KEPT = 64
_WAIT_SLACK_NS = 100_000
"""A gap is longer than the wait for a CPU that made it, as well as its length is known."""


def decide(stall: Stall, evidence: Evidence) -> Stall | None:
    """Set the stall's cause; returns the window that it belongs with, if any."""
    match stall.seen.kind:
        case StallKind.COMMIT:
            return _commit(stall, evidence)
        case StallKind.SLOT_UPDATE | StallKind.VCPU_INHIBIT | StallKind.MISSING:
            return _part_of_commit(stall, evidence)
        case StallKind.BQL_HOLD:
            return _hold(stall, evidence)
        case StallKind.BQL_WAIT:
            return _wait(stall, evidence)
        case StallKind.MAIN_LOOP:
            return _main_loop(stall, evidence)
        case StallKind.VCPU_PAUSE:
            return None
        case StallKind.VCPU_GAP:
            return _gap(stall, evidence)


def _transition(stall: Stall) -> None:
    if stall.transition is not None:
        stall.cause = StallCause(StallCauseType.TRANSITION, stall.transition, stall.length_ns)


def _commit(stall: Stall, evidence: Evidence) -> Stall | None:
    _transition(stall)
    if stall.transition is None and stall.logs:
        stall.cause = StallCause(StallCauseType.SLOT_OP, stall.why_logs, stall.length_ns)
    elif stall.transition is None and stall.seen.thread == MAIN:
        _by_command(stall, evidence)
    return None


def _part_of_commit(stall: Stall, evidence: Evidence) -> Stall | None:
    """Inside a commit of the same thread."""
    seen = stall.seen
    _transition(stall)
    if stall.transition is None and stall.logs and seen.update is not None:
        stall.cause = StallCause(StallCauseType.SLOT_OP, stall.why_logs, stall.length_ns)
    if stall.commit is not None:
        return _taken_from(stall, stall.commit)
    for commit in evidence.overlapping(StallKind.COMMIT, seen.start_ns, seen.end_ns):
        # the BQL admits one commit at a time: what concerns all vCPUs is of the one it lies in
        same = seen.tid in (commit.seen.tid, None) or (
            stall.transition is not None and commit.transition == stall.transition
        )
        if same and _shared(stall, commit) * 2 >= stall.length_ns:
            return _taken_from(stall, commit)
    return None


def _taken_from(stall: Stall, commit: Stall) -> Stall:
    if stall.transition is None and commit.transition is not None:
        stall.transition = commit.transition
        _transition(stall)
    return commit


def _hold(stall: Stall, evidence: Evidence) -> Stall | None:
    seen = stall.seen
    commits = [
        c
        for c in evidence.overlapping(StallKind.COMMIT, seen.start_ns, seen.end_ns)
        if c.seen.tid == seen.tid
    ]
    if seen.thread == MAIN and _by_command(stall, evidence):
        return max(commits, key=lambda c: _shared(stall, c), default=None)
    return _by_windows(stall, commits)


def _wait(stall: Stall, evidence: Evidence) -> Stall | None:
    seen = stall.seen
    holds = (
        h
        for h in evidence.overlapping(StallKind.BQL_HOLD, seen.start_ns, seen.end_ns)
        if h.seen.tid != seen.tid
    )
    commits = (
        c
        for c in evidence.overlapping(StallKind.COMMIT, seen.start_ns, seen.end_ns)
        if c.seen.tid != seen.tid
    )
    return _by_windows(stall, holds) or _by_windows(stall, commits)


def _main_loop(stall: Stall, evidence: Evidence) -> Stall | None:
    start, end = stall.seen.start_ns, stall.seen.end_ns
    holds = list(evidence.overlapping(StallKind.BQL_HOLD, start, end))
    if _by_command(stall, evidence):
        mine = (h for h in holds if h.seen.thread == MAIN and h.cause.ref == stall.cause.ref)
        return max(mine, key=lambda h: _shared(stall, h), default=None)
    waits = (
        w for w in evidence.overlapping(StallKind.BQL_WAIT, start, end) if w.seen.thread == MAIN
    )
    found = (
        _by_windows(stall, holds)
        or _by_windows(stall, waits)
        or _by_windows(stall, evidence.overlapping(StallKind.COMMIT, start, end))
    )
    if found is None:
        _by_host(stall, evidence)
    return found


def _gap(stall: Stall, evidence: Evidence) -> Stall | None:
    seen = stall.seen
    start, end = seen.start_ns, seen.end_ns
    commits = [
        c
        for c in evidence.overlapping(StallKind.COMMIT, start, end)
        if c.seen.thread == seen.thread and _shared(stall, c) * 2 >= c.length_ns
    ]
    if commits:
        # its own thread ran them: whatever else made the gap longer, they are in it
        commit = max(commits, key=lambda c: _shared(stall, c))
        _take(stall, commit, _covered(stall, [c for c in commits if _same(c, commit)]))
        return commit
    own = (StallKind.BQL_WAIT, StallKind.BQL_HOLD)
    blockers = (
        w
        for kind in (StallKind.VCPU_PAUSE, StallKind.VCPU_INHIBIT, *own)
        for w in evidence.overlapping(kind, start, end)
        if kind not in own or w.seen.thread == seen.thread
    )
    found = _by_windows(stall, blockers)
    if found is None:
        _by_host(stall, evidence)
    return found


def _by_host(stall: Stall, evidence: Evidence) -> None:
    """Set the cause when the host gave the thread no CPU for half of the stall."""
    seen = stall.seen
    start, end = seen.start_ns, seen.end_ns
    for kind in (StallKind.SLOT_UPDATE, StallKind.MISSING):
        if any(w.seen.tid is None for w in evidence.overlapping(kind, start, end)):
            return  # who made that change is not known
    explained = 0
    for wait in evidence.host_waits(seen.thread, start, end):
        if wait.times > 1 or wait.waited_ns <= seen.at_most_ns + _WAIT_SLACK_NS:
            shared = overlap(start, end, wait.start_ns, wait.end_ns)
            explained += min(wait.waited_ns, shared)
    if explained >= SHARE * stall.length_ns:
        stall.cause = StallCause(
            StallCauseType.SCHEDULER, None, min(explained, max(1, seen.at_most_ns))
        )
        stall.witnesses = together(stall.witnesses, witness("threads"))


def _by_command(stall: Stall, evidence: Evidence) -> bool:
    """Set the cause when the main thread was busy with a command for half of the stall."""
    seen = stall.seen
    best, longest = None, 0
    for span in evidence.commands(seen.start_ns, seen.end_ns):
        shared = overlap(seen.start_ns, seen.end_ns, span.start_ns, span.busy_until_ns)
        # of our own command another probe may know only that it was one
        if shared > longest or (shared and span.probe == "agent" and shared >= longest * SHARE):
            best, longest = span, shared
    if best is None or longest < SHARE * stall.length_ns:
        return False
    own = best.probe == "agent"
    kind = StallCauseType.AGENT if own else StallCauseType.COMMAND
    stall.cause = StallCause(kind, best.name, longest)
    stall.witnesses = together(stall.witnesses, witness(best.probe))
    return True


def _by_windows(stall: Stall, windows: Iterable[Stall]) -> Stall | None:
    """Take over the cause of the windows that account for most of the stall, if for half of it."""
    groups: dict[object, list[Stall]] = defaultdict(list)
    for window in windows:
        if window is not stall:
            known = window.cause.type is not StallCauseType.UNKNOWN
            groups[(window.cause.type, window.cause.ref) if known else id(window)].append(window)
    best: list[Stall] = []
    longest = 0
    for group in groups.values():
        shared = _covered(stall, group)
        if shared > longest:
            best, longest = group, shared
    if longest < SHARE * stall.length_ns:
        return None
    anchor = max(best, key=lambda w: _shared(stall, w))
    _take(stall, anchor, longest)
    return anchor


def _take(stall: Stall, anchor: Stall, explained_ns: int) -> None:
    stall.transition = anchor.transition
    if anchor.cause.type is not StallCauseType.UNKNOWN:
        explained_ns = min(explained_ns, stall.seen.at_most_ns)
        stall.cause = StallCause(anchor.cause.type, anchor.cause.ref, explained_ns)


def _same(one: Stall, other: Stall) -> bool:
    return one.cause.type == other.cause.type and one.cause.ref == other.cause.ref


def _shared(one: Stall, other: Stall) -> int:
    a, b = one.seen, other.seen
    return overlap(a.start_ns, a.end_ns, b.start_ns, b.end_ns)


def _covered(stall: Stall, windows: Iterable[Stall]) -> int:
    """How much of the stall the windows cover together; they may overlap each other."""
    start, end = stall.seen.start_ns, stall.seen.end_ns
    total, reached = 0, start
    for window in sorted(windows, key=lambda w: w.seen.start_ns):
        total += overlap(max(reached, start), end, window.seen.start_ns, window.seen.end_ns)
        reached = max(reached, window.seen.end_ns)
    return total


class DirtyLogging:
    """Why dirty logging was switched on or off: who last asked for it, by time.

    A migration and a dirty-rate measurement switch it for all migratable RAM in one commit
    (memory_global_dirty_log_start, system/memory.c), some time after their command, in a thread of
    their own.  A display switches it for its own memory alone: one slot is never taken for theirs.
    """

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
