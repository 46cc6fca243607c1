"""The resume guard, as the agent sees it: a process that resumes the guest if the agent cannot.

`ResumeGuard.start` takes a free monitor of the guest and gives it to a process of its own
(`guard_process`; the rules are in `promise`).  `arm` comes before every `stop`, `release` when the
guest runs again.  How a guest is paused between the two is in `paused`.

A guest that a migration has is not paused (`refuse_if_migrating`).  Why, and what follows from it,
is in `promise`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from itertools import count
from typing import Self

import msgspec

from ...errors import GuestMigrating, OperationFailed, TargetError
from ...host.bounded import in_thread
from ...qmp import Address, Monitor, find_owner
from ...qmp.freeze import freeze_key
from ...qmp.guest import GuestLook, look
from ...qmp.identity import GuestIdentity, same_answers
from .guard_notes import new_note
from .guard_start import greeted, no_monitor, spawned
from .promise import TAKEN, is_migrating

__all__ = [
    "RAN_TWICE",
    "ResumeGuard",
    "Settled",
    "WAIT",
    "check_not_migrating",
    "has_guest",
    "refuse_if_migrating",
]


MAX_PAUSE_S = 2.0
_CONNECT_S = 1.0
_ARM_S = 2.0
_RELEASE_S = 1.0
_CLOSE_S = 2.0


class Settled(StrEnum):
    """How a guest was found whose agent could not resume it.

    RUNS: it runs, the guard had nothing to do.  RESUMED: the guard has resumed it.  LEFT: it does
    not run; QEMU refuses, or it is stopped for another reason.  UNKNOWN: not known (yet).
    """

    RUNS = "runs"
    RESUMED = "resumed"
    LEFT = "left"
    UNKNOWN = "unknown"


class _Message(msgspec.Struct):
    """What the guard's process says."""

    n: int | None = None
    ready: bool = False
    told: dict[str, object] = {}
    stage: str = ""
    status: str = ""
    migration: str = ""
    looked_ns: int = 0
    acted: bool = False
    refused: bool = False
    why: str = ""
    obstacle: str = ""
    failed: str = ""


class ResumeGuard:
    """A guard that runs.  Use `start`, and `async with` or `close`.

    `acted` says that since the last `arm` the guard sent `cont` in our place, `why` what made it,
    `obstacle` what kept the guest from running all the same.  (Where QEMU was blocked meanwhile, an
    agent's own `cont` may have come first.)  `lock` is held by whoever has the guest paused.

    When it is closed, or its agent ends, while the guest is paused, the guard sees to it that the
    guest runs, and ends then.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        target: Address,
        identity: GuestIdentity,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        max_pause_s: float,
    ) -> None:
        self.target = target
        self.identity = identity
        self.max_pause_s = max_pause_s
        self.acted = False
        self.why = ""
        self.obstacle = ""
        self.lock = asyncio.Lock()
        self._process = process
        self._reader, self._writer = streams
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[_Message]] = {}
        self._ready: asyncio.Future[_Message] = asyncio.get_running_loop().create_future()
        self._failure = ""
        self.looked_ns = 0
        """When it asked (CLOCK_MONOTONIC) what `arm` returned."""
        self._closed = False
        self._note_path = ""
        self._listening = asyncio.create_task(self._listen(), name=f"guard {target}")

    @classmethod
    async def start(
        cls,
        targets: Sequence[Address],
        meant: GuestIdentity | None = None,
        *,
        max_pause_s: float = MAX_PAUSE_S,
        deadline: float = 2.0,
    ) -> ResumeGuard:
        """A guard on the first of `targets` that is free and the guest's that is `meant` (without:
        whoever answers there), ready within `deadline` seconds.

        It lets no pause last longer than `max_pause_s`.  Raises UpdateRefused when none is free,
        WrongGuest, TargetUnreachable, TargetLost or ProtocolViolation when none works,
        OperationFailed when the guard's process does not come up.
        """
        until = time.monotonic() + deadline
        failures: list[TargetError] = []
        for target in targets:
            try:
                left = min(_CONNECT_S, max(0.1, until - time.monotonic()))
                sock, identity = await greeted(target, meant, left)
            except TargetError as error:
                failures.append(error)
                continue
            with sock:
                left = max(0.5, until - time.monotonic())
                return await cls._on(sock, target, identity, max_pause_s, left)
        raise no_monitor(failures)

    @classmethod
    async def _on(
        cls,
        sock: socket.socket,
        target: Address,
        identity: GuestIdentity,
        max_pause_s: float,
        deadline: float,
    ) -> ResumeGuard:
        owner = await in_thread(find_owner, target, identity)
        note = new_note(freeze_key(target, owner))
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = spawned(theirs, sock, identity, note, max_pause_s)
        except BaseException:
            ours.close()
            if note.held is not None:
                note.held.remove()
            raise
        if note.held is not None:
            note.held.close()  # the guard's process holds it from now on
        try:
            streams = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            _reap_later(process)
            raise
        guard = cls(process, target, identity, streams, max_pause_s)
        guard._note_path = note.path
        try:
            async with asyncio.timeout(deadline):
                ready = await guard._ready
            if not identity.certain:
                same_answers(target, identity, ready.told)
        except TimeoutError:
            await guard.close()
            raise OperationFailed(
                f"the resume guard of {target} was not ready within {deadline:.1f} s; nothing was "
                "touched",
                remedy="QEMU's main loop is stalled, or this host is overloaded: try again",
            ) from None
        except BaseException:
            await guard.close()
            raise
        return guard

    @property
    def pid(self) -> int:
        """Of the guard's process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Its process answers, as far as is known."""
        return not self._listening.done()

    async def arm(self, *, held: bool = True) -> str:
        """Call it right before `stop` is sent.  Returns the guest's status (RunState).

        It is armed only when that is `running`: with any other the guest must not be resumed, and
        so there is nothing to guard.  Not `held`: `cont` is sent together with `stop`.  Raises
        GuestMigrating when a migration is under way or has taken the guest, OperationFailed when
        the guard is gone or does not answer: then nothing may be stopped.
        """
        self.acted = False
        self.why = self.obstacle = ""
        try:
            answer = await self._ask("arm", _ARM_S, held=held)
        except TimeoutError:
            self._tell("release")
            raise OperationFailed(
                f"the resume guard of {self.target} did not answer within {_ARM_S:g} s; the guest "
                "was not stopped",
                remedy="QEMU's main loop is stalled, or the guard is: try again",
            ) from None
        except asyncio.CancelledError:
            self._tell("release")
            raise
        if answer.refused:
            raise OperationFailed(
                f"an earlier pause of {self.target} is not over; the guest was not stopped again",
                remedy="QEMU's main loop is stalled; try again when it answers",
            )
        check_not_migrating(answer.status, answer.migration)
        self.looked_ns = answer.looked_ns
        return answer.status

    async def release(self) -> None:
        """The guest runs again, or was never stopped: the promise is kept.

        Sets `acted`.  Raises nothing: a guard that is gone promises nothing (`is_alive`).
        """
        try:
            self._take(await self._ask("release", _RELEASE_S))
        except TimeoutError:
            pass
        except OperationFailed:
            with suppress(OSError):
                os.unlink(self._note_path)

    async def hand_over(
        self, why: str = "the agent lost its connection", *, deadline: float = 5.0
    ) -> Settled:
        """We cannot resume the guest, or do not know whether it runs: the guard shall see to it.

        Our own connection must be closed, or all that we sent over it answered.
        """
        try:
            answer = await self._ask("lost", deadline, why=why)
        except (TimeoutError, OperationFailed):
            return Settled.UNKNOWN
        self._take(answer)
        if answer.stage == "left":
            return Settled.LEFT
        return Settled.RESUMED if answer.acted else Settled.RUNS

    async def close(self) -> None:
        """End the guard.  Idempotent; a guard that still has to resume the guest ends later."""
        if self._closed:
            return
        self._closed = True
        if self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()
        try:
            await asyncio.wait((self._listening,), timeout=_CLOSE_S)
        finally:
            ended = self._listening.done()
            self._listening.cancel()
            self._writer.close()
            # It has closed its end, so it is about to exit; otherwise it stays for its promise.
            if not ended or not _reaped(self._process, 0.5):
                _reap_later(self._process)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _take(self, answer: _Message) -> None:
        self.acted, self.why, self.obstacle = answer.acted, answer.why, answer.obstacle

    async def _ask(self, what: str, deadline: float, **more: bool | str) -> _Message:
        """Raises TimeoutError, and OperationFailed when the guard is gone."""
        if not self.is_alive or self._closed:
            raise self._gone()
        number = self._tell(what, **more)
        future: asyncio.Future[_Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(deadline):
                return await future
        finally:
            del self._waiting[number]

    def _tell(self, what: str, **more: bool | str) -> int:
        number = next(self._numbers)
        if not self._writer.is_closing():
            self._writer.write(json.dumps({"do": what, "n": number, **more}).encode() + b"\n")
        return number

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                message = msgspec.json.decode(line, type=_Message)
                self._failure = message.failed or self._failure
                future = self._ready if message.ready else self._waiting.get(message.n or 0)
                if future is not None and not future.done():
                    future.set_result(message)
        except (OSError, ValueError) as error:
            self._failure = str(error)
        finally:
            for future in (self._ready, *self._waiting.values()):
                if not future.done():
                    future.set_exception(self._gone())
                    future.exception()  # nobody may be waiting

    def _gone(self) -> OperationFailed:
        why = f" ({self._failure})" if self._failure else ""
        return OperationFailed(
            f"the resume guard of {self.target} has ended{why}; the guest was not stopped",
            remedy="QEMU quit, or the guard was killed: try again",
        )


def _reap_later(process: subprocess.Popen[bytes]) -> None:
    threading.Thread(target=process.wait, name="reap the guard", daemon=True).start()


def _reaped(process: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        process.wait(deadline)
    except subprocess.TimeoutExpired:
        return False
    return True


# -- migrations ----------------------------------------------------------------------------------


RAN_TWICE = (
    "a migration completed before our `cont`, and the guest was stopped here again; if it is "
    "paused at the destination, it stays so until `cont` is sent there"
)
WAIT = "wait until it is over, or cancel it"
_WHY = {
    "inmigrate": ("it waits for an incoming migration", WAIT),
    "finish-migrate": ("it is being migrated", WAIT),
    "postmigrate": ("it has been migrated away", "name the QEMU that it was migrated to"),
}


def has_guest(seen: GuestLook) -> bool:
    """A migration has the guest: it would not have been paused."""
    return is_migrating(seen.migration) or seen.status in TAKEN


def check_not_migrating(status: str, migration: str, done: str = "it was not paused") -> None:
    """Raises GuestMigrating, `done` says what was not."""
    if is_migrating(migration):
        why, remedy = f"a migration is under way ({migration})", WAIT
    elif status in TAKEN:
        why, remedy = f"the guest is in the state {status}: {_WHY[status][0]}", _WHY[status][1]
    else:
        return
    raise GuestMigrating(f"{why}; {done}", remedy=remedy)


async def refuse_if_migrating(monitor: Monitor, done: str, *, deadline: float = 10.0) -> None:
    """Raises GuestMigrating, and as `Monitor.pipeline`."""
    seen = await look(monitor, deadline=deadline)
    check_not_migrating(seen.status, seen.migration, done)
