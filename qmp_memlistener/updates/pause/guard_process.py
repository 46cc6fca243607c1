"""The resume guard's own process: it sends `cont` when the agent that sent `stop` cannot.

Started by `guard` by file, `python -I -S guard_process.py SETTINGS`, with two sockets: one leads to
the agent, the other is a QMP monitor of the guest whose greeting has been read.  Only cheap modules
of the standard library are imported, and of this package `promise` alone, where the rules are: it
must be up in a few milliseconds.

- It goes by STOP and RESUME events and, while the guest is stopped, from looks at
  QEMU's state.  While a pause is short it asks nothing, so that no command of ours comes between
  those of the agent (monitor/qmp.c takes them in turn from all monitors).
- While QEMU's main loop is blocked our command waits in QEMU's queue, as any other; we wait with it
  as long as QEMU lives, though not for ever once the agent is gone.
- It ends with QEMU, and with the agent as soon as nothing is promised.  Signals that end a session
  (Ctrl-C, hangup, termination) are not for it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time

if __name__ != "__main__":
    from .promise import Due, Promise, Stage
else:
    # last, so that no file beside this one is taken for a module of the standard library
    sys.path.append(os.path.dirname(__file__))
    from promise import Due, Promise, Stage  # type: ignore[import-not-found,no-redef]

__all__ = ["Guard", "main"]

_PARENT_GRACE_NS = 1_000_000_000
"""How long an agent may live on, after it closed the socket, with its `stop` on the way."""
_LINGER_NS = 600_000_000_000
"""How long a QEMU that does not answer is waited for once the agent is gone."""
_LOOK_EVERY_MS = 1000
"""A child that the agent forked may keep the socket open: look whether the agent is our parent."""
_LINE_MAX = 1 << 20
_READS = 16
_NEGOTIATION = (b"qmp_capabilities", b"query-cpus-fast")


class Guard:
    """Carries out what `Promise` says is due, between the agent and QEMU.

    `settings` (JSON): `agent` its process id, `commands` those that it may send to QEMU,
    `questions` those whose answers the agent wants, to know the guest by; `max_pause_ns`;
    `note_file`, an open file (-1: none) that is called `note_path`, and `note`, what it is to say
    (`guard_notes.GuardNote`).
    """

    def __init__(
        self, control: socket.socket, monitor: socket.socket, settings: dict[str, object]
    ) -> None:
        self._control = control
        self._monitor = monitor
        # the id of our commands: other answers are for the client before us (`dial.answered`)
        self._number = int.from_bytes(os.urandom(4), "big")
        self._agent = int(str(settings["agent"]))
        commands = settings["commands"]
        self._commands = frozenset(commands) if isinstance(commands, list) else frozenset()
        questions = settings["questions"]
        self._questions = list(map(str, questions)) if isinstance(questions, list) else []
        self._note_path = str(settings["note_path"])
        note = settings["note"]
        self._note: dict[str, object] = note if isinstance(note, dict) else {}
        self._note_file = int(str(settings["note_file"]))
        self._note_size = 0
        self._vcpus: list[int] = []
        self._is_fresh = False
        self._promise = Promise(int(str(settings["max_pause_ns"])))
        self._buffers = {control.fileno(): b"", monitor.fileno(): b""}
        self._on_its_way: tuple[Due | None, int] | None = None
        self._answers: list[dict[str, object]] = []
        self._question: tuple[str, object] | None = None
        self._is_released = False
        self._gone_at = 0
        self._ended_at = 0
        self._is_deaf = False
        self._qemu_is_gone = False

    def run(self) -> None:
        """Until nothing is promised to anybody."""
        poller = select.poll()
        for sock in (self._control, self._monitor):
            sock.setblocking(False)
            poller.register(sock, select.POLLIN)
        self._send(None)
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
        if self._qemu_is_gone or not self._is_noted:
            self._remove_note()

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
        if self._promise.stage.is_settled and self._on_its_way is None:
            return True
        if time.monotonic_ns() < self._gone_at + _LINGER_NS:
            return False
        if not self._promise.stage.is_settled:
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
        self._let_go()
        self._answer()
        if self._on_its_way is None and (due := promise.due(now)) is not None:
            self._send(due)

    # -- QEMU ------------------------------------------------------------------------------------

    def _send(self, due: Due | None) -> None:
        """None: the negotiation."""
        commands = self._commands_of(due)
        for command in commands:
            if command.decode() not in self._commands:
                raise RuntimeError(f"{command.decode()} is not among the commands that it may send")
        try:
            self._monitor.sendall(
                b"".join(b'{"execute":"%s","id":%d}\n' % (c, self._number) for c in commands)
            )
        except OSError:
            self._qemu_is_gone = True
        self._answers = []
        self._on_its_way = (due, time.monotonic_ns())

    def _commands_of(self, due: Due | None) -> tuple[bytes, ...]:
        begin = (*_NEGOTIATION, *(name.encode() for name in self._questions))
        commands: tuple[bytes, ...] = begin if due is None else due.value
        return commands

    def _on_qemu(self, message: dict[str, object]) -> None:
        if "event" in message:
            self._on_event(str(message["event"]), message)
        elif self._on_its_way is not None and message.get("id") == self._number:
            self._answers.append(message)
            (due, sent) = self._on_its_way
            if len(self._answers) == len(self._commands_of(due)):
                self._on_its_way = None
                self._on_answers(due, sent, time.monotonic_ns())
                self._note_if_settled()

    def _on_event(self, name: str, message: dict[str, object]) -> None:
        now = time.monotonic_ns()
        if name == "STOP":
            if self._question is not None and self._question[0] == "arm":
                # The agent still waits for our answer: another client has stopped the guest.
                self._promise.release()
                self._promise.status = "paused"
            self._promise.stopped(now)
            if self._promise.stage is Stage.STOPPED and self._note.get("state") == "armed":
                self._write("stopped", vcpus=self._have_run())
                self._is_fresh = True
        elif name == "RESUME":
            self._promise.resumed()
            if self._promise.stage is Stage.KEPT:
                self._write("idle")
        elif name == "MIGRATION":
            self._promise.migrating(now, _member(message.get("data"), "status"))

    def _on_answers(self, due: Due | None, sent: int, now: int) -> None:
        answers = [message.get("return") for message in self._answers]
        error = self._answers[-1].get("error")
        refusal = _member(error, "desc") if isinstance(error, dict) else None
        if due is Due.LOOK:
            migration, status = (_member(answer, "status") for answer in answers)
            self._promise.told(sent, now, status, migration)
            if self._is_fresh and self._note.get("state") == "stopped" and status == "paused":
                # by now the threads that have just been stopped are asleep
                self._is_fresh = False
                self._write("stopped", again=True, vcpus=self._have_run())
        elif due is Due.CONT:
            self._promise.continued(now, refusal)
        elif due is Due.STOP:
            self._promise.stopped_again()
        elif isinstance(refused := self._answers[0].get("error"), dict):
            raise RuntimeError(f"QEMU refused qmp_capabilities: {_member(refused, 'desc')}")
        else:
            cpus = answers[1] if isinstance(answers[1], list) else []
            numbers = [cpu.get("thread-id") for cpu in cpus if isinstance(cpu, dict)]
            self._vcpus = [number for number in numbers if isinstance(number, int)]
            told = dict(zip(self._questions, answers[2:], strict=True))
            self._say({"ready": True, "told": told})

    def _note_if_settled(self) -> None:
        promise = self._promise
        if promise.stage is Stage.DOUBTED:
            return
        if promise.acted and not self._is_noted:
            self._leave_note("")
        elif promise.stage is Stage.LEFT and not self._is_noted:
            self._leave_note(promise.obstacle or f"the guest is {promise.status}")

    # -- the agent -------------------------------------------------------------------------------

    def _on_agent(self, message: dict[str, object]) -> None:
        question = str(message.get("do"))
        self._question = (question, message.get("n"))
        now = time.monotonic_ns()
        if question == "release":
            self._is_released = True
            self._let_go()
        elif question == "lost":
            self._promise.abandoned(now, str(message.get("why")), now)
        elif self._is_released or not self._promise.arm(now, held=bool(message.get("held"))):
            self._question = None
            self._say({"n": message.get("n"), "refused": True})

    def _let_go(self) -> None:
        """The agent has released us; but of a `cont` that is on its way it is to learn why it was
        sent, and whether it came too late is to be found out."""
        sent = self._on_its_way[0] if self._on_its_way is not None else None
        if self._is_released and self._promise.stage is not Stage.DOUBTED and sent is not Due.CONT:
            self._is_released = False
            self._promise.release()

    def _answer(self) -> None:
        """Answer the agent's last question when it can be answered."""
        promise = self._promise
        if self._question is None or self._on_its_way is not None:
            return
        question, number = self._question
        if promise.stage is (Stage.ASKED if question == "arm" else Stage.DOUBTED):
            return
        if question == "lost" and not promise.stage.is_settled:
            return
        self._question = None
        if question == "arm" and promise.stage is Stage.ARMED:
            self._write("armed", sync=True)
        noted = self._note if self._is_noted else {}
        answer: dict[str, object] = {
            "n": number,
            "stage": promise.stage.value,
            "status": promise.status,
            "migration": promise.migration,
            "looked_ns": promise.looked_ns,
            "acted": promise.acted,
            "why": str(noted.get("why", "")),
            "obstacle": str(noted.get("obstacle", "")),
        }
        if question != "arm":
            # The agent is there and reports it.
            promise.release()
            self._write("idle")
        self._say(answer)

    def _say(self, message: dict[str, object]) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the end of file is noticed when it is read

    # -- notes -----------------------------------------------------------------------------------

    @property
    def _is_noted(self) -> bool:
        return self._note.get("state") == "over"

    def _leave_note(self, obstacle: str) -> None:
        why = self._promise.why
        self._write("over", sync=True, why=why, obstacle=obstacle, resumed=not obstacle)

    def _write(
        self, state: str, *, sync: bool = False, again: bool = False, **more: object
    ) -> None:
        """In place and in one write, which leaves no half of a note; never shorter than before."""
        if not again:
            if state == self._note.get("state"):
                return
            self._note["t_ns"] = time.monotonic_ns()
        self._note.update(more, state=state)
        if self._note_file < 0:
            return
        content = json.dumps(self._note).encode().ljust(self._note_size)
        self._note_size = len(content)
        try:
            os.pwrite(self._note_file, content, 0)
            if sync:
                os.fsync(self._note_file)
        except OSError:
            pass  # the guest matters more than its note

    def _have_run(self) -> dict[str, int]:
        """How often the thread of each vCPU was put on a CPU: since once more, it may have run.

        One that is stopped sleeps, however often QEMU is asked for its state.  Nothing where
        threads cannot be seen by the ids that QEMU has of them.
        """
        found = {}
        for number in self._vcpus:
            try:
                with open(f"/proc/{self._note.get('pid')}/task/{number}/schedstat") as f:
                    found[str(number)] = int(f.read().split()[2])
            except (OSError, ValueError, IndexError):
                return {}
        return found

    def _remove_note(self) -> None:
        if self._note_file >= 0:
            try:
                os.unlink(str(self._note_path))
            except OSError:
                pass

    # -- both ------------------------------------------------------------------------------------

    def _read(self, sock: socket.socket) -> list[dict[str, object]]:
        """Whole messages that have arrived, at most `_READS` pieces of them at a time: a peer that
        never stops keeps us neither from the other one nor from the clock.  Notes the end of file.
        """
        number = sock.fileno()
        data = self._buffers[number]
        for _ in range(_READS):
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
        whole, _, rest = data.rpartition(b"\n")
        lines = whole.split(b"\n")
        if len(rest) > _LINE_MAX:
            raise RuntimeError("a message that does not end")
        self._buffers[number] = rest
        messages = (json.loads(line) for line in lines if line.strip())
        return [m for m in messages if isinstance(m, dict)]


def _member(value: object, name: str) -> str:
    """Of an object; empty when there is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def main(argument: str) -> None:
    """Be the guard.  `argument` is JSON: `control` and `monitor`, file descriptors, and the
    settings of `Guard`."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(argument)
    try:
        os.nice(-10)  # so that a paused guest waits no longer than it must; for root only
    except OSError:
        pass
    control = socket.socket(fileno=settings["control"])
    monitor = socket.socket(fileno=settings["monitor"])
    try:
        Guard(control, monitor, settings).run()
    except Exception as error:
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
