"""`record`: watch, and write everything to a recording."""

from __future__ import annotations

import rich_click as click

from ..text import count_text
from .common import json_option, print_json, run_async, say, target_argument
from .follow import FollowOptions, follow, follow_options


@click.command("record")
@target_argument()
@click.option("-o", "--output", required=True, metavar="FILE", help="The recording, a new file.")
@follow_options
@json_option
def command(target: str, output: str, options: FollowOptions, as_json: bool) -> None:
    """Record a guest: what `watch` shows, as JSON lines in FILE.

    The file can be read while it grows; a line cut off by a crash is no error.

    TARGET is unix:PATH, HOST:PORT, pid:N, name:GUEST or libvirt:DOMAIN.

    Example: qmp-memlistener record /run/vm.qmp -o boot.jsonl --for 30s
    """
    from ..reports.summary import probes_lines

    seen = run_async(follow(target, options, quiet=True, record=output))
    measured = any(p.active and p.measures for p in seen.probes.values())
    if as_json:
        print_json(
            {
                "schema": 1,
                "recording": output,
                "transitions": seen.transitions,
                "slot_ops": seen.slot_ops,
                "stalls": seen.stalls if measured else None,
                "failures": seen.failures,
                "differences": seen.differences if seen.compared else None,
                "lost": seen.lost,
                "probes": list(seen.probes.values()),
            }
        )
    else:
        say(
            f"{output}: {count_text(seen.transitions, 'transition')}, "
            f"{count_text(seen.slot_ops, 'slot operation')}, "
            f"{count_text(seen.stalls, 'stall') if measured else 'stalls not measured'}"
            + (f", {count_text(seen.lost, 'loss', 'losses')}" if seen.lost else "")
            + (f", slots differed {count_text(seen.differences, 'time')}" * (seen.differences > 0))
            + ("" if seen.compared else ", slots not compared"),
            *probes_lines(list(seen.probes.values())),
        )
    if seen.error is not None:
        raise seen.error
