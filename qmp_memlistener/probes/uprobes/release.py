"""Closing many uprobes without waiting for it.

The kernel waits for several RCU grace periods at each uprobe that is closed for good, one after the
other: 85 ms each (measured on 6.18), seconds for a guest.  Nobody must wait for that who wants to
end, and a process that ends is not gone before its last one is closed.  So the descriptors are
handed to a process that has nothing else to do: it inherits them, we close ours at no cost, and
it ends.

The kernel has one lock for opening and closing uprobes.  Who opens some waits for it once or twice,
each time for as many closings as there are processes that close: so these take turns.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

from ...errors import MemListenerError
from ...host.state import own_directory

__all__ = ["release", "wait_released"]

_SHELL = "/bin/sh"
_TURN = "uprobes-release"
_TURN_S = 60  # whoever has its turn for longer hangs
_at_work: set[threading.Thread] = set()


def release(fds: Sequence[int]) -> threading.Thread | None:
    """Close all of them, at once as far as this process is concerned.

    The thread that is returned ends when the kernel is done; it need not be waited for.
    """
    if not fds:
        return None
    wait, go = os.pipe2(os.O_CLOEXEC)
    keep = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds]  # onto itself: it is then inherited
    # A reader of our output must see its end when we end, not when the kernel is done.
    mute: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)
    ]
    command = "read _"
    turn = _turn()
    if turn >= 0:
        # two descriptors of it, so that it is closed last whatever the order
        keep += [(os.POSIX_SPAWN_DUP2, turn, max(*fds, turn) + 1)]
        mute += [(os.POSIX_SPAWN_DUP2, turn, 1)]
        command += f"; flock -w {_TURN_S} 1"
    try:
        pid = os.posix_spawn(
            _SHELL,
            ["sh", "-c", command],
            {"PATH": os.defpath},
            file_actions=[*keep, (os.POSIX_SPAWN_DUP2, wait, 0), *mute],
            setsid=True,
        )
    except OSError:
        pid = 0
    finally:
        os.close(wait)
        if turn >= 0:
            os.close(turn)
    if pid:
        _close(fds)
        os.close(go)
        work = threading.Thread(target=_reap, args=(pid,), name="uprobes release", daemon=True)
    else:
        os.close(go)
        work = threading.Thread(target=_close, args=(fds,), name="uprobes release", daemon=True)
    work.start()
    _at_work.difference_update([thread for thread in _at_work if not thread.is_alive()])
    _at_work.add(work)
    return work


def wait_released(timeout: float) -> bool:
    """Wait until the kernel has taken out everything that this process gave back; blocks.

    Until then the kernel opens new uprobes slowly, on the whole host: it does one thing at a time.
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


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
