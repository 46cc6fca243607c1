"""Trace lines and snapshots of one guest, folded into transitions and slot operations.

No sockets, clocks or processes: what was seen, and when, comes in as values."""

from .changes import Change
from .commits import Commit, CommitGrouper, SeenOp
from .live_slots import LiveSlot, LiveSlots, RawOp
from .replaying import ReplayStep, replay
from .tracker import Maps, Tracker

__all__ = [
    "Change",
    "Commit",
    "CommitGrouper",
    "LiveSlot",
    "LiveSlots",
    "Maps",
    "RawOp",
    "ReplayStep",
    "SeenOp",
    "Tracker",
    "replay",
]
