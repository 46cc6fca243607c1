"""Asking a QEMU something: the answer as a type, or that there is none.

The questions are in `guest` and `guest_devices`.  They raise TargetError when QEMU does not answer,
ProtocolViolation when it answers what no QEMU does, CommandFailed when it refuses.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from ..errors import CommandFailed, MemListenerError, ProtocolViolation
from .connection import COMMAND_DEADLINE, Monitor

__all__ = ["QomProperty", "ask", "converted", "qom_get", "qom_list", "told"]

T = TypeVar("T")


async def ask(
    monitor: Monitor,
    command: str,
    kind: type[T],
    default: T | None = None,
    *,
    deadline: float = COMMAND_DEADLINE,
    **arguments: object,
) -> T:
    """The answer as `kind`; `default` when this QEMU or this machine does not have the command."""
    try:
        answer = await monitor.execute(command, arguments or None, deadline=deadline)
    except CommandFailed:
        if default is None:
            raise
        return default
    return converted(monitor, command, answer, kind)


def converted(monitor: Monitor, command: str, answer: object, kind: type[T]) -> T:
    """An answer as `kind`.  Raises ProtocolViolation."""
    try:
        return msgspec.convert(answer, type=kind)
    except msgspec.ValidationError as exc:
        raise ProtocolViolation(
            f"{monitor.target}: the answer to {command} is none of QEMU's: {exc}",
            remedy="please report it with the version of QEMU",
        ) from exc


async def told(
    monitor: Monitor, command: str, kind: type[T], *, deadline: float = COMMAND_DEADLINE
) -> T | None:
    """The answer, None for whatever reason there is none, a QEMU that has gone included."""
    try:
        return await ask(monitor, command, kind, deadline=deadline)
    except MemListenerError:
        return None


class QomProperty(msgspec.Struct, frozen=True):
    """An entry of qom-list (qapi/qom.json, ObjectPropertyInfo)."""

    name: str
    type: str

    @property
    def child(self) -> str | None:
        """The type of a child, None for another property."""
        return self.type[6:-1] if self.type.startswith("child<") else None


async def qom_list(
    monitor: Monitor, path: str, default: list[QomProperty] | None = None
) -> list[QomProperty]:
    """The properties of an object; `default` when there is none."""
    return await ask(monitor, "qom-list", list[QomProperty], default, path=path)


async def qom_get(
    monitor: Monitor, path: str, name: str, kind: type[T], default: T | None = None
) -> T:
    """A property of an object; `default` when it has no such property."""
    return await ask(monitor, "qom-get", kind, default, path=path, property=name)
