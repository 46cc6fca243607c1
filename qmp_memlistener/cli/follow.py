"""What `watch` and `record` share: attach, print what happens, end cleanly for every reason."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import rich_click as click

from ..errors import InputError, MemListenerError
from ..recording import Lost, Reconciled, Record, SlotOp, TransitionRecord
from .common import duration, print_json, printable

__all__ = ["FollowOptions", "Followed", "follow", "follow_options"]


@dataclass(frozen=True, slots=True)
class FollowOptions:
    """What a user may say of every attachment."""

    for_ns: int | None
    count: int | None
    no_trace: bool
    ping_monitor: str | None
    ops_monitor: str | None


def follow_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of every verb that attaches; the verb gets them as `options`."""

    @wraps(function)
    def verb(
        for_ns: int | None,
        count: int | None,
        no_trace: bool,
        ping_monitor: str | None,
        ops_monitor: str | None,
        **rest: object,
    ) -> None:
        options = FollowOptions(for_ns, count, no_trace, ping_monitor, ops_monitor)
        function(options=options, **rest)

    for option in (
        click.option("--ops-monitor", metavar="TARGET", help="Another QMP monitor of the same "
                     "QEMU, for operations."),
        click.option("--ping-monitor", metavar="TARGET", help="Another QMP monitor of the same "
                     "QEMU, for pinging."),
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
class Followed:
    """What was seen, and why it ended (None: as asked)."""

    transitions: int = 0
    slot_ops: int = 0
    differences: int = 0
    lost: int = 0
    error: MemListenerError | None = None

    def note(self, record: Record) -> None:
        match record:
            case TransitionRecord():
                self.transitions += 1
            case SlotOp():
                self.slot_ops += 1
            case Reconciled(equal=False):
                self.differences += 1
            case Lost():
                self.lost += 1


async def follow(
    target: str,
    options: FollowOptions,
    *,
    as_json: bool = False,
    quiet: bool = False,
    record: str | None = None,
) -> Followed:
    """Attach and print records until the time is over, the count reached, a signal or the end."""
    from ..agent import attach
    from ..reports import Narrator

    if options.for_ns == 0:
        raise InputError("--for needs a time longer than 0", remedy="such as --for 30s")
    seen = Followed()
    narrator = Narrator()
    stop = asyncio.Event()
    reader_gone = False
    enough = False

    def on_record(r: Record) -> None:
        nonlocal reader_gone, enough
        if enough or reader_gone:
            return
        if options.count is not None and seen.transitions >= options.count:
            # the operations of the last one still belong to it
            enough = not (isinstance(r, SlotOp) and r.transition is not None)
            stop.set()
            if enough:
                return
        seen.note(r)
        if seen.transitions == options.count:
            stop.set()
        try:
            if as_json:
                print_json(r)
            elif not quiet:
                for line in narrator.lines(r):
                    click.echo(printable(line))
        except BrokenPipeError:
            reader_gone = True
            stop.set()

    async with attach(
        target,
        trace=not options.no_trace,
        record=record,
        ping_monitor=options.ping_monitor,
        ops_monitor=options.ops_monitor,
        on_record=on_record,
    ) as agent:
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, stop.set)
        lost = asyncio.create_task(agent.wait_lost())
        stopped = asyncio.create_task(stop.wait())
        try:
            timeout = None if options.for_ns is None else options.for_ns / 1e9
            await asyncio.wait(
                [lost, stopped], timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if lost.done():
                seen.error = lost.result()
            elif not stopped.done():
                await agent.settle()
        finally:
            lost.cancel()
            stopped.cancel()
    if reader_gone:
        raise BrokenPipeError
    return seen
