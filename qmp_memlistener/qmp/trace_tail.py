"""Following QEMU's trace log file as it grows, without missing a line and without blocking QEMU.

A reader thread sleeps on inotify, reads whatever is there, stamps it and keeps it until it is
asked for, whatever the event loop is busy with; decoding is `trace_lines`' job, and where the file
comes from `trace_control`'s.  What is kept has a bound, beyond that the file has to hold it.

The file is ordinary, so QEMU never waits for us (a FIFO would freeze its main loop).  It stays
small although QEMU only appends: what was read is given back with fallocate(PUNCH_HOLE |
KEEP_SIZE), which changes neither the file's size nor the place where QEMU writes next.  A file with
a limit takes nothing more once it is full, and goes on where it was when there is room again: that
something may be missing there is reported, as is what another reader has given back before us.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from ..host.bounded import in_thread
from ..host.files import open_foreign
from ..host.limited_file import give_back, is_full
from .trace_lines import TraceDecoder
from .trace_records import TraceRecord

__all__ = ["TraceBatch", "TraceTail"]

_READ_SIZE = 256 * 1024
_MAX_BACKLOG = 64 * 1024 * 1024
_FREE_STEP = 1024 * 1024
_PAGE = os.sysconf("SC_PAGE_SIZE")
# Without inotify (its instances are limited per user) the file is looked at this often.
_POLL_SECONDS = 0.02
_ROOM_SECONDS = 0.1

_IN_MODIFY, _IN_ATTRIB = 0x2, 0x4  # include/uapi/linux/inotify.h

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class TraceBatch:
    """What one read brought.

    Every line in it was written after `t_after_ns` (the file was seen to end there then) and
    before `t_ns` (CLOCK_MONOTONIC).  `lost`, in a batch without records, says that lines may be
    missing here and why.  `late_ns` is by how much `t_ns` may be later than a line was written: the
    time since the file was last seen to end there, or, when the reader was waiting and the first
    line woke it, the age of the file's last change by then.
    """

    records: list[TraceRecord]
    t_after_ns: int
    t_ns: int
    lost: str | None = None
    late_ns: int = 0


@dataclass(slots=True)
class _Chunk:
    data: bytes
    t_after_ns: int
    t_ns: int
    late_ns: int
    lost: str | None = None


class TraceTail:
    """Async iterator over the batches of one log file; use as an async context manager.

    `start` is the offset to begin at.  `release(offset)` is called now and then with how far we
    have read, and returns up to where the file's bytes may be given back; without it (a file
    that is not ours) nothing is given back.  `limit` is how much a limited file holds, else 0.
    Iteration ends after `finish`.
    """

    def __init__(
        self,
        path: str,
        *,
        start: int = 0,
        release: Callable[[int], int] | None = None,
        limit: int = 0,
    ) -> None:
        self.decoder = TraceDecoder()
        self.offset = start
        self._path = path
        self._release = release
        self._limit = limit
        self._full_at: int | None = None
        self._cut = False
        self._torn = False
        self._fd = -1
        self._inotify = -1
        self._freed = start // _PAGE * _PAGE
        self._chunks: deque[_Chunk] = deque()
        self._backlog = 0
        self._lock = threading.Lock()
        self._available = asyncio.Event()
        self._posted = False  # that something is available
        self._wake = -1
        self._room = threading.Event()
        self._drained_ns = 0
        self._woken = False  # by the line that comes next
        self._finishing = False
        self._end: int | None = None
        self._ended = True
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        """Open the file and begin to read.  Raises OSError."""
        flags = os.O_RDWR if self._release is not None else os.O_RDONLY
        self._fd = open_foreign(self._path, flags, follow=True)
        self._drained_ns = time.monotonic_ns()
        self._watch()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop = asyncio.get_running_loop()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="trace log", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop_at(0)
            try:
                await in_thread(thread.join)
            finally:
                if not thread.is_alive():  # it hangs in a file system that does: it keeps its own
                    self._close()

    def _close(self) -> None:
        for handle in (self._inotify, self._wake, self._fd):
            if handle >= 0:
                os.close(handle)
        self._inotify = self._wake = self._fd = -1

    def finish(self) -> None:
        """Read what is there now, then let the iteration end (QEMU is gone, or we leave)."""
        if self._fd >= 0:
            self._stop_at(os.fstat(self._fd).st_size)

    def _stop_at(self, end: int) -> None:
        self._end = end
        self._finishing = True
        self._room.set()
        os.eventfd_write(self._wake, 1)

    @property
    def caught_up(self) -> bool:
        """Everything that is in the file now has been handed out."""
        if self._chunks or self._fd < 0:
            return False
        return os.fstat(self._fd).st_size <= self.offset

    @property
    def handed_out_ns(self) -> int:
        """Every line written before this time has been handed out."""
        if self._chunks:
            return self._chunks[0].t_after_ns
        now = time.monotonic_ns()
        return now if self.caught_up else self._drained_ns

    def __aiter__(self) -> TraceTail:
        return self

    async def __anext__(self) -> TraceBatch:
        while not self._chunks:
            if self._ended and not self._chunks:
                raise self._error or StopAsyncIteration
            self._available.clear()
            if not self._chunks and not self._ended:
                await self._available.wait()
        # A long backlog must not keep the event loop from everybody else.
        await asyncio.sleep(0)
        with self._lock:
            chunk = self._chunks.popleft()
            self._backlog -= len(chunk.data)
        self._room.set()
        if chunk.lost is not None:
            self.decoder.reset()
        records = self.decoder.feed(
            chunk.data,
            chunk.t_ns,
            since_ns=chunk.t_after_ns,
            late_ns=chunk.late_ns,
            skew_ns=time.time_ns() - time.monotonic_ns(),
        )
        return TraceBatch(records, chunk.t_after_ns, chunk.t_ns, chunk.lost, chunk.late_ns)

    def _watch(self) -> None:
        handle = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if handle < 0:
            return
        # By way of the open file, so that it is that very inode whatever the path means now.
        link = f"/proc/self/fd/{self._fd}".encode()
        if _libc.inotify_add_watch(handle, link, _IN_MODIFY | _IN_ATTRIB) < 0:
            os.close(handle)
            return
        self._inotify = handle

    # -- in the reader's thread from here on -----------------------------------------------------

    def _run(self) -> None:
        try:
            changes = select.poll()
            for handle in (self._inotify, self._wake):
                if handle >= 0:
                    changes.register(handle, select.POLLIN)
            while True:
                self._read_to_end()
                if self._finishing:
                    return
                self._woken = not changes.poll(0)
                if self._woken:
                    changes.poll(None if self._inotify >= 0 else _POLL_SECONDS * 1000)
                if self._inotify >= 0:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._inotify, 64 * 1024)
                else:
                    self._woken = False
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._post()

    def _read_to_end(self) -> None:
        written_ns: int | None = None  # not before this, what woke us
        while True:
            before = time.monotonic_ns()
            status = os.fstat(self._fd)
            if self._woken and written_ns is None:
                written_ns = before - max(0, time.time_ns() - status.st_mtime_ns)
            if status.st_size < self.offset:
                self._report_cut(status.st_size)
            if self._limit and self._full_at is None and is_full(status, self._limit):
                self._full_at = status.st_size
            size = _READ_SIZE
            if self._full_at is not None:
                size = max(0, min(size, self._full_at - self.offset))
            data = os.pread(self._fd, size, self.offset)
            now = time.monotonic_ns()
            whole = len(data) == _READ_SIZE
            if data.startswith(b"\0"):
                data = self._skip_hole(data)
            if self._torn and data:
                data = self._skip_torn(data)
            if data:
                self._cut = False
                since = self._drained_ns
                if written_ns is not None:
                    since = max(since, written_ns)
                self._put(_Chunk(data, self._drained_ns, now, now - since))
                self.offset += len(data)
                self._give_back()
            if self._full_at is not None and self.offset >= self._full_at:
                self._report_full()
                if is_full(os.fstat(self._fd), self._limit):
                    return  # another agent keeps it all
                continue
            if not whole:
                self._drained_ns = before
                return
            if self._end is not None and self.offset >= self._end:
                return
            while self._backlog > _MAX_BACKLOG and not self._finishing:
                self._room.clear()
                self._room.wait(_ROOM_SECONDS)

    def _put(self, chunk: _Chunk) -> None:
        with self._lock:
            self._chunks.append(chunk)
            self._backlog += len(chunk.data)
        self._post()

    def _post(self) -> None:
        """Tell the loop, once for all that it has not taken."""
        with self._lock:
            posted, self._posted = self._posted, True
        if not posted:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._taken_notice)

    def _taken_notice(self) -> None:
        with self._lock:
            self._posted = False
        self._available.set()

    def _report_cut(self, size: int) -> None:
        self._lose(f"the log was cut from at least {self.offset} to {size} bytes")
        self.offset = self._freed = 0
        self._full_at = None
        self._cut = True
        self._torn = False

    def _report_full(self) -> None:
        """Read up to where it was full; now there is room again."""
        self._full_at = None
        self._lose(f"the log was full ({self._limit} bytes): lines may be missing")
        self._give_back(at_once=True)

    def _lose(self, what: str) -> None:
        self._put(_Chunk(b"", self._drained_ns, time.monotonic_ns(), 0, what))

    def _skip_hole(self, data: bytes) -> bytes:
        """Go behind a hole: a log that was cut while QEMU kept its offset begins with one, and
        another reader gives back what a slow one has not read."""
        before = self.offset
        rest = data.lstrip(b"\0")
        if rest:
            self.offset += len(data) - len(rest)
        else:
            try:
                self.offset = os.lseek(self._fd, self.offset + len(data), os.SEEK_DATA)
            except OSError:
                self.offset = max(self.offset + len(data), os.fstat(self._fd).st_size)
        if not self._cut:
            self._torn = True
            self._lose(f"{self.offset - before} bytes of the log were given back before being read")
        return rest

    def _skip_torn(self, data: bytes) -> bytes:
        """What is left of a line that lay on the edge of a hole says nothing."""
        end = data.find(b"\n") + 1
        self.offset += end or len(data)
        self._torn = not end
        return data[end:] if end else b""

    def _give_back(self, *, at_once: bool = False) -> None:
        if self._release is None or (self.offset - self._freed < _FREE_STEP and not at_once):
            return
        upto = min(self._release(self.offset), self.offset) // _PAGE * _PAGE
        if upto > self._freed and give_back(self._fd, self._freed, upto):
            self._freed = upto
