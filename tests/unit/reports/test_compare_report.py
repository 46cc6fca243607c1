"""The table of a comparison."""

from __future__ import annotations

from qmp_memlistener.reports.compare import comparison_lines
from qmp_memlistener.updates.compare import Comparison, Round, Skipped
from qmp_memlistener.updates.compare_stats import Difference, Summary


def summary(strategy: str, n: int) -> Summary:
    return Summary(strategy, "vcpu_pause", n, 1_370_000, 2_000_000, 2_100_000, 2_200_000, n, 99)


def comparison(n: int, *, ended: str | None = None) -> Comparison:
    rounds = [
        Round(strategy, i, "done", None, 0, [], 1, 1, 3)
        for i, strategy in enumerate(["pause", "control"] * n)
    ]
    return Comparison(
        seed=7,
        window_ns=1_000_000_000,
        rounds=[*rounds, Round("pause", 2 * n, "failed", "QEMU refused", 0, [], 0, 0, 0)],
        summary=[summary("pause", n), summary("control", n)],
        differences=[
            Difference("pause", "control", "vcpu_pause", 1_300_000, (1_000_000, 1_500_000), True),
            Difference("pause", "control", "commit", 5, (-10_000, 20_000), False),
        ],
        skipped=[Skipped("hole", "the guest has no virtio-mem device", "start it with one")],
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


def test_percentiles_that_so_few_rounds_do_not_give_are_left_out() -> None:
    def row(n: int) -> list[str]:
        lines = comparison_lines(comparison(n), "it")
        (found,) = [x for x in lines if x.startswith("vCPU pause   pause  ")]
        return found.split()

    assert row(5)[5:7] == ["-", "-"]
    assert row(10)[5:8] == ["2.00", "ms", "-"]
    assert row(100)[5:9] == ["2.00", "ms", "2.10", "ms"]
