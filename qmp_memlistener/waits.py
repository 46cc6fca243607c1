"""What is being waited for right now, in words.

    with waiting("for the kernel to take out uprobes"):
        ...

Anything that may last longer than a second or two is inside such a block; the command line reports
what lasts longer than `TELL_S`.  Blocks may be entered in any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["TELL_S", "Wait", "begin", "end", "on_wait", "waiting", "waits"]

TELL_S = 2.0
"""A wait that lasts longer is reported to the user."""


@dataclass(eq=False, slots=True)
class Wait:
    """One wait: what for, and since when on CLOCK_MONOTONIC, in seconds."""

    what: str
    since: float = field(default_factory=time.monotonic)


_waits: dict[Wait, None] = {}
_begun: list[Callable[[], None]] = []


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """`what` completes "waiting"."""
    wait = begin(what)
    try:
        yield
    finally:
        end(wait)


def begin(what: str) -> Wait:
    """The same where no block can be: `end` it in any case."""
    wait = Wait(what)
    _waits[wait] = None
    for tell in _begun:
        tell()
    return wait


def end(wait: Wait) -> None:
    """It is over.  Idempotent."""
    _waits.pop(wait, None)


def waits() -> list[Wait]:
    """Those that go on, the longest first."""
    return list(_waits)


def on_wait(tell: Callable[[], None]) -> None:
    """Call `tell` whenever a wait begins, in the thread that waits; it must not block."""
    _begun.append(tell)
