"""A link: one way to a QEMU's monitor, and what it can do.

`connection.Monitor` is what the rest of the package talks to.  It has the deadlines, the list of
commands that do no harm, and the events' listeners; below it a link carries the messages.  There
are three: `socket_link` (QMP over a socket), `libvirt_link` (through libvirt, which holds the
monitor), and `no_link` (QEMU cannot be asked at all).  Nobody asks a link which of them it is: what
it can do stands in its `Abilities`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import CommandFailed

if TYPE_CHECKING:
    from .identity import GuestIdentity

__all__ = ["MANAGED", "Abilities", "Command", "Link", "OnEvent", "QemuVersion", "Reply"]

MANAGED = frozenset({"stop", "cont", "attach-device", "detach-device", "update-memory-device"})
"""What a manager carries out: `stop` and `cont` as QEMU does, and, of its own, `attach-device`
{xml}, `detach-device` {alias}, `update-memory-device` {alias, bytes}."""
OnEvent = Callable[[Mapping[str, object], int, int], None]
"""Called with an event as QMP has it, our CLOCK_MONOTONIC in ns, and its size in bytes."""


@dataclass(frozen=True, slots=True)
class QemuVersion:
    """What the greeting says.  `package` is the distributor's text, "" when there is none."""

    major: int
    minor: int
    micro: int
    package: str = ""

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"

    @classmethod
    def read(cls, version: object) -> QemuVersion:
        """From the greeting's `version`.  Raises LookupError, TypeError, ValueError."""
        qemu = version["qemu"] if isinstance(version, Mapping) else None
        if not isinstance(version, Mapping) or not isinstance(qemu, Mapping):
            raise TypeError("version")
        return cls(
            int(qemu["major"]),
            int(qemu["minor"]),
            int(qemu["micro"]),
            str(version.get("package", "")).strip(),
        )

    @property
    def release(self) -> tuple[int, int]:
        return (self.major, self.minor)


@dataclass(frozen=True, slots=True)
class Command:
    """A command; `fd` is a descriptor that goes with it (`getfd`)."""

    name: str
    arguments: Mapping[str, object] | None = None
    fd: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command returned, and when: `t_start_ns` at the write, `t_end_ns` at the read."""

    value: object
    t_start_ns: int
    t_end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.t_end_ns - self.t_start_ns


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a link can do; of one that is not open yet nothing is known.

    `asks`: QEMU answers commands and sends events; without, only what its process shows is known.
    `out_of_band`: commands that overtake others.  `descriptors`: a file can go with a command.
    `direct`: the monitor is ours alone, so that a command takes as long as QEMU takes, and round
    trips say something about QEMU.  `manager` names who owns the guest and must be asked for
    changes of its devices and its run state, "" when these go to QEMU.
    `remark`: what using the link means for the guest, for the user.
    """

    asks: bool = False
    out_of_band: bool = False
    descriptors: bool = False
    direct: bool = False
    manager: str = ""
    remark: str = ""


class Link(Protocol):
    """One session.  Not used again after it has ended: `Monitor.reconnect` makes a new one.

    A link is made with two callbacks, `on_event` (OnEvent) and `on_end()`; both are called in the
    event loop, the second once, when an open session ends for whatever reason.
    """

    @property
    def abilities(self) -> Abilities: ...
    @property
    def version(self) -> QemuVersion: ...
    @property
    def is_running(self) -> bool: ...
    @property
    def why_slow(self) -> str:
        """What else may hold up an answer than QEMU, for the user; "" when nothing else does."""

    async def open(self, meant: GuestIdentity | None, deadline: float) -> GuestIdentity:
        """Begin the session within `deadline` seconds; returns who answers.

        Raises WrongGuest when that is not the guest `meant`, and as `Monitor.connect` does.
        """

    async def run(
        self, commands: Sequence[Command], *, oob: bool = False
    ) -> list[Reply | CommandFailed]:
        """Have all run in their order, also after a failure; wait for every reply.

        Where there is a manager, those that are in `MANAGED` go to it and not to QEMU.

        The caller sees to the deadline, and that only one in-band call is under way.  Cancelled,
        it returns at once.  Raises ConnectionError when the session has ended, TargetError.
        """

    async def end(self) -> None:
        """End the session; raises the TargetError that ended it, if one did.  Called once."""

    def abort(self) -> None:
        """Let go of the session at once, whatever the peer does."""
