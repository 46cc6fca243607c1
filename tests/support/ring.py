"""A channel as the interposer writes it, in a file: for what reads it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from qmp_memlistener.steer import Channel, Event, EventKind, Mode
from qmp_memlistener.steer import channel as layout
from qmp_memlistener.steer.channel import number_of

__all__ = ["Ring", "event", "ring"]


def event(kind: EventKind, begin_ns: int = 1, end_ns: int = 2, **fields: int) -> Event:
    """One entry; what is not named is 0."""
    values = dict.fromkeys(("gpa", "size", "hva", "tid", "slot", "flags", "rc", "extra"), 0)
    values.update(fields)
    return Event(begin_ns=begin_ns, end_ns=end_ns, kind=kind, **values)


class Ring:
    """The interposer's side of the file."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.head = 0
        os.ftruncate(fd, layout._SIZE)
        self.put(0, "<II", layout._MAGIC, layout._SIZE)
        self.set_mode(Mode.OBSERVE)

    def put(self, at: int, shape: str, *values: int) -> None:
        os.pwrite(self.fd, struct.pack(shape, *values), at)

    def set_mode(self, mode: Mode, *, hooked: bool = True) -> None:
        self.put(layout._WANT_AT, "<I", number_of(mode))
        self.put(layout._ARMED_AT, "<III", 1, number_of(mode), hooked)

    def set_head(self, head: int) -> None:
        self.head = head
        self.put(layout._NEXT_AT, "<Q", head)

    def write(self, *events: Event) -> None:
        for e in events:
            self.write_raw(
                *(self.head + 1, e.begin_ns, e.end_ns, e.gpa, e.size, e.hva),
                *(e.tid, e.kind, e.slot, e.flags, e.rc, e.extra),
            )

    def write_raw(self, *fields: int) -> None:
        """Whatever it is; the sequence number comes first."""
        data = layout._EVENT.pack(*fields)
        os.pwrite(self.fd, data, self.place(self.head))
        self.set_head(self.head + 1)

    @staticmethod
    def place(number: int) -> int:
        return layout._RING_AT + number % layout._RING * layout._EVENT.size


@contextmanager
def ring() -> Iterator[tuple[Ring, Channel]]:
    """A new channel, written and read."""
    fd = os.memfd_create("ring")
    try:
        with Channel(os.dup(fd)) as channel:
            yield Ring(fd), channel
    finally:
        os.close(fd)
