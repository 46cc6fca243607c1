"""`list`: running QEMUs on this host, their monitors, which are busy."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, print_table


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List running QEMUs on this host, their QMP monitors, and which of these are busy.

    Looks at /proc only: no monitor is connected to.

    Example: qmp-memlistener list
    """
    from ..monitor import find_guests, list_document

    document = list_document(find_guests())
    if as_json:
        print_json(document)
        return
    guests = document["guests"]
    if not guests:
        click.echo("no QEMU is running on this host (or none that your user may see)")
        return
    rows = []
    for g in guests:
        monitors = g["monitors"]
        first = [str(g["pid"]), *(g[k] or "?" for k in ("name", "version", "machine", "accel"))]
        for i, m in enumerate(monitors or [None]):
            lead = first if i == 0 else [""] * len(first)
            rows.append([*lead, *((m["target"], m["state"]) if m else ("no QMP monitor", ""))])
    print_table(("pid", "name", "version", "machine", "accel", "monitor", "state"), rows)
