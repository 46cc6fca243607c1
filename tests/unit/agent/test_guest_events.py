"""A guest's events as records: a flood of them costs a bounded number of questions and tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import cast

import pytest

from qmp_memlistener.agent import guest_events
from qmp_memlistener.agent.guest_events import GuestEvents
from qmp_memlistener.agent.source import Source
from qmp_memlistener.qmp import Monitor, MonitorEvent
from qmp_memlistener.records import GuestState, Lost, Record


class Asked:
    """A monitor that answers when it may; the order alone is what matters."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.questions = 0

    async def execute(self, command: str, _: object = None, *, deadline: float) -> object:
        assert (command, deadline) == ("query-status", 2.0)
        self.questions += 1
        await self.may.wait()
        return {"status": "running", "running": True}


class Poked:
    name = "polling"

    def poke(self) -> None:
        pass


@pytest.mark.asyncio
async def test_a_flood_of_resets_is_asked_about_twice() -> None:
    asked, published = Asked(), list[Record]()
    told = asyncio.Event()

    def publish(records: Iterable[Record]) -> None:
        published.extend(records)
        if any(isinstance(r, Lost) for r in published):
            told.set()

    events = GuestEvents(cast(Monitor, asked), cast(Source, Poked()), publish)
    count = 10_000
    for i in range(count):
        events.take(MonitorEvent("RESET", {}, i, None))
        if i == 0:
            await asyncio.sleep(0)  # it asks
    assert len(asyncio.all_tasks()) == 2
    asked.may.set()
    async with asyncio.timeout(5):
        await told.wait()
    assert asked.questions == 2
    states = [r for r in published if isinstance(r, GuestState)]
    (lost,) = [r for r in published if isinstance(r, Lost)]
    assert len(states) == 1 + guest_events.WAITING
    assert lost.count == count - len(states)
    assert [s.t_ns for s in states] == list(range(len(states)))
    assert [s.status for s in states if s.status != "reset"] == ["running"] * 2
    await events.close()
