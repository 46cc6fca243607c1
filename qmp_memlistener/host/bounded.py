"""Work that the kernel may keep waiting: with a deadline, or at least not in the way of the end.

Reading /proc/PID/cmdline waits for the memory of that process, and opening or reading a file for
its file system: a stranger with a FUSE mount that does not answer can make that take for ever.  No
flag prevents it, so such reads happen in a thread that is left behind when they take too long.

The threads are daemons: neither asyncio.run() nor the interpreter's exit waits for them, as both do
for those of asyncio.to_thread(), which is not used here for that reason.  Waits for FUSE and NFS
are ended by the signal that ends the process.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Generic, ParamSpec, TypeVar

__all__ = ["call", "each", "in_thread"]

P = ParamSpec("P")
K = TypeVar("K")
T = TypeVar("T")


def call(function: Callable[[], T], seconds: float) -> T:
    """The function's result.  Raises TimeoutError, and what the function raises.

    A thread that hangs ends with this process.
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


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result, while the event loop goes on.  Raises what the function raises.

    Who is cancelled goes on at once; the function does so too, and its result is dropped.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(results: list[T], error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(results[0])

    def run() -> None:
        results: list[T] = []
        error: BaseException | None = None
        try:
            results.append(function(*args, **kwargs))
        except BaseException as exc:
            error = exc
        try:
            loop.call_soon_threadsafe(settle, results, error)
        except RuntimeError:
            pass  # the loop is closed: there is no waiter any more

    threading.Thread(target=run, daemon=True, name="bounded").start()
    return await done


def each(
    function: Callable[[K], T], items: Iterable[K], *, soft: float, hard: float
) -> Iterator[tuple[K, T | Exception]]:
    """What the function returns or raises for each item, in their order; TimeoutError for those
    that take more than `hard` seconds.

    One that takes more than `soft` seconds is waited for only at the end, with all such others at
    once: they cost the rest nothing, and together `hard` seconds.
    """
    results: dict[int, tuple[K, T | Exception]] = {}
    late: list[tuple[int, K, SimpleQueue[T | Exception], float]] = []
    worker = _Worker(function)
    for number, item in enumerate(items):
        began = time.monotonic()
        worker.todo.put(item)
        try:
            results[number] = item, worker.done.get(timeout=soft)
        except Empty:
            late.append((number, item, worker.done, began + hard))
            worker.end()
            worker = _Worker(function)
    worker.end()
    for number, item, done, until in late:
        try:
            results[number] = item, done.get(timeout=max(0.001, until - time.monotonic()))
        except Empty:
            results[number] = item, TimeoutError(f"no answer within {hard:g} s")
    yield from (result for _, result in sorted(results.items(), key=lambda pair: pair[0]))


class _Worker(Generic[K, T]):
    """A thread that works through what it is given, one at a time, until `end`."""

    def __init__(self, function: Callable[[K], T]) -> None:
        self.todo: SimpleQueue[K | None] = SimpleQueue()
        self.done: SimpleQueue[T | Exception] = SimpleQueue()
        self._function = function
        threading.Thread(target=self._run, daemon=True, name="bounded").start()

    def end(self) -> None:
        self.todo.put(None)

    def _run(self) -> None:
        while (item := self.todo.get()) is not None:
            try:
                self.done.put(self._function(item))
            except Exception as error:
                self.done.put(error)
