"""The tasks that last as long as an attachment, and the reason why it cannot go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from ..errors import MemListenerError, OperationFailed, TargetLost

__all__ = ["Background"]

log = logging.getLogger(__name__)

_END_DEADLINE = 2.0


class Background:
    """Runs the tasks of one attachment; make it in a running event loop.

    `lost` is set, once, to the reason why the guest cannot be followed any more.
    """

    def __init__(self) -> None:
        self.lost: asyncio.Future[MemListenerError] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        """A task that lasts as long as the attachment; if it fails, the guest is lost to us."""
        self._tasks.append(asyncio.create_task(self._guarded(work, name), name=name))

    def give_up(self, reason: MemListenerError) -> None:
        """The guest cannot be followed any more; the first reason counts."""
        if not self.lost.done():
            self.lost.set_result(reason)

    async def end(self) -> None:
        """Stop the tasks."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_DEADLINE)

    async def _guarded(self, work: Coroutine[object, object, None], name: str) -> None:
        try:
            await work
        except TargetLost:
            pass  # the monitor says so too, once everything is reported
        except MemListenerError as exc:
            self.give_up(exc)
        except OSError as exc:
            self.give_up(TargetLost(f"{name}: {exc.strerror or exc}"))
        except Exception as exc:  # a defect of ours must not leave the user blind
            log.exception("the task for %s failed", name)
            self.give_up(
                OperationFailed(
                    f"the agent cannot go on: {name} failed with {type(exc).__name__}: {exc}",
                    remedy="please report it with the recording and the log",
                )
            )
