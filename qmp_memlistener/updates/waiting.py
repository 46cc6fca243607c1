"""Ending an update in order before it is done, which is what a first signal does.

An update that is told so makes nothing more, takes back what it has made as long as no device
was changed, waits for the guest no longer, and returns an Outcome that says what it left.
"""

from __future__ import annotations

import asyncio

from .. import waits
from .model import Outcome

__all__ = ["Waiting"]


class Waiting:
    """Who carries out an update, and who may end it, share one of these.

    `enough` ends the update early.  `outcome` is what came of it, also when it was cancelled.
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
        self._answer = waits.begin(f"for QEMU's answer to {command}, which cannot be called back")

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
