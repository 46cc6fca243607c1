"""Where everything that is seen of a guest goes: records to subscribers, changes to listeners."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ..listener import Dispatcher, MemoryListener
from ..records import Note, Record
from .source import Source
from .stream import Records

__all__ = ["Outlet"]


class Outlet:
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
        self._remark(
            f"listener {type(listener).__name__} failed in {name}: {type(exc).__name__}: {exc}"
        )

    def _subscriber_failed(self, exc: Exception) -> None:
        self._remark(f"a subscriber failed and gets no more records: {_text(exc)}")

    def _remark(self, text: str) -> None:
        self.records.publish([Note(t_ns=time.monotonic_ns(), text=text)])


def _text(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
