"""Connecting to servers that are no QEMU, or a sick one: a typed error, within two seconds."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from qmp_memlistener.errors import (
    DeadlineExceeded,
    MonitorBusy,
    ProtocolViolation,
    TargetLost,
    TargetUnreachable,
)
from qmp_memlistener.qmp import Monitor, TcpTarget, UnixTarget, dial
from qmp_memlistener.qmp.identity import ASKED
from tests.unit.qmp.fake_qmp import GREETING, message, replying, request, serving, within

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


# QEMU 7.2, 10.0 and 11.1 send the answer to the last command of the client before to the next one
STALE = b'{"return": {"status": "running"}, "id": "__qmp#00001"}\r\n'


@pytest.mark.asyncio
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("after", [b"", STALE, b'{"return": {"enabled": true}}\r\n'])
async def test_answers_to_the_client_before_are_dropped(
    tmp_path: Path, before: int, after: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(before):
            writer.write(STALE)
            await writer.drain()
        writer.write(message(GREETING))
        for answer in (after, *[b""] * len(ASKED), b""):
            asked = json.loads(await request(reader))
            writer.write(answer + message({"return": {"of": asked["execute"]}, "id": asked["id"]}))
        await reader.read()

    async with (
        serving(tmp_path, serve) as target,
        within(2),
        await Monitor.connect(target) as monitor,
    ):
        assert await monitor.execute("query-status") == {"of": "query-status"}


@pytest.mark.asyncio
async def test_answers_without_end_are_not_waited_for(tmp_path: Path) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        while True:
            writer.write(STALE)
            await writer.drain()

    async with serving(tmp_path, serve) as target, within(2):
        with pytest.raises(ProtocolViolation):
            await Monitor.connect(target)


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
    "answer",
    [
        b'{"error": {"class": "X", "desc": "no"}}\n',
        b'{"error": {"class": "X", "desc": "no"}, "id": ID}\n',
        b'{"event": "STOP"}\n',
        b"[]\n",
    ],
)
async def test_negotiation_that_fails(tmp_path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        number = json.dumps(json.loads(await request(reader))["id"]).encode()
        writer.write(answer.replace(b"ID", number))
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
        assert ("a file, not a socket" in error.value.message) == (setup == "file")
    with pytest.raises(TargetUnreachable, match="a directory, not a socket"):
        await Monitor.connect(UnixTarget(str(tmp_path)))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    async with within(2):
        with pytest.raises(TargetUnreachable) as error:
            await Monitor.connect(TcpTarget("127.0.0.1", port))
    assert error.value.message == f"cannot connect to 127.0.0.1:{port}: Connection refused"
    assert "is QEMU still running" in (error.value.remedy or "")


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
async def test_a_hang_up_right_after_the_negotiation(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(message(GREETING))
        number = json.loads(await request(reader))["id"]
        writer.write(message({"return": {}, "id": number}))
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

    monkeypatch.setattr(dial, "dial", never)
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
