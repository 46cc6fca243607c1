"""Guesses of a rendering are named where something visible depends on them, and nowhere else."""

from __future__ import annotations

import pytest

from qmp_memlistener.topology import Kind, doubts
from qmp_memlistener.topology.doubts import NOTHING, Clipped, Doubts, Inherited, Overlap, Visible
from qmp_memlistener.topology.model import Region


def piece(name: str, start: int, end: int) -> Clipped:
    region = Region(addr=start, size=end - start, priority=0, kind=Kind.RAM, name=name)
    return Clipped(start, end, region, 0, Inherited())


def seen(pieces: list[Clipped], *shown: tuple[int, int, int]) -> list[Visible]:
    return [(start, end, rank, pieces[rank]) for start, end, rank in shown]


def overlap(start: int, end: int, front: int, behind: int) -> Overlap:
    return Overlap(
        start, end, range(front, front + 1), range(behind, behind + 1), ("front", "behind")
    )


@pytest.mark.parametrize(
    ("shown", "matters"),
    [
        pytest.param([(0, 10, 0), (10, 20, 1)], True, id="what is in front hides the other"),
        pytest.param([(0, 4, 0), (4, 10, 2), (10, 20, 1)], False, id="a third hides both"),
        pytest.param([(0, 4, 0), (4, 6, 2), (6, 20, 1)], False, id="the front is hidden there"),
    ],
)
def test_the_order_of_siblings_matters_where_one_hides_the_other(
    shown: list[tuple[int, int, int]], matters: bool
) -> None:
    pieces = [piece("front", 0, 10), piece("behind", 5, 20), piece("third", 4, 10)]
    guesses = Doubts(pieces)
    guesses.overlaps.append(overlap(5, 10, 0, 1))
    found = guesses.pairs(seen(pieces, *shown))
    assert found == ({("front", "behind")} if matters else set())


def test_a_part_of_one_that_is_not_there_is_not_hidden() -> None:
    """What lies behind ends where what is visible in front begins."""
    pieces = [piece("front", 8, 16), piece("behind", 0, 8)]
    guesses = Doubts(pieces)
    guesses.overlaps.append(overlap(0, 16, 0, 1))
    assert guesses.pairs(seen(pieces, (0, 8, 1), (8, 16, 0))) == set()


@pytest.mark.parametrize(
    ("shown", "instead"),
    [
        pytest.param([(0, 20, 0)], None, id="hidden everywhere"),
        pytest.param([(0, 8, 0), (8, 20, 1)], "b", id="before what lies behind"),
        pytest.param([(0, 8, 0)], NOTHING, id="nothing at its end"),
        pytest.param([(6, 20, 0)], NOTHING, id="nothing at its beginning"),
        pytest.param([(0, 6, 0), (7, 20, 0)], NOTHING, id="nothing within"),
        pytest.param([(0, 5, 0), (5, 10, 0), (10, 20, 1)], None, id="what is visible beside it"),
        pytest.param([], NOTHING, id="nothing at all"),
    ],
)
def test_one_that_may_answer_is_named_with_what_is_visible_in_its_place(
    shown: list[tuple[int, int, int]], instead: str | None
) -> None:
    pieces = [piece("a", 0, 20), piece("b", 5, 20)]
    guesses = Doubts(pieces)
    ghost = piece("ghost", 5, 10)
    guesses._pieces = pieces[:1]
    guesses.note_guess(ghost, taken=False)  # it would be the second
    guesses._pieces = pieces
    found = guesses.pairs(seen(pieces, *shown))
    assert found == ({(instead, "ghost")} if instead else set())


def test_one_that_is_taken_to_answer_is_named_where_it_is_visible() -> None:
    pieces: list[Clipped] = []
    guesses = Doubts(pieces)
    for name in ("hidden", "shown", "sure"):
        found = piece(name, 0, 10)
        if name != "sure":
            guesses.note_guess(found, taken=True)
        pieces.append(found)
    assert guesses.pairs(seen(pieces, (0, 5, 1), (5, 10, 2))) == {("shown", NOTHING)}


def test_what_would_take_too_long_is_named_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts, "_MAX_LOOKS", 3)
    pieces = [piece("front", 0, 100), piece("behind", 90, 100), piece("third", 0, 100)]
    hidden = [(at, at + 1, 2) for at in range(100)]
    guesses = Doubts(pieces)
    guesses.overlaps.append(overlap(0, 100, 0, 1))
    assert guesses.pairs(seen(pieces, *hidden)) == {("front", "behind")}
    monkeypatch.setattr(doubts, "_MAX_LOOKS", 200)
    few = Doubts(pieces)
    few.overlaps.append(overlap(0, 100, 0, 1))
    assert few.pairs(seen(pieces, *hidden)) == set()
