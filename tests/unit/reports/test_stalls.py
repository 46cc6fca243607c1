"""Records of stalls in words: durations, brackets, causes, lines."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_memlistener.probes import StallKind
from qmp_memlistener.records import (
    CommandRecord,
    GuestFailure,
    GuestReset,
    MeasurementRecord,
    Note,
    PossibleViolation,
    ProbesRecord,
    ProbeState,
    Record,
    StallCause,
    StallCauseType,
    StallRecord,
    Violation,
)
from qmp_memlistener.reports import Narrator
from qmp_memlistener.reports.lengths import bracket_text, duration_text, kind_text
from qmp_memlistener.reports.stalls import measured_lines, stall_cause_text

STAMP = "  0.033566"
INDENT = " " * 12
UNIT_NS = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9, "min": 60e9}


def lines(record: Record) -> list[str]:
    return list(measured_lines(record, STAMP))


def line(record: Record) -> str:
    """The only line, without its stamp."""
    (text,) = lines(record)
    assert text.startswith(f"{STAMP}  ")
    return text.removeprefix(f"{STAMP}  ")


def stall(at_least_ns: int, at_most_ns: int, **more: object) -> StallRecord:
    values: dict[str, Any] = {
        "kind": "commit",
        "start_ns": 0,
        "end_ns": at_most_ns,
        "at_least_ns": at_least_ns,
        "at_most_ns": at_most_ns,
        "probe": "uprobes",
        "witnesses": ["uprobes", "trace"],
        "thread": None,
        "site": None,
        "cause": StallCause(StallCauseType.UNKNOWN, None),
        "incident": 1,
    }
    return StallRecord(**(values | more))


def value(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNIT_NS[unit]


# -- durations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (850, "850 ns"),
        (1_000, "1.0 us"),
        (12_345, "12 us"),
        (99_900, "100 us"),
        (100_000, "0.10 ms"),
        (810_000, "0.81 ms"),
        (999_999, "1.00 ms"),
        (4_213_000, "4.21 ms"),
        (42_100_000, "42.1 ms"),
        (452_600_000, "453 ms"),
        (999_700_000, "1.00 s"),
        (2_310_000_000, "2.31 s"),
        (8_159_900_000, "8.16 s"),
        (61_200_000_000, "61.2 s"),
        (5_400_000_000_000, "90.0 min"),
    ],
)
def test_durations(ns: int, text: str) -> None:
    assert duration_text(ns) == text


@given(st.integers(0, 42).flatmap(lambda e: st.integers(0, 1 << e)))
def test_a_duration_is_right_to_a_few_digits_and_short(ns: int) -> None:
    text = duration_text(ns)
    assert abs(value(text) - ns) <= 0.051 * ns
    assert len(text) <= 9


@pytest.mark.parametrize(
    ("at_least", "at_most", "text"),
    [
        (4_210_000, 5_060_000, "4.2 to 5.1 ms"),
        (4_900_000, 5_000_000, "5.00 ms"),
        (4_500_000, 5_000_000, "5.00 ms"),
        (4_499_999, 5_000_000, "4.4 to 5.0 ms"),
        (0, 810_000, "up to 0.81 ms"),
        (3_000, 4_200_000, "3.0 us to 4.2 ms"),
        (950_000, 1_150_000, "0.95 to 1.2 ms"),
        (10_000_000, 99_500_001, "10 to 100 ms"),
        (0, 0, "0 ns"),
    ],
)
def test_brackets_are_shown_where_they_matter(at_least: int, at_most: int, text: str) -> None:
    assert bracket_text(at_least, at_most) == text


@given(st.integers(0, 1 << 42), st.integers(0, 1 << 42))
def test_a_bracket_is_rounded_outwards(one: int, other: int) -> None:
    at_least, at_most = sorted((one, other))
    text = bracket_text(at_least, at_most)
    if " to " not in text:
        assert (at_most - at_least) * 10 <= at_most
        return
    low, high = text.removeprefix("up").split(" to ") if at_least else ("0 ns", text[6:])
    unit = high.split()[1]
    assert value(low if " " in low else f"{low} {unit}") <= at_least * (1 + 1e-9)
    assert value(high) >= at_most * (1 - 1e-9)


def test_every_kind_has_words() -> None:
    words = [kind_text(kind) for kind in StallKind]
    assert len(set(words)) == len(words)
    assert all("_" not in word and len(word) <= 12 for word in words)
    assert kind_text("from_the_future") == "from_the_future"


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (None, "unknown"),
        (StallCause(StallCauseType.UNKNOWN, None), "unknown"),
        (StallCause(StallCauseType.TRANSITION, 12), "transition #12"),
        (StallCause(StallCauseType.COMMAND, "object-add"), "command object-add"),
        (StallCause(StallCauseType.AGENT, "info mtree"), "agent: info mtree"),
        (StallCause(StallCauseType.SLOT_OP, "0:5"), "slot 5"),
        (StallCause(StallCauseType.SLOT_OP, "1:5"), "as 1 slot 5"),
        (StallCause(StallCauseType.SLOT_OP, "dirty logging"), "dirty logging"),
        (StallCause(StallCauseType.STOP, "paused"), "guest stopped: paused"),
        (StallCause(StallCauseType.STOP, None), "guest stopped"),
        (StallCause(StallCauseType("from_the_future"), 7), "from_the_future 7"),
        (StallCause(StallCauseType("from_the_future"), None), "from_the_future"),
    ],
)
def test_causes(cause: StallCause | None, text: str) -> None:
    assert stall_cause_text(cause) == text


# -- lines ---------------------------------------------------------------------------------------


def test_a_stall_is_one_line_in_columns() -> None:
    assert line(
        stall(810_000, 811_000, cause=StallCause(StallCauseType.TRANSITION, 12), thread="main")
    ) == ("stall: commit              0.81 ms  transition #12, main [uprobes, trace]")
    assert line(
        stall(
            4_210_000, 5_060_000, kind="vcpu_gap", thread="CPU 0", witnesses=["pulse"],
            cause=StallCause(StallCauseType.TRANSITION, 12, 600_000),
        )
    ) == (
        "stall: vCPU gap      4.2 to 5.1 ms  transition #12 (0.60 ms of it), CPU 0 [pulse]"
    )  # fmt: skip
    assert line(
        stall(
            12_000, 12_100, kind="bql_wait", thread="main", site="util/rcu.c:269",
            cause=StallCause(StallCauseType.AGENT, "info mtree", 12_000), witnesses=["lockprofile"],
        )
    ) == (
        "stall: BQL wait              12 us  agent: info mtree, main at util/rcu.c:269 "
        "[lockprofile]"
    )  # fmt: skip


def test_a_site_is_a_place_in_qemu_or_in_the_guests_memory() -> None:
    assert "unknown at util/rcu.c:269 [" in line(
        stall(1, 1, kind="bql_hold", site="util/rcu.c:269")
    )
    assert "unknown, 0xe0000-0xfffff [" in line(stall(1, 1, kind="missing", site="0xe0000-0xfffff"))
    assert "unknown, add 3 0x0+0x1000 [" in line(
        stall(1, 1, kind="slot_update", site="add 3 0x0+0x1000")
    )


@pytest.mark.parametrize("kind", StallKind)
@pytest.mark.parametrize("length", [(9, 9), (4_210_000, 5_060_000), (0, 99_999_999)])
def test_stalls_align(kind: StallKind, length: tuple[int, int]) -> None:
    text = line(stall(*length, kind=str(kind)))
    assert text.index(kind_text(kind)) == len("stall: ")
    assert text.index("unknown") == 36


def test_stalls_align_with_what_the_narrator_says() -> None:
    narrator = Narrator()
    (note,) = narrator.lines(Note(t_ns=5, text="x"))
    stamp = note.removesuffix("  note: x")
    (text,) = measured_lines(stall(1, 1), stamp)
    assert text.index("stall:") == note.index("note:")


def test_what_was_under_way_is_not_called_the_cause() -> None:
    text = line(stall(0, 3_000_000, kind="main_loop", cause=None, during=[3, 4, 5, 6, 7]))
    assert "  unknown, during #3, #4, #5 and 2 more [" in text
    text = line(stall(1, 1, cause=StallCause(StallCauseType.TRANSITION, 3), during=[3]))
    assert "during" not in text
    text = line(stall(1, 1, cause=StallCause(StallCauseType.TRANSITION, 3), during=[3, 4]))
    assert "transition #3, during #4 [" in text


def test_a_cause_that_accounts_for_it_all_says_no_more() -> None:
    explained = StallCause(StallCauseType.TRANSITION, 3, 950_000)
    assert "of it" not in line(stall(1_000_000, 1_100_000, cause=explained))
    assert "(0.95 ms of it)" in line(stall(2_000_000, 2_000_000, cause=explained))


@pytest.mark.parametrize(("times", "text"), [(1, "1 time "), (3, "3 times "), (0, None)])
def test_handoffs(times: int, text: str | None) -> None:
    said = line(stall(1, 1, kind="vcpu_pause", handoffs=times))
    assert (f"BQL handed over {text}" in said) if text else ("BQL" not in said)


def test_a_command() -> None:
    sure = CommandRecord(
        name="object-add", start_ns=10, busy_until_ns=450_000_010, end_ns=452_000_010, probe="ping"
    )
    assert line(sure) == "command: object-add, 452 ms [ping]"
    vague = CommandRecord(
        name="cont", start_ns=10, busy_until_ns=10, end_ns=1_000_010, probe="trace"
    )
    assert line(vague) == "command: cont, up to 1.0 ms [trace]"


def measurement(values: dict[str, int | float | str]) -> list[str]:
    return lines(
        MeasurementRecord(probe="kvmstats", start_ns=0, end_ns=1_200_000_000, values=values)
    )


def test_counters_leave_out_what_did_not_happen() -> None:
    first, *rest = measurement(
        {
            "exits": 1234,
            "mmio_exits": 0,
            "share": 0.25,
            "wait_ns": 452_600_000,
            "at": "util/rcu.c:269",
        }
    )
    assert first == f"{STAMP}  counted by kvmstats in 1.20 s:"
    assert rest == [f"{INDENT}exits 1,234, share 0.25, wait 453 ms, at util/rcu.c:269"]
    assert measurement({"exits": 0})[1:] == [f"{INDENT}nothing"]
    assert measurement({})[1:] == [f"{INDENT}nothing"]


def test_many_counters_are_folded_between_them() -> None:
    names = {f"counter_{i}": 10**i for i in range(12)}
    _, *rest = measurement(dict(names))
    assert len(rest) > 2
    assert all(len(text) <= 80 and text.startswith(INDENT) for text in rest)
    said = re.findall(r"(counter_\d+) ([\d,]+)(?:,|$)", "\n".join(rest), re.MULTILINE)
    assert {name: int(n.replace(",", "")) for name, n in said} == names


def test_probes() -> None:
    def probe(name: str, reason: str | None, remedy: str | None) -> ProbeState:
        return ProbeState(name, [StallKind.COMMIT], reason is None, reason, remedy, 1, "little")

    record = ProbesRecord(
        t_ns=1,
        probes=[
            probe("ping", None, None),
            probe("trace", None, None),
            probe("uprobes", "tracefs is not mounted", "mount it"),
            probe("pulse", "the guest has none", None),
        ],
    )
    assert lines(record) == [
        f"{STAMP}  probes: ping, trace",
        f"{INDENT}without uprobes: tracefs is not mounted; to get it: mount it",
        f"{INDENT}without pulse: the guest has none",
    ]
    assert lines(ProbesRecord(t_ns=1, probes=[])) == [f"{STAMP}  probes: none active"]


def test_a_proven_failure_says_where_and_why() -> None:
    failure = GuestFailure(
        t_ns=1, status="internal-error", what="KVM gave up on a vCPU", proven=True, transition=3,
        cpu=1, ip=0x7C12, gpa=0x100F00,
    )  # fmt: skip
    assert lines(failure) == [
        f"{STAMP}  GUEST FAILED (internal-error): KVM gave up on a vCPU",
        f"{INDENT}CPU 1 at instruction 0x7c12 could not reach guest-physical 0x100f00",
        f"{INDENT}that RAM had no slot during transition #3",
    ]


def test_a_failure_that_is_not_proven_is_not_presented_as_such() -> None:
    failure = GuestFailure(
        t_ns=1, status="reset", what="the guest reset", proven=False, transition=3
    )
    assert lines(failure)[1:] == [f"{INDENT}transition #3 came before; not proven to be the reason"]
    failure = GuestFailure(
        t_ns=1, status="shutdown", what="a triple fault", proven=False, transition=None, cpu=0
    )
    assert lines(failure)[1:] == [f"{INDENT}CPU 0 stopped"]


def test_a_reset_is_no_failure_and_a_suspicion_comes_below() -> None:
    reset = GuestReset(t_ns=1, reason="guest-reset", guest=True, what="it asked for it")
    assert lines(reset) == [f"{STAMP}  guest reset (guest-reset): it asked for it"]
    fatal = msgspec.structs.replace(reset, possible="1 of 2 vCPUs ran", transition=7, shutdown=True)
    first, second = lines(fatal)
    assert "guest reset (guest-reset), and QEMU goes down instead: it asked for it" in first
    assert second.strip() == "possible, not proven: 1 of 2 vCPUs ran"
    old = GuestFailure(
        t_ns=1, status="reset", what="the guest was reset", proven=False, transition=7
    )
    assert "FAILED" not in lines(old)[0]


def test_violations() -> None:
    over = Violation(
        t_ns=1, kind="main_loop", what="main loop stalled", ref=1, limit_ns=5_000_000,
        found_ns=12_345_678,
    )  # fmt: skip
    assert line(over) == "VIOLATION: main loop stalled: 12.3 ms, allowed 5 ms"
    both = Violation(
        t_ns=1, kind="main_loop", what="main_loop", ref=1, limit_ns=5_000_000,
        found_ns=12_345_678, found_max_ns=105_000_000,
    )  # fmt: skip
    assert line(both) == "VIOLATION: main_loop: 12 to 105 ms, allowed 5 ms"
    maybe = PossibleViolation(
        t_ns=1, kind="main_loop", what="main_loop", ref=1, limit_ns=5_000_000,
        found_ns=2_000_000, found_max_ns=105_000_000,
    )  # fmt: skip
    assert line(maybe) == "possible violation: main_loop: 2.0 to 105 ms, allowed 5 ms"
    changed = Violation(
        t_ns=1, kind="transition", what="the map changed: #3", ref=3, limit_ns=None, found_ns=None
    )
    assert line(changed) == "VIOLATION: the map changed: #3"


def test_other_records_are_not_for_here() -> None:
    assert lines(Note(t_ns=1, text="x")) == []
