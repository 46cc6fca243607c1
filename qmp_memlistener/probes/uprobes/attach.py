"""The probes on each thread of a process: opening, switching, emptying their rings.

Everything here is called by one thread, the reader's.  What hits mean is `windows`' business, when
to look is `reader`'s.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .decode import Decoded, Decoder
from .functions import Func, Group, Point, points_of
from .perf import (
    Architecture,
    Ring,
    lost_of,
    open_dummy,
    open_uprobe,
    set_enabled,
    set_output,
)

__all__ = ["Attachment", "ThreadProbes", "thread_ids"]

_SMALLEST = 1 << 17
_LARGEST = 1 << 22
_MEMORY = 1 << 25
"""Bytes of rings in all, as long as that leaves each the smallest size."""


def thread_ids(pid: int) -> list[int]:
    """The threads of a process, the main one first; none when it is gone."""
    try:
        found = sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return []
    return sorted(found, key=lambda tid: tid != pid)


@dataclass(slots=True)
class ThreadProbes:
    """The events of one thread and its ring.  `owner` is the event that the ring belongs to."""

    tid: int
    owner: int
    ring: Ring
    groups: dict[Group, list[int]] = field(default_factory=dict)
    lost: int = 0
    """Records of these events lost that the ring has reported."""
    ended: bool = False
    calls: re.Pattern[bytes] | None = None
    """What finds runs of short commits in the ring."""

    @property
    def descriptors(self) -> list[int]:
        return [self.owner, *(fd for fds in self.groups.values() for fd in fds)]

    def untold(self) -> int:
        """Records lost that the ring has not reported: it does so with the next record only."""
        return max(0, sum(map(lost_of, self.descriptors[1:])) - self.lost)


class Attachment:
    """All probes on one process.

    `path` names its program file for the kernel.  Methods raise OSError when the kernel refuses,
    save that a thread that is gone meanwhile is simply not attached.  Opening can take seconds
    while the kernel is closing others; it ends with ECANCELED soon after `given_up` says so.
    """

    def __init__(
        self,
        arch: Architecture,
        pmu: int,
        pid: int,
        path: str,
        roles: Mapping[Func, tuple[str, int]],
        ring_bytes: int | None = None,
        given_up: Callable[[], bool] = lambda: False,
        floor_ns: int = 0,
    ) -> None:
        self.threads: dict[int, ThreadProbes] = {}
        self._arch = arch
        self._pmu = pmu
        self._pid = pid
        self._path = os.fsencode(path)
        self._roles = roles
        self._ring_bytes = ring_bytes
        self._given_up = given_up
        self._decoder = Decoder(arch, floor_ns)
        self._points: dict[int, Point] = {}

    def attach(self, tids: Sequence[int], groups: Sequence[Group]) -> list[int]:
        """Probe further threads; returns those that are now, all events on."""
        size = self._ring_bytes or _ring_size(len(self.threads) + len(tids))
        done = []
        for tid in tids:
            try:
                owner, _ = open_dummy(self._arch, tid)
            except ProcessLookupError:
                continue
            try:
                thread = ThreadProbes(tid, owner, Ring(owner, size))
            except OSError:
                os.close(owner)
                raise
            self.threads[tid] = thread
            set_enabled(owner, True)
            for group in groups:
                self._open(thread, group)
                self._switch(thread, group, True)
            done.append(tid)
        return done

    def switch(self, group: Group, on: bool) -> None:
        """Record the hits of a group or no longer do; opened at the first time, then kept."""
        for thread in self.threads.values():
            if on:
                self._open(thread, group)
            self._switch(thread, group, on)

    def remove(self, group: Group) -> list[int]:
        """Take a group out for good; returns descriptors that are to be released."""
        self.switch(group, False)
        removed = []
        for thread in self.threads.values():
            fds = thread.groups.pop(group, [])
            thread.lost -= sum(map(lost_of, fds))  # `untold` will not count them any more
            removed += fds
        return removed

    def drain(self) -> list[tuple[ThreadProbes, Decoded]]:
        """What the rings have now, thread by thread."""
        found = []
        for thread in self.threads.values():
            data = thread.ring.read()
            if data:
                now = time.monotonic_ns()
                decoded = self._decoder.decode(data, thread.tid, self._points, now, thread.calls)
                thread.lost += decoded.lost
                thread.ended |= thread.tid in decoded.ended
                found.append((thread, decoded))
        return found

    def drop(self, tid: int) -> list[int]:
        """Forget a thread; returns descriptors that are to be released."""
        thread = self.threads.pop(tid)
        thread.ring.close()
        return thread.descriptors

    def close(self) -> list[int]:
        """Forget all of them, nothing being recorded any more; returns what is to be released."""
        for thread in self.threads.values():
            for fd in thread.descriptors:
                set_enabled(fd, False)
        return [fd for tid in list(self.threads) for fd in self.drop(tid)]

    def _open(self, thread: ThreadProbes, group: Group) -> None:
        if group in thread.groups or (group in _MAIN_ONLY and thread.tid != self._pid):
            return
        fds = thread.groups[group] = []
        returns = 0  # of the event that was opened before: a function's return comes first
        for point in points_of(self._roles, group):
            if self._given_up():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            try:
                fd, ident = open_uprobe(
                    self._arch,
                    self._pmu,
                    self._path,
                    point.offset,
                    thread.tid,
                    is_return=point.is_return,
                    stack=point.stack,
                )
            except OSError as error:
                if error.errno == errno.ESRCH:
                    return
                raise
            fds.append(fd)
            set_output(fd, thread.owner)
            self._points[ident] = point
            if point.role is Func.COMMIT:
                if not point.is_return:
                    thread.calls = self._decoder.calls_of(ident, returns)
                returns = ident

    def _switch(self, thread: ThreadProbes, group: Group, on: bool) -> None:
        fds = thread.groups.get(group, [])
        for fd in fds if on else reversed(fds):
            set_enabled(fd, on)


_MAIN_ONLY = (Group.MAIN, Group.LEARN)


def _ring_size(threads: int) -> int:
    size = _LARGEST
    while size > _SMALLEST and size * threads > _MEMORY:
        size //= 2
    return size
