"""Against servers that are no QEMU, or a sick one: a typed error, within two seconds."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import (
    CommandFailed,
    DeadlineExceeded,
    MonitorBusy,
    ProtocolViolation,
    TargetError,
    TargetLost,
    TargetUnreachable,
)
from qmp_memlistener.monitor import Command, Monitor, TcpTarget, UnixTarget, connection, hmp

GREETING: dict[str, object] = {
    "QMP": {
        "version": {"qemu": {"major": 9, "minor": 1, "micro": 2}, "package": " (Debian 1:9) "},
        "capabilities": ["oob"],
    }
}

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def message(value: object) -> bytes:
    return json.dumps(value).encode() + b"\r\n"


@asynccontextmanager
async def serving(tmp_path: Path, serve: Serve) -> AsyncIterator[UnixTarget]:
    path = str(tmp_path / "qmp")
    writers: list[asyncio.StreamWriter] = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return

    server = await asyncio.start_unix_server(accepted, path)
    try:
        yield UnixTarget(path)
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()
        await asyncio.sleep(0)


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    start = time.monotonic()
    async with asyncio.timeout(seconds + 5):
        yield
    assert time.monotonic() - start < seconds


def replying(*replies: bytes, greeting: bytes = message(GREETING)) -> Serve:
    """Greets, accepts the capabilities, then answers each line with the next of `replies`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        for reply in (b'{"return": {}, "id": ID}\r\n', *replies):
            request = await reader.readuntil(b"}")
            while request.count(b"{") != request.count(b"}"):
                request += await reader.readuntil(b"}")
            exec_id = json.dumps(json.loads(request).get("id")).encode()
            writer.write(reply.replace(b"ID", exec_id))
            await writer.drain()
        await reader.read()

    return serve


GARBAGE = [
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) \n",
    b"\xff\xfe\x00\x01\n",
    b"[]\n",
    b"1\n",
    b"null\n",
    b"{}\n",
    b"\n",
    b'{"QMP": null}\n',
    b'{"QMP": {"version": 1, "capabilities": []}}\n',
    b'{"QMP": {"version": {}, "capabilities": []}}\n',
    b'{"QMP": {"version": {"qemu": [1]}, "capabilities": []}}\n',
    b'{"QMP": {"version": {"qemu": {"major": "x", "minor": 1, "micro": 1}}, "capabilities": 1}}\n',
    b'{"return": {}}\n',
    b'{"event": "STOP"}\n',
    b"[" * 5000 + b"\n",
]


@pytest.mark.asyncio
@pytest.mark.parametrize("greeting", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_instead_of_a_greeting(tmp_path: Path, greeting: bytes) -> None:
    async with serving(tmp_path, replying(greeting=greeting)) as target, within(2):
        with pytest.raises(ProtocolViolation) as error:
            await Monitor.connect(target)
    assert error.value.exit_code == 3
    assert str(target) in error.value.message


@pytest.mark.asyncio
async def test_an_endless_line(tmp_path: Path) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x" * (1 << 20))
            await writer.drain()

    async with serving(tmp_path, serve) as target, within(2.5):
        with pytest.raises((ProtocolViolation, DeadlineExceeded)):
            await Monitor.connect(target)


@pytest.mark.asyncio
async def test_a_server_that_accepts_and_says_nothing(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(tmp_path, serve) as target, within(2):
        with pytest.raises(DeadlineExceeded):
            await Monitor.connect(target, deadline=0.5)


@pytest.mark.asyncio
async def test_a_hang_in_the_middle_of_the_greeting(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING)[:40])
        await reader.read()

    async with serving(tmp_path, serve) as target, within(2):
        with pytest.raises(DeadlineExceeded):
            await Monitor.connect(target, deadline=0.5)


@pytest.mark.asyncio
@pytest.mark.parametrize("sent", [0, 10, len(message(GREETING)) - 2])
async def test_a_hang_up_during_the_greeting(tmp_path: Path, sent: int) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING)[:sent])
        writer.close()

    async with serving(tmp_path, serve) as target, within(2):
        with pytest.raises((TargetLost, ProtocolViolation)):
            await Monitor.connect(target)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answer", [b'{"error": {"class": "X", "desc": "no"}}\n', b'{"event": "STOP"}\n', b"[]\n"]
)
async def test_negotiation_that_fails(tmp_path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        await reader.readuntil(b"}")
        writer.write(answer)
        await reader.read()

    async with serving(tmp_path, serve) as target, within(2):
        with pytest.raises(ProtocolViolation):
            await Monitor.connect(target)


@pytest.mark.asyncio
async def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    for setup in ("missing", "stale", "file"):
        if setup == "stale":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        elif setup == "file":
            path.unlink()
            path.touch()
        async with within(2):
            with pytest.raises(TargetUnreachable) as error:
                await Monitor.connect(UnixTarget(str(path)))
        assert error.value.exit_code == 3
        assert str(path) in error.value.message
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    async with within(2):
        with pytest.raises(TargetUnreachable):
            await Monitor.connect(TcpTarget("127.0.0.1", port))


@pytest.mark.asyncio
async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(TargetUnreachable):
        await Monitor.connect(UnixTarget(str(deep / "qmp")))
    short = tmp_path / "s"
    short.symlink_to(deep)
    async with (
        serving(short, replying()),
        await Monitor.connect(UnixTarget(str(deep / "qmp"))) as monitor,
    ):
        assert monitor.is_connected


@pytest.mark.asyncio
async def test_busy_is_told_from_the_kernels_table(tmp_path: Path) -> None:
    """A server that accepts one client and leaves the next in its backlog, as QEMU does."""
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        accepted, _ = server.accept()
        with accepted:
            async with within(1):
                with pytest.raises(MonitorBusy):
                    await Monitor.connect(UnixTarget(path))
            # A backlog that is full refuses at once.
            waiting = [socket.socket(socket.AF_UNIX) for _ in range(2)]
            for other in waiting:
                other.setblocking(False)
                try:
                    other.connect(path)
                except BlockingIOError:
                    break
            async with within(1):
                with pytest.raises(MonitorBusy):
                    await Monitor.connect(UnixTarget(path))
            for other in waiting:
                other.close()


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
        assert monitor.oob
        called: list[str] = []
        stop = monitor.subscribe(lambda e: called.append(e.name))
        with monitor.events() as events:
            before = time.monotonic_ns()
            reply = await monitor.timed("one")
            assert reply.value == {"x": 1}
            assert before <= reply.t_start_ns <= reply.t_end_ns <= time.monotonic_ns()
            got = await anext(events)
            assert (got.name, got.stamp_ns) == ("STOP", 5_000_007_000)
            assert reply.t_start_ns <= got.t_ns <= reply.t_end_ns
            stop()
            with pytest.raises(CommandFailed) as error:
                await monitor.execute("two")
            assert error.value.error_class == "CommandNotFound"
            assert error.value.remedy is not None
            assert (await anext(events)).stamp_ns is None
        assert called == ["STOP"]
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        with pytest.raises(ProtocolViolation):
            await hmp(monitor, "info version")
        await monitor.close()
        assert isinstance(monitor.lost.result(), TargetLost)
        with pytest.raises(TargetLost):
            await monitor.execute("three")


@pytest.mark.asyncio
async def test_a_stream_that_nobody_reads_counts_what_it_drops(tmp_path: Path) -> None:
    burst = b"".join(message({"event": f"E{i}"}) for i in range(100))
    async with (
        serving(tmp_path, replying(burst + b'{"return": {}, "id": ID}\n')) as target,
        await Monitor.connect(target) as monitor,
    ):
        stream = monitor.events(limit=10)
        await monitor.execute("one")
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
            await monitor.execute("one", deadline=0.3)


@pytest.mark.asyncio
@pytest.mark.parametrize("rest", [b"", b'{"return": {"x"'])
async def test_the_peer_goes_away_in_the_middle_of_a_command(tmp_path: Path, rest: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        await reader.readuntil(b"}}")
        writer.write(b'{"return": {}}\n')
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
            await monitor.execute("one")
        assert isinstance(await monitor.lost, TargetError)
        with pytest.raises(TargetError):
            await anext(events)
        assert not monitor.is_connected


@pytest.mark.asyncio
async def test_a_late_reply_does_not_answer_the_next_command(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        await reader.readuntil(b"}}")
        writer.write(b'{"return": {}}\n')
        first = json.loads(await reader.readuntil(b"}"))["id"]
        second = json.loads(await reader.readuntil(b"}"))["id"]
        writer.write(message({"return": "late", "id": first}))
        writer.write(message({"return": "right", "id": second}))
        await reader.read()

    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        with pytest.raises(DeadlineExceeded):
            await monitor.execute("one", deadline=0.05)
        assert await monitor.execute("two") == "right"


@pytest.mark.asyncio
async def test_pipelined_commands_leave_in_one_write(tmp_path: Path) -> None:
    sizes: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        await reader.readuntil(b"}}")
        writer.write(b'{"return": {}}\n')
        data = await reader.read(1 << 16)
        sizes.append(data.count(b'"execute"'))
        decoder, text = json.JSONDecoder(), data.decode()
        while text:
            request, end = decoder.raw_decode(text)
            text = text[end:].lstrip()
            kind = "error" if request["execute"] == "two" else "return"
            value = {"class": "GenericError", "desc": "no"} if kind == "error" else {}
            writer.write(message({kind: value, "id": request["id"]}))
        await reader.read()

    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        one, two, three = await monitor.pipeline(
            [Command("one"), Command("two", {"x": 1}), Command("three")]
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
        writer.write(message(GREETING))
        await reader.readuntil(b"}}")
        writer.write(b'{"return": {}}\n')
        await stuck.wait()

    async with serving(tmp_path, serve) as target:
        monitor = await Monitor.connect(target)
        with pytest.raises(DeadlineExceeded):
            await monitor.execute("big", {"x": "y" * (8 << 20)}, deadline=0.1)
        async with within(2):
            await monitor.close(deadline=0.3)
            await monitor.close()
        stuck.set()


@pytest.mark.asyncio
async def test_reconnect_keeps_streams(tmp_path: Path) -> None:
    serve = replying(message({"event": "STOP"}) + b'{"return": {}, "id": ID}\n')
    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        stream = monitor.events()
        await monitor.execute("one")
        await monitor.reconnect()
        assert not monitor.lost.done()
        await monitor.execute("one")
        assert [(await anext(stream)).name for _ in range(2)] == ["STOP", "STOP"]


@pytest.mark.asyncio
async def test_reconnect_after_the_peer_hung_up(tmp_path: Path) -> None:
    greeted = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        greeted += 1
        writer.write(message(GREETING))
        await reader.readuntil(b"}}")
        writer.write(b'{"return": {}}\n')
        if greeted == 1:
            await reader.readuntil(b"}")
            writer.close()
            return
        writer.write(message({"event": "STOP"}))
        await reader.read()

    async with serving(tmp_path, serve) as target, await Monitor.connect(target) as monitor:
        stream = monitor.events()
        with pytest.raises(TargetLost):
            await monitor.execute("one")
        with pytest.raises(TargetLost):
            await anext(stream)
        await monitor.reconnect()
        assert (await anext(stream)).name == "STOP"


@pytest.mark.asyncio
async def test_a_hang_up_right_after_the_negotiation(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        await reader.readuntil(b"}}")
        writer.write(b'{"return": {}}\n')
        writer.close()

    async with serving(tmp_path, serve) as target, within(2):
        with pytest.raises(TargetLost):
            async with await Monitor.connect(target) as monitor:
                raise await monitor.lost


@pytest.mark.asyncio
async def test_a_connection_that_is_never_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: object) -> socket.socket:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(connection, "dial", never)
    with pytest.raises(TargetUnreachable):
        await Monitor.connect(TcpTarget("192.0.2.1", 4444), deadline=0.05)


@pytest.mark.asyncio
async def test_cancelling_a_connect_leaves_nothing(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(tmp_path, serve) as target:
        task = asyncio.create_task(Monitor.connect(target))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
