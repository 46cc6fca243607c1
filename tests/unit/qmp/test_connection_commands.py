"""Commands and events over a connection to a peer that is sick, slow or gone."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from qmp_memlistener.errors import (
    CommandFailed,
    DeadlineExceeded,
    ProtocolViolation,
    TargetError,
    TargetLost,
)
from qmp_memlistener.qmp import Command, Monitor, hmp
from tests.support.any_monitor import AnyMonitor
from tests.unit.qmp.fake_qmp import message, negotiated, replying, serving, within


@pytest.mark.asyncio
async def test_commands_events_and_errors(tmp_path: Path) -> None:
    event = message({"event": "STOP", "timestamp": {"seconds": 5, "microseconds": 7}})
    late = message({"event": "RESUME", "timestamp": {"seconds": -1, "microseconds": -1}})
    serve = replying(
        event + b'{"return": {"x": 1}, "id": ID}\n',
        late + b'{"error": {"class": "CommandNotFound", "desc": "no such"}, "id": ID}\n',
        b'{"return": 5, "id": ID}\n',
    )
    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        assert (str(monitor.version), monitor.version.package) == ("9.1.2", "(Debian 1:9)")
        assert monitor.version.release == (9, 1)
        assert monitor.abilities.out_of_band
        called: list[str] = []
        stop = monitor.subscribe(lambda e: called.append(e.name))
        with monitor.events() as events:
            before = time.monotonic_ns()
            reply = await monitor.timed("query-name")
            assert reply.value == {"x": 1}
            assert before <= reply.t_start_ns <= reply.t_end_ns <= time.monotonic_ns()
            got = await anext(events)
            assert (got.name, got.stamp_ns) == ("STOP", 5_000_007_000)
            assert reply.t_start_ns <= got.t_ns <= reply.t_end_ns
            stop()
            with pytest.raises(CommandFailed) as error:
                await monitor.execute("query-status")
            assert error.value.error_class == "CommandNotFound"
            assert error.value.remedy is not None
            assert (await anext(events)).stamp_ns is None
        assert called == ["STOP"]
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        with pytest.raises(ProtocolViolation):
            await hmp(monitor, "info network")
        await monitor.close()
        assert isinstance(monitor.lost.result(), TargetLost)
        with pytest.raises(TargetLost):
            await monitor.execute("query-kvm")


@pytest.mark.asyncio
async def test_a_stream_that_nobody_reads_counts_what_it_drops(tmp_path: Path) -> None:
    burst = b"".join(message({"event": f"E{i}"}) for i in range(100))
    async with (
        serving(tmp_path, replying(burst + b'{"return": {}, "id": ID}\n')) as target,
        await Monitor.connect(target) as monitor,
    ):
        stream = monitor.events(limit=10)
        await monitor.execute("query-name")
        assert stream.dropped == 90
        assert (await anext(stream)).name == "E90"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b'{"return": {}, "id": "other"}\n', DeadlineExceeded),
        (b"", DeadlineExceeded),
        (b'{"return": {}, "i', DeadlineExceeded),
        (b'{"id": ID}\n', ProtocolViolation),
        (b'{"error": 5, "id": ID}\n', ProtocolViolation),
        (b'{"error": {"class": "X", "desc": "parse"}}\n', ProtocolViolation),
        (b"garbage\n", ProtocolViolation),
    ],
)
async def test_replies_that_are_none(
    tmp_path: Path, reply: bytes, error: type[TargetError]
) -> None:
    async with (
        serving(tmp_path, replying(reply)) as target,
        within(2),
        await Monitor.connect(target) as monitor,
    ):
        with pytest.raises(error):
            await monitor.execute("query-name", deadline=0.3)


@pytest.mark.asyncio
@pytest.mark.parametrize("rest", [b"", b'{"return": {"x"'])
async def test_the_peer_goes_away_in_the_middle_of_a_command(tmp_path: Path, rest: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await negotiated(reader, writer)
        await reader.readuntil(b"}")
        writer.write(rest)
        writer.close()

    async with (
        serving(tmp_path, serve) as target,
        within(2),
        await Monitor.connect(target) as monitor,
    ):
        events = monitor.events()
        with pytest.raises((TargetLost, ProtocolViolation)):
            await monitor.execute("query-name")
        assert isinstance(await monitor.lost, TargetError)
        with pytest.raises(TargetError):
            await anext(events)
        assert not monitor.is_connected


@pytest.mark.asyncio
async def test_a_late_reply_does_not_answer_the_next_command(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await negotiated(reader, writer)
        first = json.loads(await reader.readuntil(b"}"))["id"]
        second = json.loads(await reader.readuntil(b"}"))["id"]
        writer.write(message({"return": "late", "id": first}))
        writer.write(message({"return": "right", "id": second}))
        await reader.read()

    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        with pytest.raises(DeadlineExceeded):
            await monitor.execute("query-name", deadline=0.05)
        assert await monitor.execute("query-status") == "right"


@pytest.mark.asyncio
async def test_pipelined_commands_leave_in_one_write(tmp_path: Path) -> None:
    sizes: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await negotiated(reader, writer)
        data = await reader.read(1 << 16)
        sizes.append(data.count(b'"execute"'))
        decoder, text = json.JSONDecoder(), data.decode()
        while text:
            request, end = decoder.raw_decode(text)
            text = text[end:].lstrip()
            kind = "error" if request["execute"] == "query-status" else "return"
            value = {"class": "GenericError", "desc": "no"} if kind == "error" else {}
            writer.write(message({kind: value, "id": request["id"]}))
        await reader.read()

    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        one, two, three = await monitor.pipeline(
            [Command("query-name"), Command("query-status", {"x": 1}), Command("query-kvm")]
        )
    assert sizes == [3]
    assert isinstance(two, CommandFailed)
    assert not isinstance(one, CommandFailed)
    assert not isinstance(three, CommandFailed)
    assert one.t_start_ns == three.t_start_ns


@pytest.mark.asyncio
async def test_closing_a_peer_that_does_not_read(tmp_path: Path) -> None:
    stuck = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await negotiated(reader, writer)
        await stuck.wait()

    async with serving(tmp_path, serve) as target:
        monitor = await Monitor.connect(target)
        with pytest.raises(DeadlineExceeded):
            await monitor.execute("query-status", {"x": "y" * (8 << 20)}, deadline=0.1)
        async with within(2):
            await monitor.close(deadline=0.3)
            await monitor.close()
        stuck.set()


@pytest.mark.asyncio
async def test_reconnect_keeps_streams(tmp_path: Path) -> None:
    serve = replying(message({"event": "STOP"}) + b'{"return": {}, "id": ID}\n')
    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        stream = monitor.events()
        await monitor.execute("query-name")
        await monitor.reconnect()
        assert not monitor.lost.done()
        await monitor.execute("query-name")
        assert [(await anext(stream)).name for _ in range(2)] == ["STOP", "STOP"]


@pytest.mark.asyncio
async def test_reconnect_after_the_peer_hung_up(tmp_path: Path) -> None:
    greeted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        greeted += 1
        await negotiated(reader, writer)
        if greeted == 1:
            await reader.readuntil(b"}")
            writer.close()
            return
        writer.write(message({"event": "STOP"}))
        await reader.read()

    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        stream = monitor.events()
        with pytest.raises(TargetLost):
            await monitor.execute("query-name")
        with pytest.raises(TargetLost):
            await anext(stream)
        await monitor.reconnect()
        assert (await anext(stream)).name == "STOP"


@pytest.mark.asyncio
async def test_a_monitor_of_the_tests_sends_what_the_product_would_not(tmp_path: Path) -> None:
    serve = replying(b'{"return": {}, "id": ID}\n')
    async with serving(tmp_path, serve) as target, await AnyMonitor.connect(target) as monitor:
        assert (await monitor.timed("system_reset")).value == {}
