"""What happened to a memory map: the lines of `watch --json` and of a recording.

One struct per record type, distinguished by the JSON key `type`.  Times `*_ns` are
CLOCK_MONOTONIC of the host the agent ran on; addresses and sizes are bytes.  Keys are only ever
added: a reader skips types and keys that it does not know.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

import msgspec

from ..memslots import OpKind
from ..topology import FlatRange, FlatView, Flip, Hole, Kind, Move, RamBlock, RamChange

__all__ = [
    "SCHEMA",
    "Cause",
    "CauseType",
    "Detail",
    "GuestState",
    "Header",
    "Lost",
    "MapRecord",
    "Mode",
    "Note",
    "OpenEnum",
    "QmpEvent",
    "Reconciled",
    "Record",
    "Section",
    "SlotOp",
    "SteeringRecord",
    "TransitionRecord",
]

SCHEMA = 1


class OpenEnum(StrEnum):
    """Words of which a later version may have more: those keep their name, and readers go on."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        word = str.__new__(cls, value)
        word._name_ = word._value_ = value
        return word


class Detail(OpenEnum):
    """How far a transition is known.

    FULL: seen in the region tree before and after.  SLOTS: from the slot operations; RAM and ROM
    are exact, what covers a hole is not known.  NONE: QEMU rebuilt its views, and the next change
    came before a snapshot could.  NET: the sum of the `merged` last changes, which nothing tells
    apart.
    """

    FULL = "full"
    SLOTS = "slots"
    NONE = "none"
    NET = "net"


class Mode(OpenEnum):
    """The strategy that the interposer in a QEMU applies to what its guest changes (`steer`).

    OFF: there is no interposer in it, or it does nothing.
    """

    OFF = "off"
    OBSERVE = "observe"
    PAUSE = "pause"
    INHIBIT = "inhibit"
    HOLE = "hole"


class Section(msgspec.Struct, frozen=True, gc=False):
    """What the guest sees of a FlatRange; as in `show --json`."""

    start: int
    size: int
    kind: Kind
    name: str
    offset: int
    owner: str | None
    memslot: bool

    @classmethod
    def of(cls, r: FlatRange) -> Section:
        return cls(r.start, r.size, r.kind, r.name, r.offset, r.owner, r.memslot)

    @classmethod
    def list_of(cls, view: FlatView | tuple[FlatRange, ...]) -> list[Section]:
        return [cls.of(r) for r in view]


class CauseType(OpenEnum):
    """How the cause of a transition was seen.

    PCI_BAR: QEMU traced a BAR being mapped or unmapped.  MEMORY_DEVICE: plug or unplug traced.
    SEVERAL: `causes` has them, of a record that sums up several changes.  REGION: no event was
    seen; `regions` came or went.
    """

    PCI_BAR = "pci_bar"
    MEMORY_DEVICE = "memory_device"
    SEVERAL = "several"
    REGION = "region"
    UNKNOWN = "unknown"


class Cause(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Why a transition happened, as far as it was seen."""

    type: CauseType
    device: str | None = None
    detail: str | None = None
    owner: str | None = None
    regions: list[str] | None = None
    causes: list[Cause] | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all records.

    Those that come by the thousand are kept from the garbage collector (`gc=False`), which would
    look at each again and again: they are frozen and cannot be part of a cycle.
    """

    schema: int = SCHEMA


class Header(Record, frozen=True, kw_only=True, tag="header"):
    """First line of a recording: which guest was watched, by what, on which clocks.

    `monotonic_ns` and `realtime_ns` were read together: their difference maps the clocks.
    """

    tool_version: str
    monotonic_ns: int
    realtime_ns: int
    host_kernel: str
    target: str
    qemu_version: str | None
    qemu_package: str | None = None
    machine: str | None
    accel: str | None
    guest_name: str | None
    pid: int | None
    source: str
    stamp_bound_ns: int | None = None


class MapRecord(Record, frozen=True, kw_only=True, tag="map"):
    """The whole map at one moment; the transitions that follow start from it."""

    t_ns: int
    address_space: str
    ranges: list[Section]
    ram_blocks: list[RamBlock]


class TransitionRecord(Record, frozen=True, kw_only=True, tag="transition", gc=False):
    """One change of the map.

    A hole that moved or changed size is in `holes_filled` with its old place and in `holes_punched`
    with the new one.  `late_ns` is by how much `t_ns` may be later than the change, where that is
    more than the header's `stamp_bound_ns`.
    """

    seq: int
    t_ns: int
    cause: Cause
    removed: list[Section]
    added: list[Section]
    holes_punched: list[Hole]
    holes_filled: list[Hole]
    ram_appeared: list[RamChange] = []
    ram_vanished: list[RamChange] = []
    flips: list[Flip] = []
    mmio_moved: list[Move] = []
    detail: Detail
    merged: int = 1
    slot_ops: int = 0
    late_ns: int | None = None


class SlotOp(Record, frozen=True, kw_only=True, tag="slot_op", gc=False):
    """One KVM_SET_USER_MEMORY_REGION; of a delete `size` is that of the slot which went away.

    As a line of QEMU's log or a uprobe shows it, an `op` of `add` may be a change of flags, and the
    size of a delete is 0: both follow from the slots that are there, which `tracking` has.
    `hva` is the host address (`ua`).  `predicted` operations were never seen: they are what QEMU's
    rules give for the transition.  `late_ns` is as of a transition.
    """

    t_ns: int
    as_id: int
    slot: int
    op: OpKind
    gpa: int
    size: int
    flags: int
    ret: int = 0
    predicted: bool = False
    transition: int | None = None
    hva: int | None = None
    late_ns: int | None = None

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.gpa + self.size

    def __str__(self) -> str:
        """`delete 3 0x100000+0x1ff00000`."""
        space = f"as {self.as_id} " if self.as_id else ""
        return f"{self.op} {space}{self.slot} {self.gpa:#x}+{self.size:#x}"


class GuestState(Record, frozen=True, kw_only=True, tag="guest_state"):
    """The guest runs, stopped, was reset: `status` is QEMU's RunState, `event` its source."""

    t_ns: int
    status: str
    running: bool
    event: str | None = None


class QmpEvent(Record, frozen=True, kw_only=True, tag="qmp_event"):
    """A QMP event that concerns devices or memory."""

    t_ns: int
    event: str
    data: dict[str, Any]


class SteeringRecord(Record, frozen=True, kw_only=True, tag="steering"):
    """From `t_ns` on the guest's transitions are made under this strategy (`steer`).

    There is one at the beginning where QEMU's process can be looked into, and one at each change.
    `late_ns` is by how much `t_ns` may be later than the change, None: not at all.
    `strict`: under `hole` vCPUs are kept out of KVM each time.  `reason` says why it is not the
    strategy that was asked for.
    """

    t_ns: int
    strategy: Mode
    strict: bool = False
    reason: str | None = None
    late_ns: int | None = None


class Reconciled(Record, frozen=True, kw_only=True, tag="reconciled"):
    """At a quiet point the slots that QEMU's rules predict were compared with the traced ones.

    There is one at the first comparison, and one each time that what is found changes.
    """

    t_ns: int
    slots: int
    equal: bool
    differences: list[str]


class Lost(Record, frozen=True, kw_only=True, tag="lost"):
    """Something was missed: `what` in words, `count` how many when that is known."""

    t_ns: int
    what: str
    count: int | None = None


class Note(Record, frozen=True, kw_only=True, tag="note"):
    """Something the reader of the records should know."""

    t_ns: int
    text: str
