"""What listeners are told at once."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import SlotOp
from ..topology import FlatView, Transition

__all__ = ["Change"]


@dataclass(frozen=True, slots=True)
class Change:
    """A transition, slot operations, or both; `view` is the map after it."""

    view: FlatView
    transition: Transition | None
    slot_ops: tuple[SlotOp, ...] = ()
