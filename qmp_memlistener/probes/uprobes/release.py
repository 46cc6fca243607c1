"""Closing many uprobes without waiting for it, and without others having to.

The kernel waits for several RCU grace periods at each uprobe that is closed for good, one after the
other: 85 ms each (measured on 6.18), seconds for a guest.  Nobody must wait for that who wants to
end, and a process that ends is not gone before its last one is closed.  So the descriptors are
handed to a process that has nothing else to do: it inherits them, we close ours at no cost, and
it ends.  Who opens uprobes goes first (see `closing`): it waits for one to be closed at most.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from ...errors import MemListenerError
from ...host.state import own_directory
from . import closing
from .closing import close_in_turns, wait_for_turn

__all__ = ["opening", "release", "wait_released"]

_TURN = "uprobes-release"
_OPENING_S = 5.0
_at_work: set[threading.Thread] = set()


def release(fds: Sequence[int]) -> threading.Thread | None:
    """Close all of them, at once as far as this process is concerned.

    The thread that is returned ends when the kernel is done; it need not be waited for.
    """
    if not fds:
        return None
    wait, go = os.pipe2(os.O_CLOEXEC)
    turn = _turn()
    handles = [*fds, *([turn] if turn >= 0 else [])]
    keep = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in handles]  # onto itself: it is then inherited
    # A reader of our output must see its end when we end, not when the kernel is done.
    mute = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", closing.__file__, str(turn), *map(str, fds)],
            {},
            file_actions=[*keep, (os.POSIX_SPAWN_DUP2, wait, 0), *mute],
            setsid=True,
        )
    except OSError:
        pid = 0
    finally:
        os.close(wait)
    if pid:
        for fd in handles:
            os.close(fd)
    os.close(go)
    what = partial(_reap, pid) if pid else partial(_close, turn, fds)
    work = threading.Thread(target=what, name="uprobes release", daemon=True)
    work.start()
    _at_work.difference_update([thread for thread in _at_work if not thread.is_alive()])
    _at_work.add(work)
    return work


@contextmanager
def opening(given_up: Callable[[], bool]) -> Iterator[None]:
    """Within it uprobes are opened: of this user's others are not closed meanwhile.

    Entering takes as long as the kernel needs for one, or until `given_up` says so.
    """
    turn = _turn()
    if turn < 0:
        yield
        return
    try:
        wait_for_turn(turn, _OPENING_S, given_up)
        yield
    finally:
        os.close(turn)


def wait_released(timeout: float) -> bool:
    """Wait until the kernel has taken out everything that this process gave back; blocks.

    Until then the kernel opens new uprobes slowly for other users: it does one thing at a time.
    """
    end = time.monotonic() + timeout
    for thread in tuple(_at_work):
        thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in _at_work)


def _turn() -> int:
    """The file that is locked by who closes; -1 when there can be none."""
    try:
        state = own_directory()
        try:
            return state.open(_TURN, os.O_RDWR)
        except OSError:
            return state.create(_TURN)
    except (OSError, MemListenerError):
        return -1


def _close(turn: int, fds: Sequence[int]) -> None:
    close_in_turns(turn, fds)
    if turn >= 0:
        os.close(turn)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
