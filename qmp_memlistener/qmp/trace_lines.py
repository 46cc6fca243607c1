"""PURE: bytes of QEMU's trace log to typed records.  No files, no clocks.

One decoder follows one log.  Bytes come in any pieces; a line counts when its newline has come.
Lines that are not ours are counted and skipped, whatever they hold; nothing raises, and order
is kept.

Formats (accel/kvm/trace-events, softmmu|system/trace-events, hw/pci/trace-events, hw/mem/
trace-events, hw/virtio/trace-events, monitor/trace-events and scripts/tracetool/backend/log.py,
compared in 7.2, 10.0.2 and master):

- `kvm_set_user_memory` up to 8.x prints `Slot#N` with the address space in the upper 16 bits,
  later `AddrSpace#A Slot#N`, and from 9.1 on also guest_memfd and guest_memfd_offset;
- downstream trees print more fields behind `ret=` (restricted_fd, restricted_offset);
- with `-msg timestamp=on` a line begins `TID@SEC.USEC:` up to 10.0 and with an ISO 8601 time
  (UTC, fraction left out when it is zero) and a space from 10.1 on.
"""

from __future__ import annotations

import calendar
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from msgspec.structs import replace

from ..memslots import OpKind
from ..records import SlotOp
from .trace_records import (
    BarMapping,
    FlatViewChange,
    FlatViewEvent,
    HmpCommand,
    MemoryDeviceChange,
    MemoryDeviceEvent,
    RunStateChange,
    SlotFailure,
    TraceRecord,
    VirtioMemEvent,
    VmStateChange,
)

__all__ = ["MAX_LINE", "STAMP_BOUND_NS", "TraceDecoder", "new_marker"]

STAMP_BOUND_NS = 200_000
"""A line without QEMU's own time stamp is read so late at most, unless it says otherwise."""

# A longer line is no trace line: it is dropped as it comes, so garbage cannot fill memory.
MAX_LINE = 64 * 1024

# A marker is the command `print 0x71…`, with a number that nobody types by chance.
_MARKER_PREFIX = 0x71

_STAMP = rb"(?:\d{1,10}+@(\d{1,12}+\.\d{6}):|(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{6})?)Z )"
# Nothing here ends where it could have gone on, so nothing is tried twice (`}+`).
_SLOT_OP = (
    rb"kvm_set_user_memory (?:AddrSpace#(\d{1,5}+) )?Slot#(-?\d{1,10}+) flags=0x([0-9a-f]{1,8}+)"
    rb" gpa=0x([0-9a-f]{1,16}+) size=0x([0-9a-f]{1,16}+) ua=0x([0-9a-f]{1,16}+)"
    rb"(?: guest_memfd=-?\d{1,10}+ guest_memfd_offset=0x[0-9a-f]{1,16}+)? ret=(-?\d{1,10}+)"
    rb"(?: \w{1,40}+=[-\w]{1,40}+){0,8}+\n"  # kernels with private memory of their own add fields
)
# Each match is one whole line: a slot operation or, last group, something else.  The groups of a
# stamp are empty in a plain line.
_PLAIN_LINES = re.compile(rb"()()(?:" + _SLOT_OP + rb"|([^\n]*+)\n)")
_STAMPED_LINES = re.compile(_STAMP + rb"?(?:" + _SLOT_OP + rb"|([^\n]*+)\n)")

_STAMPS = re.compile(_STAMP)

_MEMO_LIMIT = 4096


def new_marker() -> int:
    """A number for a marker, unlike any other agent's."""
    return _MARKER_PREFIX << 56 | secrets.randbits(56)


class _Decimal(dict[bytes, int]):
    """Memo of small numbers: slots, address spaces and return values are few; "" is 0."""

    def __missing__(self, text: bytes) -> int:
        if len(self) >= _MEMO_LIMIT:
            self.clear()
        value = self[text] = int(text) if text else 0
        return value


class _Hex(dict[bytes, int]):
    """The same for hexadecimal numbers that repeat (flags); "" is 0."""

    def __missing__(self, text: bytes) -> int:
        if len(self) >= _MEMO_LIMIT:
            self.clear()
        value = self[text] = int(text, 16) if text else 0
        return value


class _Second(dict[bytes, int | None]):
    """ISO 8601 second to ns since the epoch; None for a date that does not exist."""

    def __missing__(self, text: bytes) -> int | None:
        if len(self) >= _MEMO_LIMIT:
            self.clear()
        try:
            parsed = time.strptime(text.decode(), "%Y-%m-%dT%H:%M:%S")
            value: int | None = calendar.timegm(parsed) * 1_000_000_000
        except ValueError:
            value = None
        self[text] = value
        return value


class _Times(NamedTuple):
    """When the lines of one read were written, as far as that is known."""

    read_ns: int
    since_ns: int
    skew_ns: int
    late_ns: int | None


class TraceDecoder:
    """Turns the bytes of one log into records.

    `lines` counts complete lines, `unknown` those of them that are no record, `overlong` the
    dropped ones longer than MAX_LINE (not in `lines`).
    """

    def __init__(self) -> None:
        self.lines = 0
        self.unknown = 0
        self.overlong = 0
        self.stamped = False
        self._tail = b""
        self._skipping = False
        self._decimal = _Decimal()
        self._hex = _Hex()
        self._second = _Second()

    def feed(
        self, data: bytes, t_ns: int, *, since_ns: int = 0, late_ns: int = 0, skew_ns: int = 0
    ) -> list[TraceRecord]:
        """The records of all lines that `data` completes.

        It was read at `t_ns`, at most `late_ns` after it was written, and written after `since_ns`.
        QEMU's own stamps are of a clock that is `skew_ns` ahead; where there are none the time is
        `t_ns`, and records say how late that is when it is more than `STAMP_BOUND_NS`.
        """
        at = _Times(t_ns, since_ns, skew_ns, late_ns if late_ns > STAMP_BOUND_NS else None)
        if self._skipping:
            newline = data.find(b"\n")
            if newline < 0:
                return []
            self._skipping = False
            data = data[newline + 1 :]
        data = self._tail + data if self._tail else data
        end = data.rfind(b"\n") + 1
        tail = data[end:]
        if len(tail) > MAX_LINE:
            self.overlong += 1
            self._skipping = True
            tail = b""
        self._tail = tail
        if not end:
            return []
        whole = data[:end] if end < len(data) else data
        if not self.stamped and _is_stamped(whole):
            self.stamped = True
        records: list[TraceRecord] = []
        self._decode(whole, at, records, stamped=self.stamped)
        return records

    def reset(self) -> None:
        """Forget the incomplete line: what comes next does not continue it."""
        self._tail = b""
        self._skipping = False

    @property
    def pending(self) -> int:
        """Bytes of the incomplete line."""
        return len(self._tail)

    def _decode(self, data: bytes, at: _Times, out: list[TraceRecord], *, stamped: bool) -> None:
        append, integer, decimal, hexa = out.append, int, self._decimal, self._hex
        add, delete = OpKind.ADD, OpKind.DELETE
        read_ns, since_ns, skew_ns, read_late_ns = at
        t_ns, late_ns = read_ns, read_late_ns
        matches = (_STAMPED_LINES if stamped else _PLAIN_LINES).findall(data)
        self.lines += len(matches)
        for unix, iso, as_id, slot, flags, gpa, size, ua, ret, rest in matches:
            if stamped:
                stamp = self._stamp(unix, iso)
                if stamp is None:
                    t_ns, late_ns = read_ns, read_late_ns
                else:
                    t_ns, late_ns = stamp - skew_ns, None
                    if not since_ns <= t_ns <= read_ns:
                        t_ns = min(max(t_ns, since_ns), read_ns)
            if slot:
                number, length = decimal[slot], integer(size, 16)
                append(
                    SlotOp(
                        t_ns=t_ns,
                        as_id=decimal[as_id] if as_id else number >> 16 & 0xFFFF,
                        slot=number & 0xFFFF,
                        op=add if length else delete,
                        gpa=integer(gpa, 16),
                        size=length,
                        flags=hexa[flags],
                        ret=decimal[ret],
                        hva=integer(ua, 16),
                        late_ns=late_ns,
                    )
                )
            elif not stamped and rest[:1].isdigit():
                # Perhaps stamped after all: a log that several programs write to.
                self.lines -= 1
                self._decode(rest + b"\n", at, out, stamped=True)
            else:
                record = _decode_other(rest, t_ns, late_ns)
                if record is None:
                    self.unknown += 1
                else:
                    append(record)

    def _stamp(self, unix: bytes, iso: bytes) -> int | None:
        """`SEC.USEC` or an ISO 8601 time, in ns."""
        if unix:
            return int(unix.replace(b".", b"")) * 1_000
        second = self._second[iso[:19]] if iso else None
        return second if second is None else second + int(iso[20:] or b"0") * 1_000


def _is_stamped(data: bytes) -> bool:
    return _STAMPS.match(data) is not None


_Builder = Callable[[re.Match[bytes], int], TraceRecord]


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _flatview(m: re.Match[bytes], t: int) -> TraceRecord:
    # glibc prints a null pointer as "(nil)"; an empty address space has no root.
    root = int(m[3], 16) if m[3] is not None else 0
    return FlatViewEvent(t, FlatViewChange(m[1].decode()), int(m[2], 16), root)


def _bar(m: re.Match[bytes], t: int) -> TraceRecord:
    bus, slot, func, addr, size = (int(m[i], 16) for i in (3, 4, 5, 7, 8))
    return BarMapping(t, m[1] == b"add", _text(m[2]), bus, slot, func, int(m[6]), addr, size)


def _memory_device(m: re.Match[bytes], t: int) -> TraceRecord:
    change = MemoryDeviceChange(m[1].decode())
    return MemoryDeviceEvent(t, change, _text(m[2]) or None, int(m[3], 16))


def _virtio_mem(m: re.Match[bytes], t: int) -> TraceRecord:
    def hexa(group: int) -> int | None:
        return int(m[group], 16) if m[group] is not None else None

    def decimal(group: int) -> int | None:
        return int(m[group]) if m[group] is not None else None

    return VirtioMemEvent(t, _text(m[1]), hexa(2), decimal(3), hexa(4), hexa(5), decimal(6))


def _runstate(m: re.Match[bytes], t: int) -> TraceRecord:
    return RunStateChange(t, _text(m[1]), _text(m[2]))


def _vm_state(m: re.Match[bytes], t: int) -> TraceRecord:
    return VmStateChange(t, m[1] == b"1", _text(m[2]))


def _hmp(m: re.Match[bytes], t: int) -> TraceRecord:
    marker = int(m[2], 16) if m[2] is not None else None
    if marker is not None and marker >> 56 != _MARKER_PREFIX:
        marker = None
    return HmpCommand(t, _text(m[1]), marker)


def _failure(m: re.Match[bytes], t: int) -> TraceRecord:
    return SlotFailure(t, int(m[1]), int(m[2], 16), int(m[3], 16), _text(m[4]))


def _table(entries: Iterable[tuple[bytes, bytes, _Builder]]) -> _Table:
    return {prefix: (re.compile(pattern, re.DOTALL), build) for prefix, pattern, build in entries}


_Table = dict[bytes, tuple[re.Pattern[bytes], _Builder]]

_H = rb"([0-9a-f]{1,16})"

# Keyed by the event's name up to its first underscore, which is enough to tell them apart.
_EVENTS: _Table = _table(
    (
        (
            b"flatview",
            rb"flatview_(new|destroy_rcu|destroy) 0x"
            + _H
            + rb" \(root (?:0x"
            + _H
            + rb"|\(nil\))\)",
            _flatview,
        ),
        (
            b"pci",
            rb"pci_update_mappings_(add|del) (.*) ([0-9a-f]{2,8}):([0-9a-f]{2,8})\.([0-9a-f]{1,8})"
            rb" (-?\d{1,10}),0x" + _H + rb"\+0x" + _H,
            _bar,
        ),
        (
            b"memory",
            rb"memory_device_(pre_plug|plug|unplug) id=(.*) addr=0x" + _H,
            _memory_device,
        ),
        (
            b"virtio",
            rb"virtio_mem_([a-z_]{1,40}) (?:addr=0x" + _H + rb" nb_blocks=(\d{1,5})"
            rb"|old_size=0x" + _H + rb" ?new_size=0x" + _H + rb"|(?:type|state)=(\d{1,5}))?",
            _virtio_mem,
        ),
        (
            b"runstate",
            rb"runstate_set current_run_state -?\d{1,10} \((.*?)\) new_state -?\d{1,10} \((.*)\)",
            _runstate,
        ),
        (
            b"vm",
            rb"vm_state_notify running (-?\d{1,10}) reason -?\d{1,10} \((.*)\)",
            _vm_state,
        ),
        (
            b"handle",
            rb"handle_hmp_command mon \S{1,20} cmdline: ((?:print 0x([0-9a-f]{16}))|.*)",
            _hmp,
        ),
    )
)

# error_report() puts the program's name, and perhaps a time and the guest's name, in front.
_FAILURE = re.compile(
    rb".*KVM_SET_USER_MEMORY_REGION2? failed, slot=(\d{1,10}), start=0x"
    + _H
    + rb", size=0x"
    + _H
    + rb"(?:, flags=[^:]*)?: (.*)",
    re.DOTALL,
)


def _decode_other(line: bytes, t_ns: int, late_ns: int | None) -> TraceRecord | None:
    entry = _EVENTS.get(line.partition(b"_")[0])
    if entry is not None:
        match = entry[0].fullmatch(line)
        if match is not None:
            record = entry[1](match, t_ns)
            if late_ns is not None and isinstance(record, FlatViewEvent):
                record = replace(record, late_ns=late_ns)
            return record
    if b"KVM_SET_USER_MEMORY_REGION" in line:
        match = _FAILURE.fullmatch(line)
        if match is not None:
            return _failure(match, t_ns)
    return None
