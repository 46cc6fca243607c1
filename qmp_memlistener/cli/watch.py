"""`watch`: transitions of a running guest, live."""

from __future__ import annotations

import rich_click as click

from .common import json_option, run_async
from .follow import FollowOptions, follow, follow_options


@click.command("watch")
@click.argument("target")
@follow_options
@json_option
def command(target: str, options: FollowOptions, as_json: bool) -> None:
    """Watch a guest: each transition of its memory map with its KVM slot operations.

    Ends with Ctrl-C, after --for or --count, or (exit code 3) when the guest is gone. The guest's
    trace events and log are put back as they were.

    TARGET is unix:PATH, HOST:PORT or pid:N.

    Example: qmp-memlistener watch /run/vm.qmp --for 60s --json
    """
    seen = run_async(follow(target, options, as_json=as_json))
    if seen.error is not None:
        raise seen.error
