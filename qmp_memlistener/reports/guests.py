"""Guests of this host and their monitors: the document of `list --json` and the table's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..qmp import Guest

__all__ = ["GUEST_COLUMNS", "guest_document", "guest_rows"]

GUEST_COLUMNS = ("pid", "name", "version", "machine", "accel", "monitor", "state")


def guest_document(guest: Guest) -> dict[str, object]:
    """One guest in `list --json` (docs/json.md); the verb adds who froze it, and what is left."""
    return {
        "pid": guest.pid,
        "name": guest.name,
        "version": guest.version,
        "machine": guest.machine,
        "accel": guest.accel,
        "monitors": [
            {"target": m.label, "state": str(m.state), "why": m.why or None}
            for m in guest.qmp_monitors
        ],
        "visible": guest.visible,
        "notes": list(guest.notes),
    }


def guest_rows(guests: Sequence[Guest]) -> Iterator[tuple[str, ...]]:
    """A row for each QMP monitor; the guest itself is in the first one only."""
    for guest in guests:
        facts = (guest.version, guest.machine, guest.accel)
        lead = (str(guest.pid), guest.name or "-", *(fact or "not known" for fact in facts))
        if not guest.qmp_monitors:
            none = "no QMP monitor" if guest.visible else "unknown: no permission"
            yield (*lead, none, "")
        for monitor in guest.qmp_monitors:
            state = f"{monitor.state}: {monitor.why}" if monitor.why else str(monitor.state)
            yield (*lead, monitor.label, state)
            lead = ("",) * len(lead)
