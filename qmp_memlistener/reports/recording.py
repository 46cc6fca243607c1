"""What a recording holds, in short: who, how long, what went wrong, which stalls."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ..errors import RecordingError
from ..records import (
    GuestFailure,
    GuestReset,
    Lost,
    Mode,
    PossibleViolation,
    Record,
    Recording,
    StallRecord,
    SteeringRecord,
    SummaryRecord,
    Tally,
    TransitionRecord,
    Violation,
)
from ..text import count_text
from ..timeline.summary import Statistics
from .lengths import duration_text
from .stalls import measured_lines
from .summary import histogram_lines, summary_lines
from .terminal import Narrator

__all__ = ["Contents"]

_SHOWN = 20
_END_OF_TIME_NS = 1 << 63
_UNKNOWN = "unknown"


class _Strategies:
    """Transitions by the strategy that `steer` applied to them.

    Records of either type may come late, so they are compared when all are there.
    """

    def __init__(self, bound_ns: int) -> None:
        self._bound_ns = bound_ns
        self._from, self._to = array("q"), array("q")  # when each transition was
        self._changes: list[SteeringRecord] = []

    def take(self, record: TransitionRecord | SteeringRecord) -> None:
        if isinstance(record, SteeringRecord):
            self._changes.append(record)
        else:
            self._from.append(max(0, record.t_ns - max(self._bound_ns, record.late_ns or 0)))
            self._to.append(record.t_ns)

    def counts(self) -> dict[str, int]:
        """`unknown`: not recorded, or another one was taken at about that time."""
        changes = sorted(self._changes, key=lambda c: c.t_ns)
        times = [c.t_ns for c in changes]
        found: Counter[str] = Counter()
        for start_ns, end_ns in zip(self._from, self._to, strict=True):
            at = bisect_right(times, start_ns)
            names = {str(changes[at - 1].strategy)} if at else {_UNKNOWN}
            for change in changes[at:]:
                if change.t_ns - (change.late_ns or 0) > end_ns:
                    break
                names.add(str(change.strategy))
            found[names.pop() if len(names) == 1 else _UNKNOWN] += 1
        return dict(sorted(found.items()))

    @property
    def steered(self) -> bool:
        """As far as that is known."""
        return any(change.strategy is not Mode.OFF for change in self._changes)

    def lines(self) -> Iterator[str]:
        """Nothing for a guest that was not steered."""
        if not self.steered:
            return
        told = (f"{count:,} under {name}" for name, count in self.counts().items())
        yield f"strategies: {', '.join(told) or 'no transition was made'}"


class Contents:
    """A recording read once, as far as it goes now; raises RecordingError.

    Stalls are counted and only the `longest` of them kept.  `also` is given each record as well.
    """

    def __init__(
        self, recording: Recording, longest: int, also: Callable[[Record], None] | None = None
    ) -> None:
        self.recording = recording
        self._statistics = Statistics()
        self.tally = Tally()
        self._strategies = _Strategies(recording.header.stamp_bound_ns or 0)
        self.end_ns = recording.header.monotonic_ns
        self.failures: list[GuestFailure] = []
        self.resets: list[GuestReset] = []
        self.violations: list[Violation] = []
        self.possible: list[PossibleViolation] = []
        self.lost: list[Lost] = []
        self.longest: list[StallRecord] = []
        for record in recording:
            self._check(record)
            self._take(record, longest)
            if also is not None:
                also(record)
            self.end_ns = max(self.end_ns, *_times(record))
        self._shorten(longest)

    def document(self) -> dict[str, object]:
        """The JSON document (docs/json.md)."""
        return {
            "schema": 1,
            "recording": self.recording.path,
            "header": self.recording.header,
            "truncated": self.recording.truncated,
            "transitions": self.tally.transitions,
            "slot_ops": self.tally.slot_ops,
            "strategies": self._strategies.counts(),
            "lost": len(self.lost),
            "probes": list(self.tally.probes.values()),
            "compared": self.tally.compared,
            "differences": self.tally.differences if self.tally.compared else None,
            "failures": self.failures,
            "resets": self.resets,
            "violations": self.violations,
            "possible_violations": self.possible,
            "summary": self.summary(),
        }

    def lines(self, *, histograms: bool, width: int, unicode: bool) -> Iterator[str]:
        """The report for people; `width` and `unicode` as in `summary_lines`."""
        yield from Narrator().lines(self.recording.header)
        lasted = duration_text(self.end_ns - self.recording.header.monotonic_ns)
        lost = count_text(len(self.lost), "loss", "losses") if self.lost else "nothing lost"
        transitions = count_text(self.tally.transitions, "transition")
        slot_ops = count_text(self.tally.slot_ops, "slot operation")
        yield f"{self.recording.path}: {lasted}, {transitions}, {slot_ops}, {lost}"
        if self.recording.truncated:
            yield "the last line is cut off: it is still being written, or its writer was killed"
        if self.recording.skipped:
            skipped = count_text(self.recording.skipped, "record")
            yield f"{skipped} of a type that this version does not know"
        yield from self._strategies.lines()
        yield from self._probe_lines()
        yield self._comparison()
        yield from self._section("guest failures", self.failures)
        yield from self._section("guest resets", self.resets)
        yield from self._section("violations", self.violations)
        yield from self._section("possible violations", self.possible)
        yield from self._section("losses", self.lost)
        summary = self.summary()
        yield ""
        yield from summary_lines(summary, width=width, unicode=unicode)
        if histograms:
            yield from histogram_lines(summary, width=width, unicode=unicode)
        yield from self._section("longest stalls", self.longest, shown=len(self.longest))

    def _take(self, record: Record, longest: int) -> None:
        self.tally.note(record)
        match record:
            case StallRecord():
                self._statistics.add_record(record)
                self.longest.append(record)
                if len(self.longest) >= 64 + 2 * longest:
                    self._shorten(longest)
            case TransitionRecord() | SteeringRecord():
                self._strategies.take(record)
            case GuestReset():
                self.resets.append(record)
            case GuestFailure():
                self.failures.append(record)
            case Violation():
                self.violations.append(record)
            case PossibleViolation():
                self.possible.append(record)
            case Lost():
                self.lost.append(record)

    def _check(self, record: Record) -> None:
        """Numbers that no recording of ours has would break what is computed from them."""
        times, in_order = _times(record), True
        if isinstance(record, StallRecord):
            times = (*times, record.at_least_ns, record.at_most_ns)
            in_order = record.at_least_ns <= record.at_most_ns
        if not in_order or not all(0 <= t < _END_OF_TIME_NS for t in times):
            raise RecordingError(
                f"{self.recording.path} has a record with a time that cannot be: {record}",
                remedy="give a file that `qmp-memlistener record` wrote, unchanged",
            )

    def _shorten(self, longest: int) -> None:
        self.longest.sort(key=lambda s: (s.at_least_ns, s.at_most_ns), reverse=True)
        del self.longest[longest:]

    def strategies(self) -> dict[str, int]:
        """Transitions by the strategy that `steer` applied to them; none if it was not in use."""
        return self._strategies.counts() if self._strategies.steered else {}

    def summary(self) -> SummaryRecord:
        """Computed from the stalls in the file."""
        return self._statistics.summary(
            start_ns=self.recording.header.monotonic_ns,
            end_ns=self.end_ns,
            transitions=self.tally.transitions,
        )

    def _probe_lines(self) -> Iterator[str]:
        if not self.tally.probes:
            yield "no probe was active: stalls were not measured"
            return
        active = [s for s in self.tally.probes.values() if s.active]
        yield f"probes: {', '.join(s.name for s in active) or 'none active'}"
        for state in self.tally.probes.values():
            if not state.active:
                yield f"without {state.name}: {state.reason or 'not requested'}"

    def _comparison(self) -> str:
        if not self.tally.compared:
            return "traced slots were not compared with those that QEMU's rules predict"
        if not self.tally.differences:
            return "traced slots: as QEMU's rules predict"
        times = count_text(self.tally.differences, "time")
        return f"traced slots differed from what QEMU's rules predict: {times}"

    def _section(
        self, title: str, records: Sequence[Record], *, shown: int = _SHOWN
    ) -> Iterator[str]:
        if not records:
            return
        yield ""
        yield title
        for record in records[:shown]:
            stamp = f"{(min(_times(record)) - self.recording.header.monotonic_ns) / 1e9:10.6f}"
            if isinstance(record, Lost):
                count = f" ({record.count:,})" if record.count is not None else ""
                yield f"{stamp}  {record.what}{count}"
            else:
                yield from measured_lines(record, stamp)
        if len(records) > shown:
            yield f"{'':12}and {len(records) - shown:,} more"


def _times(record: Record) -> tuple[int, ...]:
    """When it was, or began and ended; 0 for a record without a time."""
    match record:
        case StallRecord():
            return record.start_ns, record.end_ns
        case _:
            t_ns = getattr(record, "t_ns", getattr(record, "end_ns", 0))
            return (t_ns if isinstance(t_ns, int) else 0,)
