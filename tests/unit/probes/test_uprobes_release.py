"""Closing in the background: all is closed, one at a time, and never while somebody opens."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import pytest

from qmp_memlistener.probes.uprobes import wait_released
from qmp_memlistener.probes.uprobes.release import opening, release

COUNT = 24


@pytest.fixture
def ends() -> Iterator[tuple[list[int], list[int]]]:
    """Reading ends of pipes, which tell when the others are closed, and those others."""
    pairs = [os.pipe2(os.O_CLOEXEC) for _ in range(COUNT)]
    yield [r for r, _ in pairs], [w for _, w in pairs]
    for reading, _ in pairs:
        os.close(reading)


def closed(readers: list[int]) -> int:
    """How many have nobody at the other end."""
    poll = select.poll()
    for fd in readers:
        poll.register(fd, 0)
    return sum(bool(events & select.POLLHUP) for _, events in poll.poll(0))


def never() -> bool:
    return False


def test_what_is_released_is_closed_here_at_once_and_everywhere_in_the_end(
    ends: tuple[list[int], list[int]],
) -> None:
    readers, writers = ends
    before = len(os.listdir("/proc/self/fd"))
    assert release(writers) is not None
    assert len(os.listdir("/proc/self/fd")) == before - COUNT
    assert wait_released(30)
    assert closed(readers) == COUNT


def test_nothing_is_closed_while_somebody_opens(ends: tuple[list[int], list[int]]) -> None:
    readers, writers = ends
    with opening(never), opening(never):  # as many as like
        work = release(writers)
        assert work is not None
        time.sleep(0.3)  # what must not happen cannot be waited for
        assert closed(readers) == 0
    assert wait_released(30)
    assert closed(readers) == COUNT


def test_who_opens_waits_for_one_at_most(ends: tuple[list[int], list[int]]) -> None:
    readers, writers = ends
    release(writers)
    for _ in range(3):
        while not (begun := closed(readers)):
            time.sleep(0.001)
        with opening(never):
            now = closed(readers)
            time.sleep(0.03)
            assert begun <= now == closed(readers) < COUNT
    assert wait_released(30)
    assert closed(readers) == COUNT


def test_who_gives_up_does_not_wait(ends: tuple[list[int], list[int]]) -> None:
    """Where somebody else keeps the turn, it is not waited for either."""
    _, writers = ends
    release(writers)
    start = time.monotonic()
    with opening(lambda: True):
        assert time.monotonic() - start < 1
    assert wait_released(30)
