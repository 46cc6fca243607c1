"""A comparison of strategies as a table: per kind of stall what a round lost, and the differences.

Nothing is printed here.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from ..distribution import percentile
from ..text import count_text
from ..updates.compare import CONTROL, ORDER, Comparison
from ..updates.compare.stats import Difference, Round, Summary
from ..updates.model import Result
from .lengths import bracket_text, duration_text, kind_text, span_text
from .stalls import stall_cause_text
from .summary import probes_lines

__all__ = [
    "answer_lines",
    "comparison_answer",
    "comparison_lines",
    "comparison_tables",
    "difference_text",
]

ANSWER_LINES = 10

ENOUGH_FOR_P90 = 10
ENOUGH_FOR_P99 = 100
"""With fewer rounds the percentile is the largest value, and says nothing of its own."""


def comparison_lines(found: Comparison, what: str, *, full: bool = False) -> Iterator[str]:
    """Lines of at most 80 columns; `what` says in words what was done in each round.

    They end with the answer; the tables it comes from are there when the report is `full`.
    """
    counts = Counter(r.strategy for r in found.rounds if r.outcome is Result.DONE)
    rounds = max(counts.values(), default=0)
    window = duration_text(found.window_ns)
    each = count_text(rounds, "round")
    if len(set(counts.values())) > 1:
        each = f"up to {each}"
    yield from _folded(f"{what}: {each} each in random order (seed {found.seed}),")
    if found.window_ns:
        yield f"{window} observed from the beginning of each; {CONTROL} did nothing"
    else:
        yield f"each as long as that took; {CONTROL} is the guest as it was"
    for skipped in found.skipped:
        yield from _folded(f"{skipped.strategy} is not possible: {skipped.reason}")
        if skipped.remedy:
            yield from _folded(f"  remedy: {skipped.remedy}")
    for r in found.rounds:
        if r.outcome is not Result.DONE:
            yield from _folded(f"round {r.order} ({r.strategy}) left out: {r.outcome}: {r.reason}")
    yield from probes_lines(found.probes)
    yield from _outlasted(found)
    if found.ended_early is not None:
        yield from _folded(f"ended early: {found.ended_early}")
        if found.remedy:
            yield from _folded(f"  remedy: {found.remedy}")
    if full and counts:
        yield ""
        yield from comparison_tables(found)
    yield ""
    yield from answer_lines(comparison_answer(found))


def answer_lines(answer: Sequence[str]) -> Iterator[str]:
    """Sentences as at most ANSWER_LINES lines: the first ones, as far as there is room."""
    room = ANSWER_LINES
    for sentence in answer:
        lines = list(_folded(sentence))
        if len(lines) > room:
            return
        room -= len(lines)
        yield from lines


def comparison_tables(found: Comparison) -> Iterator[str]:
    """What a round lost by kind of stall and strategy, and the differences, of 80 columns."""
    yield from _operations(found.rounds)
    kinds = {s.kind for s in found.summary}
    yield from _measured(found, "sum of a round's stalls of a kind", kinds)
    # one stall a round is all of it
    many = {s.kind for s in found.summary if s.stalls and (s.longest_ns or 0) < (s.max_ns or 0)}
    single = msgspec.structs.replace(
        found,
        summary=[_of_longest(s) for s in found.summary],
        differences=[_of_longest_difference(d) for d in found.differences],
    )
    yield from _measured(single, "the longest stall of a round, where there were several", many)


# -- the answer --------------------------------------------------------------------------------


def comparison_answer(found: Comparison) -> list[str]:
    """What differs, by how much and how sure that is: at most ten sentences, by importance."""
    done = [r for r in found.rounds if r.outcome is Result.DONE]
    names = sorted({r.strategy for r in done if r.strategy != CONTROL}, key=_rank)
    if not names:
        return ["Nothing can be compared: no round of a strategy was completed."]
    if not found.summary:
        return [f"No stall was seen in any round, under {' or '.join(names)}."]
    told = list(_verdicts(found, names))
    fewest = count_text(min(sum(r.strategy == name for r in done) for name in names), "round")
    told.append(f"At 95 %, of {fewest} or more each; 1 of 20 such intervals misses by chance.")
    told += _worst(done, names)
    told += _against_control(found, names)
    return told[:ANSWER_LINES]


def _verdicts(found: Comparison, names: Sequence[str]) -> Iterator[str]:
    """Of each two strategies: which lost more, in what, by how much."""
    alike, few = [], []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            own = [d for d in found.differences if {d.a, d.b} == {a, b}]
            seen = [d for d in own if d.seen and d.ci95_ns is not None]
            if seen:
                yield from _pair(a, b, seen)
            elif any(d.enough for d in own):
                alike.append(f"{a} - {b}")
            else:
                few.append(f"{a} - {b}")
    if alike:
        yield f"No difference seen in any kind of stall: {', '.join(alike)}."
    if few:
        yield f"Too few rounds to tell: {', '.join(few)}."
    unsure = [
        kind_text(d.kind)
        for d in found.differences
        if {d.a, d.b} <= set(names) and d.enough and not d.seen and _is_open(d)
    ]
    if unsure:
        kinds = ", ".join(dict.fromkeys(unsure))
        yield f"Bounds are too wide to compare everywhere: {kinds}."


def _pair(a: str, b: str, seen: Sequence[Difference]) -> Iterator[str]:
    more: dict[str, list[tuple[int, int, str]]] = {a: [], b: []}
    for d in seen:
        low, high = d.ci95_ns or (0, 0)
        if low < 0:
            more[d.b].append((-high, -low, d.kind))
        else:
            more[d.a].append((low, high, d.kind))
    for worse, better in ((a, b), (b, a)):
        if not more[worse]:
            continue
        low, high, kind = max(more[worse])
        also = len(more[worse]) - 1
        others = f", and more in {count_text(also, 'other kind')}" if also else ""
        yield (
            f"{worse} lost more than {better}: {kind_text(kind)}, by {bracket_text(low, high)} a "
            f"round{others}."
        )


def _worst(done: Sequence[Round], names: Sequence[str]) -> list[str]:
    """The longest stall under each strategy, and what made it, the longest first; as in the
    tables, of rounds that measured its kind."""
    told = []
    for name in names:
        own = [r for r in done if r.strategy == name]
        stalls = [s for r in own for s in r.stalls if s.kind in r.measured]
        if not stalls:
            told.append((0, 0, f"Under {name} no stall was seen."))
            continue
        s = max(stalls, key=lambda s: (s.at_least_ns, s.at_most_ns))
        length = bracket_text(s.at_least_ns, s.at_most_ns)
        cause = stall_cause_text(s.cause)
        text = f"Longest stall under {name}: {kind_text(s.kind)}, {length}, cause {cause}."
        told.append((s.at_least_ns, s.at_most_ns, text))
    return [text for _, _, text in sorted(told, key=lambda x: x[:2], reverse=True)]


def _against_control(found: Comparison, names: Sequence[str]) -> Iterator[str]:
    """Strategies that cost no more than the guest loses anyway, as far as was seen."""
    alike = [
        name
        for name in names
        for own in [[d for d in found.differences if {d.a, d.b} == {name, CONTROL}]]
        if any(d.enough for d in own) and not any(d.seen for d in own)
    ]
    if alike:
        yield f"Not told apart from {CONTROL}, in which nothing is done: {', '.join(alike)}."


def _of_longest(s: Summary) -> Summary:
    return msgspec.structs.replace(
        s,
        p50_ns=s.longest_p50_ns,
        p90_ns=s.longest_p90_ns,
        p99_ns=s.longest_p99_ns,
        max_ns=s.longest_ns,
        p50_min_ns=s.longest_p50_min_ns,
        p90_min_ns=s.longest_p90_min_ns,
        p99_min_ns=s.longest_p99_min_ns,
        max_min_ns=s.longest_min_ns,
    )


def _of_longest_difference(d: Difference) -> Difference:
    return msgspec.structs.replace(
        d, median_diff_ns=d.longest_diff_ns, ci95_ns=d.longest_ci95_ns, seen=d.longest_seen,
        diff_bounds_ns=d.longest_diff_bounds_ns,
    )  # fmt: skip


def _measured(found: Comparison, title: str, kinds: AbstractSet[str]) -> Iterator[str]:
    """The table of these kinds, and the differences."""
    rows = sorted(
        (s for s in found.summary if s.kind in kinds), key=lambda s: (s.kind, _rank(s.strategy))
    )
    if not rows:
        return
    yield ""
    yield title
    yield ""
    columns = "".join(f"{name:>12}" for name in ("p50", "p90", "p99", "max"))
    yield f"{'kind':<13}{'strategy':<9}{columns}{'stalls':>9}"
    last = None
    for row in rows:
        yield _row(row, show_kind=row.kind != last)
        last = row.kind
    yield from _missing(rows)
    nothing = {(s.strategy, s.kind) for s in rows if s.max_ns == 0}
    told = [
        d
        for d in found.differences
        if d.kind in kinds and not {(d.a, d.kind), (d.b, d.kind)} <= nothing
    ]
    if not told:
        return
    yield ""
    yield "differences of the medians, with the interval that holds them at 95 %"
    if any(d.enough for d in told):
        yield "(of 20 such intervals, one misses by chance)"
    yield ""
    yield from _differences(told)


def _folded(text: str) -> Iterator[str]:
    """At most 80 columns; what goes on is indented."""
    indent = " " * (len(text) - len(text.lstrip()))
    yield from textwrap.wrap(
        text, 80, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False
    )


def _outlasted(found: Comparison) -> Iterator[str]:
    """Updates that went on when stalls were no longer counted."""
    done = [r for r in found.rounds if r.outcome is Result.DONE]
    for name in sorted({r.strategy for r in done}, key=_rank):
        own = [r.took_ns for r in done if r.strategy == name]
        late = sum(took > found.window_ns for took in own)
        if late and found.window_ns:
            of = count_text(len(own), "round")
            yield from _folded(
                f"{name} took longer than the window in {late} of {of} (up to "
                f"{duration_text(max(own))}): later stalls are missing here, use a longer --window"
            )


def _rank(strategy: str) -> int:
    return ORDER.index(strategy)


def _operations(rounds: Sequence[Round]) -> Iterator[str]:
    yield f"{'strategy':<10}{'rounds':>7}{'slot operations':>17}{'slots':>7}{'transitions':>13}"
    names = sorted({r.strategy for r in rounds}, key=_rank)
    for name in names:
        own = [r for r in rounds if r.strategy == name and r.outcome is Result.DONE]
        if not own:
            continue
        ops, slots, changes = (
            percentile([getattr(r, key) for r in own], 50)
            for key in ("slot_ops", "slots", "transitions")
        )
        yield f"{name:<10}{len(own):>7}{ops:>17}{slots:>7}{changes:>13}"


def _missing(rows: Sequence[Summary]) -> Iterator[str]:
    """Rounds that say nothing of a kind, because it was not measured."""
    for kind in dict.fromkeys(row.kind for row in rows):
        each = [
            f"{row.strategy} {row.missing} of {row.n + row.missing}"
            for row in rows
            if row.kind == kind and row.missing
        ]
        if each:
            yield from _folded(
                f"{kind_text(kind)} was not measured throughout, and is missing: "
                f"{', '.join(each)} rounds"
            )


def _row(s: Summary, *, show_kind: bool) -> str:
    kind = kind_text(s.kind) if show_kind else ""
    if not s.n:
        return f"{kind:<13}{s.strategy:<9}{'not measured':>12}"
    cells = [
        span_text(s.p50_min_ns, s.p50_ns),
        span_text(s.p90_min_ns, s.p90_ns) if s.n >= ENOUGH_FOR_P90 else "-",
        span_text(s.p99_min_ns, s.p99_ns) if s.n >= ENOUGH_FOR_P99 else "-",
        span_text(s.max_min_ns, s.max_ns),
    ]
    columns = "".join(f"{cell:>12}" for cell in cells)
    return f"{kind:<13}{s.strategy:<9}{columns}{s.stalls:>9,}"


def _differences(found: Sequence[Difference]) -> Iterator[str]:
    """A line each; those in which nothing was seen are one line together."""
    alike: dict[str, list[str]] = {}
    for d in sorted(found, key=lambda d: (d.kind, _rank(d.a), _rank(d.b))):
        if d.ci95_ns is not None and d.enough and not d.seen and not _is_open(d):
            alike.setdefault(kind_text(d.kind), []).append(f"{d.a} - {d.b}")
            continue
        pair = f"{kind_text(d.kind):<13}{d.a} - {d.b}"
        yield f"{pair:<32}{difference_text(d)}"
    if alike:
        each = "; ".join(f"{kind}: {', '.join(pairs)}" for kind, pairs in alike.items())
        yield from _folded(f"no difference seen in {each}")


def difference_text(d: Difference) -> str:
    """The difference and its interval, or why there is none."""
    if d.ci95_ns is None:
        return "not measured"
    if not d.enough:
        return "too few rounds"
    if not d.seen and _is_open(d):
        return f"bounds leave it open ({_interval(d.ci95_ns)})"
    if not d.seen:
        return f"no difference seen ({_interval(d.ci95_ns)})"
    return f"{_estimate(d):>10}  ({_interval(d.ci95_ns)})"


def _is_open(d: Difference) -> bool:
    """The lengths are not known well enough, however many rounds there are."""
    low, high = d.diff_bounds_ns or (0, 0)
    return low < 0 < high


def _estimate(d: Difference) -> str:
    """The difference itself where the bounds of what was measured leave one."""
    diff, (low, high) = d.median_diff_ns or 0, d.diff_bounds_ns or (0, 0)
    return _signed(diff) if (high - low) * 10 <= abs(diff) else ""


def _interval(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return _signed(low) if low == high else f"{_signed(low)} to {_signed(high)}"


def _signed(ns: int) -> str:
    sign = "-" if ns < 0 else "+" if ns else ""
    return f"{sign}{duration_text(abs(ns))}"
