"""Closing many uprobes without waiting for it.

The kernel waits for several RCU grace periods at each uprobe that is closed for good, one after the
other: 85 ms each (measured on 6.18), seconds for a guest.  Nobody must wait for that who wants to
end, and a process that ends is not gone before its last one is closed.  So the descriptors are
handed to a process that has nothing else to do: it inherits them, we close ours at no cost, and
it ends.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

__all__ = ["release", "wait_released"]

_SHELL = "/bin/sh"
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
    mute = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    try:
        pid = os.posix_spawn(
            _SHELL,
            ["sh", "-c", "read _"],
            {},
            file_actions=[*keep, (os.POSIX_SPAWN_DUP2, wait, 0), *mute],
            setsid=True,
        )
    except OSError:
        pid = 0
    finally:
        os.close(wait)
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


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
