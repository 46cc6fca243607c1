"""What hits are folded into: windows and commands.  Plain values; strings are still addresses."""

from __future__ import annotations

import msgspec

from ...records import SlotOp, StallKind

__all__ = ["CommandSpan", "Site", "Window"]


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
