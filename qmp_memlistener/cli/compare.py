"""`compare`: one change of a guest under several strategies, again and again."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

import rich_click as click

from .common import (
    Interrupted,
    duration,
    json_option,
    new_file,
    print_json,
    run_async,
    say,
    target_argument,
)
from .steer import confirm_loading
from .update_options import (
    Attaching,
    additions_options,
    attach_options,
    plug_of,
    update_options,
)

if TYPE_CHECKING:
    from ..updates.compare import CompareOptions, Comparison
    from ..updates.compare.steered import SteeredStrategy
    from ..updates.model import Intent, Strategy
    from ..updates.settings import UpdateOptions

S = TypeVar("S", bound=StrEnum)
_TRANSITIONS = ("pam", "smram", "tseg", "mmconfig", "reset")
_UPDATE_WINDOW_NS = 1_000_000_000
_GUEST_WINDOW_NS = 60_000_000_000


@click.command("compare", context_settings={"ignore_unknown_options": True})
@target_argument()
@click.argument("intent", required=False)
@additions_options
@click.option("--transition", type=click.Choice(_TRANSITIONS), help="In place of INTENT: what the "
              "pulse guest does and takes back.")  # fmt: skip
@click.option("--guest-made", type=click.IntRange(min=1), metavar="N", help="In place of INTENT: "
              "N transitions a round, whatever the guest itself makes.")  # fmt: skip
@click.option("--strategies", metavar="NAMES", help="Which to compare; the control is always "
              "there. Default: direct,pause,hole; what the guest makes: with inhibit.")  # fmt: skip
@click.option("--repeat", type=click.IntRange(min=1), default=10, show_default=True, metavar="N",
              help="Rounds of each strategy.")  # fmt: skip
@click.option("--window", type=duration, metavar="DURATION", help="How long each round is observed "
              "from its first command on (default: 1s); with --guest-made how long it may last "
              "(60s).")  # fmt: skip
@click.option("--seed", type=int, metavar="N", help="Seed for the order of the rounds; default: "
              "a new one each time.")  # fmt: skip
@update_options
@attach_options
@click.option("--yes", is_flag=True, help="With --transition or --guest-made: do not ask on a "
              "terminal before QEMU is steered.")  # fmt: skip
@click.option("--full", is_flag=True, help="All tables, not only the answer.")
@click.option("--page", "output", metavar="FILE", help="Write a page for a browser to this new "
              "file, as -o does with a name that ends in .html.")  # fmt: skip
@json_option
def command(
    attaching: Attaching,
    intent: str | None,
    device: str | None,
    objects: tuple[str, ...],
    netdevs: tuple[str, ...],
    blockdevs: tuple[str, ...],
    transition: str | None,
    guest_made: int | None,
    strategies: str | None,
    repeat: int,
    window: int | None,
    seed: int | None,
    options: UpdateOptions,
    yes: bool,
    full: bool,
    output: str | None,
    as_json: bool,
) -> int:
    """Change a guest under several strategies, many times in random order, and compare the stalls.

    INTENT is a change of memory (+256M, -256M, =4G) or a device (DRIVER,id=ID,…, which can be
    given as --device as well), with its backends as for `hotplug`. After each round the guest is
    put back as it was; Ctrl-C does that too, and shows the rounds so far. A strategy that the
    guest does not allow is left out, with the reason.

    With --transition or --guest-made the strategies are applied inside QEMU (see `steer`) to what
    the guest itself does. QEMU is steered meanwhile only; on a terminal it asks before.

    The report ends with what differs, by how much and how sure that is; --full and -o show it all.

    Exit code 1: no strategy is possible, or the guest could not be put back. 4: QEMU cannot be
    steered.

    Example: qmp-memlistener compare /run/vm.qmp +256M --repeat 20
    """
    import secrets

    from ..updates.compare import INTERRUPTED, CompareOptions
    from ..updates.compare.steered import SteeredStrategy
    from ..updates.model import Strategy

    asked = [x for x in (intent, device, transition, guest_made) if x is not None]
    if len(asked) != 1:
        raise click.UsageError(
            "give an INTENT such as +256M, or --device DRIVER,id=ID,…, --transition, --guest-made"
        )
    if window is not None and window <= 0:
        raise click.BadParameter("a window must be longer than 0", param_hint="'--window'")
    if output is None and attaching.record is not None and attaching.record.endswith(".html"):
        output, attaching = attaching.record, replace(attaching, record=None)
    if transition is not None or guest_made is not None:
        if objects or netdevs or blockdevs:
            raise click.UsageError("backends go with an INTENT")
        confirm_loading(yes)
    chance = secrets.randbelow(1_000_000) if seed is None else seed
    with new_file(output) as write:
        if transition is not None or guest_made is not None:
            names = _strategies(strategies or "direct,pause,inhibit,hole", SteeredStrategy)
            span = None if guest_made else (window or _UPDATE_WINDOW_NS) / 1e9
            wanted = CompareOptions(repeat, span, chance, options)
            patience = (window or _GUEST_WINDOW_NS) / 1e9
            what = f"{guest_made} of the guest's transitions" if guest_made else f"{transition}"
            found = run_async(
                _compare_steered(attaching, transition, guest_made, patience, names, wanted),
                cancels=2,
            )
        else:
            change, what = _intent(intent or device or "", objects, netdevs, blockdevs)
            ours = _strategies(strategies or "direct,pause,hole", Strategy)
            wanted = CompareOptions(repeat, (window or _UPDATE_WINDOW_NS) / 1e9, chance, options)
            found = run_async(_compare(attaching, change, ours, wanted), cancels=2)
        if output is not None:
            from ..page import comparison_page

            write(comparison_page(found, what))
    if as_json:
        print_json(found)
    else:
        from ..reports.compare import comparison_lines

        for line in comparison_lines(found, what, full=full):
            say(line)
    if found.ended_early == INTERRUPTED:
        raise Interrupted
    return found.exit_code


def _strategies(text: str, kind: type[S]) -> tuple[S, ...]:
    from ..updates.options import shown

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in set(kind)]
    if unknown or not names or len(set(names)) < len(names):
        raise click.BadParameter(
            f"{shown(text)} is not a list such as {','.join(kind)}", param_hint="'--strategies'"
        )
    return tuple(kind(name) for name in names)


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


async def _compare_steered(
    attaching: Attaching,
    transition: str | None,
    guest_made: int | None,
    patience_s: float,
    strategies: tuple[SteeredStrategy, ...],
    options: CompareOptions,
) -> Comparison:
    """QEMU is steered before the agent attaches, so that its probe can see that."""
    from contextlib import closing

    from ..agent.monitors import refuse_if_frozen
    from ..qmp import Monitor
    from ..updates.compare.steered import admit, compare_steered, kept_as_it_was
    from ..updates.compare.transitions import GuestMade, PulseMade, PulseTransition

    admission = await refuse_if_frozen(attaching.target)
    async with await Monitor.connect(admission.target, meant=admission.meant) as monitor:
        process, machine = await admit(monitor, strategies)
    transitions: PulseMade | GuestMade
    if transition is not None:
        what = PulseTransition(transition)
        transitions = await PulseMade.of(process, what, machine)
    else:
        transitions = GuestMade(guest_made or 1, patience_s)
    with closing(transitions):
        async with (
            kept_as_it_was(process) as home,
            attaching.attached(guarded=False) as agent,
        ):
            return await compare_steered(
                agent,
                process,
                home,
                transitions,
                strategies,
                options,
                lambda text: say(text, err=True),
            )
