"""The table of a comparison."""

from __future__ import annotations

import msgspec

from qmp_memlistener.reports.compare import comparison_lines
from qmp_memlistener.updates.compare import Comparison, Round, Skipped
from qmp_memlistener.updates.compare_stats import Difference, Summary


def summary(strategy: str, n: int, kind: str = "vcpu_pause") -> Summary:
    if kind == "missing":
        return Summary(strategy, kind, n, 0, 0, 0, 0, 0, 0)
    return Summary(strategy, kind, n, 1_370_000, 2_000_000, 2_100_000, 2_200_000, n, 2_200_000)


def comparison(n: int, *, ended: str | None = None, took_ns: int = 0) -> Comparison:
    rounds = [
        Round(strategy, i, "done", None, 0, [], 1, 1, 3, took_ns)
        for i, strategy in enumerate(["pause", "control"] * n)
    ]
    return Comparison(
        seed=7,
        window_ns=1_000_000_000,
        rounds=[*rounds, Round("pause", 2 * n, "failed", "QEMU refused", 0, [], 0, 0, 0)],
        summary=[
            summary(name, n, kind)
            for kind in ("commit", "missing", "vcpu_pause")
            for name in ("pause", "control")
        ],
        differences=[
            Difference("pause", "control", "vcpu_pause", 1_300_000, (1_000_000, 1_500_000), True),
            Difference("pause", "control", "commit", 5, (-10_000, 20_000), False),
            Difference("pause", "control", "missing", 0, (0, 0), False),
            Difference("direct", "pause", "commit", 90, (80, 95), False, enough=False),
        ],
        skipped=[
            Skipped("hole", "the guest has no virtio-mem device, nothing " * 3, "start it with one")
        ],
        ended_early=ended,
        remedy=None,
    )


def test_it_fits_a_terminal_and_says_what_was_not_done() -> None:
    lines = list(comparison_lines(comparison(5, ended="interrupted"), "resize +256M"))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "resize +256M: 5 rounds each in random order (seed 7)" in text
    assert "hole is not possible: the guest has no virtio-mem device" in text
    assert "round 10 (pause) left out: failed: QEMU refused" in text
    assert "ended early: interrupted" in text


def test_a_difference_is_only_claimed_where_one_was_seen() -> None:
    lines = list(comparison_lines(comparison(5), "resize +256M"))
    (seen,) = [line for line in lines if line.startswith("vCPU pause   pause - control")]
    assert "+1.30 ms" in seen
    (unseen,) = [line for line in lines if line.startswith("commit       pause - control")]
    assert "no difference seen (-10 us to +20 us)" in unseen
    # neither had any: the table says so
    assert not any(line.startswith("RAM missing") and "pause - " in line for line in lines)
    (few,) = [line for line in lines if "direct - pause" in line]
    assert few.endswith("too few rounds to tell")


def test_percentiles_that_so_few_rounds_do_not_give_are_left_out() -> None:
    def row(n: int) -> list[str]:
        lines = comparison_lines(comparison(n), "it")
        (found,) = [x for x in lines if x.startswith("vCPU pause   pause  ")]
        return found.split()

    assert row(5)[5:7] == ["-", "-"]
    assert row(10)[5:8] == ["2.00", "ms", "-"]
    assert row(100)[5:9] == ["2.00", "ms", "2.10", "ms"]


def test_updates_that_outlast_the_window_are_told() -> None:
    text = " ".join(comparison_lines(comparison(5, took_ns=2_000_000_000), "it"))
    assert "took longer than was looked at in 5 of 5 rounds" in text
    assert "took longer" not in " ".join(comparison_lines(comparison(5), "it"))


def test_rounds_without_any_stall_are_rounds() -> None:
    calm = msgspec.structs.replace(comparison(5), summary=[], differences=[])
    text = "\n".join(comparison_lines(calm, "it"))
    assert "no stall was seen in any round" in text
    assert "slot operations" in text
    nothing = msgspec.structs.replace(calm, rounds=[])
    assert list(comparison_lines(nothing, "it"))[-1] == "nothing to compare"


def test_the_longest_is_told_where_a_round_had_several() -> None:
    found = comparison(5)
    assert "the longest stall of a round" not in "\n".join(comparison_lines(found, "it"))
    several = Summary("pause", "bql_hold", 5, 10, 10, 10, 9000, 50, 4000, 3000, 3500, 4000)
    more = msgspec.structs.replace(found, summary=[*found.summary, several])
    lines = list(comparison_lines(more, "it"))
    assert max(map(len, lines)) <= 80
    below = lines[lines.index("the longest stall of a round, where there were several") :]
    (row,) = [line for line in below if line.startswith("BQL hold")]
    assert row.split()[2:] == ["pause", "3.0", "us", "-", "-", "4.0", "us", "50"]
    assert not any(line.startswith("vCPU pause") for line in below)
