"""What `hotplug`, `unplug`, `resize` and `compare` share: options, attaching, the outcome's end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING

import rich_click as click

from .common import Interrupted, duration, print_error, print_json, run_async, say, terminal_shape
from .follow import not_put_back, probe_names

if TYPE_CHECKING:
    from ..agent import Agent
    from ..updates.model import Intent, Outcome, Plug
    from ..updates.settings import UpdateOptions

__all__ = [
    "Attaching",
    "additions_options",
    "attach_options",
    "plug_of",
    "run_update",
    "strategy_option",
    "update_options",
]


@dataclass(frozen=True, slots=True)
class Attaching:
    """How to attach for an update."""

    target: str
    no_trace: bool
    probes: tuple[str, ...] | None
    record: str | None
    ping_monitor: str | None
    ops_monitor: str | None

    @asynccontextmanager
    async def attached(self, *, guarded: bool) -> AsyncIterator[Agent]:
        """An agent whose probes start once it is known what is to be done; its remarks are printed.

        With `guarded` a monitor is kept free for the guard, as pausing needs it.
        """
        from ..agent import attach

        async with attach(
            self.target,
            trace=not self.no_trace,
            probes=self.probes,
            record=self.record,
            ping_monitor=self.ping_monitor,
            ops_monitor=self.ops_monitor,
            guarded=guarded,
            probes_at_once=False,
        ) as agent:
            for remark in agent.remarks:
                say(remark, err=True)
            yield agent
        if agent.unrestored:
            print_error(not_put_back(agent.unrestored))


def attach_options(function: Callable[..., int]) -> Callable[..., int]:
    """How to attach; the verb gets that and its `target` as `attaching`."""

    @wraps(function)
    def verb(
        target: str,
        no_trace: bool,
        probes: tuple[str, ...] | None,
        record: str | None,
        ping_monitor: str | None,
        ops_monitor: str | None,
        **rest: object,
    ) -> int:
        attaching = Attaching(target, no_trace, probes, record, ping_monitor, ops_monitor)
        return function(attaching=attaching, **rest)

    for option in (
        click.option("--ops-monitor", metavar="TARGET", help="Another QMP monitor of the same "
                     "QEMU, for the commands."),
        click.option("--ping-monitor", metavar="TARGET", help="Another QMP monitor of the same "
                     "QEMU, for pinging."),
        click.option("--probes", callback=probe_names, metavar="NAMES", help="Measure stalls with "
                     "these only, such as ping,uprobes, or none. Default: the best that work."),
        click.option("--no-trace", is_flag=True, help="Touch neither trace events nor the log of "
                     "the guest; poll instead."),
        click.option("-o", "--record", metavar="FILE", help="Write a recording to this new file."),
    ):  # fmt: skip
        verb = option(verb)
    return verb


def strategy_option(function: Callable[..., int]) -> Callable[..., int]:
    """`--strategy`."""
    return click.option(
        "--strategy", type=click.Choice(["direct", "pause", "hole"]), default="direct",
        show_default=True, help="direct: the update alone. pause: all vCPUs are paused for "
        "it. hole: the change stays inside a region that was reserved beforehand.",
    )(function)  # fmt: skip


def update_options(function: Callable[..., int]) -> Callable[..., int]:
    """How to carry out an update; the verb gets them as `options`.

    A verb with a `strategy` takes those for a pause with that one only.  Raises InputError.
    """

    @wraps(function)
    def verb(max_pause: int, wait: int, guard_monitor: str | None, **rest: object) -> int:
        from ..qmp import parse_target
        from ..updates.settings import UpdateOptions

        if not max_pause:
            raise click.BadParameter("a pause must be longer than 0", param_hint="'--max-pause'")
        if guard_monitor is not None:
            if rest.get("strategy", "pause") != "pause":
                raise click.UsageError("--guard-monitor goes with --strategy pause only")
            parse_target(guard_monitor)
        options = UpdateOptions(
            max_pause_s=max_pause / 1e9,
            wait_s=wait / 1e9,
            guard_monitor=guard_monitor,
        )
        return function(options=options, **rest)

    for option in (
        click.option("--guard-monitor", metavar="TARGET", help="Another QMP monitor of the same "
                     "QEMU, for the guard that resumes the guest if we cannot."),
        click.option("--wait", type=duration, default="10s", show_default=True, metavar="DURATION",
                     help="How long the guest may take for its part."),
        click.option("--max-pause", type=duration, default="2s", show_default=True,
                     metavar="DURATION", help="The longest pause; a guard ends it."),
    ):  # fmt: skip
        verb = option(verb)
    return verb


def additions_options(function: Callable[..., int]) -> Callable[..., int]:
    """`--device` and its backends; the verb gets them as `device`, `objects`, …"""
    for option in (
        click.option("--blockdev", "blockdevs", multiple=True, metavar="DRIVER,node-name=ID,…",
                     help="A block node to make first; may be repeated."),
        click.option("--netdev", "netdevs", multiple=True, metavar="TYPE,id=ID,…",
                     help="A network backend to make first; may be repeated."),
        click.option("--object", "objects", multiple=True, metavar="TYPE,id=ID,…",
                     help="An object to make first, such as a memory backend; may be repeated."),
        click.option("--device", metavar="DRIVER,id=ID,…", help="The device, as QEMU's -device "
                     "takes it (a comma in a value is written twice), or as JSON."),
    ):  # fmt: skip
        function = option(function)
    return function


def plug_of(
    device: str, objects: tuple[str, ...], netdevs: tuple[str, ...], blockdevs: tuple[str, ...]
) -> Plug:
    """The intent that the options say.  Raises InputError."""
    from ..updates.model import Plug, Role
    from ..updates.options import parse_addition

    backends = [
        parse_addition(role, text)
        for role, texts in (
            (Role.OBJECT, objects),
            (Role.NETDEV, netdevs),
            (Role.BLOCKDEV, blockdevs),
        )
        for text in texts
    ]
    return Plug(parse_addition(Role.DEVICE, device), tuple(backends))


def run_update(
    attaching: Attaching,
    intent: Intent | Callable[[Agent], Awaitable[Intent]],
    strategy: str,
    options: UpdateOptions,
    what: str,
    *,
    as_json: bool,
) -> int:
    """Carry it out, print what came of it, and return the exit code.

    An `intent` that depends on the guest is asked for once it is attached to.
    A first signal ends the update in order; what came of it is printed all the same, and
    Interrupted is raised then.
    """
    from ..updates.model import Result
    from ..updates.settings import Waiting

    waiting = Waiting()
    printed = False

    def tell(outcome: Outcome) -> None:
        nonlocal printed
        if not printed:
            printed = True
            _print(outcome, what, as_json=as_json)

    async def work() -> int:
        outcome = await _update(attaching, intent, strategy, replace(options, waiting=waiting))
        tell(outcome)  # as long as signals are handled, so that none falls between
        return 0 if outcome.outcome is Result.DONE else 1

    try:
        code = run_async(work(), signalled=waiting.end)
    except Interrupted:
        tell(waiting.outcome or _untouched(strategy))
        raise
    if waiting.enough.is_set():
        raise Interrupted
    return code


def _print(outcome: Outcome, what: str, *, as_json: bool) -> None:
    if as_json:
        print_json(outcome)
        return
    from ..reports.updates import outcome_lines

    width, _ = terminal_shape()
    for line in outcome_lines(outcome, what, width=width):
        say(line)


async def _update(
    attaching: Attaching,
    intent: Intent | Callable[[Agent], Awaitable[Intent]],
    strategy: str,
    options: UpdateOptions,
) -> Outcome:
    from ..updates.model import Strategy

    async with attaching.attached(guarded=strategy == Strategy.PAUSE) as agent:
        wanted = await intent(agent) if callable(intent) else intent
        return await agent.update(wanted, Strategy(strategy), options)


def _untouched(strategy: str) -> Outcome:
    """Of an update that a signal ended before it began."""
    from ..updates.model import GuestStates, Outcome, Result, Strategy

    return Outcome(
        outcome=Result.REFUSED,
        reason="interrupted: nothing was touched",
        strategy=Strategy(strategy),
        guest_state=GuestStates("unknown", "unknown"),
        interrupted=True,
    )
