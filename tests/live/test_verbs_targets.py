"""Verbs whose target is no good: nobody there, no QEMU, a sick one, a busy monitor."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from tests.live.verbs_support import in_time, one_build, watched
from tests.support.live import best_accel, booted
from tests.support.verbs import Ran, run_verb, started_verb

pytestmark = pytest.mark.qemu

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""},'
    b' "capabilities": []}}\r\n'
)
FAKES = {
    "garbage": b"\x00\xff\xfe garbage that is not JSON\r\n" * 4,
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "other json": b'{"hello": "world"}\r\n',
    "a list": b"[1, 2, 3]\r\n",
    "half a greeting": GREETING[:40],
    "silence": b"",
    "a greeting and silence": GREETING,
    "a greeting and garbage": GREETING + b"}}}}\r\n",
    "endless": b"x" * (1 << 21),
}


@asynccontextmanager
async def fake_server(path: Path, says: bytes, close: bool = False) -> AsyncIterator[asyncio.Event]:
    """Says the same to every client, then hangs (or closes); the event tells of the first one."""
    connected, over = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        try:
            writer.write(says)
            await writer.drain()
            if not close:
                drained = asyncio.create_task(reader.read())
                await asyncio.wait(
                    [drained, asyncio.create_task(over.wait())],
                    return_when=asyncio.FIRST_COMPLETED,
                )
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield connected
    finally:
        over.set()
        server.close()


async def all_verbs(target: str, file: Path) -> list[Ran]:
    """`watch`, `show` and `record` of one target, at once."""
    return list(
        await asyncio.gather(
            run_verb("watch", target),
            run_verb("show", target),
            run_verb("record", target, "-o", file),
        )
    )


@pytest.mark.parametrize("says", FAKES)
@pytest.mark.asyncio
async def test_a_server_that_is_no_qemu(says: str, tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with fake_server(path, FAKES[says]):
        ran = await run_verb("watch", str(path))
    ran.check_error(3, str(path))
    assert ran.seconds < in_time()
    assert ran.out == ""


@pytest.mark.asyncio
async def test_a_server_that_closes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with fake_server(path, b"", close=True):
        for ran in await all_verbs(str(path), tmp_path / "r"):
            ran.check_error(3, str(path))
            assert ran.seconds < in_time()
    assert not (tmp_path / "r").exists()


@pytest.mark.asyncio
async def test_targets_that_are_not_there(tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(stale))
    plain = tmp_path / "plain"
    plain.write_text("no socket")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    targets = [str(tmp_path / "gone"), str(stale), str(plain), f"127.0.0.1:{port}"]
    ended = await asyncio.create_subprocess_exec("true")
    await ended.wait()
    targets += [f"pid:{os.getpid()}", f"pid:{ended.pid}"]
    for target in targets:
        ran = await run_verb("watch", target)
        ran.check_error(3, target, "remedy: ")
        assert ran.out == ""
        assert ran.seconds < in_time()
    for ran in await all_verbs(targets[0], tmp_path / "r"):
        ran.check_error(3, targets[0], "remedy: ")
    assert not (tmp_path / "r").exists()
    for target in ("pid:nobody", "a:b:c", "", "unix:"):
        (await run_verb("watch", target)).check_error(2)


@one_build
@pytest.mark.asyncio
async def test_a_busy_monitor(build: QemuBuild, tmp_path: Path) -> None:
    async with booted(build, best_accel(build)) as vm, watched(vm, "--probes", "none") as first:
        for ran in await all_verbs(vm.target, tmp_path / "r"):
            ran.check_error(3, vm.target, "another client")
            assert ran.seconds < in_time()
        assert not (tmp_path / "r").exists()
        # By process id another monitor is found; the first one goes on undisturbed.
        async with started_verb("watch", f"pid:{vm.guest.pid}", "--count", "1") as second:
            await second.ready()
            await vm.open_pam()
            assert (await second.end()).code == 0
        await first.until("hole filled")


@pytest.mark.asyncio
async def test_an_interrupt_before_it_is_attached(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with fake_server(path, b"") as connected, started_verb("watch", path) as watch:
        await connected.wait()
        watch.process.send_signal(signal.SIGINT)
        ran = await watch.end()
    assert ran.code == 130
    assert ran.err == "interrupted\n"
    assert ran.seconds < in_time()
