"""Bytes of a ring to hits: the grammar of perf's records, and nothing of their meaning.

Layouts: include/uapi/linux/perf_event.h, enum perf_event_type, for the sample type that `perf`
opens events with.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .functions import Point
from .perf import Architecture

__all__ = ["Decoded", "Decoder", "Hit"]

_LOST, _EXIT, _THROTTLE, _FORK, _SAMPLE, _LOST_SAMPLES = 2, 4, 5, 7, 9, 13
_HEADER = struct.Struct("<IHH")
_TASK = struct.Struct("<IIIIQ")  # pid, ppid, tid, ptid, time
_TWO = struct.Struct("<QQ")
_NO_ARGS = (0, 0, 0, 0, 0)


class Hit(NamedTuple):
    """A probed function was entered or left.

    `args` of a return mean nothing, nor does `result` of an entry.  `sp` is the stack pointer: at
    an entry it points to the return address, at the return that belongs to it one word above.
    `stack` is what lies from `sp` on, where that was asked for.  With `point` None it is no hit but
    a gap: hits of this thread are missing right before the next one.  With `calls` it stands for
    so many short calls one after the other, which took `result` ns in all.
    """

    t_ns: int
    tid: int
    point: Point | None
    args: tuple[int, int, int, int, int]
    sp: int
    result: int
    stack: bytes
    calls: int = 0


@dataclass(slots=True)
class Decoded:
    """What one ring had: `lost` records found no room, `started` and `ended` threads."""

    hits: list[Hit] = field(default_factory=list)
    lost: int = 0
    throttled: int = 0
    started: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)


class Decoder:
    """Decodes what events of one architecture's registers give.

    A guest that changes its map makes some thirty calls of memory_region_transaction_commit within
    transactions for one that ends a transaction.  Those are runs of an entry and its return, and
    are found as such: calls shorter than `floor_ns`, with no other hit inside, become one.
    """

    def __init__(self, arch: Architecture, floor_ns: int = 0) -> None:
        # identifier, pid, tid, time, ABI, registers
        self._sample = struct.Struct(f"<QIIQQ{len(arch.registers)}Q")
        self._args = [5 + place for place in arch.arguments]
        self._sp = 5 + arch.sp
        self._result = 5 + arch.result
        self._plain = _HEADER.size + self._sample.size
        self._floor_ns = floor_ns
        self._popped = arch.popped
        # of an entry and its return: time and stack pointer
        before, between = 8 + 16, (arch.sp + 1) * 8
        after = self._plain - before - 8 - between - 8
        self._call = struct.Struct("<" + f"{before}xQ{between}xQ{after}x" * 2)

    def calls_of(self, entry: int, back: int) -> re.Pattern[bytes] | None:
        """What finds runs of calls by the event ids of a function's entry and return."""
        if not self._floor_ns:
            return None
        records = (
            re.escape(_SAMPLE.to_bytes(4, "little"))
            + b".."
            + re.escape(self._plain.to_bytes(2, "little") + ident.to_bytes(8, "little"))
            + b".{%d}" % (self._plain - _HEADER.size - 8)
            for ident in (entry, back)
        )
        return re.compile(b"(?:" + b"".join(records) + b")+", re.DOTALL)

    def decode(
        self,
        data: bytes,
        tid: int,
        points: Mapping[int, Point],
        read_ns: int,
        calls: re.Pattern[bytes] | None = None,
    ) -> Decoded:
        """Every record in `data`, read at `read_ns` from the ring of thread `tid`.

        `points` are by event id; records of events that are not (any more) there are left out.
        `calls` finds those that may become one.
        """
        found = Decoded()
        gap = False
        header, sample = _HEADER.unpack_from, self._sample.unpack_from
        a, b, c, d, e = self._args
        sp, result, plain = self._sp, self._result, self._plain
        hit, append = Hit, found.hits.append
        at, end = 0, len(data)
        while at < end:
            kind, _, size = header(data, at)
            if kind == _SAMPLE:
                if size >= plain:
                    f = sample(data, at + 8)
                    point = points.get(f[0])
                    if point is not None:
                        if gap:
                            append(_gap(f[3], tid))
                            gap = False
                        if calls is not None and (run := calls.match(data, at)) is not None:
                            count, last, total = self._short(run[0])
                            if count:
                                append(hit(last, f[2], point, _NO_ARGS, f[sp], total, b"", count))
                                at += count * self._call.size
                                continue
                        stack = b"" if size == plain else _stack(data[at + plain : at + size])
                        args = (f[a], f[b], f[c], f[d], f[e])
                        append(hit(f[3], f[2], point, args, f[sp], f[result], stack))
            elif _other(found, kind, data, at + _HEADER.size):
                gap = True
            at += size or end
        if gap:
            append(_gap(read_ns, tid))
        return found

    def _short(self, run: bytes) -> tuple[int, int, int]:
        """How many calls a run begins with that are short, when the last ended, and ns in all."""
        count = last = total = 0
        for start_ns, sp, end_ns, top in self._call.iter_unpack(run):
            if end_ns - start_ns >= self._floor_ns or top - sp != self._popped:
                break
            count += 1
            total += end_ns - start_ns
            last = end_ns
        return count, last, total


def _other(found: Decoded, kind: int, data: bytes, body: int) -> bool:
    """Take in a record that is no sample; true when it says that some are missing."""
    if kind == _LOST:
        found.lost += _TWO.unpack_from(data, body)[1]
    elif kind == _LOST_SAMPLES:
        found.lost += _TWO.unpack_from(data, body)[0]
    elif kind == _THROTTLE:
        found.throttled += 1
    elif kind in (_FORK, _EXIT):
        pid, parent, tid, _, _ = _TASK.unpack_from(data, body)
        if kind == _EXIT:
            found.ended.append(tid)
        elif pid == parent:
            found.started.append(tid)
    return kind in (_LOST, _LOST_SAMPLES, _THROTTLE)


def _gap(t_ns: int, tid: int) -> Hit:
    return Hit(t_ns, tid, None, _NO_ARGS, 0, 0, b"")


def _stack(data: bytes) -> bytes:
    """The part of a dumped stack that the kernel really could read.

    A u64 of how much was asked for, the dump, and a u64 of how much of it is real.
    """
    if len(data) < 16:
        return b""
    real = int.from_bytes(data[-8:], "little")
    return data[8 : 8 + real]
