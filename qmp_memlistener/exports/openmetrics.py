"""What a recording adds up to, as OpenMetrics text: counters, and histograms by kind of stall.

Every sample has the time of the last record, on the wall clock of the recording's host.  Labels
are words of ours, as many as there are: words that this version does not know are `other`.  A kind
that no probe measured has no series.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from ..records import CauseType, Detail, Recording, StallKind
from ..timeline.summary import BOUNDS_NS
from .counts import MapCounts
from .fields import DECODERS, Recorded, cause_of

__all__ = ["openmetrics_text"]

_PREFIX = "qmp_memlistener_recording"
_BOUNDS_NS = BOUNDS_NS[1:]
_KINDS, _CAUSES, _DETAILS = frozenset(StallKind), frozenset(CauseType), frozenset(Detail)
_OPS = frozenset({"add", "delete", "flags"})
_OTHER = "other"
_COUNTED = {
    "guest_failure": ("guest_failures", "Guest failures."),
    "guest_reset": ("guest_resets", "Resets of the guest."),
    "violation": ("violations", "Limits exceeded for certain, and changes of a frozen guest."),
    "possible_violation": ("possible_violations", "Limits that may have been exceeded."),
    "lost": ("losses", "Records of something that was missed."),
}


class _State(msgspec.Struct, gc=False):
    measures: list[str] = []
    active: bool = False


_STATES = msgspec.json.Decoder(list[_State])


class _Histogram:
    """Lengths by the smallest bound that they do not exceed."""

    __slots__ = ("counts", "total_ns")

    def __init__(self) -> None:
        self.counts = array("q", bytes(8 * (len(_BOUNDS_NS) + 1)))
        self.total_ns = 0

    def add(self, ns: int) -> None:
        self.counts[bisect_left(_BOUNDS_NS, ns)] += 1
        self.total_ns += ns


class _Totals:
    """What the records read so far add up to."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.transitions: Counter[tuple[str, str]] = Counter()
        self.slot_ops: Counter[tuple[str, str]] = Counter()
        self.most: dict[str, _Histogram] = {}
        self.least: dict[str, _Histogram] = {}
        self.map = MapCounts()
        self.end_ns = 0

    def measured(self, kind: str) -> None:
        if kind not in self.most:
            self.most[kind], self.least[kind] = _Histogram(), _Histogram()

    def take(self, tag: str, record: Recorded) -> None:
        self.rows[tag] += 1
        if tag == "stall":
            kind = _word(record.kind, _KINDS)
            self.measured(kind)
            self.most[kind].add(record.at_most_ns)
            self.least[kind].add(record.at_least_ns)
            at = record.end_ns
        elif tag == "transition":
            cause = cause_of(record.cause)
            word = _word(cause.type if cause else None, _CAUSES)
            self.transitions[word, _word(record.detail, _DETAILS)] += 1
            self.map.transition(record)
            at = record.t_ns
        elif tag == "slot_op":
            predicted = record.predicted
            shown = _OTHER if predicted is msgspec.UNSET else "true" if predicted else "false"
            self.slot_ops[_word(record.op, _OPS), shown] += 1
            self.map.slot_op(record)
            at = record.t_ns
        else:
            if tag == "map":
                self.map.map(record)
            elif tag == "probes":
                for state in _STATES.decode(record.probes):
                    for kind in state.measures if state.active else ():
                        self.measured(_word(kind, _KINDS))
            at = getattr(record, "t_ns", getattr(record, "end_ns", 0))
        self.end_ns = max(self.end_ns, at)


def openmetrics_text(recording: Recording) -> tuple[bytes, Counter[str]]:
    """The text, and how many records of each type it is made of."""
    totals = _Totals()
    for _, _, record in recording.read_as(DECODERS):
        totals.take(record.__class__.__name__, record)
    lines = "".join(f"{line}\n" for line in _lines(recording, totals))
    return lines.encode(), totals.rows


def _lines(recording: Recording, totals: _Totals) -> Iterator[str]:
    header = recording.header
    end_ns = max(totals.end_ns, header.monotonic_ns)
    at = _seconds(header.realtime_ns + end_ns - header.monotonic_ns)
    facts = {
        "tool_version": header.tool_version,
        "qemu_version": header.qemu_version,
        "machine": header.machine,
        "accel": header.accel,
        "guest_name": header.guest_name,
        "host_kernel": header.host_kernel,
    }
    known = {name: value for name, value in facts.items() if value is not None}
    yield from _family("", "info", "What was recorded.")
    yield _sample("_info", known, "1", at)
    yield from _family(
        "_duration_seconds", "gauge", "From the first record to the last.", "seconds"
    )
    yield _sample("_duration_seconds", {}, _seconds(end_ns - header.monotonic_ns), at)
    yield from _family("_records", "counter", "Records by type.")
    for tag, count in sorted(totals.rows.items()):
        yield _sample("_records_total", {"type": tag}, str(count), at)
    yield from _family("_transitions", "counter", "Changes of the memory map.")
    for (cause, detail), count in sorted(totals.transitions.items()):
        labels = {"cause": cause, "detail": detail}
        yield _sample("_transitions_total", labels, str(count), at)
    yield from _family("_slot_operations", "counter", "Memslot operations.")
    for (op, predicted), count in sorted(totals.slot_ops.items()):
        labels = {"op": op, "predicted": predicted}
        yield _sample("_slot_operations_total", labels, str(count), at)
    for tag, (name, text) in _COUNTED.items():
        yield from _family(f"_{name}", "counter", text)
        yield _sample(f"_{name}_total", {}, str(totals.rows[tag]), at)
    for name, value, text in (
        ("slots", totals.map.slots, "Slots of the main address space at the end."),
        ("holes", totals.map.holes, "Holes in RAM at the end."),
    ):
        if value is not None:
            yield from _family(f"_{name}", "gauge", text)
            yield _sample(f"_{name}", {}, str(value), at)
    yield from _histograms("_stall_at_most", "Stalls by their upper bounds.", totals.most, at)
    yield from _histograms("_stall_at_least", "Stalls by their lower bounds.", totals.least, at)
    yield "# EOF"


def _histograms(name: str, text: str, found: Mapping[str, _Histogram], at: str) -> Iterator[str]:
    name = f"{name}_seconds"
    yield from _family(name, "histogram", text, "seconds")
    bounds = [*map(_seconds, _BOUNDS_NS), "+Inf"]
    for kind, histogram in sorted(found.items()):
        total = 0
        for bound, count in zip(bounds, histogram.counts, strict=True):
            total += count
            yield _sample(f"{name}_bucket", {"kind": kind, "le": bound}, str(total), at)
        yield _sample(f"{name}_count", {"kind": kind}, str(total), at)
        yield _sample(f"{name}_sum", {"kind": kind}, _seconds(histogram.total_ns), at)


def _family(name: str, kind: str, text: str, unit: str | None = None) -> Iterator[str]:
    yield f"# TYPE {_PREFIX}{name} {kind}"
    if unit is not None:
        yield f"# UNIT {_PREFIX}{name} {unit}"
    yield f"# HELP {_PREFIX}{name} {text}"


def _sample(name: str, labels: Mapping[str, str], value: str, at: str) -> str:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{_PREFIX}{name}{f'{{{shown}}}' if shown else ''} {value} {at}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _word(word: str | None, known: frozenset[str]) -> str:
    return word if word in known else _OTHER


def _seconds(ns: int) -> str:
    """Exact, for a float would not do for a time in this century."""
    sign, ns = ("-", -ns) if ns < 0 else ("", ns)
    fraction = f"{ns % 10**9:09}".rstrip("0")
    return f"{sign}{ns // 10**9}.{fraction or '0'}"
