"""`watch`: transitions of a running guest, live."""

from __future__ import annotations

import rich_click as click

from .common import json_option, run_async
from .follow import follow, follow_options


@click.command("watch")
@click.argument("target")
@follow_options
@json_option
def command(
    target: str,
    for_ns: int | None,
    count: int | None,
    no_trace: bool,
    ping_monitor: str | None,
    ops_monitor: str | None,
    as_json: bool,
) -> None:
    """Watch a guest: each transition of its memory map with its KVM slot operations.

    Ends with Ctrl-C, after --for or --count, or (exit code 3) when the guest is gone. The guest's
    trace events and log are put back as they were.

    TARGET is unix:PATH, HOST:PORT or pid:N.

    Example: qmp-memlistener watch /run/vm.qmp --for 60s --json
    """
    seen = run_async(
        follow(
            target,
            as_json=as_json,
            for_ns=for_ns,
            count=count,
            no_trace=no_trace,
            ping_monitor=ping_monitor,
            ops_monitor=ops_monitor,
        )
    )
    if seen.error is not None:
        raise seen.error
