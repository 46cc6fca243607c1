"""Where everything that is seen of a guest goes: records to the recording, the terminal and other
subscribers, changes to listeners."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ..errors import MemListenerError
from ..listener import Dispatcher, MemoryListener
from ..records import Lost, Note, Record
from .source import Source

__all__ = ["Publisher", "RecordStream", "Records"]

log = logging.getLogger(__name__)

Kinds = tuple[type[Record], ...]


class Publisher:
    """The way out of one attachment; a subscriber or a listener that fails is reported on it."""

    def __init__(self) -> None:
        self.records = Records(self._subscriber_failed)
        self.dispatcher = Dispatcher(self._listener_failed)
        self._source: Source | None = None

    def follow(self, source: Source) -> None:
        """Hand out what the tracker of `source` folds, from now on."""
        self._source = source

    def publish(self, records: Iterable[Record] = ()) -> None:
        """Hand out what the tracker has, then `records`."""
        tracker = self._source.tracker if self._source is not None else None
        if tracker is not None:
            folded, changes = tracker.take()
            self.records.publish(folded)
            self.dispatcher.dispatch(changes)
        self.records.publish(records)

    def _listener_failed(self, listener: MemoryListener, name: str, exc: BaseException) -> None:
        self._remark(f"listener {type(listener).__name__} failed in {name}: {_text(exc)}")

    def _subscriber_failed(self, exc: Exception) -> None:
        self._remark(f"a subscriber failed and gets no more records: {_text(exc)}")

    def _remark(self, text: str) -> None:
        self.records.publish([Note(t_ns=time.monotonic_ns(), text=text)])


class Records:
    """Where records are published; subscribers get them in order.

    One that raises is dropped and `on_failure` called; only our own errors (a full disk under the
    recording) reach the publisher.  A `writer` gets all records that are published at once.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure
        self._callbacks: list[tuple[Callable[[Record], None], Kinds | None]] = []
        self._wanted_by: dict[type[Record], tuple[Callable[[Record], None], ...]] = {}
        self.writer: Callable[[Sequence[Record]], None] | None = None
        self._streams: list[RecordStream] = []
        self._closed = False

    def publish(self, records: Iterable[Record]) -> None:
        """Hand out records at once; callbacks must be quick."""
        records = records if isinstance(records, list) else list(records)
        if self.writer is not None and records:
            self.writer(records)
        for record in records:
            for callback in self._wanted_by.get(type(record)) or self._wanting(type(record)):
                try:
                    callback(record)
                except MemListenerError:
                    raise
                except Exception as exc:
                    log.warning("a subscriber failed: %r", exc)
                    self._forget(callback)
                    self._on_failure(exc)
            for stream in tuple(self._streams):
                stream.push(record)

    def subscribe(
        self, callback: Callable[[Record], None], kinds: Kinds | None = None
    ) -> Callable[[], None]:
        """Call `callback` with every record of these kinds from now on; returns the way to stop
        that."""
        self._callbacks.append((callback, kinds))
        self._wanted_by.clear()
        return lambda: self._forget(callback)

    def _forget(self, callback: Callable[[Record], None]) -> None:
        self._callbacks = [known for known in self._callbacks if known[0] != callback]
        self._wanted_by.clear()

    def _wanting(self, kind: type[Record]) -> tuple[Callable[[Record], None], ...]:
        found = tuple(
            callback
            for callback, kinds in self._callbacks
            if kinds is None or issubclass(kind, kinds)
        )
        self._wanted_by[kind] = found
        return found

    def stream(self, limit: int) -> RecordStream:
        """A new stream of the records from now on, that holds at most `limit` unread ones."""
        stream = RecordStream(limit)
        if self._closed:
            stream.close()
        else:
            self._streams.append(stream)
        return stream

    def close(self) -> None:
        """No more records will come: streams end after what they hold."""
        self._closed = True
        for stream in self._streams:
            stream.close()
        self._streams.clear()


class RecordStream:
    """Records in order, as an async iterator that ends when the agent does.

    When they are not read for long the oldest are dropped, and a `Lost` record takes their place.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: deque[Record] = deque()
        self._dropped = 0
        self._wake = asyncio.Event()
        self._closed = False

    def push(self, record: Record) -> None:
        """Add a record; the agent's side."""
        if len(self._queue) >= self._limit:
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(record)
        self._wake.set()

    def close(self) -> None:
        """End the iteration after what is queued."""
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> RecordStream:
        return self

    async def __anext__(self) -> Record:
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        if self._dropped:
            count, self._dropped = self._dropped, 0
            at = getattr(self._queue[0], "t_ns", 0)
            return Lost(t_ns=at, what="records that were not read in time", count=count)
        return self._queue.popleft()


def _text(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
