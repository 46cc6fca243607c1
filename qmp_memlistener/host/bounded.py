"""A deadline for what the kernel may keep us waiting for.

Reading /proc/PID/cmdline waits for the memory of that process, and opening or reading a file for
its file system: a stranger with a FUSE mount that does not answer can make that take for ever.  No
flag prevents it, so such reads happen in a thread that is left behind when they take too long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["call"]

T = TypeVar("T")


def call(function: Callable[[], T], seconds: float) -> T:
    """The function's result.  Raises TimeoutError, and what the function raises.

    A thread that hangs ends with this process: it is a daemon, and waits for FUSE and NFS are ended
    by the signal that ends the process.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="bounded")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]
