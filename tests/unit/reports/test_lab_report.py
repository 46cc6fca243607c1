"""What the lab's reports say in the end."""

from __future__ import annotations

import msgspec

from qmp_memlistener.kvmlab.measuring import Update
from qmp_memlistener.kvmlab.programs import GuestKind
from qmp_memlistener.kvmlab.race import RaceReport
from qmp_memlistener.kvmlab.replay.run import (
    ReplayedTransition,
    ReplayOptions,
    ReplayReport,
    ReplayResult,
)
from qmp_memlistener.reports.lab import race_answer, race_lines, replay_answer, replay_lines
from qmp_memlistener.tracking.replaying import FileKind
from tests.unit.page.page_support import race


def without_host(report: RaceReport) -> RaceReport:
    return msgspec.structs.replace(report, host={"kernel": "6.1", "kvm": "vmx"})


def test_a_race_says_what_killed_and_how_sure_the_others_are() -> None:
    lines = list(race_lines(without_host(race())))
    assert max(map(len, lines)) <= 80
    answer = lines[lines.index("") + 1 :]
    assert len(answer) <= 10
    assert answer[0] == "The guest died of missing RAM under naive (2 of 400)."
    text = " ".join(" ".join(answer).split())
    assert "Updates in which it did not find RAM that stays: naive 12 of 400." in text
    assert "RAM was never seen missing under pause." in text
    assert "0 of 400 updates: at 95 %, at most 0.75 % of them are hit" in text
    assert "Not run here: batch." in text


def test_tables_are_there_when_they_are_asked_for() -> None:
    assert not any("p50" in line for line in race_lines(race()))
    full = list(race_lines(race(), full=True))
    assert any("p50" in line for line in full)
    assert full[-3:] == list(race_lines(race()))[-3:]


def test_a_guest_that_does_not_look_proves_nothing() -> None:
    options = msgspec.structs.replace(race().options, guest=GuestKind.GAP)
    text = " ".join(race_answer(msgspec.structs.replace(race(), options=options)))
    assert "whether RAM was missing is not known" in text
    assert "never seen" not in text
    assert "rule of three" not in text


def replay(mismatches: int) -> ReplayReport:
    update = Update(gap_ns=2000, took_ns=1, calls_ns=1, missing_ns=0, stall_ns=0)
    one = ReplayedTransition(seq=1, ops=2, return_mismatches=mismatches, update=update)
    return ReplayReport(
        {"kernel": "6.1", "kvm": "vmx"},
        "boot.jsonl",
        FileKind.RECORDING,
        "10.0.0",
        ReplayOptions(),
        (ReplayResult("naive", "as QEMU", None, (one,)),),
        (),
    )


def test_a_replay_says_what_kvm_answered_otherwise() -> None:
    assert replay_answer(replay(3))[0] == (
        "Operations that KVM answered otherwise than recorded: naive 3."
    )
    text = " ".join(replay_answer(replay(0)))
    assert "otherwise" not in text
    assert "rule of three" not in text  # each transition is another one
    assert any("operations" in line for line in replay_lines(replay(0), full=True))
    assert not any("operations" in line for line in replay_lines(replay(0)))
