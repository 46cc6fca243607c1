"""Whose turn it is to open or to close uprobes, and the program that closes them.

The kernel has one lock for opening and closing uprobes (event_mutex, kernel/trace), and keeps it
over several RCU grace periods for each one that is closed for good.  A closer that closes one after
the other leaves hardly a moment for who wants to open some: it waits for one closing after another.
So closers close one at a time, and only while nobody of ours opens any.

Run as a program this closes what it inherits: it needs nothing but the standard library.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Sequence

__all__ = ["close_in_turns", "wait_for_turn"]

_LOOK_S = 0.002  # so often who opens looks whether it may
_PAUSE_S = 0.02  # so long who closes leaves to others between two
_TURN_S = 60  # whoever has its turn for longer hangs


def wait_for_turn(turn: int, wait_s: float, given_up: Callable[[], bool]) -> None:
    """Have none of our closers at work until `turn` is closed; not for longer than `wait_s`."""
    _lock(turn, fcntl.LOCK_SH, wait_s, _LOOK_S, given_up)


def close_in_turns(turn: int, fds: Sequence[int]) -> None:
    """Close all of them, whenever it is our turn; `turn` is -1 where there are none."""
    for fd in fds:
        if turn >= 0:
            _lock(turn, fcntl.LOCK_EX, _TURN_S, _PAUSE_S)
        os.close(fd)
        if turn >= 0:
            fcntl.flock(turn, fcntl.LOCK_UN)
            time.sleep(_PAUSE_S)


def _lock(
    turn: int, how: int, wait_s: float, look_s: float, given_up: Callable[[], bool] = lambda: False
) -> None:
    end = time.monotonic() + wait_s
    while time.monotonic() < end and not given_up():
        try:
            fcntl.flock(turn, how | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(look_s)
        except OSError:
            return  # no locks there
        else:
            return


if __name__ == "__main__":
    os.read(0, 1)  # until nobody else has them
    close_in_turns(int(sys.argv[1]), [int(fd) for fd in sys.argv[2:]])
