"""`list`: running QEMUs on this host, their monitors, which are busy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from .common import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from ..qmp.discovery import MonitorDocument


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List running QEMUs on this host, their QMP monitors, and which of these are busy.

    Looks at /proc only: no monitor is connected to.

    Example: qmp-memlistener list
    """
    from ..host import bounded
    from ..qmp import find_guests, list_document
    from ..qmp.freeze import freeze_document, frozen_by, process_key
    from ..updates.left_behind import REMEDY, left_behind

    found = find_guests()
    document = list_document(found)
    guests = document["guests"]
    left = left_behind()
    holders = {}
    looked = bounded.each(lambda g: frozen_by(process_key(g.process)), found, soft=0.1, hard=2)
    for (guest, holder), shown in zip(looked, guests, strict=True):
        holders[guest.pid] = None if isinstance(holder, Exception) else holder
        if isinstance(holder, Exception):
            shown["notes"].append(f"whether it is frozen cannot be seen: {holder}")
    if as_json:
        more = [
            {
                **g,
                "frozen": freeze_document(holders[g["pid"]]),
                "left_behind": [x.text for x in left if x.pid == g["pid"]],
            }
            for g in guests
        ]
        print_json({**document, "guests": more})
        return
    if not guests:
        say("no QEMU is running on this host (or none that your user may see)")
        return
    rows = []
    for g in guests:
        monitors = g["monitors"]
        hidden = not g["visible"]
        facts = (g["version"], g["machine"], g["accel"])
        first = [str(g["pid"]), g["name"] or "-", *(fact or "not known" for fact in facts)]
        none = "not known: no permission" if hidden else "no QMP monitor"
        for i, m in enumerate(monitors or [None]):
            lead = first if i == 0 else [""] * len(first)
            rows.append([*lead, *((m["target"], _state(m)) if m else (none, ""))])
    for g in guests:
        for note in g["notes"]:
            say(f"{g['pid']}: {note}")
    for each in left:
        say(f"{each.text}; {REMEDY} puts that right, if it is so still")
    for pid, holder in holders.items():
        if holder is not None:
            say(f"{pid} is frozen for real-time work by {holder}")
    print_table(("pid", "name", "version", "machine", "accel", "monitor", "state"), rows)


def _state(monitor: MonitorDocument) -> str:
    return f"{monitor['state']}: {monitor['why']}" if monitor["why"] else monitor["state"]
