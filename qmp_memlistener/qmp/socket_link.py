"""The link over a socket: QMP as QEMU speaks it (`links.Link`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from qemu.qmp import ConnectError, ExecInterruptedError, QMPError, StateError
from qemu.qmp.error import ProtocolError

from ..errors import (
    CommandFailed,
    DeadlineExceeded,
    ProtocolViolation,
    TargetError,
    TargetLost,
    TargetUnreachable,
)
from .client import TimedClient
from .dial import answered
from .identity import GuestIdentity
from .links import Abilities, Command, OnEvent, QemuVersion, Reply
from .targets import SocketTarget, UnixTarget

__all__ = ["SocketLink"]


class SocketLink:
    """One connection to a QMP monitor's socket."""

    def __init__(self, target: SocketTarget, on_event: OnEvent, on_end: Callable[[], None]) -> None:
        self.abilities = Abilities()
        self.version = QemuVersion(0, 0, 0)
        self._target = target
        self._client = TimedClient(on_event, on_end)

    @property
    def why_slow(self) -> str:
        return ""

    @property
    def is_running(self) -> bool:
        return self._client.is_running

    async def open(self, meant: GuestIdentity | None, deadline: float) -> GuestIdentity:
        target, client = self._target, self._client
        until = asyncio.get_running_loop().time() + deadline
        found = await answered(target, meant, deadline)
        try:
            async with asyncio.timeout_at(until):
                try:
                    await client.open(found.sock)
                except BaseException:
                    found.sock.close()
                    raise
        except TimeoutError:
            raise DeadlineExceeded(
                f"{target} began to answer, but did not greet and negotiate within {deadline:g} s",
                remedy="QEMU hangs, or this is no QMP monitor",
            ) from None
        except ConnectError as error:
            raise _session_error(target, error.exc) from error
        except (EOFError, OSError, QMPError) as error:
            raise _session_error(target, error) from error
        greeting = client.greeting
        if greeting is None:
            raise _session_error(target, ProtocolError("no greeting"))
        try:
            self.version = QemuVersion.read(greeting.QMP.version)
            self.abilities = Abilities(
                asks=True,
                out_of_band="oob" in greeting.QMP.capabilities,
                descriptors=isinstance(target, UnixTarget),
                direct=True,
            )
        except (LookupError, TypeError, ValueError) as error:
            with suppress(Exception):
                await client.disconnect()
            raise _session_error(target, ProtocolError(f"odd greeting: {error}")) from error
        return found.identity

    async def run(
        self, commands: Sequence[Command], *, oob: bool = False
    ) -> list[Reply | CommandFailed]:
        try:
            return await self._client.run_commands(commands, oob=oob)
        except (ExecInterruptedError, StateError) as error:
            raise ConnectionError(str(error)) from error
        except QMPError as error:
            raise _session_error(self._target, error) from error

    async def end(self) -> None:
        try:
            await self._client.disconnect()
        except Exception as cause:
            raise _session_error(self._target, cause) from cause

    def abort(self) -> None:
        self._client.abort()


def _session_error(target: SocketTarget, cause: BaseException) -> TargetError:
    """The typed error for what qemu.qmp raised."""
    if isinstance(cause, TargetError):
        return cause
    if isinstance(cause, EOFError):
        return TargetLost(f"{target} hung up", remedy="QEMU quit, was killed or closed the monitor")
    if isinstance(cause, QMPError):
        lines = str(cause).splitlines() or [type(cause).__name__]
        return ProtocolViolation(
            f"{target} does not speak QMP: {lines[0][:200]}",
            remedy="is this a QMP monitor (-qmp, or -mon mode=control)?",
        )
    if isinstance(cause, ConnectionError):
        return TargetLost(
            f"the connection to {target} broke: {cause}",
            remedy="QEMU quit, was killed or closed the monitor",
        )
    if isinstance(cause, OSError):
        return TargetUnreachable(f"cannot connect to {target}: {cause.strerror or cause}")
    # asyncio reports a line longer than the read limit as ValueError.
    return ProtocolViolation(f"{target} does not speak QMP: {str(cause)[:200]}")
