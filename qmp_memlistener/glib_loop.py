"""An asyncio event loop that is a GLib program's main loop, so that an agent runs inside it.

    with asyncio.Runner(loop_factory=glib_loop.new_event_loop) as runner:
        runner.run(main())

While `main` runs, sources of the GLib main context are dispatched as under `GLib.MainLoop.run`:
D-Bus calls of Gio, GLib's timers, a GTK window.  Two libraries do that.  `gi.events` is PyGObject's
own (3.50 and later); `asyncio-glib` works with older ones.  The first that is installed is taken.

Both have defects, which are cured here.  asyncio-glib 0.1 loses three kinds of wake-up
(glib_selector.py); the cure takes names of it that are private, so the extra `[glib]` asks for
exactly 0.1, the last since 2019.  `gi.events` (PyGObject 3.50) tells each signal once.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from typing import Any

from .errors import MissingPrerequisite

__all__ = ["Integration", "integrations", "new_event_loop"]


class Integration(StrEnum):
    """What ties the two loops together."""

    GI_EVENTS = "gi.events"
    ASYNCIO_GLIB = "asyncio-glib"


def integrations() -> tuple[Integration, ...]:
    """Those that are installed, the one that is taken first."""
    return tuple(which for which in Integration if _module(which) is not None)


def new_event_loop(
    context: Any = None, integration: Integration | str | None = None
) -> asyncio.AbstractEventLoop:
    """A new event loop on a `GLib.MainContext` (None: the default one), for `asyncio.Runner`.

    Raises MissingPrerequisite when `integration`, or without it any, is not installed.  Do not
    run a `GLib.MainLoop` or `Gtk.Application.run` on the same context meanwhile: await a future.
    """
    installed = integrations()
    wanted = Integration(integration) if integration is not None else next(iter(installed), None)
    if wanted is None or wanted not in installed:
        raise MissingPrerequisite(
            f"{wanted or 'PyGObject'} is not installed in this Python: no loop of GLib's here",
            remedy="pip install 'qmp-memlistener[glib]' (on Debian it needs libgirepository1.0-dev "
            "and gcc), or the Debian package python3-gi with pip install asyncio-glib",
        )
    module = _module(wanted)
    if context is None:
        context = import_module("gi.repository.GLib").MainContext.default()
    cured = _gi_events if wanted is Integration.GI_EVENTS else _asyncio_glib
    return cured(module)(context)


def _module(which: Integration) -> Any:
    """The library; None when it is not installed, or older than what is needed."""
    names = {Integration.GI_EVENTS: "gi.events", Integration.ASYNCIO_GLIB: "asyncio_glib"}
    try:
        return import_module(names[which])
    except ImportError:
        return None


def _gi_events(library: Any) -> Callable[[Any], asyncio.AbstractEventLoop]:
    """PyGObject's event loop, with signals handled as asyncio does.

    `_signal_cb` of gi/events.py returns None, so GLib drops the signal's source at its first call.
    """

    class EventLoop(library.GLibEventLoop):  # type: ignore[misc]
        add_signal_handler = asyncio.SelectorEventLoop.add_signal_handler
        remove_signal_handler = asyncio.SelectorEventLoop.remove_signal_handler

    return EventLoop


def _asyncio_glib(library: Any) -> Callable[[Any], asyncio.AbstractEventLoop]:
    """asyncio-glib's event loop, which misses nothing.

    As it is, (1) a descriptor that has only hung up or failed is never reported, so a subprocess
    that ends is waited for in a busy loop; (2) what a callback of GLib's schedules while `select`
    blocks is noticed at the next timer or input, so a future that such a callback sets comes late,
    and (3) a D-Bus service of Gio's answers when its client has given up.
    """
    glib = import_module("gi.repository.GLib")
    private = library.glib_selector
    broken = glib.IOCondition.HUP | glib.IOCondition.ERR | glib.IOCondition.NVAL

    class Source(private._SelectorSource):  # type: ignore[misc, name-defined]  # noqa: SLF001
        def dispatch(self, callback: object, args: object) -> Any:
            for fd, tag in self._fd_to_tag.items():
                if self.query_unix_fd(tag) & broken:
                    # as select() has it: reading and writing do not block, but fail
                    self._fd_to_events[fd] = selectors.EVENT_READ | selectors.EVENT_WRITE
            return super().dispatch(callback, args)

    class Selector(private.GLibSelector):  # type: ignore[misc, name-defined]
        def __init__(self, context: Any) -> None:
            super().__init__(context)
            self._source.destroy()
            self._source: Any = Source(self._main_loop)
            self._source.attach(context)
            self._blocks = False

        def select(self, timeout: float | None = None) -> Any:
            self._blocks = timeout is None or timeout > 0
            try:
                return super().select(timeout)
            finally:
                self._blocks = False

        def wake(self) -> None:
            """Something is to be done: `select`, from inside which GLib called, returns."""
            if self._blocks:
                self._main_loop.quit()

    class EventLoop(library.GLibEventLoop):  # type: ignore[misc]
        def __init__(self, context: Any) -> None:
            asyncio.SelectorEventLoop.__init__(self, Selector(context))

        def call_soon(self, *args: Any, **more: Any) -> Any:
            handle = super().call_soon(*args, **more)
            self._selector.wake()
            return handle

        def call_at(self, *args: Any, **more: Any) -> Any:
            handle = super().call_at(*args, **more)
            self._selector.wake()
            return handle

    return EventLoop
