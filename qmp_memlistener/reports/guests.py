"""Guests of this host and their monitors: the document of `list --json` and the table's rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..qmp import Guest
from ..qmp.resolving import domain_target, targets_of

__all__ = ["GUEST_COLUMNS", "guest_document", "guest_rows"]

GUEST_COLUMNS = ("pid", "name", "owner", "version", "machine", "accel", "monitor", "state")


def guest_document(guest: Guest, names: Counter[str] | None = None) -> dict[str, object]:
    """One guest in `list --json` (docs/json.md); the verb adds who froze it, and what is left.

    `names` counts the names of all guests here, so that one that is not alone is no target.
    """
    names = Counter([guest.name or ""]) if names is None else names
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
        "owners": [
            {"manager": str(o.manager), "name": o.name or None, "uri": o.uri} for o in guest.owners
        ],
        "targets": targets_of(guest, names),
        "visible": guest.visible,
        "notes": list(guest.notes),
    }


def guest_rows(guests: Sequence[Guest]) -> Iterator[tuple[str, ...]]:
    """A row for each way to a guest; the guest itself is in the first one only."""
    for guest in guests:
        facts = (guest.version, guest.machine, guest.accel)
        lead = (
            str(guest.pid),
            guest.name or "-",
            ", ".join(map(str, guest.owners)) or "none",
            *(fact or "not known" for fact in facts),
        )
        domain = domain_target(guest)
        if domain is not None:
            yield (*lead, str(domain), "through libvirt")
            lead = ("",) * len(lead)
        elif not guest.qmp_monitors:
            none = "no QMP monitor" if guest.visible else "unknown: no permission"
            yield (*lead, none, "")
        for monitor in guest.qmp_monitors:
            state = f"{monitor.state}: {monitor.why}" if monitor.why else str(monitor.state)
            yield (*lead, monitor.label, state)
            lead = ("",) * len(lead)
