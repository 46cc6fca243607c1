"""What the service sends: never more than the bus takes, and what was dropped is told."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Sequence

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from .interface import GUEST, SIGNAL_TYPES

__all__ = ["Outbox", "be_patient"]

log = logging.getLogger(__name__)

_MOST_UNSENT = 4000
"""So many messages may wait for the bus; signals of guests beyond that are dropped and counted."""


class _PatientSocket:
    """A socket that takes nothing when it is full, instead of raising BlockingIOError."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner

    def send(self, data: memoryview) -> int:
        try:
            return self._inner.send(data)
        except BlockingIOError:
            return 0


def be_patient(bus: MessageBus) -> None:
    """A bus that does not read for a while is not gone.

    dbus-fast (5.2: `write_callback` in aio/message_bus.py) closes the connection when a message
    finds the socket full.  Of one that was taken in part it waits until the rest can be sent.
    """
    writer = bus._writer  # noqa: SLF001 - it has no public name
    if writer is not None and isinstance(writer.sock, socket.socket):
        writer.sock = _PatientSocket(writer.sock)  # type: ignore[assignment]


class Outbox:
    """Messages on their way to the bus."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._unsent = 0
        self._dropped: Counter[str] = Counter()

    def guest_signal(self, path: str, member: str, body: Sequence[object]) -> None:
        """Send a signal of a guest, or count it among those that `Missed` tells later."""
        if self._unsent >= _MOST_UNSENT:
            self._dropped[path] += 1
            return
        if dropped := self._dropped.pop(path, 0):
            why = "signals that the bus did not take in time"
            self.signal(path, GUEST, "Missed", SIGNAL_TYPES["Missed"], [why, dropped])
        self.signal(path, GUEST, member, SIGNAL_TYPES[member], body)

    def signal(
        self, path: str, interface: str, member: str, signature: str, body: Sequence[object]
    ) -> None:
        """Send a signal."""
        self.send(
            Message(
                message_type=MessageType.SIGNAL,
                path=path,
                interface=interface,
                member=member,
                signature=signature,
                body=list(body),
            )
        )

    def send(self, message: Message) -> None:
        """Send a message; nothing when the bus is gone."""
        if not self._bus.connected:
            return
        try:
            sent = self._bus.send(message)
        except Exception as exc:  # what cannot be said of one guest keeps nothing from the others
            log.warning("%s was not sent: %s", message.member, exc)
            return
        self._unsent += 1
        if sent.done():
            self._sent(sent)
        else:
            sent.add_done_callback(self._sent)

    def _sent(self, sent: asyncio.Future[None]) -> None:
        self._unsent -= 1
        if not sent.cancelled():
            sent.exception()  # the bus is gone: `run` tells
