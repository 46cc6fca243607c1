"""QMP events as records: the guest's state, devices and memory."""

from __future__ import annotations

import asyncio

from ..qmp import Monitor, MonitorEvent
from ..qmp.guest import try_status
from ..records import GuestState, Lost, QmpEvent, Record
from .source import Publish, Source

__all__ = ["GuestEvents"]

# QMP events about the guest's state, and those about devices and memory
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


WAITING = 256
"""So many events of the guest's state wait to be reported."""


class GuestEvents:
    """Takes the events of one monitor; every one pokes the source."""

    def __init__(self, monitor: Monitor, source: Source, publish: Publish) -> None:
        self._monitor = monitor
        self._source = source
        self._publish = publish
        self._waiting: list[MonitorEvent] = []
        self._dropped = 0
        self._telling: asyncio.Task[None] | None = None

    def take(self, event: MonitorEvent) -> None:
        """Report one event, or ask the guest about it first."""
        if event.name in _STATE_EVENTS:
            # with a trace `runstate_set` reports it, and why
            if self._source.name != "trace" or event.name not in ("STOP", "RESUME"):
                self._tell(event)
        elif event.name in _DEVICE_EVENTS:
            record = QmpEvent(t_ns=event.t_ns, event=event.name, data=dict(event.data))
            self._publish([record])
        self._source.poke()

    async def close(self) -> None:
        """Ask no more."""
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.cancel()
            await asyncio.wait([telling])

    def _tell(self, event: MonitorEvent) -> None:
        if len(self._waiting) >= WAITING:
            self._dropped += 1
            return
        self._waiting.append(event)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._report_states())

    async def _report_states(self) -> None:
        """STOP does not say why the guest stopped: ask, once for all that came meanwhile.

        The answer is what the last of them led to; of the others the event is all there is.
        """
        while self._waiting:
            events, self._waiting = self._waiting, []
            dropped, self._dropped = self._dropped, 0
            # none: it is going down
            answer = await try_status(self._monitor, deadline=2.0)
            records: list[Record] = [
                GuestState(
                    t_ns=event.t_ns,
                    status=event.name.lower(),
                    running=event.name in ("RESUME", "RESET", "WAKEUP"),
                    event=event.name,
                )
                for event in events
            ]
            if answer is not None:
                last = events[-1]
                records[-1] = GuestState(
                    t_ns=last.t_ns,
                    status=answer.status,
                    running=answer.running,
                    event=last.name,
                )
            if dropped:
                what = "events of the guest's state came faster than it could be asked"
                records.append(Lost(t_ns=events[-1].t_ns, what=what, count=dropped))
            self._publish(records)
