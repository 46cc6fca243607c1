"""Ending an update in order before it is done, which is what a first signal does.

An update that is told so makes nothing more, takes back what it has made as long as no device
was changed, waits for the guest no longer, and returns an Outcome that says what it left.
"""

from __future__ import annotations

import asyncio

from .model import Outcome

__all__ = ["Waiting"]


class Waiting:
    """Who carries out an update, and who may end it, share one of these.

    `begun` is set while the guest is waited for; `enough` ends the update early.  `command` is what
    QEMU is asked for just now, which is waited for all the same.  `outcome` is what came of the
    update, also of one that was cancelled.
    """

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.enough = asyncio.Event()
        self.command: str | None = None
        self.outcome: Outcome | None = None
        self._under_way = False

    def start(self) -> None:
        """The update is under way, and ends in order from now on."""
        self._under_way = True

    def end(self) -> bool:
        """End it; False when it has not begun, or was ended so before."""
        if not self._under_way or self.enough.is_set():
            return False
        self.enough.set()
        return True
