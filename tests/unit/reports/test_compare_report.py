"""The table of a comparison."""

from __future__ import annotations

import re

import msgspec

from qmp_memlistener.records import (
    ProbeState,
    StallCause,
    StallCauseType,
    StallKind,
    StallRecord,
)
from qmp_memlistener.reports.compare import comparison_answer, comparison_lines
from qmp_memlistener.updates.compare import Comparison, Skipped
from qmp_memlistener.updates.compare.stats import (
    Difference,
    Round,
    Summary,
    differences,
    summaries,
)
from qmp_memlistener.updates.model import Result, Strategy

RANGE = (1_000_000, 1_500_000)


def summary(strategy: str, n: int, kind: str = "vcpu_pause") -> Summary:
    if kind == "missing":
        return exact(strategy, kind, n, [0] * 4, 0, [0] * 4)
    times = [1_370_000, 2_000_000, 2_100_000, 2_200_000]
    return exact(strategy, kind, n, times, n, times)


def exact(
    strategy: str, kind: str, n: int, times: list[int], stalls: int, longest: list[int]
) -> Summary:
    """Bounds that are equal."""
    names = [f"{name}{bound}_ns" for name in ("p50", "p90", "p99", "max") for bound in ("", "_min")]
    single = [f"longest{name}" for name in ("_p50", "_p90", "_p99", "")]
    names += [f"{name}{bound}_ns" for name in single for bound in ("", "_min")]
    values = [t for t in (*times, *longest) for _ in range(2)]
    given = dict(zip(names, values, strict=True))
    return Summary(strategy=strategy, kind=StallKind(kind), n=n, stalls=stalls, **given)


def difference(
    a: str, b: str, kind: str, diff: int, ci: tuple[int, int], *, seen: bool, enough: bool = True
) -> Difference:
    return Difference(
        a=a,
        b=b,
        kind=StallKind(kind),
        median_diff_ns=diff,
        diff_bounds_ns=(diff, diff),
        ci95_ns=ci,
        seen=seen,
        enough=enough,
    )


def comparison(n: int, *, ended: str | None = None, took_ns: int = 0) -> Comparison:
    rounds = [
        Round(strategy, i, Result.DONE, None, 0, [], 1, 1, 3, took_ns)
        for i, strategy in enumerate(["pause", "control"] * n)
    ]
    return Comparison(
        seed=7,
        window_ns=1_000_000_000,
        rounds=[*rounds, Round("pause", 2 * n, Result.FAILED, "QEMU refused", 0, [], 0, 0, 0)],
        summary=[
            summary(name, n, kind)
            for kind in ("commit", "missing", "vcpu_pause")
            for name in ("pause", "control")
        ],
        differences=[
            difference("pause", "control", "vcpu_pause", 1_300_000, RANGE, seen=True),
            difference("pause", "control", "commit", 5, (-10_000, 20_000), seen=False),
            difference("pause", "control", "missing", 0, (0, 0), seen=False),
            difference("direct", "pause", "commit", 90, (80, 95), seen=False, enough=False),
        ],
        skipped=[
            Skipped(
                Strategy.HOLE,
                "the guest has no virtio-mem device, nothing " * 3,
                "start it with one",
            )
        ],
        ended_early=ended,
        remedy=None,
    )


def test_it_fits_a_terminal_and_says_what_was_not_done() -> None:
    lines = list(comparison_lines(comparison(5, ended="interrupted"), "resize +256M", full=True))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "resize +256M: 5 rounds each in random order (seed 7)" in text
    assert "hole is not possible: the guest has no virtio-mem device" in text
    assert "round 10 (pause) left out: failed: QEMU refused" in text
    assert "ended early: interrupted" in text


def test_a_difference_is_only_claimed_where_one_was_seen() -> None:
    lines = list(comparison_lines(comparison(5), "resize +256M", full=True))
    (seen,) = [line for line in lines if line.startswith("vCPU pause   pause - control")]
    assert "+1.30 ms" in seen
    (unseen,) = [line for line in lines if line.startswith("no difference seen")]
    assert unseen == "no difference seen in commit: pause - control"
    # neither had any: the table says so
    assert not any(line.startswith("RAM missing") and "pause - " in line for line in lines)
    (few,) = [line for line in lines if "direct - pause" in line]
    assert few.endswith("too few rounds")


def test_bounds_that_leave_the_sign_open_are_no_lack_of_rounds() -> None:
    (seen, *_) = comparison(5).differences
    wide = msgspec.structs.replace(
        seen, seen=False, diff_bounds_ns=(-1_000_000, 9_000_000), ci95_ns=(-2_000_000, 9_900_000)
    )
    found = msgspec.structs.replace(comparison(5), differences=[wide])
    (line,) = [x for x in comparison_lines(found, "it", full=True) if "pause - control" in x]
    assert line.endswith("bounds leave it open (-2.00 ms to +9.90 ms)")
    assert len(line) <= 80


def test_percentiles_that_so_few_rounds_do_not_give_are_left_out() -> None:
    def row(n: int) -> list[str]:
        lines = comparison_lines(comparison(n), "it", full=True)
        (found,) = [x for x in lines if x.startswith("vCPU pause   pause  ")]
        return found.split()

    assert row(5)[5:7] == ["-", "-"]
    assert row(10)[5:8] == ["2.00", "ms", "-"]
    assert row(100)[5:9] == ["2.00", "ms", "2.10", "ms"]


def test_updates_that_outlast_the_window_are_told() -> None:
    text = " ".join(comparison_lines(comparison(5, took_ns=2_000_000_000), "it", full=True))
    assert "took longer than the window in 5 of 5 rounds" in text
    assert "took longer" not in " ".join(comparison_lines(comparison(5), "it", full=True))


def test_rounds_without_any_stall_are_rounds() -> None:
    calm = msgspec.structs.replace(comparison(5), summary=[], differences=[])
    text = "\n".join(comparison_lines(calm, "it", full=True))
    assert "No stall was seen in any round, under pause." in text
    assert "slot operations" in text
    nothing = msgspec.structs.replace(calm, rounds=[])
    assert "no round of a strategy was completed" in list(comparison_lines(nothing, "it"))[-1]


def test_the_longest_is_told_where_a_round_had_several() -> None:
    found = comparison(5)
    assert "the longest stall of a round" not in "\n".join(comparison_lines(found, "it", full=True))
    single = [3000, 3500, 4000, 4000]
    several = exact("pause", "bql_hold", 5, [10, 10, 10, 9000], 50, single)
    more = msgspec.structs.replace(found, summary=[*found.summary, several])
    lines = list(comparison_lines(more, "it", full=True))
    assert max(map(len, lines)) <= 80
    below = lines[lines.index("the longest stall of a round, where there were several") :]
    (row,) = [line for line in below if line.startswith("BQL hold")]
    assert row.split()[2:] == ["pause", "3.0", "us", "-", "-", "4.0", "us", "50"]
    assert not any(line.startswith("vCPU pause") for line in below)


def test_both_bounds_and_what_was_not_measured_are_told() -> None:
    found = comparison(12)
    wide = Summary(
        strategy="direct", kind=StallKind.MAIN_LOOP, n=10, missing=2, stalls=3, p50_ns=105_000_000,
        p90_ns=105_000_000, p99_ns=105_000_000, max_ns=105_000_000,
        longest_ns=105_000_000, p50_min_ns=2_100_000, p90_min_ns=2_100_000,
        p99_min_ns=2_100_000, max_min_ns=4_000,
    )  # fmt: skip
    never = Summary(strategy="pause", kind=StallKind.MAIN_LOOP, n=0, missing=12, stalls=0)
    probes = [
        ProbeState("ping", [StallKind.MAIN_LOOP], True, None, None, 0, "-"),
        ProbeState("uprobes", [StallKind.COMMIT], False, "not root", "be root", 0, "-"),
    ]
    both = Difference(a="direct", b="pause", kind=StallKind.MAIN_LOOP, enough=False)
    found = msgspec.structs.replace(found, summary=[wide, never], differences=[both], probes=probes)
    lines = list(comparison_lines(found, "it", full=True))
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("main loop    direct  ")]
    cells = ["main loop", "direct", "2.1-105 ms", "2.1-105 ms", "-", "<105 ms", "3"]
    assert re.split(r"\s\s+", row) == cells
    assert any(line.split() == ["pause", "not", "measured"] for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "is missing: direct 2 of 12, pause 12 of 12 rounds" in text
    assert "main loop direct - pause not measured" in text
    assert "measured by: ping without uprobes (not root)" in text


def stall(kind: str, length: int, cause: str) -> StallRecord:
    return StallRecord(
        kind=StallKind(kind), start_ns=0, end_ns=length, at_least_ns=length, at_most_ns=length,
        probe="uprobes", witnesses=["uprobes"], thread=None, site=None,
        cause=StallCause(StallCauseType(cause), None), incident=1,
    )  # fmt: skip


def raced(lengths: dict[str, int], n: int = 12) -> Comparison:
    """Rounds with one pause of that length each; 0 for none."""
    each = {
        name: [
            Round(
                name, i, Result.DONE, None, i, [stall("vcpu_pause", ns + i, "stop")] if ns else [],
                1, 1, 1, 0, [StallKind.VCPU_PAUSE],
            )
            for i in range(n)
        ]
        for name, ns in lengths.items()
    }  # fmt: skip
    return Comparison(
        seed=1, window_ns=10**9, rounds=[r for own in each.values() for r in own],
        summary=summaries(each), differences=differences(each), skipped=[], ended_early=None,
        remedy=None,
    )  # fmt: skip


def test_the_answer_says_who_lost_more_by_how_much_and_how_sure_that_is() -> None:
    found = raced({"direct": 0, "pause": 2_000_000, "hole": 0, "control": 0})
    lines = list(comparison_lines(found, "it"))
    answer = lines[lines.index("") + 1 :]
    assert len(answer) <= 10
    assert max(map(len, lines)) <= 80
    assert "pause lost more than direct: vCPU pause, by 2.00 ms a round." in answer
    assert "pause lost more than hole: vCPU pause, by 2.00 ms a round." in answer
    assert "No difference seen in any kind of stall: direct - hole." in answer
    assert "Longest stall under pause: vCPU pause, 2.00 ms, cause guest stopped." in answer
    text = " ".join(answer)
    assert "Not told apart from control, in which nothing is done: direct, hole." in text
    sure = "At 95 %, of 12 rounds or more each; 1 of 20 such intervals misses by chance."
    assert sure in text
    # before what can be left out where there is no room
    assert text.index("lost more") < text.index(sure) < text.index("Longest stall")


def test_of_too_few_rounds_nothing_is_said() -> None:
    text = " ".join(comparison_answer(raced({"direct": 0, "pause": 2_000_000}, 3)))
    assert "Too few rounds to tell: direct - pause." in text
    assert "lost more" not in text
    assert "No difference" not in text


def test_tables_are_there_when_they_are_asked_for() -> None:
    found = raced({"direct": 0, "pause": 2_000_000})
    assert not any("p50" in line for line in comparison_lines(found, "it"))
    full = list(comparison_lines(found, "it", full=True))
    assert any("p50" in line for line in full)
    assert full[-3:] == list(comparison_lines(found, "it"))[-3:]


def test_the_longest_stall_is_one_of_a_round_that_measured_its_kind() -> None:
    found = raced({"direct": 0, "pause": 2_000_000})
    long = [stall("vcpu_pause", 10**9, "stop")]
    blind = [
        msgspec.structs.replace(r, measured=[StallKind.COMMIT], stalls=long)
        for r in found.rounds[:1]
    ]
    text = " ".join(comparison_answer(msgspec.structs.replace(found, rounds=blind + found.rounds)))
    assert "Longest stall under pause: vCPU pause, 2.00 ms" in text
    assert "Under direct no stall was seen." in text
