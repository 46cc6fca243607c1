"""`watch`: transitions and stalls of a running guest, live; optionally against limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from ..errors import OperationFailed
from ..text import quoted
from .common import duration, json_option, run_async, say, target_argument
from .follow import FollowOptions, follow, follow_options
from .watch_mirror import MirrorOptions, mirror_options

if TYPE_CHECKING:
    from ..agent.limits import Limits


@click.command("watch")
@target_argument()
@click.option("--max-stall", "max_stalls", multiple=True, metavar="KIND=DURATION",
              help="Exit 1 when a stall of this kind was longer, such as main_loop=5ms; may be "
              "given several times.")  # fmt: skip
@click.option("--freeze", is_flag=True, help="While real-time work runs: every transition, and "
              "every stall above a limit (5ms unless --max-stall says otherwise), is a violation; "
              "other verbs refuse to touch this guest meanwhile.")  # fmt: skip
@mirror_options
@follow_options
@json_option
def command(
    target: str,
    max_stalls: tuple[str, ...],
    freeze: bool,
    mirror: MirrorOptions | None,
    options: FollowOptions,
    as_json: bool,
) -> None:
    """Watch a guest: its memory map's transitions, their KVM slot operations, and the stalls.

    Ends with Ctrl-C, after --for or --count, or (exit code 3) when the guest ends, with a
    summary of all stalls by kind and cause. The guest's trace events and log are put back as
    they were. Exit code 1: a limit was exceeded for certain, or a mirror was not in step at the
    end. A stall of which only the upper bound exceeds its limit is reported as a possible violation
    and does not change the exit code. Exit code 4: no probe here measures a kind that --max-stall
    limits.

    With --mirror, slots of our own follow the guest's map; their report comes before the summary.

    TARGET is unix:PATH, HOST:PORT, pid:N, name:GUEST or libvirt:DOMAIN.

    Example: qmp-memlistener watch /run/vm.qmp --max-stall main_loop=5ms --for 60s
    """
    if freeze and mirror is not None and mirror.pauses:
        raise click.UsageError("--strategy pause stops the guest: it does not go with --freeze")
    from ..text import count_text

    limits = _limits(max_stalls, freeze)
    seen = run_async(follow(target, options, as_json=as_json, limits=limits, mirror=mirror))
    problems = []
    possible = count_text(seen.possible_violations, "possible violation")
    if seen.violations:
        more = f" and {possible}" if seen.possible_violations else ""
        problems.append(f"{count_text(seen.violations, 'violation')}{more} of the limits")
    elif seen.possible_violations:
        unsure = "the length of these stalls is not known precisely enough"
        say(f"{possible} of the limits: {unsure}", err=True)
    if seen.not_always_measured:
        kinds = ", ".join(seen.not_always_measured)
        say(f"not measured all the time, so a limit could be exceeded unseen: {kinds}", err=True)
    if seen.mirror_fault is not None:
        problems.append(seen.mirror_fault)
    if problems:
        more = f" ({seen.error.message})" if seen.error is not None else ""
        raise OperationFailed(
            f"{'; '.join(problems)}{more}",
            remedy="the lines above name the stalls and transitions, and their causes"
            if seen.violations
            else "the lines above, from `mirror` on, name the differences",
        )
    if seen.error is not None:
        raise seen.error


def _limits(max_stalls: tuple[str, ...], freeze: bool) -> Limits | None:
    from ..agent.limits import Limits
    from ..probes import StallKind

    found: dict[StallKind, int] = {}
    for text in max_stalls:
        name, sign, length = text.partition("=")
        if name not in set(StallKind) or not sign:
            raise click.BadParameter(
                f"{quoted(text)} is not KIND=DURATION; the kinds are {', '.join(StallKind)}",
                param_hint="'--max-stall'",
            )
        found[StallKind(name)] = duration(length)
    if freeze:
        return Limits.freeze(found)
    return Limits(found) if found else None
