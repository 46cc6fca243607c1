"""QMP events as values, and a bounded stream of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from ..errors import TargetError

__all__ = ["QUEUE_BYTES", "EventStream", "MonitorEvent", "decode_event"]

QUEUE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class MonitorEvent:
    """One event.

    `t_ns` is our CLOCK_MONOTONIC when it was read; `stamp_ns` QEMU's own realtime clock
    (microseconds, as ns), None when QEMU could not read its clock.
    """

    name: str
    data: Mapping[str, object]
    t_ns: int
    stamp_ns: int | None


def decode_event(message: Mapping[str, object], t_ns: int) -> MonitorEvent:
    """The event in a QMP message; missing or odd members become empty values, nothing raises."""
    data = message.get("data")
    stamp = message.get("timestamp")
    stamp_ns: int | None = None
    if isinstance(stamp, Mapping):
        seconds, microseconds = stamp.get("seconds"), stamp.get("microseconds")
        # QEMU sends -1 for both when the clock cannot be read (qapi/qmp-event.c).
        if isinstance(seconds, int) and isinstance(microseconds, int) and seconds >= 0:
            stamp_ns = seconds * 1_000_000_000 + microseconds * 1_000
    return MonitorEvent(
        name=str(message.get("event", "")),
        data=data if isinstance(data, Mapping) else {},
        t_ns=t_ns,
        stamp_ns=stamp_ns,
    )


class EventStream:
    """Events in order, as an async iterator.

    Holds at most `limit` events that have not been read, and at most QUEUE_BYTES of them as QEMU
    wrote them; then the oldest go, counted in `dropped`. The iteration stops when the stream is
    closed, and raises the monitor's TargetError, after the last event, when the peer ended the
    session.  One reader at a time.
    """

    def __init__(self, limit: int, forget: Callable[[EventStream], None]) -> None:
        self.dropped = 0
        self._queue: deque[tuple[MonitorEvent, int]] = deque()
        self._bytes = 0
        self._limit = limit
        self._forget = forget
        self._wake = asyncio.Event()
        self._error: TargetError | None = None
        self._closed = False

    def push(self, event: MonitorEvent, size: int) -> None:
        """Add an event, `size` bytes in QMP; the monitor's side."""
        self._queue.append((event, size))
        self._bytes += size
        while len(self._queue) > self._limit or (
            self._bytes > QUEUE_BYTES and len(self._queue) > 1
        ):
            self._take()
            self.dropped += 1
        self._wake.set()

    def fail(self, error: TargetError) -> None:
        """No more events will come; the monitor's side."""
        self._error = error
        self._wake.set()

    def revive(self) -> None:
        """The monitor is connected again; its side."""
        self._error = None

    def close(self) -> None:
        """Stop listening.  Idempotent."""
        if not self._closed:
            self._closed = True
            self._forget(self)
            self._wake.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> MonitorEvent:
        while True:
            if self._queue:
                return self._take()
            if self._closed:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()

    def _take(self) -> MonitorEvent:
        event, size = self._queue.popleft()
        self._bytes -= size
        return event
