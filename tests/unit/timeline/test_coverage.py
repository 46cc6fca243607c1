"""Which kinds were measured when."""

from __future__ import annotations

from qmp_memlistener.probes import StallKind
from qmp_memlistener.timeline.coverage import Coverage

LOOP, COMMIT, WAIT = StallKind.MAIN_LOOP, StallKind.COMMIT, StallKind.BQL_WAIT


def test_only_a_probe_that_was_at_work_all_the_time_counts() -> None:
    coverage = Coverage()
    coverage.measures("ping", [LOOP], 100)
    coverage.measures("uprobes", [COMMIT], 150)
    assert coverage.measured(99, 120) == frozenset()
    assert coverage.measured(100, 120) == {LOOP}
    assert coverage.measured(100, 160) == {LOOP}
    assert coverage.measured(150, 160) == {LOOP, COMMIT}


def test_a_kind_that_is_measured_for_a_while() -> None:
    coverage = Coverage()
    coverage.measures("uprobes", [COMMIT], 100)
    coverage.measures("uprobes", [COMMIT, WAIT], 200)
    coverage.measures("uprobes", [COMMIT], 300)
    coverage.measures("uprobes", [COMMIT, WAIT], 310)
    assert coverage.measured(150, 250) == {COMMIT}
    assert coverage.measured(200, 300) == {COMMIT, WAIT}
    assert coverage.measured(290, 320) == {COMMIT}
    assert coverage.measured(310, 900) == {COMMIT, WAIT}
    assert coverage.measures_now("uprobes")
    assert not coverage.measures_now("ping")


def test_a_probe_that_ended_or_lost_something_measures_nothing_there() -> None:
    coverage = Coverage()
    coverage.measures("ping", [LOOP], 100)
    coverage.advance("ping", 200)
    coverage.lost("ping", 250)
    assert coverage.measured(100, 200) == {LOOP}
    assert coverage.measured(150, 220) == frozenset()
    assert coverage.measured(260, 300) == {LOOP}
    coverage.measures("ping", (), 400)
    assert coverage.measured(390, 410) == frozenset()
    assert coverage.measured(500, 600) == frozenset()


def test_one_of_two_probes_is_enough() -> None:
    coverage = Coverage()
    for name in ("lockprofile", "uprobes"):
        coverage.measures(name, [WAIT], 100)
    coverage.lost("lockprofile", 150)
    assert coverage.measured(100, 200) == {WAIT}


def test_what_lies_far_back_is_not_claimed() -> None:
    coverage = Coverage()
    for t_ns in range(0, 10_000, 2):
        coverage.measures("uprobes", [COMMIT], t_ns)
        coverage.measures("uprobes", [COMMIT, WAIT], t_ns + 1)
    assert coverage.measured(10, 20) == frozenset()
    assert coverage.measured(9_990, 9_999) == {COMMIT}
