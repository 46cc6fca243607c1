"""What is read of the interposer's ring: each event once, none torn, and how many are lost."""

from __future__ import annotations

import os
import struct

import pytest

from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.host.processes import Process
from qmp_memlistener.steer import Channel, EventKind, Mode, open_channel
from qmp_memlistener.steer import channel as layout
from tests.support.ring import event, ring

SIZE = layout._RING


def _numbers(channel: Channel, most: int = 4096) -> list[int]:
    return [e.gpa for e in channel.read_events(most)]


def test_each_event_is_read_once_and_in_order() -> None:
    with ring() as (writer, channel):
        writer.write(*(event(EventKind.KVM, gpa=n) for n in range(5)))
        assert _numbers(channel, 3) == [0, 1, 2]
        assert channel.is_behind()
        assert _numbers(channel) == [3, 4]
        assert not channel.is_behind()
        assert (_numbers(channel), channel.lost) == ([], 0)


def test_what_was_overwritten_is_counted() -> None:
    with ring() as (writer, channel):
        writer.write(*(event(EventKind.KVM, gpa=n) for n in range(SIZE + 1000)))
        found = _numbers(channel, SIZE)
        assert found[-1] == SIZE + 999
        assert channel.lost + len(found) == SIZE + 1000


def test_what_is_overwritten_while_it_is_read_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with ring() as (writer, channel):
        writer.write(*(event(EventKind.KVM, gpa=n) for n in range(4096)))
        read = os.pread

        def overtaken(fd: int, size: int, at: int) -> bytes:
            data = read(fd, size, at)
            if size > 64 and writer.head == 4096:  # the first entries have changed since
                writer.write(*(event(EventKind.KVM, gpa=n) for n in range(4096, SIZE + 2048)))
            return data

        monkeypatch.setattr(os, "pread", overtaken)
        found = _numbers(channel)
        assert found[0] == 2048 + 64
        assert channel.lost == found[0]


def test_an_event_that_is_being_written_is_waited_for() -> None:
    with ring() as (writer, channel):
        writer.write_raw(0, *[1] * 11)
        writer.write(event(EventKind.KVM, gpa=7))
        assert _numbers(channel) == []
        writer.put(writer.place(0), "<Q", 1)
        assert _numbers(channel) == [1, 7]
        assert channel.lost == 0


def test_an_event_that_nobody_writes_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with ring() as (writer, channel):
        writer.write_raw(0, *[1] * 11)
        writer.write(event(EventKind.KVM, gpa=7))
        assert _numbers(channel) == []
        monkeypatch.setattr(layout, "_UNWRITTEN_NS", -1)
        assert _numbers(channel) == [7]
        assert channel.lost == 1


def test_a_count_that_goes_back_is_a_loss() -> None:
    with ring() as (writer, channel):
        writer.write(event(EventKind.KVM, gpa=1), event(EventKind.KVM, gpa=2))
        assert _numbers(channel) == [1, 2]
        writer.set_head(0)
        assert _numbers(channel) == []
        assert channel.lost == 1
        writer.write(event(EventKind.KVM, gpa=3))
        assert _numbers(channel) == [3]


@pytest.mark.parametrize("number", [5, 1 << 31])
def test_a_mode_that_there_is_not(number: int) -> None:
    with ring() as (writer, channel):
        assert channel.state().mode is Mode.OBSERVE
        writer.put(layout._ARMED_AT + 4, "<I", number)
        with pytest.raises(OperationFailed, match="nonsense"):
            channel.state()


def test_a_channel_that_is_cut_short() -> None:
    with ring() as (writer, channel):
        os.ftruncate(writer.fd, 100)
        for ask in (channel.state, channel.skip, channel.read_events):
            with pytest.raises(OperationFailed, match="cut short"):
                ask()


def test_a_channel_that_is_being_made_is_none_yet() -> None:
    """QEMU makes the memfd, gives it a size, and writes the magic number last."""
    process = Process.read(os.getpid())
    assert process is not None
    fd = os.memfd_create(layout.NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        assert open_channel(process) is None
        os.ftruncate(fd, layout._SIZE)
        assert open_channel(process) is None
        os.pwrite(fd, struct.pack("<II", layout._MAGIC, layout._SIZE), 0)
        channel = open_channel(process)
        assert channel is not None
        with channel:
            assert channel.state().mode is Mode.OFF
    finally:
        os.close(fd)


def test_the_modes_are_written_by_their_numbers() -> None:
    with ring() as (writer, channel):
        for number, mode in enumerate(Mode):
            channel.want(mode)
            assert struct.unpack("<I", os.pread(writer.fd, 4, layout._WANT_AT)) == (number,)
            assert channel.state().want is mode


def test_a_vcpu_counts_as_seen_since_this_attach_or_while_it_is_inside() -> None:
    """The interposer was taken out and brought in again; the threads are the same."""
    with ring() as (writer, channel):
        assert channel.vcpus() == []
        vcpus = (
            (1, 71, 5, 1, 9),
            (0, 72, 6, 1, 8),
            (0, 73, 7, 2, 7),
        )  # inside, tid, fd, epoch, runs
        for n, fields in enumerate(vcpus):
            writer.put(layout._VCPU_AT + n * layout._VCPU.size, "<4IQ", *fields)
        writer.put(32, "<I", len(vcpus))
        writer.put(56, "<I", 2)
        assert (channel.state().vcpus, channel.state().epoch) == (3, 2)
        assert [(v.tid, v.seen, v.runs) for v in channel.vcpus()] == [
            (71, True, 9),
            (72, False, 8),
            (73, True, 7),
        ]
