"""What a thread is in, and what its hits are folded into: calls, windows, commands.

Plain values, made by `windows`; strings are still addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ...records import SlotOp, StallKind
from .decode import Hit
from .functions import Func

__all__ = ["Call", "CommandSpan", "Site", "Span", "Thread", "Window"]


class Site(msgspec.Struct, frozen=True, gc=False):
    """A place in QEMU's source as the lock functions are told: address of the name, and line."""

    file: int
    line: int


class Window(msgspec.Struct, frozen=True, gc=False):
    """A stall in `[start_ns, end_ns)`, at least `at_least_ns` long, caused or suffered by `tid`.

    COMMIT: `inner` inside another one of that thread; `updates` slot updates are in it.
    """

    kind: StallKind
    tid: int
    start_ns: int
    end_ns: int
    at_least_ns: int
    site: Site | None = None
    update: SlotOp | None = None
    handoffs: int | None = None
    inner: bool = False
    updates: int = 0


class CommandSpan(msgspec.Struct, frozen=True, gc=False):
    """A command between its beginning and its end; `info` is the address of its QmpCommand.

    0 for a command of an HMP monitor.
    """

    info: int
    start_ns: int
    end_ns: int


_MOST = 64


@dataclass(slots=True)
class Call:
    """It began at `t_ns`, with `hits` of its thread before it, and returns to `sp`.

    `slot` is the ioctl's argument, `updates` counts the slot updates in it.  `real`: it is a
    resume_all_vcpus that resumes.
    """

    role: Func
    sp: int
    t_ns: int
    hits: int
    site: Site | None = None
    slot: tuple[int, int, int, int, int] | None = None
    updates: int = 0
    real: bool = False


@dataclass(slots=True)
class Span:
    """Something that began: a hold, an inhibition."""

    t_ns: int
    hits: int
    site: Site | None = None
    sure_ns: int = 0


@dataclass(slots=True)
class Thread:
    """A thread whose probes are all in place from `since_ns` on; the youngest call is the last."""

    tid: int
    since_ns: int
    hits: int = 0
    calls: list[Call] = field(default_factory=list)
    hold: Span | None = None
    inhibit: Span | None = None
    last: Hit | None = None

    def begin(self, call: Call) -> None:
        """A call begins.  One of the same function at the same place must have ended unseen."""
        self.end(call.role, call.sp)
        if len(self.calls) >= _MOST:
            self.calls.clear()
        self.calls.append(call)

    def end(self, role: Func, sp: int) -> Call | None:
        """The youngest call of that function at that place on the stack has ended.

        No function whose return is probed can switch coroutines, so calls of a thread nest, and
        those that began later have ended too.
        """
        calls = self.calls
        for i in range(len(calls) - 1, -1, -1):
            call = calls[i]
            if call.sp == sp and call.role is role:
                del calls[i:]
                return call
        return None
