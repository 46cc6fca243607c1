"""Pages: of a recording, of a comparison, of a race in the lab."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..kvmlab.measuring import Totals
from ..kvmlab.race import RaceReport
from ..records import ProbeState, StallStatistics
from ..reports.compare import comparison_answer, comparison_tables, difference_text
from ..reports.lab import race_answer, race_tables
from ..reports.lengths import KIND_ORDER, bracket_text, duration_text, kind_text, span_text
from ..reports.recording import Contents
from ..reports.stalls import stall_cause_text
from ..updates.compare import Comparison
from ..updates.model import Result
from .charts import Bar, bars, histograms, strip
from .lanes import Lanes
from .markup import Html, page, shown, tag
from .words import guest_text, limits, recording_words

__all__ = ["comparison_page", "race_page", "recording_page"]

_PICTURED = 12
_MEDIANS = "Filled: the median. Outlined: up to the longest of all updates."


def recording_page(contents: Contents, lanes: Lanes) -> str:
    """`lanes` took every record that `contents` counted."""
    header, summary = contents.recording.header, contents.summary()
    ordered = sorted(summary.statistics, key=lambda s: (KIND_ORDER.get(s.kind, 99), s.kind))
    worst = sorted(ordered, key=lambda s: (s.max_min_ns or 0, s.max_ns), reverse=True)
    picture = [_longest(s) for s in worst[:_PICTURED]]
    timeline, values = _timeline(lanes, contents.end_ns)
    body = [
        *_first("Memory map of " + guest_text(header), recording_words(contents, lanes)),
        bars(picture, "The longest stall of each kind and cause.") if picture else "",
        *timeline,
        *_section("Longest stalls", _longest_table(contents)),
        *_section("How long stalls were", *histograms(ordered)),
        *_section("Statistics", _statistics(ordered)),
        *_section("Probes", _probes(list(contents.tally.probes.values()))),
        *_section("Limits of this measurement", _list(limits(contents, lanes))),
        *_section("Environment", _environment(contents)),
    ]
    return page(f"{guest_text(header)}: memory map and stalls", body, values)


def comparison_page(found: Comparison, what: str | None) -> str:
    """`what` was done in each round, where that is known."""
    done = [r for r in found.rounds if r.outcome is Result.DONE]
    start = min((r.start_ns for r in found.rounds), default=0)
    lanes = Lanes(start)
    end = start
    for r in found.rounds:
        lanes.take_round(r, found.window_ns)
        end = max(end, r.start_ns + (found.window_ns or r.took_ns), *(s.end_ns for s in r.stalls))
    timeline, values = _timeline(lanes, end)
    kinds = list(dict.fromkeys(s.kind for s in found.summary))
    pictures = [
        bars(
            [
                Bar(
                    s.strategy,
                    s.longest_min_ns,
                    s.longest_ns,
                    _measured(s.n, s.longest_min_ns, s.longest_ns),
                )
                for s in found.summary
                if s.kind == kind
            ],
            f"{kind_text(kind)}: the longest of all rounds.",
        )
        for kind in sorted(kinds, key=lambda k: _weight(found, k), reverse=True)
    ]
    title = f"Strategies compared{f': {what}' if what else ''}"
    body = [
        *_first(title, comparison_answer(found)),
        *pictures[:1],
        *(_section("By kind of stall", *pictures[1:]) if pictures[1:] else []),
        *_section("Differences", _differences(found)),
        *_section("Tables", _pre(comparison_tables(found))),
        *timeline,
        *_section("Strategies that did not run", _list(
            f"{s.strategy}: {s.reason}{f' Remedy: {s.remedy}.' if s.remedy else ''}"
            for s in found.skipped)) * bool(found.skipped),
        *_section("Probes", _probes(found.probes)),
        *_section("Limits of this measurement", _list(_comparison_limits(found, len(done)))),
    ]  # fmt: skip
    return page(title, body, values)


def race_page(report: RaceReport) -> str:
    """A race of strategies on a VM of the lab."""
    ran = [r for r in report.results if r.skipped is None]
    picture = [
        Bar(r.name, t.guest_gap.p50_ns, t.guest_gap.max_ns, _gap(t))
        for r in ran
        for t in [r.totals]
    ]
    host = report.host
    facts = [(str(k), str(v)) for k, v in host.items() if not isinstance(v, dict)]
    options = [
        (name.replace("_", " "), ", ".join(v) if isinstance(v, tuple) else str(v))
        for name in report.options.__struct_fields__
        for v in [getattr(report.options, name)]
    ]
    title = "Strategies raced in the lab"
    body = [
        *_first(title, race_answer(report)),
        bars(picture, "The guest's gap in an update.", _MEDIANS) if picture else "",
        *_section("Tables", _pre(race_tables(report))),
        *_section("What the strategies stand for", _list(
            f"{r.name}: {r.fidelity}{f' Not run: {r.skipped}.' if r.skipped else ''}"
            for r in report.results)),
        *_section("Environment", _table(("fact", "value"), facts)),
        *_section("Options", _table(("option", "value"), options)),
    ]  # fmt: skip
    return page(title, body, {})


def _weight(found: Comparison, kind: str) -> tuple[int, int]:
    """What tells strategies apart comes first, by how much; then what is longest for certain."""
    seen = [d.ci95_ns for d in found.differences if d.kind == kind and d.seen and d.ci95_ns]
    certain = max((min(abs(low), abs(high)) for low, high in seen), default=0)
    return certain, max((s.longest_min_ns or 0 for s in found.summary if s.kind == kind), default=0)


# -- parts -------------------------------------------------------------------------------------


def _first(title: str, words: Iterable[str]) -> Iterator[Html]:
    yield tag("h1", shown(title))
    yield tag("ul", (tag("li", shown(line)) for line in words), class_="words")


def _section(title: str, *parts: str) -> list[Html]:
    return [tag("section", tag("h2", title), *parts)]


def _list(lines: Iterable[str]) -> Html:
    return tag("ul", (tag("li", shown(line)) for line in lines))


def _pre(lines: Iterable[str]) -> Html:
    return tag("div", tag("pre", Html("\n".join(tag("span", line) for line in lines))),
               class_="wide", tabindex=0)  # fmt: skip


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    head = tag("tr", (tag("th", name, scope="col") for name in columns))
    lines = [tag("tr", (tag("td", shown(cell)) for cell in row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", lines)),
               class_="wide", tabindex=0)  # fmt: skip


def _timeline(lanes: Lanes, end_ns: int) -> tuple[list[Html], dict[str, object]]:
    """The section with a canvas, with strips for those without a script, and what is drawn."""
    names: dict[str, int] = {}
    groups, static = [], []
    for name, what, found in lanes.groups(end_ns):
        rows = []
        for lane in found:
            drawn = [
                (
                    d.start - lanes.start_ns,
                    d.end - lanes.start_ns,
                    d.least,
                    d.most,
                    d.alike,
                    names.setdefault(shown(d.about()) if d.about else "", len(names)),
                )
                for d in lane.drawn()
            ]
            rows.append(
                {"name": lane.name, "count": lane.count, "bin": lane.bin_ns, "items": drawn}
            )
        groups.append({"name": name, "what": what, "lanes": rows})
        static.append(tag("h3", f"{name}: {what}"))
        static += [strip(lane, lanes.start_ns, end_ns) for lane in found]
    values = {
        "length": max(1, end_ns - lanes.start_ns),
        "groups": groups,
        "names": list(names),
    }
    if not groups:
        return [], values
    lasted = duration_text(max(0, end_ns - lanes.start_ns))
    binned = "Where many things begin close together the longest is drawn, with their count."
    how = (
        "Filled: at least so long. Outlined: possibly so long. The thin line with end marks: where "
        f"it lies. {binned}"
    )
    keys = (
        "Drag to move. Ctrl and wheel, or + and -, to zoom. With the keyboard: left and right, "
        "Home for all, up and down for the lane, n and p for what comes next and before."
    )
    buttons = tag(
        "div",
        (
            tag("button", text, type="button", data_do=do)
            for text, do in (
                ("Zoom in", "in"), ("Zoom out", "out"), ("Earlier", "left"), ("Later", "right"),
                ("Whole", "all"), ("Previous", "p"), ("Next", "n"),
            )
        ),
        class_="buttons",
    )  # fmt: skip
    drawn_by_script = tag(
        "div",
        tag("p", keys, class_="note"),
        buttons,
        tag("canvas", "", id="time", tabindex=0, role="application", aria_label="Timeline"),
        tag("p", "", id="about", role="status"),
        tag("div", "", id="hover", hidden=True),
        id="live",
        hidden=True,
    )
    section = _section(
        "Over time",
        tag("p", f"{lasted} from left to right. {how}", class_="note"),
        drawn_by_script,
        tag("div", static, id="static"),
    )
    return section, values


def _longest(s: StallStatistics) -> Bar:
    name = f"{kind_text(s.kind)}, {s.cause.replace('_', ' ')}"
    return Bar(name, s.max_min_ns, s.max_ns, span_text(s.max_min_ns, s.max_ns))


def _measured(n: int, low: int | None, high: int | None) -> str:
    if not n:
        return "not measured"
    return "none seen" if not high else span_text(low, high)


def _gap(t: Totals) -> str:
    return f"{duration_text(t.guest_gap.max_ns)}, hit {t.hit:,} of {t.updates:,}"


def _longest_table(contents: Contents) -> Html:
    if not contents.longest:
        return tag("p", "There is none.")
    start = contents.recording.header.monotonic_ns
    rows = [
        (
            f"{(s.start_ns - start) / 1e9:.6f} s",
            kind_text(s.kind),
            bracket_text(s.at_least_ns, s.at_most_ns),
            stall_cause_text(s.cause),
            s.thread or "not known",
            s.site or "",
            ", ".join(s.witnesses or [s.probe]),
        )
        for s in contents.longest
    ]
    return _table(("at", "kind", "how long", "cause", "thread", "where", "seen by"), rows)


def _statistics(found: Sequence[StallStatistics]) -> Html:
    if not found:
        return tag("p", "There is none.")
    rows = [
        (
            kind_text(s.kind),
            s.cause.replace("_", " "),
            f"{s.count:,}",
            span_text(s.total_min_ns, s.total_ns),
            span_text(s.p50_min_ns, s.p50_ns),
            span_text(s.p90_min_ns, s.p90_ns),
            span_text(s.p99_min_ns, s.p99_ns),
            span_text(s.max_min_ns, s.max_ns),
        )
        for s in found
    ]
    return _table(("kind", "cause", "stalls", "total", "p50", "p90", "p99", "max"), rows)


def _probes(found: Sequence[ProbeState]) -> Html:
    if not found:
        return tag("p", "No probe is named: stalls were not measured.")
    rows = [
        (
            p.name,
            "active" if p.active else f"off: {p.reason or 'not requested'}",
            ", ".join(map(kind_text, p.measures)),
            duration_text(p.resolution_ns) if p.active else "",
            p.cost if p.active else (f"to get it: {p.remedy}" if p.remedy else ""),
        )
        for p in found
    ]
    return _table(("probe", "state", "measures", "resolution", "cost or remedy"), rows)


def _environment(contents: Contents) -> Html:
    header = contents.recording.header
    facts = [
        (name.replace("_", " "), "not known" if value is None else str(value))
        for name in header.__struct_fields__
        if name != "schema"
        for value in [getattr(header, name)]
    ]
    return _table(("fact", "value"), facts)


def _differences(found: Comparison) -> Html:
    if not found.differences:
        return tag("p", "There is nothing to compare.")
    rows = [(kind_text(d.kind), f"{d.a} - {d.b}", difference_text(d)) for d in found.differences]
    note = "Of the medians of what a round lost; in brackets the interval that holds it at 95 %."
    return tag("div", tag("p", note, class_="note"), _table(("kind", "pair", "difference"), rows))


def _comparison_limits(found: Comparison, done: int) -> Iterator[str]:
    yield f"{done:,} rounds counted, {len(found.rounds) - done:,} were left out."
    if found.window_ns:
        yield f"Each was observed for {duration_text(found.window_ns)}; later stalls are not here."
    yield f"The order of rounds was random (seed {found.seed})."
    yield "Of 20 intervals of 95 % one misses by chance."
    for s in found.summary:
        if s.missing:
            yield (
                f"{kind_text(s.kind)} under {s.strategy} was not measured in {s.missing:,} of "
                f"{s.n + s.missing:,} rounds."
            )
    if found.ended_early:
        yield f"It ended early: {found.ended_early}."
