"""Under which strategy transitions were made, as a report says it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qmp_memlistener.records import Mode, Record, Recording, RecordingWriter, SteeringRecord
from qmp_memlistener.reports.recording import Contents
from qmp_memlistener.reports.terminal import Narrator
from tests.support.records import HEADER, transition

BOUND = 100
START = 10_000


def change(t_ns: int, strategy: Mode, **more: int) -> SteeringRecord:
    return SteeringRecord(t_ns=START + t_ns, strategy=strategy, late_ns=more.get("late_ns"))


def contents(tmp_path: Path, *records: Record) -> Contents:
    header = msgspec.structs.replace(HEADER, monotonic_ns=START, stamp_bound_ns=BOUND)
    path = tmp_path / "recording"
    with RecordingWriter(str(path), header) as writer:
        writer.write_all(records)
    return Contents(Recording(str(path)), 0)


@pytest.mark.parametrize(
    ("records", "counts"),
    [
        pytest.param([transition(1, START + 5)], {"unknown": 1}, id="a former version"),
        pytest.param([change(0, Mode.OFF), transition(1, START + 500)], {"off": 1}, id="none"),
        pytest.param(
            [transition(1, START + 900), change(0, Mode.OFF), transition(2, START + 500),
             change(700, Mode.HOLE)],
            {"off": 1, "hole": 1}, id="records may come late",
        ),
        pytest.param(
            [change(0, Mode.OFF), change(700, Mode.HOLE), transition(1, START + 750)],
            {"unknown": 1}, id="its line may be late",
        ),
        pytest.param(
            [change(0, Mode.OFF), change(900, Mode.HOLE, late_ns=300), transition(1, START + 650)],
            {"unknown": 1}, id="the change may be late",
        ),
        pytest.param(
            [change(0, Mode.HOLE), change(700, Mode.HOLE), transition(1, START + 750)],
            {"hole": 1}, id="the same again",
        ),
        pytest.param(
            [change(0, Mode("later")), transition(1, START + 750)], {"later": 1}, id="a later one"
        ),
    ],
)  # fmt: skip
def test_transitions_are_counted_by_strategy(
    records: list[Record], counts: dict[str, int], tmp_path: Path
) -> None:
    assert contents(tmp_path, *records).document()["strategies"] == counts


def test_people_are_told_of_a_guest_that_was_steered(tmp_path: Path) -> None:
    def told(*records: Record) -> list[str]:
        lines = contents(tmp_path, *records).lines(histograms=False, width=80, unicode=False)
        (tmp_path / "recording").unlink()
        return [line for line in lines if line.startswith("strategies")]

    assert told(transition(1, START + 5)) == []
    assert told(change(0, Mode.OFF), transition(1, START + 500)) == []
    found = told(change(0, Mode.OFF), change(5, Mode.HOLE), transition(1, START + 500))
    assert found == ["strategies: 1 under hole"]


def test_a_change_is_a_line_unless_there_is_nothing_to_say() -> None:
    narrator = Narrator()
    assert list(narrator.lines(change(0, Mode.OFF))) == []
    strict = SteeringRecord(t_ns=START, strategy=Mode.HOLE, strict=True)
    assert list(narrator.lines(strict)) == ["  0.000000  strategy: hole, strict"]
    gone = SteeringRecord(t_ns=START + 1000, strategy=Mode.OBSERVE, reason="a vCPU ran on")
    assert list(narrator.lines(gone)) == ["  0.000001  strategy: observe (a vCPU ran on)"]
    assert list(narrator.lines(change(2000, Mode.OFF))) == ["  0.000002  strategy: off"]
