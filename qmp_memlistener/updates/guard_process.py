"""The resume guard's own process: it sends `cont` when the agent that sent `stop` cannot.

Started by `guard` by file, `python -I -S guard_process.py SETTINGS`, with two sockets: one leads to
the agent, the other is a QMP monitor of the guest whose greeting has been read.  Only cheap modules
of the standard library are imported, nothing of this package: it must be up in a few milliseconds.

What it knows comes from STOP and RESUME events; it asks QEMU nothing while all goes well, so that
no command of ours comes between those of the agent (monitor/qmp.c takes them in turn from all
monitors).  Its rules (`Promise`, which is pure):

- Only the first STOP after `arm` is ours.  With the first RESUME after that the promise is kept,
  whoever sent `cont`; a later STOP is somebody else's.  QMP does not say who stopped a guest: one
  that somebody stops in the moment between `arm` and our own `stop` is taken for ours.
- It acts when the agent is gone (end of file, or it is no longer our parent), when the agent says
  that it lost QEMU, or when the pause lasts longer than allowed, which is also how a hanging agent
  shows.  Then `cont` is sent, but only if the status is exactly `paused`: a guest that stands for
  another reason (internal-error, io-error, postmigrate ...) is left alone, and that is noted.
- When a monitor's client goes, QEMU drops what is still queued of it (CHR_EVENT_CLOSED in
  monitor/qmp.c), but the command it has begun is executed: a `stop` may take effect after its
  sender's end.  So a guest that runs is asked about some more times.  All monitors are read by one
  thread in QEMU and served by another, so that a few answers after the agent's end there can be no
  `stop` on its way.
- While QEMU's main loop is blocked our command waits in QEMU's queue, as any other; we wait with it
  as long as QEMU lives, though not for ever once the agent is gone.
- It ends with QEMU, and with the agent as soon as nothing is promised.  Signals that end a session
  (Ctrl-C, hangup, termination) are not for it.
"""

from __future__ import annotations

import enum
import json
import os
import select
import signal
import socket
import sys
import time

__all__ = ["Guard", "Phase", "Promise", "main"]

_CHECKS = 3
"""Answers of QEMU, after the agent's end, that show that no `stop` came."""
_CHECK_EVERY_NS = 10_000_000
_RETRY_EVERY_NS = 100_000_000
_RETRY_FOR_NS = 10_000_000_000
_PARENT_GRACE_NS = 1_000_000_000
"""How long an agent may live on, after it closed the socket, with its `stop` on the way."""
_LINGER_NS = 600_000_000_000
"""How long a QEMU that does not answer is waited for once the agent is gone."""
_LOOK_EVERY_MS = 1000
"""A child that the agent forked may keep the socket open: look whether the agent is our parent."""
_LINE_MAX = 1 << 20
_OVER = b"\n"


class Phase(enum.Enum):
    """What is promised at the moment."""

    IDLE = "idle"
    """Nothing."""
    ASKED = "asked"
    """The agent is about to stop the guest; QEMU is asked whether it runs."""
    ARMED = "armed"
    """The agent may stop the guest at any moment."""
    STOPPED = "stopped"
    """It has: the guest must run again."""
    KEPT = "kept"
    """It was resumed."""
    LEFT = "left"
    """It was not, and we have stopped trying."""

    @property
    def is_settled(self) -> bool:
        return self in (Phase.IDLE, Phase.KEPT, Phase.LEFT)


class Promise:
    """What is owed to the guest, and which command is due.  Pure; times are CLOCK_MONOTONIC ns.

    `why` says why the guard acts, empty while it need not; `acted` that its `cont` was accepted;
    `status` is the last one that QEMU told, `obstacle` QEMU's words when it refused `cont`.
    """

    def __init__(self, max_pause_ns: int) -> None:
        self.phase = Phase.IDLE
        self.why = ""
        self.acted = False
        self.status = ""
        self.obstacle = ""
        self._max_pause_ns = max_pause_ns
        self._since = 0
        self._is_paused = False
        self._not_before = 0
        self._give_up = 0
        self._sure_at = 0
        self._checks = 0

    def arm(self) -> bool:
        """The agent wants to stop the guest.  False while an earlier pause is not over, or may
        still come: then there would be no telling which STOP is whose."""
        if self.phase in (Phase.ARMED, Phase.STOPPED):
            return False
        self._forget(Phase.ASKED)
        self.acted = False
        return True

    def release(self) -> None:
        """The agent says that the guest runs, or that it was never stopped."""
        self._forget(Phase.IDLE)

    def stopped(self, now: int) -> None:
        """A STOP event."""
        if self.phase is Phase.ARMED:
            self.phase = Phase.STOPPED
            self._since = now

    def resumed(self) -> None:
        """A RESUME event."""
        if self.phase is Phase.STOPPED:
            self.phase = Phase.KEPT

    def abandoned(self, now: int, why: str, sure_at: int) -> None:
        """The agent cannot keep the promise; from `sure_at` on it can send no `stop` either."""
        if not self.why:
            self._act(now, why)
        self._sure_at = sure_at

    def due(self, now: int) -> str | None:
        """The command to send now; call it when none is on its way."""
        if self.phase is Phase.ASKED:
            return "query-status"
        if self.phase is Phase.STOPPED and not self.why and now >= self._since + self._max_pause_ns:
            self._act(now, f"it was paused for more than {self._max_pause_ns / 1e9:g} s")
        if self.phase in (Phase.ARMED, Phase.STOPPED) and self.why and now >= self._not_before:
            return "cont" if self._is_paused else "query-status"
        return None

    def wake_at(self) -> int | None:
        """When `due` may have something new to say without an event."""
        if self.phase in (Phase.ARMED, Phase.STOPPED) and self.why:
            return self._not_before
        return self._since + self._max_pause_ns if self.phase is Phase.STOPPED else None

    def told_status(self, sent: int, now: int, status: str) -> None:
        """QEMU's answer to a `query-status` that was sent at `sent`."""
        self.status = status
        if self.phase is Phase.ASKED:
            self.phase = Phase.ARMED if status == "running" else Phase.IDLE
        elif self.phase is Phase.STOPPED and self.why:
            self._is_paused = status == "paused"
            if not self._is_paused:
                self.phase = Phase.KEPT if status == "running" else Phase.LEFT
        elif self.phase is Phase.ARMED and self.why:
            self._checks += sent >= self._sure_at
            self._not_before = now + _CHECK_EVERY_NS
            if self._checks >= _CHECKS:
                self.phase = Phase.IDLE

    def continued(self, now: int, refusal: str | None) -> None:
        """QEMU's answer to `cont`; the status is asked for again before the next one."""
        self._is_paused = False
        if refusal is None:
            self.acted = True
            if self.phase is Phase.STOPPED:
                self.phase = Phase.KEPT
        elif self.phase is Phase.STOPPED:
            self.obstacle = refusal
            self._not_before = now + _RETRY_EVERY_NS
            if now >= self._give_up:
                self.phase = Phase.LEFT

    def _act(self, now: int, why: str) -> None:
        self.why = why
        self._not_before = now
        self._give_up = now + _RETRY_FOR_NS

    def _forget(self, phase: Phase) -> None:
        self.phase = phase
        self.why = self.obstacle = ""
        self._is_paused = False
        self._checks = self._sure_at = 0


class Guard:
    """Carries out what `Promise` says is due, between the agent and QEMU.

    `settings` (JSON): `agent` its process id, `max_pause_ns`, `note_path` (empty: no notes) and
    `note`, the part of the note that is known beforehand.
    """

    def __init__(
        self, control: socket.socket, monitor: socket.socket, settings: dict[str, object]
    ) -> None:
        self._control = control
        self._monitor = monitor
        self._agent = int(str(settings["agent"]))
        self._note_path = str(settings["note_path"])
        note = settings["note"]
        self._note: dict[str, object] = note if isinstance(note, dict) else {}
        self._promise = Promise(int(str(settings["max_pause_ns"])))
        self._buffers = {control.fileno(): b"", monitor.fileno(): b""}
        self._on_its_way: tuple[str, int] | None = None
        self._question: tuple[str, object] | None = None
        self._gone_at = 0
        self._ended_at = 0
        self._is_deaf = False
        self._noted = False
        self._qemu_is_gone = False

    def run(self) -> None:
        """Until nothing is promised to anybody."""
        poller = select.poll()
        for sock in (self._control, self._monitor):
            sock.setblocking(False)
            poller.register(sock, select.POLLIN)
        self._send("qmp_capabilities")
        while not self._is_over():
            poller.poll(self._timeout_ms())
            # All that there is to know first: after a long sleep a pause may be over by now.
            for line in self._read(self._monitor):
                self._on_qemu(line)
            if not self._gone_at:
                for line in self._read(self._control):
                    self._on_agent(line)
            self._look_for_the_agent(poller)
            self._step()

    def _look_for_the_agent(self, poller: select.poll) -> None:
        """A process gets another parent after its own has closed all files (exit_notify,
        kernel/exit.c), so its monitor is closed then as well."""
        if not self._ended_at and os.getppid() != self._agent:
            self._ended_at = time.monotonic_ns()
            self._gone_at = self._gone_at or self._ended_at
        if self._gone_at and not self._is_deaf:
            self._is_deaf = True
            poller.unregister(self._control)

    def _is_over(self) -> bool:
        if self._qemu_is_gone:
            return True
        if not self._gone_at:
            return False
        if self._promise.phase.is_settled and self._on_its_way is None:
            return True
        if time.monotonic_ns() < self._gone_at + _LINGER_NS:
            return False
        if not self._promise.phase.is_settled:
            self._leave_note("QEMU did not answer")
        return True

    def _timeout_ms(self) -> int:
        at = None if self._on_its_way is not None else self._promise.wake_at()
        if at is None:
            return _LOOK_EVERY_MS
        # rounded up, or the last millisecond would be spent polling
        return min(_LOOK_EVERY_MS, max(0, -(-(at - time.monotonic_ns()) // 1_000_000)))

    def _step(self) -> None:
        now = time.monotonic_ns()
        promise = self._promise
        if self._ended_at:
            promise.abandoned(now, f"the agent (pid {self._agent}) ended", self._ended_at)
        elif self._gone_at:
            grace = self._gone_at + _PARENT_GRACE_NS
            promise.abandoned(now, f"the agent (pid {self._agent}) closed its guard", grace)
        self._answer()
        if self._on_its_way is None and (command := promise.due(now)) is not None:
            self._send(command)

    # -- QEMU ------------------------------------------------------------------------------------

    def _send(self, command: str) -> None:
        try:
            self._monitor.sendall(b'{"execute":"%s"}\n' % command.encode())
        except OSError:
            self._qemu_is_gone = True
        self._on_its_way = (command, time.monotonic_ns())

    def _on_qemu(self, message: dict[str, object]) -> None:
        now = time.monotonic_ns()
        event = message.get("event")
        if event == "STOP":
            if self._question is not None and self._question[0] == "arm":
                # The agent still waits for our word: it is somebody else who stops the guest.
                self._promise.release()
                self._promise.status = "paused"
            self._promise.stopped(now)
        elif event == "RESUME":
            self._promise.resumed()
        if event is not None or self._on_its_way is None:
            return
        (command, sent), self._on_its_way = self._on_its_way, None
        error, value = message.get("error"), message.get("return")
        refusal = str(error.get("desc")) if isinstance(error, dict) else None
        if command == "query-status":
            status = str(value.get("status")) if isinstance(value, dict) else ""
            self._promise.told_status(sent, now, status)
        elif command == "cont":
            self._promise.continued(now, refusal)
        elif refusal is None:
            self._say({"ready": True})
        else:
            raise RuntimeError(f"QEMU refused {command}: {refusal}")
        self._note_if_settled()

    def _note_if_settled(self) -> None:
        promise = self._promise
        if promise.acted and not self._noted:
            self._leave_note("")
        elif promise.phase is Phase.LEFT and not self._noted:
            self._leave_note(promise.obstacle or f"the guest is {promise.status}")

    # -- the agent -------------------------------------------------------------------------------

    def _on_agent(self, message: dict[str, object]) -> None:
        question = str(message.get("do"))
        self._question = (question, message.get("n"))
        if question == "release":
            self._promise.release()
        elif question == "lost":
            now = time.monotonic_ns()
            self._promise.abandoned(now, "the agent lost its connection", now)
        elif not self._promise.arm():
            self._question = None
            self._say({"n": message.get("n"), "refused": True})

    def _answer(self) -> None:
        """Answer the agent's last question when it can be answered."""
        promise = self._promise
        if self._question is None or self._on_its_way is not None:
            return
        question, number = self._question
        if question == "arm" and promise.phase is Phase.ASKED:
            return
        if question == "lost" and not promise.phase.is_settled:
            return
        self._question = None
        noted = self._note if self._noted else {}
        answer: dict[str, object] = {
            "n": number,
            "phase": promise.phase.value,
            "status": promise.status,
            "acted": promise.acted,
            "why": str(noted.get("why", "")),
            "obstacle": str(noted.get("obstacle", "")),
        }
        if question != "arm":
            # The agent is there to tell it.
            promise.release()
            self._remove_note()
        self._say(answer)

    def _say(self, message: dict[str, object]) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + _OVER)
        except OSError:
            pass  # the end of file is noticed when it is read

    # -- notes -----------------------------------------------------------------------------------

    def _leave_note(self, obstacle: str) -> None:
        self._noted = True
        self._note["why"] = self._promise.why
        self._note["obstacle"] = obstacle
        self._note["resumed"] = not obstacle
        self._note["t_ns"] = time.monotonic_ns()
        if not self._note_path:
            return
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(f"{self._note_path}.new", flags, 0o600)
            try:
                os.write(handle, json.dumps(self._note).encode())
            finally:
                os.close(handle)
            os.rename(f"{self._note_path}.new", self._note_path)
        except OSError:
            pass  # the guest matters more than its note

    def _remove_note(self) -> None:
        if self._noted and self._note_path:
            try:
                os.unlink(self._note_path)
            except OSError:
                pass
        self._noted = False

    # -- both ------------------------------------------------------------------------------------

    def _read(self, sock: socket.socket) -> list[dict[str, object]]:
        """All whole messages that have arrived; notes the end of file."""
        number = sock.fileno()
        data = self._buffers[number]
        while True:
            try:
                more = sock.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                more = b""
            if not more:
                if sock is self._monitor:
                    self._qemu_is_gone = True
                else:
                    self._gone_at = time.monotonic_ns()
                break
            data += more
        *lines, rest = data.split(b"\n")
        if len(rest) > _LINE_MAX:
            raise RuntimeError("a message that does not end")
        self._buffers[number] = rest
        messages = (json.loads(line) for line in lines if line.strip())
        return [m for m in messages if isinstance(m, dict)]


def main(argument: str) -> None:
    """Be the guard.  `argument` is JSON: `control` and `monitor`, file descriptors, and the
    settings of `Guard`."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(argument)
    control = socket.socket(fileno=settings["control"])
    monitor = socket.socket(fileno=settings["monitor"])
    try:
        Guard(control, monitor, settings).run()
    except Exception as error:
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode() + _OVER)


if __name__ == "__main__":
    main(sys.argv[1])
