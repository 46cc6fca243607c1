"""The link to a QEMU that cannot be asked: it has no monitor, or others hold them all.

What there is to know of such a guest comes from its process.  The session lasts as long as that.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from ..errors import CommandFailed, TargetLost, TargetUnreachable
from ..host.bounded import in_thread
from ..host.processes import Process
from .discovery import find_guest
from .identity import GuestIdentity, wrong_guest
from .links import Abilities, Command, QemuVersion, Reply
from .targets import PidTarget

__all__ = ["NoLink"]


class NoLink:
    """A process and nothing else; no ability is there, and every command is refused."""

    def __init__(self, target: PidTarget, on_end: Callable[[], None]) -> None:
        self.abilities = Abilities()
        self.version = QemuVersion(0, 0, 0)
        self._target = target
        self._on_end = on_end
        self._handle = -1  # a pidfd, readable when the process has ended
        self._ended = False

    @property
    def why_slow(self) -> str:
        return ""

    @property
    def is_running(self) -> bool:
        return self._handle >= 0 and not self._ended

    async def open(self, meant: GuestIdentity | None, deadline: float) -> GuestIdentity:  # noqa: ARG002 (nobody is waited for)
        target = self._target
        try:
            handle = os.pidfd_open(target.pid)
        except OSError as error:
            raise TargetUnreachable(f"{target}: {error.strerror}") from error
        try:
            guest = await in_thread(find_guest, target.pid)
            if guest is None:
                raise TargetUnreachable(
                    f"{target} is no running QEMU",
                    remedy="`qmp-memlistener list` shows those on this host",
                )
            found = GuestIdentity.of(guest.process)
            if meant is not None and meant != found:
                raise wrong_guest(target, meant, found)
        except BaseException:
            os.close(handle)
            raise
        if guest.version is not None:
            major, minor, micro = map(int, guest.version.split("."))
            self.version = QemuVersion(major, minor, micro)
        self._handle = handle
        asyncio.get_running_loop().add_reader(handle, self._gone)
        return found

    async def run(
        self,
        commands: Sequence[Command],
        *,
        oob: bool = False,  # noqa: ARG002 (as a link has it)
    ) -> list[Reply | CommandFailed]:
        if not self.is_running:
            raise ConnectionError("the process has ended")
        names = ", ".join(c.name for c in commands)
        raise TargetUnreachable(
            f"{self._target} cannot be asked {names}: no QMP monitor of it is free",
            remedy="start QEMU with -qmp unix:PATH,server=on,wait=off",
        )

    async def end(self) -> None:
        gone = self._ended or Process.read(self._target.pid) is None
        self.abort()
        if gone:
            raise TargetLost(f"{self._target} has ended", remedy="QEMU quit or was killed")

    def abort(self) -> None:
        self._forget()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _gone(self) -> None:
        self._forget()
        self._ended = True
        self._on_end()

    def _forget(self) -> None:
        if self._handle >= 0:
            asyncio.get_running_loop().remove_reader(self._handle)
