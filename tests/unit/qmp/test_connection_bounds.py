"""What a hostile QEMU can make us hold: long messages, messages of many values, many events."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from pathlib import Path

import pytest

from qmp_memlistener.errors import ProtocolViolation
from qmp_memlistener.qmp import EventStream, Monitor, MonitorEvent
from qmp_memlistener.qmp.client import EVENT_LIMIT, VALUES_LIMIT
from qmp_memlistener.qmp.events import QUEUE_BYTES
from tests.unit.qmp.fake_qmp import message, replying, serving


@pytest.mark.asyncio
async def test_a_message_of_too_many_values_is_not_decoded(tmp_path: Path) -> None:
    reply = b'{"return": [' + b"[]," * VALUES_LIMIT + b'[]], "id": ID}\n'
    server = serving(tmp_path, replying(reply))
    async with server as target, await Monitor.connect(target) as monitor:
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolViolation, match="values"):
                await monitor.execute("query-status", deadline=30)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 10 * len(reply)


@pytest.mark.asyncio
async def test_an_event_larger_than_any_of_qemus_ends_the_session(tmp_path: Path) -> None:
    event = message({"event": "STOP", "data": {"x": "y" * EVENT_LIMIT}})
    server = serving(tmp_path, replying(event + b'{"return": {}, "id": ID}\n'))
    async with server as target, await Monitor.connect(target) as monitor:
        with pytest.raises(ProtocolViolation, match="event"):
            await monitor.execute("query-status")


@pytest.mark.asyncio
async def test_events_that_nobody_reads_are_bounded_in_bytes(tmp_path: Path) -> None:
    data = {"x": "y" * (EVENT_LIMIT // 2)}
    count = 3 * QUEUE_BYTES // (EVENT_LIMIT // 2)
    events = [message({"event": "RTC_CHANGE", "data": {"n": n} | data}) for n in range(count)]
    server = serving(tmp_path, replying(b"".join(events) + b'{"return": {}, "id": ID}\n'))
    async with server as target, await Monitor.connect(target) as monitor:
        with monitor.events(limit=4096) as stream:
            await monitor.execute("query-status", deadline=30)
            assert stream.dropped > 0
            kept = [await anext(stream) for _ in range(count - stream.dropped)]
    assert [e.data["n"] for e in kept] == list(range(stream.dropped, count))
    assert sum(len(json.dumps(e.data)) for e in kept) <= QUEUE_BYTES


@pytest.mark.asyncio
async def test_one_event_is_kept_however_large() -> None:
    stream = EventStream(10, lambda _: None)
    stream.push(MonitorEvent("A", {}, 0, None), 1)
    stream.push(MonitorEvent("B", {}, 0, None), QUEUE_BYTES + 1)
    assert stream.dropped == 1
    assert (await asyncio.wait_for(anext(stream), 1)).name == "B"
