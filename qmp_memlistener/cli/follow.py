"""What `watch` and `record` share: attach, print what happens, end cleanly for every reason."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING

import rich_click as click

from ..errors import InputError, MemListenerError, OperationFailed
from ..records import (
    MirrorRecord,
    Record,
    SlotOp,
    Tally,
    TransitionRecord,
)
from ..text import quoted
from ..waits import waiting
from .common import READER_GONE, duration, print_json, say, terminal_shape
from .signals import signals
from .watch_mirror import MirrorOptions, WatchedMirror, opened_mirror

if TYPE_CHECKING:
    from ..agent import Agent
    from ..agent.limits import Limits

__all__ = ["FollowOptions", "Followed", "follow", "follow_options", "not_put_back", "probe_names"]


READY_S = 10.0
"""How long a check against limits waits for its probes; a pulse's clock is known after 2 s."""


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """What a user may say of every attachment."""

    for_ns: int | None
    count: int | None
    no_trace: bool
    probes: tuple[str, ...] | None
    max_overhead: float | None
    ping_monitor: str | None
    ops_monitor: str | None


def probe_names(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """`ping,uprobes`, or `none`; whether there are such probes is the agent's to say."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise click.BadParameter("name at least one, such as ping,uprobes, or none")
    return () if names == ("none",) else names


def _share(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """`2%` or `0.02` as a part of one CPU."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise click.BadParameter(f"{quoted(text)} is not a part of one CPU such as 2%")
    return value


def follow_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of every verb that attaches; the verb gets them as `options`."""

    @wraps(function)
    def verb(
        for_ns: int | None,
        count: int | None,
        no_trace: bool,
        probes: tuple[str, ...] | None,
        max_overhead: float | None,
        ping_monitor: str | None,
        ops_monitor: str | None,
        **rest: object,
    ) -> None:
        options = FollowOptions(
            for_ns, count, no_trace, probes, max_overhead, ping_monitor, ops_monitor
        )
        function(options=options, **rest)

    for option in (
        click.option("--ops-monitor", metavar="TARGET", help="Another QMP monitor of the same "
                     "QEMU, for operations."),
        click.option("--ping-monitor", metavar="TARGET", help="Another QMP monitor of the same "
                     "QEMU, for pinging."),
        click.option("--max-overhead", callback=_share, metavar="PERCENT", help="What each probe "
                     "may take of one CPU from QEMU, such as 2%."),
        click.option("--probes", callback=probe_names, metavar="NAMES", help="Measure stalls with "
                     "these only, such as ping,uprobes, or none; `doctor` lists them. Default: "
                     "the best that work here."),
        click.option("--no-trace", is_flag=True, help="Touch neither trace events nor the log of "
                     "the guest; poll instead, short-lived holes may be missed."),
        click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N "
                     "transitions."),
        click.option("--for", "for_ns", type=duration, metavar="DURATION", help="End after this "
                     "time, such as 500ms, 30s or 5min."),
    ):  # fmt: skip
        verb = option(verb)
    return verb


@dataclass
class Followed(Tally):
    """What was seen, and why it ended (None: as asked).

    `not_always_measured` are kinds with a limit that could have been exceeded unseen;
    `mirror_fault` says what is wrong with the mirror, if there was one.
    """

    not_always_measured: tuple[str, ...] = ()
    mirror_fault: str | None = None
    error: MemListenerError | None = None


class _Printer:
    """Prints records as they come, checks limits, and says when it has had enough."""

    def __init__(
        self, count: int | None, limits: Limits | None, *, as_json: bool, quiet: bool
    ) -> None:
        from ..reports import Narrator

        self.seen = Followed()
        self.stop = asyncio.Event()
        self.reader_gone = False
        self.began = False
        self.give_up: Callable[[], object] | None = None  # while nobody waits for `stop` yet
        self._count = count
        self._last: int | None = None
        self._limits = limits
        self._as_json = as_json
        self._quiet = quiet
        width, unicode = terminal_shape()
        self._width = width
        self._narrator = Narrator(width=width, unicode=unicode)

    def take(self, record: Record) -> None:
        """A record of the agent."""
        self.began = True
        if self.reader_gone or self._is_later(record):
            return
        self._print(record)
        violation = self._limits.check(record) if self._limits is not None else None
        if violation is not None:
            self._print(violation)
        if isinstance(record, TransitionRecord) and self.seen.transitions == self._count:
            self._last = record.seq
            self.stop.set()

    def _is_later(self, record: Record) -> bool:
        """Of a transition behind the last one that was wanted; its stalls still belong to it."""
        if self._last is None:
            return False
        if isinstance(record, SlotOp):
            return record.transition != self._last
        return isinstance(record, TransitionRecord)

    def _print(self, record: Record) -> None:
        self.seen.note(record)
        try:
            if self._as_json:
                print_json(record)
            elif not self._quiet:
                for line in self._lines(record):
                    say(line)
        except OSError as exc:
            if exc.errno not in READER_GONE:
                raise
            self.reader_gone = True
            self.stop.set()
            if self.give_up is not None:
                self.give_up()

    def _lines(self, record: Record) -> Iterator[str]:
        if isinstance(record, MirrorRecord):
            from ..reports.mirror import mirror_lines

            return mirror_lines(record, width=self._width)
        return self._narrator.lines(record)

    async def tell_mirror(self, mirror: WatchedMirror) -> None:
        """What became of a mirror that has followed to the end."""
        if not self.reader_gone:
            self._print(await mirror.record())
            self.seen.mirror_fault = mirror.fault


async def follow(
    target: str,
    options: FollowOptions,
    *,
    as_json: bool = False,
    quiet: bool = False,
    record: str | None = None,
    limits: Limits | None = None,
    mirror: MirrorOptions | None = None,
) -> Followed:
    """Attach and print records until the time is over, the count reached, a signal or the end.

    `limits` are checked on the way; with a freeze among them, our other verbs may not touch
    the guest meanwhile.  With `mirror`, slots of our own follow the guest; what they need is there
    before anything is attached, and gone when this returns.
    """
    if options.for_ns == 0:
        raise InputError("--for needs a time longer than 0", remedy="such as --for 30s")
    printer = _Printer(options.count, limits, as_json=as_json, quiet=quiet)
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    printer.give_up = task.cancel
    try:
        with ExitStack() as stack:
            beside = stack.enter_context(opened_mirror(mirror)) if mirror is not None else None
            await _follow(target, options, printer, limits, record, beside)
    except asyncio.CancelledError:
        # a signal while probes were started, or nobody reads: the user has seen enough
        if not printer.began:
            raise
        task.uncancel()
    if printer.reader_gone:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    return printer.seen


async def _follow(
    target: str,
    options: FollowOptions,
    printer: _Printer,
    limits: Limits | None,
    record: str | None,
    mirror: WatchedMirror | None,
) -> None:
    from ..agent import attach

    agent = attach(
        target,
        trace=not options.no_trace,
        probes=options.probes,
        max_overhead=options.max_overhead,
        must_see=limits.stalls if limits is not None else None,
        freeze="watch --freeze" if limits is not None and limits.frozen else None,
        record=record,
        ping_monitor=options.ping_monitor,
        ops_monitor=options.ops_monitor,
        guarded=mirror is not None and mirror.options.pauses,
        on_record=printer.take,
    )
    try:
        async with agent:
            if limits is not None and limits.stalls:
                await agent.probes_started()
                limits.require_measured(agent.probes())
                with waiting("for every probe to measure"):
                    await agent.probes_ready(READY_S)
            began_ns = time.monotonic_ns()
            printer.give_up = None
            ends: list[Callable[[], object]] = [printer.stop.set]
            if mirror is not None:
                ends.append(mirror.give_up)
            with signals.asking(_one_after_the_other(ends)):
                async with mirror.following(agent) if mirror is not None else nullcontext():
                    if mirror is not None:
                        printer.take(mirror.note())
                    await _wait(agent, options, printer)
                    if limits is not None:
                        seen = agent.measured(began_ns, time.monotonic_ns())
                        printer.seen.not_always_measured = tuple(
                            str(kind) for kind in limits.stalls if kind not in seen
                        )
                    if mirror is not None and printer.reader_gone:
                        mirror.give_up()
                if mirror is not None:
                    await printer.tell_mirror(mirror)
    finally:
        if agent.unrestored and printer.seen.error is None:
            printer.seen.error = not_put_back(agent.unrestored)


def not_put_back(what: Sequence[str]) -> OperationFailed:
    """A guest that could not be left as it was found."""
    return OperationFailed(
        f"the guest was not put back as it was: {'; '.join(what)}",
        remedy="the next attach does that, or `qmp-memlistener doctor --clean`",
    )


def _one_after_the_other(calls: list[Callable[[], object]]) -> Callable[[], bool]:
    """For signals: each has the event loop make the next call; false when all are made."""
    loop = asyncio.get_running_loop()

    def end() -> bool:
        if not calls:
            return False
        loop.call_soon_threadsafe(calls.pop(0))
        return True

    return end


async def _wait(agent: Agent, options: FollowOptions, printer: _Printer) -> None:
    """Until the time is over, the count reached, a signal came, or the guest is gone."""
    lost = asyncio.create_task(agent.wait_lost())
    stopped = asyncio.create_task(printer.stop.wait())
    try:
        timeout = None if options.for_ns is None else options.for_ns / 1e9
        await asyncio.wait([lost, stopped], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            printer.seen.error = lost.result()
        elif not stopped.done():
            await agent.settle()
    finally:
        lost.cancel()
        stopped.cancel()
