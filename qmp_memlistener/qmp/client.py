"""qemu.qmp's QMPClient with what this project needs on top of it.

Each message is time-stamped at the moment it is written to and read from the socket, events go
to one synchronous callback (the stock client keeps every event of its life in memory), several
commands can leave in one write, and the end of the session is announced at once.  Policy
(deadlines, errors of the connection, locking) is `connection`'s job.

Overrides the documented hooks `_cb_outbound` and `_cb_inbound`, and `_do_recv`, `_event_dispatch`,
`_set_state`, `_pending`, `_writer` of qemu.qmp 0.0.6 (qmp/protocol.py, qmp/qmp_client.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence

from qemu.qmp import Message, QMPClient, Runstate
from qemu.qmp.error import ProtocolError
from qemu.qmp.qmp_client import BadReplyError

from ..errors import CommandFailed
from .links import Command, OnEvent, Reply

__all__ = [
    "EVENT_LIMIT",
    "READ_LIMIT",
    "VALUES_LIMIT",
    "TimedClient",
]

# `info mtree` of 100,000 regions is about 10 MB of text; a peer that never ends a line must not
# take all memory.
READ_LIMIT = 32 * 1024 * 1024
# Text costs about its own size, values do not: an empty list is 3 bytes here and 56 in memory.  The
# characters of such a text count as well, 300,000 of them.
VALUES_LIMIT = 2_000_000
# QEMU's own events have some hundred bytes.
EVENT_LIMIT = 1024 * 1024
_NEGOTIATE = "qmp_capabilities"
# One command at a time is executed, so one stale answer is what there can be.
_STALE_ANSWERS = 16


class _Demote(logging.Filter):
    """Everything the client logs reaches the caller as an exception too: log it as DEBUG only."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return _LOGGER.isEnabledFor(logging.DEBUG)


_LOGGER = logging.getLogger("qmp_memlistener.qmp")
_LOGGER.addHandler(logging.NullHandler())
_LOGGER.addFilter(_Demote())


class TimedClient(QMPClient):
    """A QMP client for one connection.

    `on_event(message, t_ns, size)` and `on_end()` are called from the event loop and must not
    raise; `size` is that of the message in bytes.  A message of more than READ_LIMIT bytes or
    VALUES_LIMIT values, or an event of more than EVENT_LIMIT bytes, ends the session.
    """

    def __init__(self, on_event: OnEvent, on_end: Callable[[], None]) -> None:
        super().__init__(readbuflen=READ_LIMIT)
        self.logger = _LOGGER
        self._on_event = on_event
        self._on_end = on_end
        self._sent_ns: dict[object, int] = {}
        self._received_ns: dict[object, int] = {}
        self._inbound_ns = 0
        self._inbound_size = 0
        self._negotiation: str | None = None

    async def open(self, sock: socket.socket) -> None:
        """Start a session on a connected socket.  Raises ConnectError, EOFError, OSError."""
        try:
            await self.connect(sock)
        except AssertionError:
            # connect() asserts that the session runs when it returns; a peer that hangs up right
            # after the negotiation has ended it by then.
            pass
        if not self.is_running:
            await self.disconnect()
            raise EOFError

    async def hand_over(self, fd: int) -> None:
        """Give QEMU a descriptor, for the command that follows; only over a UNIX socket.

        Raises OSError, and QMPError where it cannot be.
        """
        if self._writer is None:
            raise ConnectionError("not connected")
        # It travels with a blank, which must not come between the bytes of a command.
        while self._writer.transport.get_write_buffer_size():  # noqa: ASYNC110 (there is no event for it)
            await asyncio.sleep(0.001)
        self.send_fd_scm(fd)

    async def run_commands(
        self, commands: Sequence[Command], *, oob: bool = False
    ) -> list[Reply | CommandFailed]:
        """Send all in one write, wait for all replies, in the order of the commands.

        Descriptors go first.  Raises ExecInterruptedError when the session ends before the last
        reply, and ProtocolError.
        """
        for fd in (c.fd for c in commands if c.fd is not None):
            await self.hand_over(fd)
        messages = []
        for command in commands:
            message = Message({"exec-oob" if oob else "execute": command.name})
            if command.arguments is not None:
                message["arguments"] = dict(command.arguments)
            message["id"] = self._get_exec_id()
            messages.append(message)
        ids = [str(m["id"]) for m in messages]
        if self._writer is None:
            raise ConnectionError("not connected")
        for exec_id in ids:
            self._pending[exec_id] = asyncio.Queue(maxsize=1)
        waiting = list(ids)
        try:
            data = b"".join(bytes(m) for m in messages)
            now = time.monotonic_ns()
            self._sent_ns.update((exec_id, now) for exec_id in ids)
            self._writer.write(data)
            replies: list[Reply | CommandFailed] = []
            for command, exec_id in zip(commands, ids, strict=True):
                # _reply() forgets the id whether it returns, raises or is cancelled.
                waiting.remove(exec_id)
                message = await self._reply(exec_id)
                end = self._received_ns.get(exec_id, time.monotonic_ns())
                replies.append(_result(command, message, self._sent_ns[exec_id], end))
            return replies
        finally:
            for exec_id in waiting:
                self._pending.pop(exec_id, None)
            for exec_id in ids:
                self._sent_ns.pop(exec_id, None)
                self._received_ns.pop(exec_id, None)

    @property
    def is_running(self) -> bool:
        return self.runstate is Runstate.RUNNING

    def abort(self) -> None:
        """Drop the connection without flushing what the peer does not take."""
        if self._writer is not None:
            self._writer.transport.abort()

    def _cb_outbound(self, msg: Message) -> Message:
        if msg.get("execute") == _NEGOTIATE:
            # what comes before its answer is for the client before us (`dial.answered`)
            msg["id"] = self._negotiation = secrets.token_hex(8)
        return msg

    async def _do_recv(self) -> Message:
        for _ in range(_STALE_ANSWERS):
            message = await self._next_message()
            if self._negotiation is None or "event" in message:
                return message
            refused = "error" in message and "id" not in message
            if refused or message.get("id") == self._negotiation:
                self._negotiation = None
                return message
        raise ProtocolError(f"{_STALE_ANSWERS} answers, and none to {_NEGOTIATE}")

    async def _next_message(self) -> Message:
        line = await self._readline()
        self._inbound_size = len(line)
        values = line.count(b",") + line.count(b"[") + line.count(b"{")
        if values > VALUES_LIMIT:
            raise ProtocolError(f"a message of about {values} values")
        return Message(line, eager=True)

    def _cb_inbound(self, msg: Message) -> Message:
        self._inbound_ns = time.monotonic_ns()
        exec_id = msg.get("id")
        if isinstance(exec_id, str) and exec_id in self._sent_ns:
            self._received_ns[exec_id] = self._inbound_ns
        return msg

    async def _event_dispatch(self, msg: Message) -> None:
        if self._inbound_size > EVENT_LIMIT:
            raise ProtocolError(f"an event of {self._inbound_size} bytes")
        self._on_event(msg, self._inbound_ns, self._inbound_size)

    def _set_state(self, state: Runstate) -> None:
        before = self.runstate
        super()._set_state(state)
        if before is Runstate.RUNNING and state is not Runstate.RUNNING:
            self._on_end()


def _result(
    command: Command, message: Message, start_ns: int, end_ns: int
) -> Reply | CommandFailed:
    """What the reply says.  Raises ProtocolError."""
    if "return" not in message and "error" not in message:
        raise BadReplyError("neither return nor error", message, Message())
    if "error" not in message:
        return Reply(message["return"], start_ns, end_ns)
    error = message["error"]
    if not isinstance(error, dict):
        raise ProtocolError("an error that is no object")
    return CommandFailed.of(command.name, error)
