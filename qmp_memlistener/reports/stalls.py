"""What probes measured, in words: one line a stall, and the table and charts of a summary.

Lines begin with the stamp they are given and align with those of `terminal.Narrator`.  Nothing is
printed here, and text that a guest chose is passed on as it is: who prints makes it harmless.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from ..probes import Kind
from ..recording import (
    CommandRecord,
    GuestFailure,
    MeasurementRecord,
    ProbesRecord,
    ProbeState,
    Record,
    StallCause,
    StallRecord,
    StallStatistics,
    SummaryRecord,
    Violation,
)
from ..timeline.summary import BOUNDS_NS

__all__ = [
    "bracket_text",
    "count_text",
    "duration_text",
    "histogram_lines",
    "kind_text",
    "measured_lines",
    "probes_lines",
    "span_text",
    "stall_cause_text",
    "summary_lines",
]

_INDENT = " " * 12
_KINDS = {
    Kind.MAIN_LOOP: "main loop",
    Kind.BQL_WAIT: "BQL wait",
    Kind.BQL_HOLD: "BQL hold",
    Kind.COMMIT: "commit",
    Kind.SLOT_UPDATE: "slot update",
    Kind.VCPU_INHIBIT: "vCPU inhibit",
    Kind.VCPU_PAUSE: "vCPU pause",
    Kind.VCPU_GAP: "vCPU gap",
    Kind.MISSING: "RAM missing",
}
_ORDER = {str(kind): i for i, kind in enumerate(_KINDS)}
_WORDS = {str(kind): words for kind, words in _KINDS.items()}

# (from here on, unit, its name): what is shorter than 0.1 of a unit is told in the one below
_UNITS = (
    (600 * 10**9, 60 * 10**9, "min"),
    (10**9, 10**9, "s"),
    (10**5, 10**6, "ms"),
    (10**3, 10**3, "us"),
    (0, 1, "ns"),
)
_BARS = "▏▎▍▌▋▊▉█"
_COLUMN_BARS = {True: "▁▂▃▄▅▆▇█", False: "123456789"}
_WIDEST_BAR = 60
_WIDEST_STEP = 4


def duration_text(ns: int) -> str:
    """A length of time as people say it: `850 ns`, `12 us`, `0.81 ms`, `452 ms`, `2.31 s`."""
    unit, name = _unit(ns)
    return f"{_number(ns, unit, 3)} {name}"


def bracket_text(at_least_ns: int, at_most_ns: int) -> str:
    """Both bounds where they are more than 10 % apart (`4.2 to 5.1 ms`), else the upper one.

    Bounds are rounded outwards.
    """
    if (at_most_ns - at_least_ns) * 10 <= at_most_ns:
        return duration_text(at_most_ns)
    unit, name = _unit(at_most_ns)
    high = f"{_number(at_most_ns, unit, 2, up=True)} {name}"
    if not at_least_ns:
        return f"up to {high}"
    if at_least_ns * 20 < unit:
        lower, lower_name = _unit(at_least_ns)
        return f"{_number(at_least_ns, lower, 2, up=False)} {lower_name} to {high}"
    return f"{_number(at_least_ns, unit, 2, up=False)} to {high}"


def span_text(at_least_ns: int | None, at_most_ns: int | None) -> str:
    """As `bracket_text`, for a column: `4.2-5.1 ms`; `-` for what was not measured.

    Without a lower bound, as in recordings of former versions, it is `<5.1 ms`.
    """
    if at_most_ns is None:
        return "-"
    low = at_least_ns or 0
    if at_least_ns is not None and (at_most_ns - low) * 10 <= at_most_ns:
        return duration_text(at_most_ns)
    unit, name = _unit(at_most_ns)
    high = f"{_number(at_most_ns, unit, 2, up=True)} {name}"
    if low * 100 < unit:
        return f"<{high}"
    return f"{_number(low, unit, 2, up=False)}-{high}"


def count_text(count: int, one: str, many: str | None = None) -> str:
    """`1 loss`, `1,200 losses`: `many` where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def kind_text(kind: str) -> str:
    """A kind of stall window in words."""
    return _WORDS.get(kind, kind)


def stall_cause_text(cause: StallCause | None) -> str:
    """What made a stall: `transition #12`, `command object-add`, `unknown`."""
    if cause is None:
        return "unknown"
    match cause.type:
        case "unknown":
            return "unknown"
        case "transition":
            return f"transition #{cause.ref}"
        case "command":
            return f"command {cause.ref}"
        case "agent":
            return f"agent: {cause.ref}"
        case "stop":
            return "guest stopped" if cause.ref is None else f"guest stopped: {cause.ref}"
        case "slot_op":
            as_id, colon, slot = str(cause.ref).partition(":")
            if not colon:
                return str(cause.ref)
            return f"slot {slot}" if as_id == "0" else f"as {as_id} slot {slot}"
        case other:
            return other if cause.ref is None else f"{other} {cause.ref}"


def measured_lines(
    record: Record, stamp: str, *, width: int = 80, unicode: bool = True
) -> Iterator[str]:
    """The lines for a record of something measured, `stamp` in front; none for other records.

    `width` and `unicode` are for a summary, which has no stamp (see `summary_lines`).
    """
    match record:
        case StallRecord():
            yield f"{stamp}  {_stall(record)}"
        case CommandRecord():
            length = bracket_text(
                record.busy_until_ns - record.start_ns, record.end_ns - record.start_ns
            )
            yield f"{stamp}  command: {record.name}, {length} [{record.probe}]"
        case MeasurementRecord():
            over = duration_text(record.end_ns - record.start_ns)
            yield f"{stamp}  counted by {record.probe} in {over}:"
            yield from _values(record.values)
        case ProbesRecord():
            active = ", ".join(p.name for p in record.probes if p.active)
            yield f"{stamp}  probes: {active or 'none at work'}"
            for probe in record.probes:
                if not probe.active:
                    remedy = f"; to get it: {probe.remedy}" if probe.remedy else ""
                    why = probe.reason or "not asked for"
                    yield f"{_INDENT}without {probe.name}: {why}{remedy}"
        case GuestFailure():
            yield f"{stamp}  GUEST FAILED ({record.status}): {record.what}"
            yield from _failure(record)
        case Violation():
            found = "" if record.found_ns is None else f": {duration_text(record.found_ns)}"
            allowed = duration_text(record.limit_ns or 0).replace(".00 ", " ")
            limit = "" if record.limit_ns is None else f", allowed {allowed}"
            yield f"{stamp}  VIOLATION: {record.what}{found}{limit}"
        case SummaryRecord():
            yield ""
            yield from summary_lines(record, width=width, unicode=unicode)


def probes_lines(probes: Sequence[ProbeState]) -> Iterator[str]:
    """What measured, in a line; why the others did not, in short, in another."""
    active = ", ".join(p.name for p in probes if p.active)
    yield f"measured by: {active or 'nobody'}"
    without = [f"{p.name} ({p.reason or 'not asked for'})" for p in probes if not p.active]
    if without:
        yield from textwrap.wrap(
            f"without {', '.join(without)}", 78, initial_indent="  ", subsequent_indent="    ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip


def summary_lines(
    summary: SummaryRecord, *, width: int = 80, unicode: bool = True, charts: bool = True
) -> Iterator[str]:
    """A table by kind and cause, and below it, with `charts`, histograms on one logarithmic axis.

    Lines are at most `width` long, down to 48 columns: the narrower, the fewer columns has the
    table, and where the histograms find no room they are left out.  `unicode` says that the output
    can show block characters.
    """
    over = duration_text(summary.end_ns - summary.start_ns)
    during = f"{count_text(summary.transitions, 'transition')} in {over}"
    if not summary.statistics:
        yield f"no stall, {during}"
        return
    yield f"{count_text(summary.stalls, 'stall')}, {during}"
    yield ""
    ordered = sorted(summary.statistics, key=lambda s: (_ORDER.get(s.kind, 99), s.kind))
    yield from _table(ordered, width)
    if charts:
        yield from _chart(ordered, width, unicode=unicode)


def histogram_lines(
    summary: SummaryRecord, *, width: int = 80, unicode: bool = True
) -> Iterator[str]:
    """For each kind, all causes together: a line for each step of length, with its count."""
    for kind in sorted({s.kind for s in summary.statistics}, key=lambda k: (_ORDER.get(k, 99), k)):
        counts = _counts(s for s in summary.statistics if s.kind == kind)
        most = max(counts.values(), default=0)
        digits = len(f"{most:,}")
        room = max(1, min(_WIDEST_BAR, width - 13 - digits))
        yield ""
        yield f"{kind_text(kind)}, from this length up to the next"
        for bound, count in counts.items():
            bar = _bar(count, most, room, unicode=unicode)
            yield f"  {_bound_text(bound):>7}  {count:>{digits},}  {bar}".rstrip()


# -- lines ---------------------------------------------------------------------------------------


def _stall(s: StallRecord) -> str:
    parts = [stall_cause_text(s.cause)]
    explained = None if s.cause is None else s.cause.explained_ns
    # what is nearly all of it says nothing
    if explained is not None and parts[0] != "unknown" and explained * 10 < s.at_least_ns * 9:
        parts[0] += f" ({duration_text(explained)} of it)"
    others = [n for n in s.during if s.cause is None or n != s.cause.ref]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        parts.append(f"during {', '.join(f'#{n}' for n in others[:3])}{more}")
    if s.thread is not None:
        parts.append(s.thread)
    if s.handoffs:
        parts.append(f"BQL handed over {count_text(s.handoffs, 'time')}")
    # of these the site is a range or an operation, of others a place in QEMU's sources
    link = ", " if s.kind in (Kind.MISSING, Kind.SLOT_UPDATE) else " at "
    where = f"{link}{s.site}" if s.site else ""
    length = bracket_text(s.at_least_ns, s.at_most_ns)
    return (
        f"stall: {kind_text(s.kind):<12} {length:>14}  {', '.join(parts)}{where} "
        f"[{', '.join(s.witnesses or [s.probe])}]"
    )


def _values(values: dict[str, int | float | str]) -> Iterator[str]:
    words = []
    for name, value in values.items():
        if isinstance(value, str):
            words.append(f"{name} {value}")
        elif value and name.endswith("_ns"):
            words.append(f"{name.removesuffix('_ns')} {duration_text(int(value))}")
        elif value:
            words.append(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}")
    if not words:
        yield f"{_INDENT}nothing"
        return
    # what belongs together stays on one line
    text = ", ".join(word.replace(" ", "\0") for word in words)
    wrapped = textwrap.wrap(
        text, 80, initial_indent=_INDENT, subsequent_indent=_INDENT,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    yield from (line.replace("\0", " ") for line in wrapped)


def _failure(f: GuestFailure) -> Iterator[str]:
    cpu = f"CPU {f.cpu}" if f.cpu is not None else "a vCPU"
    at = f" at instruction {f.ip:#x}" if f.ip is not None else ""
    if f.gpa is not None:
        yield f"{_INDENT}{cpu}{at} could not reach guest-physical {f.gpa:#x}"
    elif f.cpu is not None:
        yield f"{_INDENT}{cpu} stopped{at}"
    if f.transition is not None:
        yield (
            f"{_INDENT}that RAM had no slot during transition #{f.transition}"
            if f.proven
            else f"{_INDENT}transition #{f.transition} came before; not proven to be the reason"
        )


# -- the table -----------------------------------------------------------------------------------

_COLUMNS = ("kind", "cause", "count", "total", "p50", "p90", "p99", "max")
_DROPPED_FIRST = ("p90", "total", "p50", "p99")


def _table(ordered: Sequence[StallStatistics], width: int) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    last = None
    for s in ordered:
        times = (s.total_ns, s.p50_ns, s.p90_ns, s.p99_ns, s.max_ns)
        kind = "" if s.kind == last else kind_text(s.kind)
        rows.append((kind, s.cause, f"{s.count:,}", *map(duration_text, times)))
        last = s.kind
    widths = {name: max(len(row[i]) for row in rows) for i, name in enumerate(_COLUMNS)}
    for name in _DROPPED_FIRST:
        if sum(widths.values()) + 2 * (len(widths) - 1) <= width:
            break
        del widths[name]
    for row in rows:
        cells = []
        for name, cell in zip(_COLUMNS, row, strict=True):
            if name in widths:
                align = "<" if name in ("kind", "cause") else ">"
                cells.append(f"{cell:{align}{widths[name]}}")
        yield "  ".join(cells)


def _chart(ordered: Sequence[StallStatistics], width: int, *, unicode: bool) -> Iterator[str]:
    """A line for each kind and cause: how often each length was seen, its most frequent one as the
    full height."""
    axis = list(_counts(ordered))
    kinds = max(len(kind_text(s.kind)) for s in ordered)
    causes = max(len(s.cause) for s in ordered)
    lead = kinds + causes + 4
    step = min(_WIDEST_STEP, (width - lead) // max(1, len(axis)))
    if step < 1:
        return
    labels = ""
    for i, bound in enumerate(axis):
        text = _bound_text(bound)
        at = i * step
        if (
            _is_decade(bound)
            and (not labels or at > len(labels))
            and at + len(text) <= width - lead
        ):
            labels = f"{labels:<{at}}{text}"
    yield ""
    yield f"{'how long':<{lead}}{labels}"
    bars = _COLUMN_BARS[unicode]
    last = None
    for s in ordered:
        counts = _counts([s])
        most = max(counts.values(), default=0)
        cells = (bars[(counts[b] * len(bars) - 1) // most] if counts.get(b) else " " for b in axis)
        kind = "" if s.kind == last else kind_text(s.kind)
        row = f"{kind:<{kinds}}  {s.cause:<{causes}}  {''.join(c * step for c in cells)}"
        yield row.rstrip()
        last = s.kind


def _counts(statistics: Iterable[StallStatistics]) -> dict[int, int]:
    """How many by length, added up; the steps between the first and the last one are all there."""
    counts: Counter[int] = Counter()
    for s in statistics:
        counts.update(dict(zip(s.bounds_ns, s.histogram, strict=False)))
    first, last = min(counts, default=0), max(counts, default=0)
    counts.update(dict.fromkeys((b for b in BOUNDS_NS if first < b < last), 0))
    return dict(sorted(counts.items()))


def _bar(count: int, most: int, room: int, *, unicode: bool) -> str:
    if not count:
        return ""
    if not unicode:
        return "#" * max(1, round(count * room / most))
    eighths = max(1, round(count * room * 8 / most))
    rest = eighths % 8
    return _BARS[-1] * (eighths // 8) + (_BARS[rest - 1] if rest else "")


def _is_decade(ns: int) -> bool:
    return ns in (60 * 10**9, 600 * 10**9) or (ns <= 10**10 and str(ns).strip("0") == "1")


def _bound_text(ns: int) -> str:
    """A bound of a histogram, in the largest unit that it is a whole number of."""
    for unit, name in ((60 * 10**9, "min"), (10**9, "s"), (10**6, "ms"), (10**3, "us")):
        if ns and ns % unit == 0:
            return f"{ns // unit} {name}"
    return f"{ns} ns"


def _unit(ns: int) -> tuple[int, str]:
    for start, unit, name in _UNITS:
        # what would be rounded up to `start` counts as `start`
        if ns >= start - start // 2000:
            return unit, name
    return 1, "ns"


def _number(ns: int, unit: int, digits: int, *, up: bool | None = None) -> str:
    """`ns` in `unit` with so many digits (two for microseconds), at most two of them decimals.

    `up`: rounded up, down or (None) to the nearest.
    """
    if unit == 1:
        return str(ns)
    most = 10 ** (min(digits, 2) if unit == 1000 else digits)
    for decimals in (2, 1, 0):
        step = unit // 10**decimals
        steps = -(-ns // step) if up else ns // step if up is not None else (ns + step // 2) // step
        if steps < most:
            break
    return f"{steps / 10**decimals:.{decimals}f}"
