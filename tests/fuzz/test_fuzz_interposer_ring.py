"""A QEMU that writes whatever it likes into the ring: bounded work, windows that can be."""

from __future__ import annotations

import contextlib
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.probes.interposer import Fold
from qmp_memlistener.records import SlotOp, StallRecord
from qmp_memlistener.steer import channel as layout
from qmp_memlistener.timeline import Timeline
from tests.support.ring import Ring, ring

NOW = 1 << 40
U64 = st.integers(0, (1 << 64) - 1) | st.integers(0, 2 * NOW) | st.sampled_from([0, NOW])
U32 = st.integers(0, (1 << 32) - 1) | st.integers(0, 9)
I32 = st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(-1, 9)
SOON = st.integers(NOW - 1000, NOW)
RIGHT = st.integers(0, 3).map(lambda n: None if n else n)
FIELDS = st.tuples(
    *(SOON | U64, SOON | U64, st.integers(0, 1 << 20) | U64, st.integers(0, 1 << 20) | U64, U64),
    *(st.integers(1, 2) | U32, st.integers(1, 6) | U32, U32, U32, I32, U32),
)
ENTRIES = st.lists(st.tuples(RIGHT, FIELDS), max_size=60)


def _write(writer: Ring, entries: list[tuple[int | None, tuple[int, ...]]]) -> None:
    for seq, fields in entries:
        writer.write_raw(writer.head + 1 if seq is None else seq, *fields)


@given(ENTRIES, st.none() | U64, st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_whatever_is_written_there(
    entries: list[tuple[int | None, tuple[int, ...]]], head: int | None, most: int
) -> None:
    timeline = Timeline(stamp_bound_ns=0)
    timeline.expect("trace", 0)
    timeline.expect("interposer", 0)
    fold = Fold(str, 0)
    with ring() as (writer, channel):
        _write(writer, entries)
        if head is not None:
            writer.put(layout._NEXT_AT, "<Q", head)
        for _ in range(3):
            lost = channel.lost
            events = channel.read_events(most)
            assert len(events) <= most
            assert channel.lost >= lost
            for carried in fold.take(events, NOW):
                for seen in (*carried.asked, *carried.windows):
                    assert 0 <= seen.start_ns <= seen.end_ns <= NOW
                timeline.carried_out(carried.asked, carried.windows)
            assert fold._count == sum(len(w) for w in fold._waiting.values()) <= 8192
    op = SlotOp(t_ns=NOW, as_id=0, slot=0, op=OpKind.ADD, gpa=0, size=1, flags=0, transition=1)
    timeline.record(op)
    found = timeline.finish()
    while timeline.more:
        found += timeline.finish()
    for record in found:
        assert isinstance(record, StallRecord)
        assert 0 <= record.at_least_ns <= record.at_most_ns <= record.end_ns - record.start_ns


@given(st.binary(max_size=4096), st.integers(0, layout._SIZE - 1))
@settings(max_examples=200, deadline=None)
def test_whatever_is_written_over_it(data: bytes, at: int) -> None:
    with ring() as (writer, channel):
        os.pwrite(writer.fd, data[: layout._SIZE - at], at)
        for ask in (channel.state, channel.vcpus, channel.read_events, channel.skip):
            with contextlib.suppress(OperationFailed):
                ask()
