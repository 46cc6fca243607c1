"""A small blocking QMP client for pinging, used in a thread of its own.

It reads the clock around the system calls themselves, which an event loop cannot.  What the times
mean is `ping_brackets`' business, when to ping `ping`'s.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import threading
import time

from ..errors import DeadlineExceeded, ProtocolViolation, TargetLost
from ..qmp import SocketTarget
from ..qmp.allowed import names
from ..qmp.dial import no_answer
from ..qmp.identity import ASKED, GuestIdentity, same_answers
from ..text import quoted
from .ping_brackets import Ping

__all__ = ["PingLink", "Stopped"]

# QEMU reads a monitor byte by byte (monitor_can_read, monitor/monitor.c, returns 1), at 2 to 4 us a
# byte, and sees the end of a command at its closing brace: hence no spaces, ids or line ends where
# they can be spared, and the short name.  query-kvm returns two flags; of the harmless commands it
# was the cheapest on 7.2, 10.0 and 11.1.
_COMMAND, _OOB_COMMAND, _NEGOTIATE = names("query-kvm", "query-yank", "qmp_capabilities")
_IN_BAND = b'{"execute":"%s"}' % _COMMAND.encode()
# The one out-of-band command that changes nothing (qapi/yank.json; the others are yank,
# migrate-pause and migrate-recover, qapi/migration.json).
_OUT_OF_BAND = b'{"exec-oob":"%s","id":0}' % _OOB_COMMAND.encode()
_OOB_ID = 0
_LINE_MAX = 1 << 20
_GREETING_S = 1.0
_ANSWER_S = 5.0
_HANG_UP_S = 1.0


class Stopped(Exception):
    """We were told to stop.  `ping` is what is known of a ping that had no answer yet."""

    def __init__(self, ping: Ping | None = None) -> None:
        super().__init__()
        self.ping = ping


class PingLink:
    """One connected socket at a QMP monitor.  All methods but `wake` and `stop` block.

    `wake` and `stop` may be called from any thread, at any time.
    """

    def __init__(
        self, sock: socket.socket, target: SocketTarget, meant: GuestIdentity | None = None
    ) -> None:
        sock.setblocking(False)
        self.target = target
        self.oob = False
        self._meant = meant
        self.unanswered: Ping | None = None
        self._sock = sock
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._buffer = bytearray()
        self._stopping = False

    def wake(self) -> None:
        """End the present `rest`."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Have whatever blocks raise Stopped."""
        self._stopping = True
        self.wake()

    def negotiate(self) -> None:
        """Greeting and capabilities.  Raises MonitorBusy, DeadlineExceeded, TargetLost,
        ProtocolViolation, Stopped."""
        greeting = self._message(_GREETING_S)
        if greeting is None:
            raise no_answer(self.target, _GREETING_S, connected=True)
        face = greeting.get("QMP")
        offered = face.get("capabilities") if isinstance(face, dict) else None
        if not isinstance(offered, list):
            raise ProtocolViolation(f"{self.target} does not greet as QMP does")
        self.oob = "oob" in offered
        wanted = ["oob"] if self.oob else []
        number = secrets.token_hex(8)
        command = {"execute": _NEGOTIATE, "arguments": {"enable": wanted}, "id": number}
        self._send(json.dumps(command).encode())
        # what comes before it is for the client before us (`dial.answered`)
        answer = self._message(_ANSWER_S, number)
        if answer is None:
            raise DeadlineExceeded(
                f"{self.target} did not answer qmp_capabilities within {_ANSWER_S:g} s",
                remedy="QEMU's main loop is stalled, or the process is stopped",
            )
        if "return" not in answer:
            raise ProtocolViolation(f"{self.target} refused qmp_capabilities: {quoted(answer)}")
        if self._meant is not None and not self._meant.certain:
            self._check_guest(self._meant)

    def _check_guest(self, meant: GuestIdentity) -> None:
        """It says of itself what it said on the first connection.  Raises WrongGuest."""
        told = {}
        for name in names(*ASKED):
            self._send(json.dumps({"execute": name}).encode())
            answer = self._message(_ANSWER_S)
            if answer is None:
                raise DeadlineExceeded(f"{self.target} did not answer {name} in {_ANSWER_S:g} s")
            if "return" in answer:
                told[name] = answer["return"]
        same_answers(self.target, meant, told)

    def ping(self) -> Ping:
        """Send one and wait for its answer, however long that takes.

        Raises Stopped with what is known, TargetLost or ProtocolViolation; after these two
        `unanswered` is the ping that was under way, if one was.
        """
        begun = empty = time.monotonic_ns()
        self._send(_OUT_OF_BAND + _IN_BAND if self.oob else _IN_BAND)
        sent = time.monotonic_ns()
        oob: int | None = None
        self.unanswered = Ping(begun, sent, None, begun, None)
        while True:
            looked = time.monotonic_ns()
            if not self._receive():
                empty = looked
                self.unanswered = Ping(begun, sent, oob, empty, None)
                if self._stopping:
                    raise Stopped(self.unanswered)
                # a late answer is found within a fiftieth of the time it took, at most 20 ms
                self._poll.poll(max(1, min(20, (looked - sent) // 50_000_000)))
                self._drain()
                continue
            now = time.monotonic_ns()
            for message in self._messages():
                if "event" in message:
                    continue
                if message.get("id") == _OOB_ID:
                    oob = now
                elif "return" in message or "error" in message:
                    self.unanswered = None
                    return Ping(begun, sent, oob, empty, now)
                else:
                    raise ProtocolViolation(f"{self.target} sent {quoted(message)}")

    def rest(self, ns: int) -> None:
        """Wait, at most until `wake`; events that arrive meanwhile are thrown away.

        Raises Stopped, TargetLost, ProtocolViolation.
        """
        until = time.monotonic_ns() + ns
        while True:
            if self._stopping:
                raise Stopped
            left = until - time.monotonic_ns()
            if left <= 0:
                return
            self._poll.poll(left / 1e6)
            if self._drain():
                if self._stopping:
                    raise Stopped
                return
            if self._receive():
                for message in self._messages():
                    if "event" not in message:
                        raise ProtocolViolation(
                            f"{self.target} sent without a command {quoted(message)}"
                        )

    def close(self) -> None:
        """Hang up, and wait a moment for QEMU to do so too: then the monitor is free again."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.settimeout(_HANG_UP_S)
            while self._sock.recv(4096):
                pass
        except OSError:
            pass
        finally:
            self._sock.close()
            with self._lock:
                os.close(self._wake)
                self._wake = -1

    def _send(self, data: bytes) -> None:
        try:
            if self._sock.send(data) != len(data):
                raise ProtocolViolation(f"{self.target} does not read what it is sent")
        except BlockingIOError:
            raise ProtocolViolation(f"{self.target} does not read what it is sent") from None
        except OSError as error:
            raise self._lost(error) from error

    def _receive(self) -> bool:
        """Read what is there; False when there is nothing."""
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost(None)
        self._buffer += data
        if len(self._buffer) > _LINE_MAX:
            raise ProtocolViolation(f"{self.target} sends a line without end")
        return True

    def _messages(self) -> list[dict[str, object]]:
        """The complete messages that were received."""
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        found = []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                raise ProtocolViolation(
                    f"{self.target} does not speak QMP: {quoted(line[:100])}",
                    remedy="is this a QMP monitor (-qmp, or -mon mode=control)?",
                )
            found.append(message)
        return found

    def _message(self, seconds: float, number: str | None = None) -> dict[str, object] | None:
        """The next message that is no event, and has that id; None when none comes in time."""
        until = time.monotonic_ns() + int(seconds * 1e9)
        while True:
            if self._stopping:
                raise Stopped
            if self._receive():
                found = [m for m in self._messages() if "event" not in m]
                if number is not None:
                    found = [m for m in found if m.get("id") == number]
                if found:
                    return found[0]
            left = until - time.monotonic_ns()
            if left <= 0:
                return None
            self._poll.poll(left / 1e6)
            self._drain()

    def _drain(self) -> bool:
        """Forget that we were woken; True when we were."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return False
        return True

    def _lost(self, error: OSError | None) -> TargetLost:
        if error is None:
            return TargetLost(
                f"{self.target} hung up", remedy="QEMU quit, was killed or closed the monitor"
            )
        return TargetLost(f"the connection to {self.target} broke: {error.strerror or error}")
