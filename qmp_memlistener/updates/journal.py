"""What an update has made so far, and the way back.

Steps that QEMU has answered are known to be made; one that was sent and not answered may be.  What
is taken back is struck out, so that what is left can be named at any moment, a second interruption
included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable

from ..errors import CommandFailed, MemListenerError, TargetUnreachable
from ..qmp import Monitor
from ..qmp.guest_devices import PERIPHERAL, read_children
from .model import Role
from .removing import remove
from .steps import Step

__all__ = ["Journal"]

UNDO_DEADLINE = 10.0


class Journal:
    """`made` and `asked`, the oldest first; `notes` tell what came of taking back.

    `stands`: a device was changed, so that nothing is taken back.
    """

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.made: list[Step] = []
        self.asked: tuple[Step, ...] = ()
        self.stands = False
        self._removed: list[str] = []

    def ask(self, *steps: Step) -> None:
        """They are sent now."""
        self.asked = steps

    def answered(self, steps: Iterable[Step]) -> None:
        """Of those that were sent QEMU has carried out these, and no others."""
        self.asked = ()
        self.made += steps

    @property
    def left(self) -> list[str]:
        """What is there now, in words."""
        return [step.state for step in self.made] + [
            f"whether {step.state} is not known" for step in self.asked
        ]

    @property
    def removed(self) -> str:
        """What was taken back, in words."""
        if not self._removed:
            return "nothing had been made"
        return f"what had been made was taken back: {', '.join(self._removed)}"

    async def take_back(self, ops: Monitor) -> None:
        """In reverse; what cannot be taken back is noted.  Bounded, also when cancelled again."""
        await _bounded(self._take_back(ops))

    async def _take_back(self, ops: Monitor) -> None:
        known = False
        try:
            if not ops.is_connected:
                await ops.reconnect()
            known = await self._was_made(ops)
        except TargetUnreachable:
            self.made, self.asked = [], ()
            return  # QEMU has gone, and all that was made with it
        except MemListenerError as exc:
            self.notes.append(f"what was changed may not be as it was before: {exc.message}")
        self.notes += [
            f"{step.what}: whether QEMU took the command is not known"
            for step in self.asked
            if step.undo is None and step.addition is None
        ]
        if known:
            return
        for step in reversed((*self.made, *self.asked)):
            if step.undo is None:
                continue
            sure = step in self.made
            try:
                await remove(ops, step.undo, deadline=UNDO_DEADLINE)
            except CommandFailed as exc:
                if sure:
                    self.notes.append(f"{step.what} is still there: {exc.message}")
                    continue
                # one that was never made cannot be removed
            except MemListenerError as exc:
                self.notes.append(f"{step.what} may still be there: {exc.message}")
                return
            self._strike(step)

    def _strike(self, step: Step) -> None:
        if step in self.made:
            self.made.remove(step)
            self._removed.insert(0, step.what)
        self.asked = tuple(s for s in self.asked if s is not step)

    async def _was_made(self, ops: Monitor) -> bool:
        """Whether a device has come or gone although the answer to its device_add or device_del has
        not come.  One that is still there may have been asked for: the guest lets it go, or not.
        """
        commands = (Role.DEVICE.add_command, Role.DEVICE.remove_command)
        changed = [step for step in self.asked if step.command.name in commands]
        if not changed:
            return False
        there = await read_children(ops, PERIPHERAL)
        for step in changed:
            is_there = (step.command.arguments or {}).get("id") in there
            if step.addition is None and is_there:
                continue
            self._strike(step)
            if step.addition is None or is_there:
                self.made.append(step)
                how = "there all the same, and what it stands on" if is_there else "gone"
                self.notes.append(f"{step.what} is {how}")
                self.stands = True
        return self.stands


async def _bounded(work: Coroutine[object, object, None]) -> None:
    """Also when cancelled meanwhile, it gets its time; cancelled again, it ends."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=UNDO_DEADLINE)
    finally:
        task.cancel()
