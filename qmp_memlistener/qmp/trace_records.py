"""What the lines of QEMU's trace log mean: one value type per kind of line.

Pure values.  `trace_lines` makes them, nothing here reads anything.  `kvm_set_user_memory` is a
`records.SlotOp`.  `t_ns` is when the line was written, on our CLOCK_MONOTONIC: by QEMU's own stamp
(`-msg timestamp=on`), or else when the line was read, `late_ns` later at most where that is more
than usual.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from ..records import SlotOp

__all__ = [
    "BarMapping",
    "FlatViewChange",
    "FlatViewEvent",
    "HmpCommand",
    "MemoryDeviceChange",
    "MemoryDeviceEvent",
    "RunStateChange",
    "SlotFailure",
    "TraceRecord",
    "VirtioMemEvent",
    "VmStateChange",
]


class SlotFailure(msgspec.Struct, frozen=True, gc=False):
    """QEMU's error report when the kernel refused a slot (kvm_set_user_memory_region)."""

    t_ns: int
    slot: int
    start: int
    size: int
    error: str


class FlatViewChange(StrEnum):
    NEW = "new"
    DESTROY = "destroy"
    DESTROY_RCU = "destroy_rcu"


class FlatViewEvent(msgspec.Struct, frozen=True, gc=False):
    """`flatview_new`, `flatview_destroy`, `flatview_destroy_rcu`: pointers of view and root."""

    t_ns: int
    change: FlatViewChange
    view: int
    root: int
    late_ns: int | None = None


class BarMapping(msgspec.Struct, frozen=True, gc=False):
    """`pci_update_mappings_add` (`mapped`) and `_del`: a PCI BAR appears or goes."""

    t_ns: int
    mapped: bool
    device: str
    bus: int
    slot: int
    func: int
    bar: int
    addr: int
    size: int


class MemoryDeviceChange(StrEnum):
    PRE_PLUG = "pre_plug"
    PLUG = "plug"
    UNPLUG = "unplug"


class MemoryDeviceEvent(msgspec.Struct, frozen=True, gc=False):
    """`memory_device_pre_plug`, `_plug`, `_unplug`.  `id` is None for a device without one."""

    t_ns: int
    change: MemoryDeviceChange
    id: str | None
    addr: int


class VirtioMemEvent(msgspec.Struct, frozen=True, gc=False):
    """A `virtio_mem_*` line.  `event` is its name without that prefix; the members that this
    event does not have are None."""

    t_ns: int
    event: str
    addr: int | None = None
    nb_blocks: int | None = None
    old_size: int | None = None
    new_size: int | None = None
    value: int | None = None


class RunStateChange(msgspec.Struct, frozen=True, gc=False):
    """`runstate_set`: names as in QMP's RunState ("running", "paused", "internal-error", …)."""

    t_ns: int
    old: str
    new: str


class VmStateChange(msgspec.Struct, frozen=True, gc=False):
    """`vm_state_notify`: handlers are told that the VM runs or stops, and why."""

    t_ns: int
    running: bool
    reason: str


class HmpCommand(msgspec.Struct, frozen=True, gc=False):
    """`handle_hmp_command`: a human-monitor command is about to run.

    `marker` is the number of a marker that `trace_control` sent: everything QEMU logged before
    it precedes it.
    """

    t_ns: int
    line: str
    marker: int | None = None


TraceRecord = (
    SlotOp
    | SlotFailure
    | FlatViewEvent
    | BarMapping
    | MemoryDeviceEvent
    | VirtioMemEvent
    | RunStateChange
    | VmStateChange
    | HmpCommand
)
