"""`list`: running QEMUs on this host, their monitors, which are busy."""

from __future__ import annotations

import rich_click as click

from .common import json_option, print_json, print_table, say


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List running QEMUs on this host, who owns them, their QMP monitors, and which are busy.

    Looks at /proc only: no monitor is connected to.

    Example: qmp-memlistener list
    """
    from collections import Counter

    from ..agent.steered import strategy_text
    from ..host import bounded
    from ..qmp import find_guests
    from ..qmp.freeze import frozen_by, process_key
    from ..reports.guests import GUEST_COLUMNS, guest_document, guest_rows
    from ..steer import state_of
    from ..updates.left_behind import REMEDY, left_behind

    guests = find_guests()
    left = left_behind()
    looked = bounded.each(lambda g: frozen_by(process_key(g.process)), guests, soft=0.1, hard=2)
    holders = {}
    notes = {guest.pid: list(guest.notes) for guest in guests}
    for guest, holder in looked:
        holders[guest.pid] = None if isinstance(holder, Exception) else holder
        if isinstance(holder, Exception):
            notes[guest.pid].append(f"whether it is frozen cannot be seen: {holder}")
    strategies = {
        guest.pid: None if isinstance(found, Exception) else found or "off"
        for guest, found in bounded.each(
            lambda g: strategy_text(state_of(g.process)), guests, soft=0.1, hard=2
        )
    }
    if as_json:
        names = Counter(guest.name for guest in guests if guest.name)
        documents = [
            {
                **guest_document(guest, names),
                "notes": notes[guest.pid],
                "strategy": strategies[guest.pid],
                "frozen": holders[guest.pid],
                "left_behind": [x.text for x in left if x.pid == guest.pid],
            }
            for guest in guests
        ]
        print_json({"schema": 1, "guests": documents})
        return
    if not guests:
        say("no QEMU is running on this host (or none that your user may see)")
        return
    for pid, texts in notes.items():
        for text in texts:
            say(f"{pid}: {text}")
    for each in left:
        say(f"{each.text}; {REMEDY} puts that right, if it is so still")
    for pid, holder in holders.items():
        if holder is not None:
            say(f"{pid} is frozen for real-time work by {holder}")
    for pid, strategy in strategies.items():
        if strategy not in (None, "off"):
            say(f"{pid} is steered: {strategy} is applied to what it changes in its map")
    print_table(GUEST_COLUMNS, guest_rows(guests))
