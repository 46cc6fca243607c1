"""What a plan is made of: steps, and what they wait for.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..qmp import Command
from .model import Addition, Role

__all__ = ["Awaited", "UpdateStep", "UpdatePlan", "adding", "mib", "removal"]


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
