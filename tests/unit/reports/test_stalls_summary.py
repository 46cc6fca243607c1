"""The summary in a terminal: fits, aligns, tells what the statistics say."""

from __future__ import annotations

import math
import random
import re

import msgspec
import pytest

from qmp_memlistener.probes import StallKind
from qmp_memlistener.records import ProbeState, StallCauseType, StallStatistics, SummaryRecord
from qmp_memlistener.reports.lengths import kind_text
from qmp_memlistener.reports.stalls import measured_lines
from qmp_memlistener.reports.summary import histogram_lines, summary_lines
from qmp_memlistener.timeline.summary import BOUNDS_NS, Statistics

WIDTHS = (48, 60, 72, 80, 100, 132, 200)


def summary(statistics: Statistics) -> SummaryRecord:
    return statistics.summary(start_ns=0, end_ns=60_200_000_000, transitions=200)


@pytest.fixture(scope="module")
def everything() -> SummaryRecord:
    """Every kind with every cause, from nanoseconds to ten minutes, and many of some."""
    rng = random.Random(1)
    statistics = Statistics()
    for kind in StallKind:
        for cause in StallCauseType:
            for _ in range(rng.choice((1, 20, 3000))):
                statistics.add(kind, cause, int(math.exp(rng.uniform(3, 27))))
    statistics.add(StallKind.COMMIT, StallCauseType.UNKNOWN, 0)
    return summary(statistics)


@pytest.fixture
def usual() -> SummaryRecord:
    statistics = Statistics()
    for kind, cause, lengths in (
        (StallKind.VCPU_GAP, StallCauseType.TRANSITION, [110_000, 250_000, 260_000, 900_000]),
        (StallKind.MAIN_LOOP, StallCauseType.UNKNOWN, [3_000_000]),
        (StallKind.MAIN_LOOP, StallCauseType.COMMAND, [284_000_000]),
    ):
        for length in lengths:
            statistics.add(kind, cause, length)
    return summary(statistics)


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits(
    everything: SummaryRecord, usual: SummaryRecord, width: int, unicode: bool
) -> None:
    for record in (everything, usual):
        for lines in (summary_lines, histogram_lines):
            text = list(lines(record, width=width, unicode=unicode))
            assert max(map(len, text)) <= width
            assert all(line == line.rstrip() for line in text)
            assert unicode or "\n".join(text).isascii()


def test_what_it_looks_like(usual: SummaryRecord) -> None:
    assert list(summary_lines(usual)) == [
        "6 stalls, 200 transitions in 60.2 s",
        "",
        "kind       cause       count    total      p50      p90      p99      max",
        "main loop  command         1   284 ms   284 ms   284 ms   284 ms   284 ms",
        "           unknown         1  3.00 ms  3.00 ms  3.00 ms  3.00 ms  3.00 ms",
        "vCPU gap   transition      4  1.52 ms  0.25 ms  0.90 ms  0.90 ms  0.90 ms",
        "",
        "how long               100 us      1 ms        10 ms       100 ms",
        "main loop  command                                             ████",
        "           unknown                     ████",
        "vCPU gap   transition  ▄▄▄▄████▄▄▄▄",
    ]


def test_as_a_record_among_others_it_stands_apart(usual: SummaryRecord) -> None:
    assert list(measured_lines(usual, "stamp")) == ["", *summary_lines(usual)]
    narrow = measured_lines(usual, "stamp", width=60, unicode=False)
    assert list(narrow) == ["", *summary_lines(usual, width=60, unicode=False)]


def test_what_it_looks_like_without_block_characters(usual: SummaryRecord) -> None:
    assert list(summary_lines(usual, unicode=False, width=60))[-4:] == [
        "how long               100 us   1 ms     10 ms    100 ms",
        "main loop  command                                   999",
        "           unknown                 999",
        "vCPU gap   transition  555999555",
    ]


def test_the_histogram_with_its_counts(usual: SummaryRecord) -> None:
    assert list(histogram_lines(usual, width=40))[-5:] == [
        "",
        "vCPU gap, from this length up to the next",
        "   100 us  1  █████████████",
        "   200 us  2  ██████████████████████████",
        "   500 us  1  █████████████",
    ]


def test_kinds_come_in_their_order_and_each_has_a_histogram(everything: SummaryRecord) -> None:
    titles = [kind_text(kind) for kind in StallKind]
    text = "\n".join(summary_lines(everything, width=100))
    assert re.findall(rf"^({'|'.join(titles)})  ", text, re.MULTILINE) == titles * 2
    text = "\n".join(histogram_lines(everything))
    assert re.findall(r"^(.*), from this", text, re.MULTILINE) == titles


def test_counts_add_up_and_gaps_are_shown(everything: SummaryRecord) -> None:
    counts = [
        int(m[1].replace(",", ""))
        for line in histogram_lines(everything)
        if (m := re.match(r" +\d+ (?:ns|us|ms|s|min)  +([\d,]+)", line))
    ]
    assert sum(counts) == everything.stalls
    statistics = Statistics()
    statistics.add(StallKind.COMMIT, StallCauseType.UNKNOWN, 1_500)
    statistics.add(StallKind.COMMIT, StallCauseType.AGENT, 15_000_000)
    steps = [line.split()[:3] for line in histogram_lines(summary(statistics))][2:]
    assert [s[2] for s in steps] == ["1", *["0"] * 11, "1"]
    assert len(steps) == len([b for b in BOUNDS_NS if 1_000 <= b <= 10_000_000])


def test_one_stall_is_seen_beside_many() -> None:
    statistics = Statistics()
    for _ in range(100_000):
        statistics.add(StallKind.COMMIT, StallCauseType.UNKNOWN, 1_500)
    statistics.add(StallKind.COMMIT, StallCauseType.UNKNOWN, 3_000)
    for unicode, bar in ((True, "▏"), (False, "#")):
        last = list(histogram_lines(summary(statistics), unicode=unicode))[-1]
        assert last.split() == ["2", "us", "1", bar]
    assert list(summary_lines(summary(statistics)))[-1].endswith("████▁▁▁▁")


def test_nothing_was_seen() -> None:
    assert list(summary_lines(summary(Statistics()))) == ["no stall, 200 transitions in 60.2 s"]
    assert list(histogram_lines(summary(Statistics()))) == []


def test_no_stall_and_nobody_who_measured_are_told_apart() -> None:
    ping = ProbeState("ping", [StallKind.MAIN_LOOP], True, None, None, 0, "-")
    counters = ProbeState("kvmstats", [], True, None, None, 0, "-")
    reason = "no free monitor is left, and this is said at some length " * 2
    none = ProbeState("ping", [StallKind.MAIN_LOOP], False, reason, None, 0, "-")
    calm = msgspec.structs.replace(summary(Statistics()), probes=[ping, counters])
    assert list(summary_lines(calm)) == [
        "no stall, 200 transitions in 60.2 s",
        "measured by: ping, kvmstats",
    ]
    blind = msgspec.structs.replace(calm, probes=[counters, none])
    lines = list(summary_lines(blind, width=48))
    assert lines[0] == "stalls were not measured, 200 transitions in 60.2 s"[: len(lines[0])]
    assert lines[1:3][0] == "measured by: kvmstats"
    assert max(map(len, lines[1:])) <= 48


def test_statistics_without_a_histogram_do_no_harm() -> None:
    """As another program may write them."""
    bare = StallStatistics(StallKind.COMMIT, StallCauseType.UNKNOWN, 1, 5, 5, 5, 5, 5, [], [])
    record = SummaryRecord(start_ns=5, end_ns=0, transitions=1, stalls=1, statistics=[bare])
    assert next(summary_lines(record)) == "1 stall, 1 transition in -5 ns"
    list(histogram_lines(record))


@pytest.fixture
def idle() -> SummaryRecord:
    """Pings at rest: brackets of 100 ms around stalls of a few."""
    statistics = Statistics()
    for n in range(400):
        statistics.add(
            StallKind.MAIN_LOOP,
            StallCauseType.UNKNOWN,
            100_000_000 + n * 10_000,
            2_000_000 + n * 10_000,
        )
    statistics.add(StallKind.COMMIT, StallCauseType.TRANSITION, 210_000)
    return summary(statistics)


def test_wide_brackets_are_told_as_such(idle: SummaryRecord) -> None:
    assert list(summary_lines(idle, unicode=False)) == [
        "401 stalls, 200 transitions in 60.2 s",
        "",
        "kind       cause       count     total         p50         p99         max",
        "main loop  unknown       400  1.5-41 s  3.9-102 ms  5.9-104 ms  5.9-104 ms",
        "commit     transition      1   0.21 ms     0.21 ms     0.21 ms     0.21 ms",
        "",
        "at least                       1 ms        10 ms       100 ms",
        "main loop  unknown                 99993333",
        "             at most                                   9999",
        "commit     transition  9999",
    ]


def test_one_stall_of_known_length_has_one_line(usual: SummaryRecord) -> None:
    assert not any("at most" in line for line in summary_lines(usual))
    assert not any("at least" in line for line in histogram_lines(usual))


@pytest.mark.parametrize("width", WIDTHS)
def test_wide_brackets_fit(idle: SummaryRecord, width: int) -> None:
    for lines in (summary_lines, histogram_lines):
        assert max(map(len, lines(idle, width=width))) <= width
    text = list(summary_lines(idle, width=80))
    assert any(re.match(r"main loop  unknown .*1\.5-41 s", line) for line in text)


def test_histograms_of_both_bounds_have_the_same_count(idle: SummaryRecord) -> None:
    titles = [line for line in histogram_lines(idle) if "from this length" in line]
    assert titles[:2] == [
        "main loop at least, from this length on",
        "main loop at most, from this length on",
    ]


def test_statistics_of_former_versions_have_upper_bounds_only() -> None:
    old = StallStatistics(
        StallKind.COMMIT, StallCauseType.UNKNOWN, 1, 5000, 5000, 5000, 5000, 5000, [5000], [1]
    )
    record = SummaryRecord(start_ns=5, end_ns=9, transitions=1, stalls=1, statistics=[old])
    assert any("<5.0 us" in line for line in summary_lines(record))
