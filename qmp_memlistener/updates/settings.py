"""How an update is carried out, and how it is ended in order before it is done."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from .. import waits
from .model import Outcome

__all__ = ["UpdateOptions", "Waiting"]


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How an update is carried out.

    The guard resumes the guest after `max_pause_s`.  The guest has `wait_s` for its part.
    `pipelined=False` sends stop, update and cont one after the other, to compare.
    `guard_monitor` names a monitor for the guard; otherwise a free one is found.  `waiting` can end
    the update in order, and keeps what came of it.
    """

    max_pause_s: float = 2.0
    wait_s: float = 10.0
    pipelined: bool = True
    guard_monitor: str | None = None
    waiting: Waiting | None = None


class Waiting:
    """Shared by an update and whoever may end it early, as a first signal does.

    `enough` is set then: the update makes nothing more, takes back what it has made as long as no
    device was changed, and waits for the guest no longer.  `outcome` is what came of it, also when
    it was cancelled.
    """

    def __init__(self) -> None:
        self.enough = asyncio.Event()
        self._answer: waits.Wait | None = None
        self.outcome: Outcome | None = None
        self._under_way = False

    def start(self) -> None:
        """The update is under way, and ends in order from now on."""
        self._under_way = True

    def ask(self, command: str) -> None:
        """QEMU is asked for this now; its answer is waited for whatever happens meanwhile."""
        self.answered()
        self._answer = waits.begin(f"for QEMU's answer to {command}, which cannot be cancelled")

    def answered(self) -> None:
        """It has answered, or is not waited for any more."""
        if self._answer is not None:
            waits.end(self._answer)
            self._answer = None

    def end(self) -> bool:
        """End it; False when it has not begun, or was ended so before."""
        if not self._under_way or self.enough.is_set():
            return False
        self.enough.set()
        return True
