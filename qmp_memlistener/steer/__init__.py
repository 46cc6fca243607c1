"""A strategy for every transition of a guest, applied inside its own QEMU.

`interposer.c` is what is loaded into QEMU, `channel` how it is read and written, `steering` brings
it in and takes it out.
"""

from .channel import Channel, Event, EventKind, Mode, Refusal, State, open_channel
from .steering import OBJECT, Steering, judge, release, state_of, steer

__all__ = [
    "steer",
    "release",
    "judge",
    "state_of",
    "open_channel",
    "Mode",
    "Steering",
    "State",
    "Channel",
    "Event",
    "EventKind",
    "Refusal",
    "OBJECT",
]
