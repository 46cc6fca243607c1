"""Everything that speaks to a QEMU: targets, discovery, connections, HMP, tracing, snapshots.

In order of use: `parse_target` and `find_guests` name a monitor, `Monitor.connect` connects to
it, `companions_of` finds further ones, `read_facts` and `take_snapshot` read the guest,
`start_tracing` has it write down every change, and the session's `tail()` brings the records.
"""

from ..errors import TraceReason, TraceUnavailable
from .cmdline import CommandLine, MonitorMode
from .connection import CONNECT_DEADLINE, Command, Monitor, QemuVersion, Reply
from .discovery import Guest, GuestMonitor, find_guest, find_guests
from .events import EventStream, MonitorEvent
from .guest import GuestFacts, MemoryDevice, read_facts
from .hmp import (
    Flag,
    IdleRoundTrip,
    Snapshot,
    hmp,
    hmp_line,
    hmp_timed,
    measure_idle,
    take_snapshot,
)
from .identity import Companions, companions_of, find_owner
from .links import Abilities
from .owners import Manager, Owner
from .sockets import MonitorState
from .targets import (
    TARGET_FORMS,
    Address,
    LibvirtTarget,
    NameTarget,
    PidTarget,
    SocketTarget,
    Target,
    TcpTarget,
    UnixTarget,
    parse_target,
)
from .trace_control import (
    TRACE_EVENTS,
    Restored,
    TraceSession,
    restore_stale,
    start_tracing,
)
from .trace_lines import TraceDecoder
from .trace_records import (
    BarMapping,
    FlatViewChange,
    FlatViewEvent,
    HmpCommand,
    MemoryDeviceChange,
    MemoryDeviceEvent,
    RunStateChange,
    SlotFailure,
    TraceRecord,
    VirtioMemEvent,
    VmStateChange,
)
from .trace_tail import TraceBatch, TraceTail

__all__ = [
    # naming and finding guests
    "parse_target",
    "Target",
    "SocketTarget",
    "Address",
    "UnixTarget",
    "TcpTarget",
    "PidTarget",
    "NameTarget",
    "LibvirtTarget",
    "TARGET_FORMS",
    "find_guests",
    "find_guest",
    "Guest",
    "GuestMonitor",
    "Owner",
    "Manager",
    "MonitorMode",
    "MonitorState",
    "CommandLine",
    # talking to them
    "CONNECT_DEADLINE",
    "Monitor",
    "Abilities",
    "Command",
    "Reply",
    "QemuVersion",
    "MonitorEvent",
    "EventStream",
    "hmp",
    "hmp_timed",
    "hmp_line",
    "Flag",
    "Companions",
    "companions_of",
    "find_owner",
    # reading them
    "take_snapshot",
    "Snapshot",
    "measure_idle",
    "IdleRoundTrip",
    "read_facts",
    "GuestFacts",
    "MemoryDevice",
    # tracing them
    "start_tracing",
    "restore_stale",
    "TraceSession",
    "Restored",
    "TRACE_EVENTS",
    "TraceReason",
    "TraceUnavailable",
    "TraceTail",
    "TraceBatch",
    "TraceDecoder",
    "TraceRecord",
    "SlotFailure",
    "FlatViewEvent",
    "FlatViewChange",
    "BarMapping",
    "MemoryDeviceEvent",
    "MemoryDeviceChange",
    "VirtioMemEvent",
    "RunStateChange",
    "VmStateChange",
    "HmpCommand",
]
