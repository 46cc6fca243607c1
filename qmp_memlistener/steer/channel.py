"""The interposer's channel (interposer.h): its state, what it did, and what the agent wants of it.

A memfd of QEMU's, read and written as a file and never mapped: whoever owns QEMU may cut it short.
Everything in it is said by that process, and is checked.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Self

from ..errors import OperationFailed
from ..host.files import open_memfd
from ..host.processes import Process
from ..records import Mode

__all__ = [
    "Channel",
    "Event",
    "EventKind",
    "Mode",
    "Refusal",
    "State",
    "mode_of",
    "number_of",
    "open_channel",
]

NAME = "qmp-memlistener-steer"
_MAGIC = 0x6C6D7132
_RING = 16384
_UNWRITTEN_NS = 1_000_000_000
_VCPUS = 1024
_HEAD = struct.Struct("<15I4x10Q")
_WANT_AT, _STRICT_AT, _ARMED_AT = 8, 12, 16
_VCPU = struct.Struct("<4IQ40x")
_VCPU_AT = 192
_NEW = struct.Struct("<I")
_NEXT = struct.Struct("<Q")
_NEXT_AT = _VCPU_AT + _VCPUS * _VCPU.size
_EVENT = struct.Struct("<6Q4IiI")
_RING_AT = _NEXT_AT + 8
_SIZE = (_RING_AT + _RING * _EVENT.size + 63) // 64 * 64


_MODES = tuple(Mode)
"""In the order of `enum mode`."""


class Refusal(IntEnum):
    """Why it observes although more was wanted (`enum refusal`)."""

    NONE = 0
    NOT_STOPPED = 1
    TOO_MANY = 2
    NO_SAVE = 3
    KVM_REFUSED = 4
    REGION2_USED = 5
    DIRTY_RINGS = 6
    NO_MEMORY = 7
    NOT_READY = 8
    HELD = 9

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Refusal.NONE: "nothing",
    Refusal.NOT_STOPPED: "a vCPU did not leave KVM_RUN within 1 s",
    Refusal.TOO_MANY: "the guest has more slots, operations or vCPUs than there is room for",
    Refusal.NO_SAVE: "dirty logging is on, and this QEMU does not export memory_region_set_dirty",
    Refusal.KVM_REFUSED: "KVM refused an operation of hole; QEMU's own slots were put back",
    Refusal.REGION2_USED: "QEMU uses KVM_SET_USER_MEMORY_REGION2, which is only observed",
    Refusal.DIRTY_RINGS: "KVM's dirty rings carry slot ids, so slots cannot be split",
    Refusal.NO_MEMORY: "QEMU has no memory left for a dirty bitmap: all its pages count as dirty",
    Refusal.NOT_READY: "a vCPU may be in KVM_RUN unseen",
    Refusal.HELD: "a vCPU was kept out of KVM_RUN for 2 s, and was let in then",
}


class EventKind(IntEnum):
    """What happened (`enum kind`)."""

    QEMU = 1
    KVM = 2
    PARK = 3
    TRANSACTION = 4
    MODE = 5
    SAVED = 6


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the ring, as in the header; times in ns of CLOCK_MONOTONIC."""

    begin_ns: int
    end_ns: int
    gpa: int
    size: int
    hva: int
    tid: int
    kind: EventKind
    slot: int
    flags: int
    rc: int
    extra: int


@dataclass(frozen=True, slots=True)
class SteeredVcpu:
    """A thread that has called KVM_RUN through the interposer.

    `seen`: since it was attached, or it is in there now; before that it may be in KVM_RUN unseen.
    """

    tid: int
    seen: bool
    runs: int


@dataclass(frozen=True, slots=True)
class State:
    """The channel's first part."""

    mode: Mode
    want: Mode
    strict: bool
    armed: bool
    hooked: bool
    parked: bool
    vcpus: int
    refusal: Refusal
    slots: int
    pieces: int
    answers: int
    answer: int
    epoch: int
    transactions: int
    parks: int
    park_ns: int
    park_max_ns: int
    splits: int
    kept: int
    gave_up: int
    translated: int
    saved: int
    answered_ns: int


class Channel:
    """An open channel; `read_events` goes on where it was.  Raises OperationFailed: not as ours."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0
        self._unwritten: tuple[int, int] | None = None  # an entry, and since when
        self.lost = 0
        """Events that were overwritten before they were read, or never written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it; the interposer goes on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def state(self) -> State:
        """What it is and has done so far."""
        magic, size, want, strict, armed, mode, hooked, parked, vcpus, refusal, *counts = (
            _HEAD.unpack(self._pread(_HEAD.size, 0))
        )
        if magic != _MAGIC or size != _SIZE:
            raise OperationFailed(
                "QEMU is steered by another version of qmp-memlistener",
                remedy="use that version, or start QEMU anew",
            )
        try:
            return State(
                mode_of(mode), mode_of(want), bool(strict), bool(armed), bool(hooked), bool(parked),
                min(vcpus, _VCPUS), Refusal(refusal), *counts,
            )  # fmt: skip
        except ValueError as error:
            raise OperationFailed(f"the channel of QEMU says nonsense: {error}") from error

    def want(self, mode: Mode, *, strict: bool = False) -> None:
        """The mode from the next moment between two transactions on."""
        self._put(_STRICT_AT, strict)
        self._put(_WANT_AT, number_of(mode))

    def arm(self) -> None:
        """Every vCPU is known: they may be kept out of KVM_RUN."""
        self._put(_ARMED_AT, 1)

    def vcpus(self) -> list[SteeredVcpu]:
        """The threads that run vCPUs, in the order in which they came."""
        state = self.state()
        data = self._pread(state.vcpus * _VCPU.size, _VCPU_AT)
        return [
            SteeredVcpu(tid, bool(inside) or epoch == state.epoch, runs)
            for inside, tid, _, epoch, runs in _VCPU.iter_unpack(data)
        ]

    def skip(self) -> None:
        """Read no event of before."""
        self._at = self._head()

    def is_behind(self) -> bool:
        """There is more to read, or an event is being written."""
        return self._head() != self._at

    def read_events(self, most: int = 4096) -> list[Event]:
        """What happened since the last call, at most `most`; `lost` counts what was overwritten.

        An entry that is read while the interposer writes it again is not taken: QEMU may have gone
        round the ring meanwhile.
        """
        self._catch_up(self._head())
        start = self._at
        entries: list[tuple[int, ...]] = []
        head = self._head()
        while self._at + len(entries) < head and len(entries) < most:
            place = (self._at + len(entries)) % _RING
            count = min(head - self._at - len(entries), _RING - place, most - len(entries))
            data = self._pread(count * _EVENT.size, _RING_AT + place * _EVENT.size)
            entries += _EVENT.iter_unpack(data)
        self._catch_up(self._head())  # what was overwritten meanwhile may be torn
        found: list[Event] = []
        for number in range(self._at, start + len(entries)):
            seq, *fields = entries[number - start]
            if seq != number + 1:
                if not self._is_given_up(number):
                    break  # it is being written
                self.lost += 1
            elif (event := _event(fields)) is not None:
                found.append(event)
            self._at = number + 1
        return found

    def _head(self) -> int:
        (head,) = _NEXT.unpack(self._pread(_NEXT.size, _NEXT_AT))
        return int(head)

    def _catch_up(self, head: int) -> None:
        """Leave out what is overwritten, or may be at this moment."""
        if head < self._at:  # it counts up: somebody else writes there
            self.lost += 1
            self._at = head
        oldest = head - _RING + 64
        if self._at < oldest:
            self.lost += oldest - self._at
            self._at = oldest

    def _is_given_up(self, number: int) -> bool:
        """Nobody has written it for a second."""
        now = time.monotonic_ns()
        if self._unwritten is None or self._unwritten[0] != number:
            self._unwritten = (number, now)
        return now - self._unwritten[1] > _UNWRITTEN_NS

    def _pread(self, size: int, at: int) -> bytes:
        data = os.pread(self._fd, size, at)
        if len(data) != size:
            raise OperationFailed("the channel of QEMU is cut short: it is not as it was made")
        return data

    def _put(self, at: int, value: int) -> None:
        os.pwrite(self._fd, struct.pack("<I", value), at)


def mode_of(number: int) -> Mode:
    """The member of `enum mode`.  Raises ValueError."""
    if not 0 <= number < len(_MODES):
        raise ValueError(f"{number} is no mode")
    return _MODES[number]


def number_of(mode: Mode) -> int:
    """Its number in `enum mode`."""
    return _MODES.index(mode)


def _event(fields: list[int]) -> Event | None:
    begin, end, gpa, size, hva, tid, kind, slot, flags, rc, extra = fields
    try:
        known = EventKind(kind)
    except ValueError:
        return None
    return Event(begin, end, gpa, size, hva, tid, known, slot, flags, rc, extra)


def open_channel(process: Process) -> Channel | None:
    """The channel of the interposer in a QEMU; None when it has none, or is making it.

    Raises PermissionError when that cannot be seen, FileNotFoundError when QEMU has ended.
    """
    found = open_memfd(process, NAME)
    if found is None:
        return None
    if os.pread(found[1], _NEW.size, 0) in (b"", bytes(_NEW.size)):
        os.close(found[1])
        return None
    return Channel(found[1])
