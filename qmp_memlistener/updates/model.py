"""The values of an update: what is wanted, how, and what came of it.  Pure.

An `Intent` is what is wanted of a guest, a `Strategy` how the guest is treated meanwhile, an
`Outcome` what happened.  `plans` turns the first two into the commands that `operation` runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from ..errors import OperationFailed
from ..qmp import Command
from ..records import OpenEnum, ProbeState, SlotOp, StallRecord

__all__ = [
    "Addition",
    "Awaited",
    "GuestStates",
    "Intent",
    "Outcome",
    "Phase",
    "PhaseName",
    "Placed",
    "Plug",
    "Range",
    "Resize",
    "Result",
    "Role",
    "Strategy",
    "Unplug",
    "UpdatePlan",
    "UpdateRefused",
    "UpdateStep",
    "Value",
    "adding",
    "mib",
    "removal",
]


Value = str | int | float | bool | None | list["Value"] | dict[str, "Value"]
"""A JSON value."""


class UpdateRefused(OperationFailed):
    """The update was not begun: the guest, or this strategy for it, does not allow it.

    Nothing was touched; the remedy names what to change, most often the guest's configuration.
    """


class Strategy(StrEnum):
    """How the guest is treated while its map changes.

    DIRECT: the update alone, vCPUs run.  PAUSE: the same while all vCPUs are paused.  HOLE: no slot
    is deleted, the change stays inside a region or slots that are there already.
    """

    DIRECT = "direct"
    PAUSE = "pause"
    HOLE = "hole"


class Result(StrEnum):
    """What an update came to.

    PARTIAL: some of it holds, such as a part of the memory, or the guest has not answered yet.
    REFUSED: nothing was touched, or the guest refused.  FAILED: it was undone.
    """

    DONE = "done"
    PARTIAL = "partial"
    REFUSED = "refused"
    FAILED = "failed"


class Role(StrEnum):
    """What something is that is added to a guest; each has its own QMP commands.

    An OBJECT is any user-creatable QOM object, a memory backend most often.
    """

    OBJECT = "object"
    NETDEV = "netdev"
    BLOCKDEV = "blockdev"
    DEVICE = "device"

    @property
    def id_key(self) -> str:
        return "node-name" if self is Role.BLOCKDEV else "id"

    @property
    def type_key(self) -> str:
        """The key of its type; in option syntax it may stand first without its name."""
        return {"object": "qom-type", "netdev": "type", "blockdev": "driver", "device": "driver"}[
            self
        ]

    @property
    def add_command(self) -> str:
        return {
            "object": "object-add",
            "netdev": "netdev_add",
            "blockdev": "blockdev-add",
            "device": "device_add",
        }[self]

    @property
    def remove_command(self) -> str:
        return {
            "object": "object-del",
            "netdev": "netdev_del",
            "blockdev": "blockdev-del",
            "device": "device_del",
        }[self]


@dataclass(frozen=True, slots=True)
class Addition:
    """Something to add; `arguments` are those of its QMP command, type and id included.

    `typed`: the values came as JSON and are taken as they are; otherwise they are text, and what
    is a number or a boolean is found out from QEMU (`property_types`).
    """

    role: Role
    id: str
    arguments: Mapping[str, Value] = field(default_factory=dict)
    typed: bool = False

    @property
    def type(self) -> str:
        """The driver of a device, the QOM type of an object, and so on."""
        return str(self.arguments[self.role.type_key])


@dataclass(frozen=True, slots=True)
class Plug:
    """Add a device; its backends are made first, in this order, and removed on failure."""

    device: Addition
    backends: tuple[Addition, ...] = ()


@dataclass(frozen=True, slots=True)
class Unplug:
    """Take out the device `id`, and then the backends in `also`."""

    id: str
    also: tuple[Addition, ...] = ()


@dataclass(frozen=True, slots=True)
class Resize:
    """Give the guest more or less memory.

    `sign` is `+` or `-` for a change by `size` bytes, `=` for that much memory in all, boot memory
    included.
    """

    sign: str
    size: int


Intent = Plug | Unplug | Resize


class PhaseName(OpenEnum):
    """The parts of an update.

    PREPARED: backends made.  ACCEPTED: the command, to its reply.  REALISED: to the last transition
    that QEMU's main thread made for it.  GUEST_TOLD: to the guest's first reaction.  GUEST_ACTS:
    the guest programs BARs, plugs or unplugs blocks, ejects.  DRIVER_BOUND: where that can be seen.
    SETTLED: nothing has happened any more until then.
    """

    PREPARED = "prepared"
    ACCEPTED = "accepted"
    REALISED = "realised"
    GUEST_TOLD = "guest_told"
    GUEST_ACTS = "guest_acts"
    DRIVER_BOUND = "driver_bound"
    SETTLED = "settled"


class Phase(msgspec.Struct, frozen=True, omit_defaults=True):
    """A part of an update, `[start_ns, end_ns)`.

    `stalls` are numbers of incidents (`StallRecord.incident`) that began in it.
    """

    name: PhaseName
    start_ns: int
    end_ns: int
    transitions: list[int] = []
    stalls: list[int] = []


class GuestStates(msgspec.Struct, frozen=True):
    """QEMU's RunState before and after."""

    before: str
    after: str


class Range(msgspec.Struct, frozen=True):
    """Guest-physical, in bytes."""

    start: int
    size: int

    def holds(self, start: int, size: int) -> bool:
        return self.start <= start and start + size <= self.start + self.size


class Placed(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a device went.

    `bus` is the name by which `bus=` finds it, `bus_type` QEMU's name of its kind; both None for
    what is on no bus.  `address` is its place there or in the machine, as QEMU's properties say.
    `pci` is bus, slot and function as the guest numbers them, None until it has.  `memory` is where
    a memory device is mapped; `size` of it the guest has, `requested` it was asked to take, of
    devices that report both.
    """

    id: str
    driver: str
    bus: str | None = None
    bus_type: str | None = None
    address: dict[str, int | str] = {}
    pci: str | None = None
    memory: Range | None = None
    size: int | None = None
    requested: int | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an update; the JSON document of `hotplug`, `unplug` and `resize`.

    `reason` is why it is not `done`.  `probes`: which of them measured, and why others did not.
    `placed` is where the devices of the update are, those that QEMU still has.  `interrupted`: it
    was ended before it was done.
    """

    schema: int = 1
    outcome: Result
    reason: str | None
    remedy: str | None = None
    strategy: Strategy
    phases: list[Phase] = []
    stalls: list[StallRecord] = []
    slot_ops: list[SlotOp] = []
    guest_state: GuestStates
    transitions: int = 0
    notes: list[str] = []
    probes: list[ProbeState] = []
    placed: list[Placed] = []
    interrupted: bool = False


# -- what a plan is made of --------------------------------------------------------------------


class Awaited(StrEnum):
    """What shows that the guest has done its part.

    REACTION: any sign of it, and then quiet; a guest without a driver gives none.  TAKEN: the same,
    and without a sign it is not done, for the guest was to have more memory.  GONE: DEVICE_DELETED
    of the device itself.  SIZE: virtio-mem devices have the size that was asked for.
    """

    REACTION = "reaction"
    TAKEN = "taken"
    GONE = "gone"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class UpdateStep:
    """A command, what it is for in words, and the command that takes it back, if there is one."""

    command: Command
    what: str
    undo: Command | None = None
    addition: Addition | None = None

    @property
    def state(self) -> str:
        """What holds once QEMU has carried it out."""
        if self.addition is not None:
            return f"{self.what} is there"
        if self.command.name == Role.DEVICE.remove_command:
            return f"the guest was asked to release {self.what}"
        return f"{self.what} was changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """`prepare` runs first, with vCPUs running; `update` is what changes the map, under the
    strategy; `finish` runs once the guest has done its part.  `devices` are the ids of the devices
    that come, go or change; `sizes` what virtio-mem devices shall have.
    """

    prepare: tuple[UpdateStep, ...] = ()
    update: tuple[UpdateStep, ...] = ()
    finish: tuple[UpdateStep, ...] = ()
    awaited: Awaited
    devices: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def adding(addition: Addition) -> UpdateStep:
    """A failed device_add leaves nothing behind, and a device that is there must not be undone by
    force: only backends have an undo."""
    undo = None if addition.role is Role.DEVICE else removal(addition)
    command = Command(addition.role.add_command, dict(addition.arguments))
    return UpdateStep(command, f"{addition.role} {addition.id}", undo, addition)


def removal(addition: Addition) -> Command:
    return Command(addition.role.remove_command, {addition.role.id_key: addition.id})


def mib(size: int) -> str:
    """A size in words, exactly."""
    return f"{size >> 20} MiB" if not size % (1 << 20) else f"{size} bytes"
