"""QMP events as records: the guest's state, devices and memory."""

from __future__ import annotations

import asyncio

from ..errors import CommandFailed, TargetError
from ..monitor import Monitor, QmpEvent
from ..recording import GuestState
from ..recording import QmpEvent as EventRecord
from .source import Publish, Source

__all__ = ["GuestEvents"]

# QMP events that tell of the guest's state, and those that tell of devices and memory
_STATE_EVENTS = frozenset(
    {"STOP", "RESUME", "RESET", "SHUTDOWN", "POWERDOWN", "SUSPEND", "WAKEUP", "GUEST_PANICKED"}
)
_DEVICE_EVENTS = frozenset(
    {
        "ACPI_DEVICE_OST",
        "BALLOON_CHANGE",
        "DEVICE_DELETED",
        "DEVICE_UNPLUG_GUEST_ERROR",
        "MEMORY_DEVICE_SIZE_CHANGE",
        "MEM_UNPLUG_ERROR",
        "MIGRATION",
        "UNPLUG_PRIMARY",
    }
)


class GuestEvents:
    """Takes the events of one monitor; every one pokes the source."""

    def __init__(self, monitor: Monitor, source: Source, publish: Publish) -> None:
        self._monitor = monitor
        self._source = source
        self._publish = publish
        self._questions: set[asyncio.Task[None]] = set()

    def take(self, event: QmpEvent) -> None:
        """Report one event, or ask the guest about it first."""
        if event.name in _STATE_EVENTS:
            # with a trace `runstate_set` tells, and tells why
            if self._source.name != "trace" or event.name not in ("STOP", "RESUME"):
                task = asyncio.create_task(self._report_state(event))
                self._questions.add(task)
                task.add_done_callback(self._questions.discard)
        elif event.name in _DEVICE_EVENTS:
            record = EventRecord(t_ns=event.t_ns, event=event.name, data=dict(event.data))
            self._publish([record])
        self._source.poke()

    async def close(self) -> None:
        """Ask no more."""
        questions = list(self._questions)
        for task in questions:
            task.cancel()
        if questions:
            await asyncio.wait(questions)

    async def _report_state(self, event: QmpEvent) -> None:
        """STOP does not say why the guest stopped: ask."""
        status, running = event.name.lower(), event.name in ("RESUME", "RESET", "WAKEUP")
        try:
            value = await self._monitor.execute("query-status", deadline=2.0)
            if isinstance(value, dict):
                status, running = str(value.get("status")), value.get("running") is True
        except (TargetError, CommandFailed):
            pass  # it is going down; the event is all there is
        self._publish(
            [GuestState(t_ns=event.t_ns, status=status, running=running, event=event.name)]
        )
