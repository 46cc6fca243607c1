"""Trace lines and snapshots of one guest, folded into transitions and slot operations.

No sockets, clocks or processes: what was seen, and when, comes in as values."""

from .commits import Change, Commit, CommitGrouper
from .live_slots import LiveSlot, LiveSlots
from .replaying import ReplayStep, replay
from .tracker import Maps, Tracker

__all__ = [
    "Change",
    "Commit",
    "CommitGrouper",
    "LiveSlot",
    "LiveSlots",
    "Maps",
    "ReplayStep",
    "Tracker",
    "replay",
]
