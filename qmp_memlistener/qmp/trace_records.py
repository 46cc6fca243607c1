"""What the lines of QEMU's trace log mean: one value type per kind of line.

Pure values.  `trace_lines` makes them, nothing here reads anything.  Common to all:

- `t_ns`: our CLOCK_MONOTONIC when the line was read (an upper bound for when it was written);
- `stamp_ns`: QEMU's own realtime clock (since the epoch), only with `-msg timestamp=on`;
- `tid`: the writing thread, only with `-msg timestamp=on` of QEMU <= 10.0.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = [
    "BarMapping",
    "FlatViewChange",
    "FlatViewEvent",
    "HmpCommand",
    "MemoryDeviceChange",
    "MemoryDeviceEvent",
    "RunStateChange",
    "SlotFailure",
    "SlotOp",
    "TraceRecord",
    "VirtioMemEvent",
    "VmStateChange",
]


class SlotOp(msgspec.Struct, frozen=True, gc=False):
    """`kvm_set_user_memory`: one KVM_SET_USER_MEMORY_REGION(2) call and its return value.

    `size` 0 deletes the slot.  Whether another one adds or changes flags depends on the slots
    that exist.  `guest_memfd` is -1 when there is none, and before QEMU 9.1.
    """

    t_ns: int
    as_id: int
    slot: int
    flags: int
    gpa: int
    size: int
    ua: int
    ret: int
    guest_memfd: int = -1
    guest_memfd_offset: int = 0
    stamp_ns: int | None = None
    tid: int | None = None

    @property
    def is_delete(self) -> bool:
        return self.size == 0


class SlotFailure(msgspec.Struct, frozen=True, gc=False):
    """QEMU's error report when the kernel refused a slot (kvm_set_user_memory_region)."""

    t_ns: int
    slot: int
    start: int
    size: int
    error: str
    stamp_ns: int | None = None
    tid: int | None = None


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
    stamp_ns: int | None = None
    tid: int | None = None


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
    stamp_ns: int | None = None
    tid: int | None = None


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
    stamp_ns: int | None = None
    tid: int | None = None


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
    stamp_ns: int | None = None
    tid: int | None = None


class RunStateChange(msgspec.Struct, frozen=True, gc=False):
    """`runstate_set`: names as in QMP's RunState ("running", "paused", "internal-error", …)."""

    t_ns: int
    old: str
    new: str
    stamp_ns: int | None = None
    tid: int | None = None


class VmStateChange(msgspec.Struct, frozen=True, gc=False):
    """`vm_state_notify`: handlers are told that the VM runs or stops, and why."""

    t_ns: int
    running: bool
    reason: str
    stamp_ns: int | None = None
    tid: int | None = None


class HmpCommand(msgspec.Struct, frozen=True, gc=False):
    """`handle_hmp_command`: a human-monitor command is about to run.

    `marker` is the number of a marker that `trace_control` sent: everything QEMU logged before
    it stands before it.
    """

    t_ns: int
    line: str
    marker: int | None = None
    stamp_ns: int | None = None
    tid: int | None = None


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
