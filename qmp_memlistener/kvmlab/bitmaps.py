"""Whether a strategy keeps dirty bits that KVM has: punched once, with nobody writing.

A guest writes every page of a logged slot, then only beats elsewhere.  So whatever bit outside the
hole is gone after the punch was lost by the update and by nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from .competitor import Competitor
from .device import Kvm
from .host_memory import PAGE
from .layout import Layout
from .programs import GuestKind
from .strategies import LabStrategy

__all__ = ["keeps_bitmap"]

_SIZE = 1 << 20


def keeps_bitmap(kvm: Kvm, strategy: LabStrategy) -> bool:
    """Every dirty bit of RAM that stays is in KVM's bitmaps after the punch.

    Logs are not fetched on the way, whatever the strategy does otherwise: that saves bits from
    being lost, it does not keep them.  Raises OperationFailed.
    """
    ground = Layout(size=_SIZE, logged=True)
    still = replace(strategy, sync=False)
    with Competitor(kvm, still, ground, GuestKind.WRITER, populate=True) as competitor:
        written = competitor.write_every_page()
        logs = competitor.punch_at_rest()
        low, high = ground.lost
        stay = [gpa for gpa in written if not low <= gpa < high]
        assert len(stay) == (ground.size - (high - low)) // PAGE, "the guest wrote every page"
        return all(any(log.dirty(gpa) for log in logs) for gpa in stay)
