"""What races and replays on the lab found, as tables of at most 80 columns.  Nothing is printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..kvmlab.measuring import Totals
from ..kvmlab.programs import GuestKind
from ..kvmlab.race import RaceReport, StrategyResult
from ..kvmlab.replay.run import ReplayReport
from ..kvmlab.strategies import CONTROL
from ..text import count_text
from .compare import answer_lines
from .lengths import duration_text
from .terminal import size_text

__all__ = [
    "Table",
    "race_answer",
    "race_lines",
    "race_tables",
    "replay_answer",
    "replay_lines",
    "strategy_lines",
]

_WIDTH = 80


def race_lines(report: RaceReport, *, full: bool = False) -> Iterator[str]:
    """What was raced, with the tables when it is `full`, and the answer."""
    o = report.options
    layout = o.layout()
    low, _ = layout.hole
    yield from textwrap.wrap(
        f"{count_text(o.updates, 'punch or fill', 'punches and fills')} of a hole of "
        f"{size_text(o.hole_size)} at {low:#x}, in a slot of {size_text(o.slot_size)}"
        f"{', dirty logging on' if layout.logged else ''}; {count_text(o.vcpus, 'vCPU')}, "
        f"guest {o.guest.value}; {report.host['kvm']} KVM of Linux {report.host['kernel']}",
        _WIDTH,
    )
    if report.ram_lost:
        yield from textwrap.wrap(
            f"a slot is whole pages, so the hole takes {size_text(report.ram_lost)} of RAM more "
            "than it has",
            _WIDTH,
        )
    if full:
        yield ""
        yield from race_tables(report)
    yield ""
    yield from answer_lines(race_answer(report))


def race_tables(report: RaceReport) -> Iterator[str]:
    """What the guest met, how long things took, what did not run."""
    layout = report.options.layout()
    ran = [r for r in report.results if r.skipped is None]
    yield from _met(ran, logged=layout.logged, touched=report.options.touch_hole)
    yield ""
    yield from _times([(r.name, r.totals) for r in ran])
    yield from _skipped([(r.name, r.skipped) for r in report.results if r.skipped])


def race_answer(report: RaceReport) -> list[str]:
    """Which strategies hid RAM that stays, which killed, and how long the guest waited."""
    found = [(r.name, r.skipped, r.totals) for r in report.results]
    looks = report.options.guest is not GuestKind.GAP
    return list(_answer(found, "updates", same=True, looks=looks))


def replay_answer(report: ReplayReport) -> list[str]:
    """The same of a replay, and where KVM answered otherwise than recorded."""
    told = []
    differ = {r.name: sum(t.return_mismatches for t in r.transitions) for r in report.results}
    if any(differ.values()):
        each = ", ".join(f"{name} {n:,}" for name, n in differ.items() if n)
        told.append(f"Operations that KVM answered otherwise than recorded: {each}.")
    found = [(r.name, r.skipped, r.totals) for r in report.results]
    return [*told, *_answer(found, "transitions", same=False)]


def _answer(
    found: Sequence[tuple[str, str | None, Totals]], unit: str, *, same: bool, looks: bool = True
) -> Iterator[str]:
    """`same`: all of them were the same change, so that what was never seen has a bound; `looks`:
    the guest would have found RAM missing."""
    ran = [(name, t) for name, skipped, t in found if skipped is None and name != CONTROL]
    if not ran:
        yield "No strategy could run here."
    died = [(name, t.internal_errors + t.shutdowns, t.updates) for name, t in ran]
    if any(deaths for _, deaths, _ in died):
        each = ", ".join(f"{name} ({n:,} of {of:,})" for name, n, of in died if n)
        yield f"The guest died of missing RAM under {each}."
    if any(t.hit for _, t in ran):
        each = ", ".join(f"{name} {t.hit:,} of {t.updates:,}" for name, t in ran if t.hit)
        yield f"{unit.capitalize()} in which it did not find RAM that stays: {each}."
    safe = [(name, t) for name, t in ran if not t.hit and t.updates]
    if safe:
        updates = min(t.updates for _, t in safe)
        if looks:
            yield f"RAM was never seen missing under {', '.join(name for name, _ in safe)}."
        else:
            yield "The guest touched nothing of the slot: whether RAM was missing is not known."
        if same and looks:
            yield (
                f"That is 0 of {updates:,} {unit}: at 95 %, at most {300 / updates:.2g} % of them "
                "are hit (rule of three)."
            )
        quickest = sorted(safe, key=lambda r: r[1].guest_gap.p50_ns)[:4]
        each = ", ".join(f"{name} {_gap(t)}" for name, t in quickest)
        yield f"Median of the guest's longest gap, of those: {each}."
    for name, skipped, t in found:
        if name == CONTROL and skipped is None:
            yield f"The control, which changes nothing: {_gap(t)}."
    lost = [name for name, t in ran if t.pages_lost]
    if lost:
        yield f"Pages that were written are in no dirty log under {', '.join(lost)}."
    left = [name for name, skipped, _ in found if skipped is not None]
    if left:
        yield f"Not run here: {', '.join(left)}."


def _gap(t: Totals) -> str:
    return f"{duration_text(t.guest_gap.p50_ns)} (longest {duration_text(t.guest_gap.max_ns)})"


def _met(ran: Sequence[StrategyResult], *, logged: bool, touched: bool) -> Iterator[str]:
    columns = ["strategy", "hit", "of", "spurious", "died"]
    columns += ["hole"] * touched + ["dirty", "lost"] * logged + ["ids", "bitmap"]
    rows = []
    for r in ran:
        t = r.totals
        row = [r.name, f"{t.hit:,}", f"{t.updates:,}", f"{t.spurious:,}"]
        row.append(f"{t.internal_errors + t.shutdowns:,}")
        row += [f"{t.hole:,}"] * touched
        row += [f"{t.pages_changed:,}", f"{t.pages_lost:,}"] * logged
        row += ["changed" if t.ids_changed else "kept", "kept" if r.bitmap_kept else "lost"]
        rows.append(tuple(row))
    title = (
        "hit: updates in which the guest did not find RAM that should have been there; spurious "
        "exits, deaths"
        f"{'; exits at the hole' if touched else ''}"
        f"{'; pages that it wrote, and those of them in no dirty log' if logged else ''}; slot ids "
        "and dirty bitmaps of RAM that stays"
    )
    yield from Table(title, tuple(columns), tuple(rows)).lines()


def _times(found: Sequence[tuple[str, Totals]]) -> Iterator[str]:
    rows = []
    for name, t in found:
        gap = t.guest_gap
        numbers = [gap.p50_ns, gap.p90_ns, gap.p99_ns, gap.max_ns]
        numbers += (t.update.p50_ns, t.ioctl.p50_ns, t.missing.p50_ns, t.vcpu_stall.p50_ns)
        rows.append((name, *map(_us, numbers)))
    columns = ("strategy", "gap p50", "p90", "p99", "max", "update", "calls", "missing", "stall")
    yield from Table(
        "us: the guest's longest gap in an update; then medians of the update, its system calls, "
        "how long RAM was missing at most, how long vCPUs were kept out",
        columns,
        tuple(rows),
    ).lines()


def _us(ns: int) -> str:
    """In us, or what is long in ms: columns stay narrow."""
    return f"{ns / 1000:,.0f}" if ns < 10_000_000 else f"{ns / 1_000_000:.0f}ms"


def _skipped(found: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not found:
        return
    yield ""
    yield "not run:"
    for name, why in found:
        yield from textwrap.wrap(
            f"{name}: {why}", _WIDTH, initial_indent="  ", subsequent_indent="    "
        )


def replay_lines(report: ReplayReport, *, full: bool = False) -> Iterator[str]:
    """What was replayed, with the tables when it is `full`, and the answer."""
    of = f" of QEMU {report.qemu_version}" if report.qemu_version else ""
    yield from textwrap.wrap(
        f"{report.kind} {report.source}{of}, on {report.host['kvm']} KVM of Linux "
        f"{report.host['kernel']}, {count_text(report.options.vcpus, 'vCPU')}",
        _WIDTH,
        break_on_hyphens=False,
    )
    for note in report.notes:
        yield from textwrap.wrap(f"note: {note}", _WIDTH, subsequent_indent="  ")
    if full:
        yield ""
        yield from _replay_tables(report)
    yield ""
    yield from answer_lines(replay_answer(report))


def _replay_tables(report: ReplayReport) -> Iterator[str]:
    """What the guest met, how long things took, what did not run."""
    ran = [r for r in report.results if r.skipped is None]
    rows = []
    for r in ran:
        t = r.totals
        rows.append(
            (
                r.name,
                f"{t.hit:,}",
                f"{t.updates:,}",
                f"{sum(x.ops for x in r.transitions):,}",
                f"{sum(x.return_mismatches for x in r.transitions):,}",
                f"{t.spurious:,}",
                f"{t.internal_errors + t.shutdowns:,}",
            )
        )
    yield from Table(
        "hit: transitions in which the guest did not find RAM that should have been there; "
        "operations, and those with another return code than recorded; spurious exits, deaths of "
        "the guest",
        ("strategy", "hit", "of", "operations", "differ", "spurious", "died"),
        tuple(rows),
    ).lines()
    yield ""
    yield from _times([(r.name, r.totals) for r in ran])
    yield from _skipped([(r.name, r.skipped) for r in report.results if r.skipped])


def strategy_lines(found: Sequence[tuple[str, str, str | None]]) -> Iterator[str]:
    """Name, what it stands for, and why it does not run here or None."""
    for name, fidelity, why_not in found:
        yield name if why_not is None else f"{name} (not here)"
        yield from _indented(fidelity)
        if why_not is not None:
            yield from _indented(why_not)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the names of columns, and rows of as many cells; the first `words` of each are
    words or labels, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1

    def lines(self) -> Iterator[str]:
        """The title, an empty line, and columns under their names."""
        yield from textwrap.wrap(self.title, 80, break_on_hyphens=False)
        yield ""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        for row in (self.columns, *self.rows):
            cells = [
                cell.ljust(width) if i < self.words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            yield "  ".join(cells).rstrip()
