"""Limits: exceeded for certain, possibly, or not."""

from __future__ import annotations

import pytest

from qmp_memlistener.agent.limits import FREEZE_LIMIT_NS, Limits
from qmp_memlistener.probes import StallKind
from qmp_memlistener.records import PossibleViolation, StallRecord, Violation

MS = 1_000_000


def stall(at_least: int, at_most: int, kind: StallKind = StallKind.MAIN_LOOP) -> StallRecord:
    return StallRecord(
        kind=kind, start_ns=7, end_ns=7 + at_most, at_least_ns=at_least, at_most_ns=at_most,
        probe="ping", witnesses=["ping"], thread="main", site=None, cause=None, incident=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("at_least", "at_most", "verdict"),
    [
        (6 * MS, 6 * MS, Violation),
        (5 * MS + 1, 105 * MS, Violation),
        (5 * MS, 105 * MS, PossibleViolation),
        (0, 5 * MS + 1, PossibleViolation),
        (0, 5 * MS, None),
        (5 * MS, 5 * MS, None),
    ],
)
def test_a_limit_is_exceeded_for_certain_or_possibly(
    at_least: int, at_most: int, verdict: type | None
) -> None:
    limits = Limits({StallKind.MAIN_LOOP: 5 * MS})
    found = limits.check(stall(at_least, at_most))
    if verdict is None:
        assert found is None
        return
    assert type(found) is verdict
    assert isinstance(found, Violation | PossibleViolation)
    assert (found.limit_ns, found.found_ns, found.found_max_ns) == (5 * MS, at_least, at_most)
    assert (found.kind, found.ref) == ("main_loop", 3)


def test_kinds_without_a_limit_have_that_of_the_freeze() -> None:
    assert Limits({StallKind.MAIN_LOOP: MS}).check(stall(9 * MS, 9 * MS, StallKind.COMMIT)) is None
    frozen = Limits.freeze({StallKind.MAIN_LOOP: 20 * MS})
    assert frozen.check(stall(9 * MS, 9 * MS)) is None
    found = frozen.check(stall(FREEZE_LIMIT_NS + 1, 9 * MS, StallKind.COMMIT))
    assert isinstance(found, Violation)
