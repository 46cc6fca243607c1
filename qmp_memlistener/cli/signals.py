"""How the command line is ended from outside, and what it prints when something takes long.

SIGINT, SIGTERM, SIGHUP (a closed terminal) and SIGQUIT mean the same: end, and put everything back.
What runs in an event loop is cancelled; elsewhere `Interrupted` is raised.  A handler in Python
is called between two instructions of the main thread, so it needs no event loop that has time
for it, and none of its wake-up pipe, which drops signals when it is full.

A further signal ends at once, when there is nothing left that could be asked more politely:
the notes that tell what is to be put back stay for the next run and `doctor --clean`, and a guard
resumes a guest that is paused.  Signals that come within `SAME_S` are one: who closes a terminal
or stops a service sends several.

A thread reports what is waited for (see `waits`), and frees a main thread that is stuck in writing
to a terminal or pipe that nobody reads.  It also takes a signal that the main thread has not taken
after `_DEAF_S`: that thread is in the kernel (a file system that does not answer), where no handler
runs.  The process then ends, when there is nothing to be put back, or at the second signal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ..waits import TELL_S, Wait, on_wait, waits

__all__ = ["EXIT_CODE", "NUMBERS", "SAME_S", "Interrupted", "Signals", "signals"]

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
EXIT_CODE = 130
"""Of a verb that a signal ended before it was done, whichever signal it was."""
SAME_S = 0.3
_STUCK_S = 0.5
_DEAF_S = 1.0
_STEP_S = 0.25


class Interrupted(BaseException):
    """A signal ended the verb before it was done."""


class Signals:
    """What this process does when it is asked to end; `install` once, in the main thread."""

    def __init__(self) -> None:
        self.taken = 0
        """Signals that a block has seen to."""
        self._asked: list[Callable[[], bool]] = []
        self._first: float | None = None
        self._last = 0.0
        self._raised = False
        self._nudging = False
        self._over = False
        self._main = threading.main_thread().ident
        self._wake = -1
        self._told: set[Wait] = set()
        self._told_end = False
        self._pending_since: float | None = None
        self._deaf = False

    @property
    def came(self) -> bool:
        """Somebody wants this process to end."""
        return self._first is not None

    def install(self) -> None:
        """Take over the signals.  SIGHUP stays ignored if it is (nohup)."""
        for number in NUMBERS:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        ours, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        threading.Thread(target=self._watch, args=(ours,), name="waits", daemon=True).start()
        on_wait(self._poke)

    def finish(self) -> None:
        """All is done but the exit itself: nothing is to be interrupted any more.

        Ignored, for Python gives its handlers up on its way out: a signal that came then would be
        the end, and not the exit code that fits what was done and said.
        """
        self._over = True
        for number in NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def asking(self, end: Callable[[], bool]) -> Iterator[None]:
        """Within the block a signal calls `end`, between two instructions of the main thread.

        It returns false when it can do no more than it has.  The innermost block counts.
        """
        self._asked.append(end)
        try:
            yield
        finally:
            self._asked.remove(end)

    # -- the main thread ---------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._nudging:
            self._nudging = False
            return
        if self._over:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._last < SAME_S:
            return
        self._last = now
        self._poke()
        if self._asked and self._asked[-1]():
            self.taken += 1
            return
        if not self._asked and not self._raised:
            self._raised = True
            raise Interrupted
        _write(2, "ended at once; `qmp-memlistener doctor` shows what is to be put back\n")
        os._exit(EXIT_CODE)

    def _poke(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake, b"\0")

    # -- the thread --------------------------------------------------------------------------

    def _watch(self, ours: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            busy = waits() or (self.came and not self._over)
            select.select([ours], [], [], _STEP_S if busy else _STUCK_S)
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 4096)
            self._take_pending()
            self._tell()
            if self._first is not None and time.monotonic() - self._first > _STUCK_S:
                self._free()

    def _take_pending(self) -> None:
        """Signals to this process that the main thread does not take: it is stuck in the kernel.

        All signals are blocked in this thread, so `sigpending` is what waits for the process.
        """
        pending = signal.sigpending() & set(NUMBERS)
        if not pending or self._over:
            self._pending_since = None
            return
        now = time.monotonic()
        self._pending_since = self._pending_since or now
        if now - self._pending_since < _DEAF_S:
            return
        self._pending_since = None
        if self._deaf or not self._asked:
            _write(2, "ended at once: the file system of one of the files does not answer\n")
            os._exit(EXIT_CODE)
        self._deaf = True
        _write(
            2,
            "a file system does not answer, so nothing can be put back yet; another signal ends "
            "this at once, `qmp-memlistener doctor` shows what is left\n",
        )
        assert self._main is not None
        for number in pending:
            if signal.sigtimedwait([number], 0) is not None:  # the thread takes it when it is back
                signal.pthread_kill(self._main, number)

    def _tell(self) -> None:
        now = time.monotonic()
        found = waits()
        self._told.intersection_update(found)
        for wait in found:
            if now - wait.since >= TELL_S and wait not in self._told:
                self._told.add(wait)
                _write(2, f"waiting {wait.what}\n")
        if self._first is None or self._over or self._told_end or now - self._first < TELL_S:
            return
        self._told_end = True
        whats = (wait.what.partition(";")[0] for wait in found)
        what = ", ".join(whats) or "for everything to be put back"
        _write(2, f"ending, but waiting {what}; another signal ends this at once\n")

    def _free(self) -> None:
        """Whoever should read what we print does not: the main thread must not wait for that."""
        stuck = [fd for fd in (1, 2) if not self._over and not _can_write(fd)]
        if not stuck or self._main is None:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in stuck:
            os.dup2(nowhere, fd)
        os.close(nowhere)
        self._nudging = True
        signal.pthread_kill(self._main, signal.SIGTERM)  # its write begins again, into nothing


def _can_write(fd: int) -> bool:
    try:
        return bool(select.select([], [fd], [], 0)[1])
    except (OSError, ValueError):
        return True


def _write(fd: int, text: str) -> None:
    """Past Python's buffers, whose lock the main thread may hold."""
    if _can_write(fd):
        with contextlib.suppress(OSError):
            os.write(fd, text.encode(errors="backslashreplace"))


signals = Signals()
"""This process's own."""
