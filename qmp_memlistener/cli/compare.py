"""`compare`: one change of a guest under several strategies, again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from .common import Interrupted, duration, json_option, print_json, run_async, say
from .update_options import (
    Attaching,
    additions_options,
    attach_options,
    plug_of,
    update_options,
)

if TYPE_CHECKING:
    from ..updates.compare import CompareOptions, Comparison
    from ..updates.model import Intent, Strategy
    from ..updates.settings import UpdateOptions


def _strategies(_: click.Context, __: click.Parameter, text: str) -> tuple[Strategy, ...]:
    from ..updates.model import Strategy
    from ..updates.options import shown

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in set(Strategy)]
    if unknown or not names or len(set(names)) < len(names):
        raise click.BadParameter(f"{shown(text)} is not a list such as direct,pause,hole")
    return tuple(Strategy(name) for name in names)


@click.command("compare", context_settings={"ignore_unknown_options": True})
@click.argument("target")
@click.argument("intent", required=False)
@additions_options
@click.option("--strategies", default="direct,pause,hole", show_default=True, metavar="NAMES",
              callback=_strategies, help="Which to compare; the control, which does nothing, is "
              "always there.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(min=1), default=10, show_default=True, metavar="N",
              help="Rounds of each strategy.")  # fmt: skip
@click.option("--window", type=duration, default="1s", show_default=True, metavar="DURATION",
              help="How long each round is observed from its first command on.")  # fmt: skip
@click.option("--seed", type=int, metavar="N", help="Seed for the order of the rounds; default: "
              "a new one each time.")  # fmt: skip
@update_options
@attach_options
@json_option
def command(
    attaching: Attaching,
    intent: str | None,
    device: str | None,
    objects: tuple[str, ...],
    netdevs: tuple[str, ...],
    blockdevs: tuple[str, ...],
    strategies: tuple[Strategy, ...],
    repeat: int,
    window: int,
    seed: int | None,
    options: UpdateOptions,
    as_json: bool,
) -> int:
    """Change a guest under several strategies, many times in random order, and compare the stalls.

    INTENT is a change of memory (+256M, -256M, =4G) or a device (DRIVER,id=ID,…, which can be
    given as --device as well), with its backends as for `hotplug`. After each round the guest is
    put back as it was; Ctrl-C does that too, and shows the rounds so far. A strategy that the
    guest does not allow is left out, with the reason.

    Exit code 1: no strategy is possible, or the guest could not be put back.

    Example: qmp-memlistener compare /run/vm.qmp +256M --repeat 20
    """
    import secrets

    from ..updates.compare import INTERRUPTED, CompareOptions

    if (intent is None) == (device is None):
        raise click.UsageError("give an INTENT such as +256M, or --device DRIVER,id=ID,…")
    if window <= 0:
        raise click.BadParameter("a window must be longer than 0", param_hint="'--window'")
    change, what = _intent(intent or device or "", objects, netdevs, blockdevs)
    wanted = CompareOptions(
        repeat, window / 1e9, secrets.randbelow(1_000_000) if seed is None else seed, options
    )
    found = run_async(_compare(attaching, change, strategies, wanted), cancels=2)
    if as_json:
        print_json(found)
    else:
        from ..reports.compare import comparison_lines

        for line in comparison_lines(found, what):
            say(line)
    if found.ended_early == INTERRUPTED:
        raise Interrupted
    return found.exit_code


def _intent(
    text: str, objects: tuple[str, ...], netdevs: tuple[str, ...], blockdevs: tuple[str, ...]
) -> tuple[Intent, str]:
    """The intent, and what it is in words.  Raises InputError, UsageError."""
    from ..updates.options import parse_resize

    if text[:1] in ("+", "-", "="):
        if objects or netdevs or blockdevs:
            raise click.UsageError("a change of memory makes its own backends")
        return parse_resize(text), f"resize {text}"
    plug = plug_of(text, objects, netdevs, blockdevs)
    return plug, f"plug {plug.device.type} {plug.device.id}"


async def _compare(
    attaching: Attaching, intent: Intent, strategies: tuple[Strategy, ...], options: CompareOptions
) -> Comparison:
    from ..updates.compare import compare

    async with attaching.attached(guarded="pause" in strategies) as agent:
        return await compare(agent, intent, strategies, options, lambda text: say(text, err=True))
