"""`compare`: one change of a guest under several strategies, again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from .common import Interrupted, json_option, print_json, printable, run_async
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
    from ..updates.operation import UpdateOptions


def _strategies(_: click.Context, __: click.Parameter, text: str) -> tuple[Strategy, ...]:
    from ..updates.model import Strategy

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in set(Strategy)]
    if unknown or not names or len(set(names)) < len(names):
        raise click.BadParameter(f"{text!r} is no list such as direct,pause,hole")
    return tuple(Strategy(name) for name in names)


@click.command("compare")
@click.argument("target")
@click.option("--resize", "size", metavar="+SIZE|-SIZE", help="What to do: more or less memory.")
@additions_options
@click.option("--strategies", default="direct,pause,hole", show_default=True, metavar="NAMES",
              callback=_strategies, help="Which to compare; the control, which does nothing, is "
              "always there.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(min=1), default=10, show_default=True, metavar="N",
              help="Rounds of each strategy.")  # fmt: skip
@click.option("--window", type=float, default=1.0, show_default=True, metavar="SECONDS",
              help="How long each round is looked at from its beginning.")  # fmt: skip
@click.option("--seed", type=int, metavar="N", help="Makes the order of the rounds; default: a new "
              "one each time.")  # fmt: skip
@update_options
@attach_options
@json_option
def command(
    attaching: Attaching,
    size: str | None,
    device: str | None,
    objects: tuple[str, ...],
    netdevs: tuple[str, ...],
    blockdevs: tuple[str, ...],
    strategies: tuple[Strategy, ...],
    repeat: int,
    window: float,
    seed: int | None,
    options: UpdateOptions,
    as_json: bool,
) -> int:
    """Change a guest under several strategies, many times in random order, and compare the stalls.

    What to do is --resize SIZE, or --device with what it stands on, as for `hotplug`. After each
    round the guest is put back as it was. A strategy that the guest does not allow is left out, and
    the reason is said.

    Exit code 1: no strategy is possible, or the guest could not be put back.

    Example: qmp-memlistener compare /run/vm.qmp --resize +256M --repeat 20
    """
    import secrets

    from ..updates.compare import CompareOptions
    from ..updates.options import parse_resize

    if (size is None) == (device is None):
        raise click.UsageError("say what to do: --resize SIZE, or --device DRIVER,id=ID,…")
    if window <= 0:
        raise click.BadParameter("a window is longer than 0", param_hint="'--window'")
    intent: Intent
    if size is not None:
        intent, what = parse_resize(size), f"resize {size}"
    else:
        assert device is not None
        intent = plug_of(device, objects, netdevs, blockdevs)
        what = f"plug {intent.device.type} {intent.device.id}"
    wanted = CompareOptions(
        repeat, window, secrets.randbelow(1_000_000) if seed is None else seed, options
    )
    found = run_async(_compare(attaching, intent, strategies, wanted))
    if as_json:
        print_json(found)
    else:
        from ..reports.compare import comparison_lines

        for line in comparison_lines(found, what):
            click.echo(printable(line))
    if found.ended_early == "interrupted":
        raise Interrupted
    return 0 if found.ended_early is None else 1


async def _compare(
    attaching: Attaching, intent: Intent, strategies: tuple[Strategy, ...], options: CompareOptions
) -> Comparison:
    from ..updates.compare import compare

    async with attaching.attach(guarded="pause" in strategies) as agent:
        for remark in agent.remarks:
            click.echo(printable(remark), err=True)
        await agent.measuring.wait_started()
        return await compare(
            agent, intent, strategies, options, lambda text: click.echo(text, err=True)
        )
