"""Entries of the interposer's ring as windows: each transaction whole, or not at all."""

from __future__ import annotations

import pytest

from qmp_memlistener.memslots import OpKind
from qmp_memlistener.probes import StallKind
from qmp_memlistener.probes.interposer import Carried, Fold
from qmp_memlistener.records import Mode
from qmp_memlistener.steer import Event, EventKind, Refusal
from qmp_memlistener.steer.channel import number_of
from tests.support.ring import event

NOW = 1_000_000
HOLE = number_of(Mode.HOLE)
SLOT = {"slot": 3, "gpa": 0xE0000, "hva": 0x7F00_000E_0000}


def fold(*events: Event, since_ns: int = 0) -> tuple[Fold, list[Carried]]:
    folded = Fold("tid {}".format, since_ns)
    return folded, list(folded.take(events, NOW))


def asked(begin_ns: int, size: int = 0, *, waits: int = 1, tid: int = 7) -> Event:
    return event(
        EventKind.QEMU, begin_ns, begin_ns + 1, **SLOT, size=size, extra=waits, tid=tid
    )  # fmt: skip


def given(begin_ns: int, size: int = 0, *, gone: int = 0, tid: int = 7) -> Event:
    return event(
        EventKind.KVM, begin_ns, begin_ns + 5, **SLOT, size=size, extra=gone >> 12, tid=tid
    )  # fmt: skip


def ended(begin_ns: int, end_ns: int, *, tid: int = 7) -> Event:
    return event(EventKind.TRANSACTION, begin_ns, end_ns, extra=HOLE, tid=tid)


def test_a_transaction_is_told_when_it_has_ended() -> None:
    events = [
        *(asked(100), asked(110, 0x10000), given(120, gone=0x10000), given(130, 0x10000)),
        event(EventKind.PARK, 115, 140, extra=1, tid=7),
    ]
    folded, found = fold(*events)
    assert found == []
    waiting_since = [folded.open_ns]
    (carried,) = folded.take([ended(100, 145)], NOW)
    assert [*waiting_since, folded.open_ns] == [100, None]
    assert [o.site for o in carried.asked] == ["delete 3 0xe0000+0x0", "add 3 0xe0000+0x10000"]
    delete, add, park = carried.windows
    assert delete.site == "delete 3 0xe0000+0x10000"
    assert delete.update is not None
    assert (delete.update.op, delete.update.size) == (OpKind.DELETE, 0x10000)
    assert (add.start_ns, add.end_ns, add.at_least_ns, add.thread) == (130, 135, 5, "tid 7")
    assert (park.kind, park.start_ns, park.end_ns) == (StallKind.VCPU_INHIBIT, 115, 140)
    assert (park.thread, park.site) == (None, "strategy hole")


def test_an_operation_outside_of_a_transaction_is_told_at_once() -> None:
    _, (carried,) = fold(given(101, 0x1000), asked(100, 0x1000, waits=0))
    assert len(carried.asked) == len(carried.windows) == 1


def test_what_began_before_is_left_out() -> None:
    """Of a transaction that was under way nobody knows whether it is all there."""
    folded, found = fold(asked(110), given(120), ended(90, 130), since_ns=100)
    assert found == []
    assert folded.open_ns is None


def test_threads_do_not_mix() -> None:
    _, found = fold(asked(100), asked(101, tid=8), ended(101, 110, tid=8), ended(100, 120))
    assert [[o.tid for o in c.asked] for c in found] == [[8], [7]]


def test_after_a_loss_only_what_begins_later_is_taken() -> None:
    folded, _ = fold(asked(100))
    folded.lose()
    found = list(folded.take([given(120), ended(100, 130), asked(140), ended(140, 150)], NOW))
    assert [[o.start_ns for o in c.asked] for c in found] == [[140]]


def test_slots_that_are_put_back_are_told_with_the_change_of_mode() -> None:
    mode = event(EventKind.MODE, 130, 130, rc=1, extra=Refusal.NOT_STOPPED, tid=7)
    folded, (carried,) = fold(given(110), given(120, 0x1000), mode)
    assert (len(carried.asked), len(carried.windows)) == (0, 2)
    assert folded.modes == [(130, Mode.OBSERVE, Refusal.NOT_STOPPED)]


@pytest.mark.parametrize(
    "bad",
    [
        event(EventKind.KVM, 10, 5),
        event(EventKind.KVM, 10, NOW + 1),
        event(EventKind.KVM, 1, 2, gpa=1 << 63, size=1 << 63 | 1),
        event(EventKind.KVM, 1, 2, gpa=(1 << 64) - 1, extra=1),
        event(EventKind.MODE, 1, 2, rc=99),
        event(EventKind.MODE, 1, 2, rc=-1),
        event(EventKind.MODE, 1, 2, extra=99),
        event(EventKind.TRANSACTION, 1, 2, extra=99),
    ],
)
def test_what_cannot_be_is_counted(bad: Event) -> None:
    folded, found = fold(bad)
    assert (found, folded.nonsense, folded.open_ns) == ([], 1, None)


def test_a_transaction_without_end_is_bounded() -> None:
    folded, found = fold(*(asked(100 + n) for n in range(9000)))
    assert found == []
    assert folded.nonsense > 8000
    assert sum(len(w) for w in folded._waiting.values()) < 8192
