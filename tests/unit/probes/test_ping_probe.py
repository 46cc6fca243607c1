"""The ping probe against servers that are no QEMU, or a sick one."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import ProtocolViolation, TargetLost
from qmp_memlistener.probes import Observation, ProbeUnavailable, StallKind, ping_link
from qmp_memlistener.probes import ping as ping_module
from qmp_memlistener.probes.ping import PingProbe
from qmp_memlistener.qmp import Monitor, UnixTarget
from tests.support.host import patience
from tests.support.probes import Recorder, context_of

GREETING = {"QMP": {"version": {}, "capabilities": ["oob"]}}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers here are in the event loop of the test, and greet when that one comes to it."""
    monkeypatch.setattr(ping_module, "CONNECT_DEADLINE", patience(1.0))
    monkeypatch.setattr(ping_link, "_GREETING_S", patience(1.0))


class Server:
    """Talks enough QMP for pings.  While `serves` is unset it answers nothing in-band; `say` is
    sent in place of the next in-band answer, `greeting` in place of QMP's."""

    def __init__(self) -> None:
        self.serves = asyncio.Event()
        self.serves.set()
        self.greeting: bytes | None = json.dumps(GREETING).encode() + b"\r\n"
        self.oob_answers = True
        self.say: bytes | None = None
        self.pings = 0
        self.clients = 0
        self.enabled: object = None
        self.waiting = asyncio.Event()
        self.writer: asyncio.StreamWriter | None = None

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients += 1
        self.writer = writer
        try:
            if self.greeting is not None:
                writer.write(self.greeting)
            text = ""
            while data := await reader.read(4096):
                text += data.decode()
                while text:
                    command, used = json.JSONDecoder().raw_decode(text)
                    text = text[used:].lstrip()
                    await self._answer(command, writer)
        except ConnectionError:
            pass
        finally:
            self.clients -= 1
            writer.close()

    async def _answer(self, command: dict[str, object], writer: asyncio.StreamWriter) -> None:
        if "exec-oob" in command:
            if self.oob_answers:
                writer.write(b'{"return": [], "id": 0}\r\n')
            return
        if command["execute"] == "qmp_capabilities":
            self.enabled = command["arguments"]
            # the answer to the client before, and ours
            writer.write(b'{"return": {"enabled": true, "present": true}}\r\n')
            writer.write(json.dumps({"return": {}, "id": command["id"]}).encode() + b"\r\n")
            return
        self.pings += 1
        if not self.serves.is_set():
            self.waiting.set()
            await self.serves.wait()
            self.waiting.clear()
        writer.write(b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n')
        writer.write(self.say or b'{"return": {"enabled": true, "present": true}}\r\n')
        await writer.drain()


@asynccontextmanager
async def served(tmp_path: Path, server: Server) -> AsyncIterator[UnixTarget]:
    path = str(tmp_path / "qmp")
    listener = await asyncio.start_unix_server(server, path)
    try:
        yield UnixTarget(path)
    finally:
        server.serves.set()
        if server.writer is not None:
            server.writer.close()
        listener.close()
        await listener.wait_closed()
        await asyncio.sleep(0)


def probe_at(target: UnixTarget | None) -> PingProbe:
    """The observer's own connection is not used by pings; it is there and never gets lost."""
    return PingProbe(context_of(Monitor(UnixTarget("/none")), target))


@asynccontextmanager
async def pinging(
    tmp_path: Path, *, burst: bool = False
) -> AsyncIterator[tuple[Server, PingProbe, Recorder]]:
    """A server, a probe that pings it (quickly, with `burst`), and what that one tells."""
    server = Server()
    async with served(tmp_path, server) as target:
        probe, recorder = probe_at(target), Recorder()
        await probe.start(recorder)
        if burst:
            await probe.burst(True)
        yield server, probe, recorder


async def silence_of(seconds: float, server: Server, recorder: Recorder) -> Observation:
    """What is observed of a ping without an answer."""
    server.serves.clear()
    await server.waiting.wait()
    silent_ns = time.monotonic_ns()
    await asyncio.sleep(seconds)
    server.serves.set()
    await recorder.wait_for(lambda: bool(of_silence(recorder, silent_ns)))
    return of_silence(recorder, silent_ns)[0]


def of_silence(recorder: Recorder, since_ns: int) -> list[Observation]:
    """What was observed of a server that has not answered `since_ns`; a busy host may have
    delayed pings before."""
    return [o for o in recorder.observations if o.end_ns > since_ns]


def ping_threads() -> int:
    return sum(t.name == "ping" for t in threading.enumerate())


async def threads_gone() -> None:
    """Its last act is to tell the event loop that it ends; a moment later it has."""
    async with asyncio.timeout(10):
        while ping_threads():  # noqa: ASYNC110 - a thread that ends tells nobody
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_it_pings_and_hangs_up(tmp_path: Path) -> None:
    server = Server()
    async with served(tmp_path, server) as target:
        probe, recorder = probe_at(target), Recorder()
        assert (await probe.check()).usable
        await probe.start(recorder)
        assert server.enabled == {"enable": ["oob"]}
        assert ping_threads() == 1
        before = time.monotonic_ns()
        await probe.flush()
        assert recorder.reached["ping"] >= before
        await probe.stop()
        await probe.stop()
        assert server.clients == 0
        await threads_gone()
        recorder.check_nothing_wrong()
        # stopped is stopped: none of these does anything or raises
        await probe.flush()
        await probe.burst(True)


@pytest.mark.asyncio
async def test_bursts_ping_quickly_and_may_be_nested(tmp_path: Path) -> None:
    server = Server()

    async def count() -> int:
        before = server.pings
        await asyncio.sleep(0.3)
        return server.pings - before

    async with served(tmp_path, server) as target:
        probe, recorder = probe_at(target), Recorder()
        await probe.start(recorder)
        idle = await count()
        await probe.burst(True)
        await probe.burst(True)
        await probe.burst(False)
        quick = await count()
        await probe.burst(False)
        while await count() > idle + 2:  # it slows down by and by
            pass
        await probe.stop()
        assert idle <= 8
        assert quick > 4 * idle


@pytest.mark.asyncio
async def test_a_burst_begins_with_a_ping_that_was_answered(tmp_path: Path) -> None:
    async with pinging(tmp_path) as (_, probe, recorder):
        before = time.monotonic_ns()
        await probe.burst(True)
        assert recorder.reached["ping"] >= before
        await probe.stop()


@pytest.mark.asyncio
async def test_a_stall_is_reported_when_it_is_over(tmp_path: Path) -> None:
    async with pinging(tmp_path, burst=True) as (server, probe, recorder):
        server.serves.clear()
        stalled = time.monotonic_ns()
        await server.waiting.wait()
        waited = time.monotonic_ns()
        reached = recorder.reached["ping"]
        await asyncio.sleep(0.3)
        # meanwhile nothing is known
        assert of_silence(recorder, waited) == []
        assert recorder.reached["ping"] - reached < 100_000_000
        asked = time.monotonic()
        await probe.flush()
        assert time.monotonic() - asked < 2.0  # it does not wait for the end of a stall
        over = time.monotonic_ns()
        server.serves.set()
        await recorder.wait_for(lambda: bool(of_silence(recorder, waited)))
        ended = time.monotonic_ns()
        await probe.stop()
        (stall,) = of_silence(recorder, waited)
        assert stall.kind is StallKind.MAIN_LOOP
        assert stall.thread == "main"
        assert stall.at_most_ns >= over - waited
        assert stall.at_least_ns <= ended - stalled
        assert stall.at_least_ns >= 0.9 * (over - waited)
        assert stall.site is None
        recorder.check_nothing_wrong()


@pytest.mark.asyncio
async def test_a_stall_that_goes_on_is_reported_so_far_when_stopped(tmp_path: Path) -> None:
    async with pinging(tmp_path, burst=True) as (server, probe, recorder):
        server.serves.clear()
        await server.waiting.wait()
        waited = time.monotonic_ns()
        await asyncio.sleep(0.2)
        asked = time.monotonic()
        await probe.stop()
        assert time.monotonic() - asked < 2.0
        (stall,) = of_silence(recorder, waited)
        assert stall.at_least_ns > 150_000_000
        assert "may be longer" in recorder.notes[0]
        recorder.check_nothing_wrong()


@pytest.mark.asyncio
async def test_a_server_that_dies_during_a_stall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ping_module, "_LOST_TOO_S", 0.1)
    async with pinging(tmp_path, burst=True) as (server, probe, recorder):
        server.serves.clear()
        await server.waiting.wait()
        waited = time.monotonic_ns()
        await asyncio.sleep(0.1)
        assert server.writer is not None
        server.writer.close()
        await recorder.wait_for(lambda: bool(recorder.failures))
        assert isinstance(recorder.failures[0], TargetLost)
        assert len(of_silence(recorder, waited)) == 1
        await probe.flush()
        await probe.burst(False)
        await probe.stop()


@pytest.mark.asyncio
async def test_when_the_observer_is_lost_too_there_is_nothing_to_add(tmp_path: Path) -> None:
    server = Server()
    async with served(tmp_path, server) as target:
        monitor = Monitor(UnixTarget("/none"))
        probe, recorder = PingProbe(context_of(monitor, target)), Recorder()
        await probe.start(recorder)
        assert server.writer is not None
        server.writer.close()
        monitor.lost.set_result(TargetLost("QEMU is gone"))
        await threads_gone()
        await probe.stop()
        assert recorder.failures == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\xfe\r\n",
        b"[1, 2]\r\n",
        b'{"neither": 1}\r\n',
        b"[" * 100_000 + b"\r\n",
        b"x" * (3 << 20),
    ],
    ids=["bytes", "list", "object", "deep", "endless"],
)
@pytest.mark.asyncio
async def test_garbage_ends_the_probe_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, garbage: bytes
) -> None:
    monkeypatch.setattr(ping_module, "_LOST_TOO_S", 0.1)
    async with pinging(tmp_path) as (server, probe, recorder):
        server.say = garbage
        await recorder.wait_for(lambda: bool(recorder.failures))
        assert isinstance(recorder.failures[0], ProtocolViolation)
        await probe.stop()
        await threads_gone()


@pytest.mark.parametrize(
    "greeting",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b'{"QMP": 1}\r\n', b"{}\r\n"],
)
@pytest.mark.asyncio
async def test_what_does_not_greet_as_qmp_does_is_refused(tmp_path: Path, greeting: bytes) -> None:
    server = Server()
    server.greeting = greeting
    async with served(tmp_path, server) as target:
        probe = probe_at(target)
        with pytest.raises(ProbeUnavailable, match="QMP"):
            await probe.start(Recorder())
        await probe.stop()
        await threads_gone()


@pytest.mark.asyncio
async def test_a_server_that_never_greets_is_given_up(tmp_path: Path) -> None:
    server = Server()
    server.greeting = None
    async with served(tmp_path, server) as target:
        probe = probe_at(target)
        with pytest.raises(ProbeUnavailable, match="did not greet"):
            await probe.start(Recorder())
        await threads_gone()


@pytest.mark.asyncio
async def test_a_server_that_hangs_up_at_once(tmp_path: Path) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    path = str(tmp_path / "qmp")
    async with await asyncio.start_unix_server(hang_up, path):
        with pytest.raises(ProbeUnavailable, match=r"hung up|broke"):
            await probe_at(UnixTarget(path)).start(Recorder())


@pytest.mark.asyncio
async def test_no_monitor_and_no_server() -> None:
    verdict = await probe_at(None).check()
    assert not verdict.usable
    assert verdict.remedy is not None
    assert "-qmp" in verdict.remedy
    with pytest.raises(ProbeUnavailable):
        await probe_at(None).start(Recorder())
    with pytest.raises(ProbeUnavailable, match="cannot connect"):
        await probe_at(UnixTarget("/no/such/socket")).start(Recorder())


@pytest.mark.asyncio
async def test_a_monitor_that_is_taken(tmp_path: Path) -> None:
    """One client is served, the next waits in the backlog, as with QEMU."""
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen(1)
        client.connect(path)
        with listener.accept()[0]:
            probe = probe_at(UnixTarget(path))
            verdict = await probe.check()
            assert verdict.reason == f"unix:{path} serves another client"
            with pytest.raises(ProbeUnavailable, match="another client"):
                await probe.start(Recorder())


@pytest.mark.asyncio
async def test_a_cancelled_start_leaves_no_connection(tmp_path: Path) -> None:
    server = Server()
    server.serves.clear()  # qmp_capabilities is never answered
    async with served(tmp_path, server) as target:
        probe = probe_at(target)
        starting = asyncio.create_task(probe.start(Recorder()))
        await server.waiting.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await threads_gone()
        await probe.stop()


@pytest.mark.asyncio
async def test_a_monitor_without_out_of_band(tmp_path: Path) -> None:
    server = Server()
    server.greeting = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
    server.oob_answers = False
    async with served(tmp_path, server) as target:
        probe, recorder = probe_at(target), Recorder()
        await probe.start(recorder)
        assert server.enabled == {"enable": []}
        await probe.burst(True)
        stall = await silence_of(0.05, server, recorder)
        await probe.stop()
        assert stall.at_least_ns > 30_000_000


@pytest.mark.asyncio
async def test_when_even_out_of_band_is_silent_all_of_it_may_have_stood_still(
    tmp_path: Path,
) -> None:
    """As when the process is stopped: nothing is proven of the main loop alone."""
    async with pinging(tmp_path, burst=True) as (server, probe, recorder):
        server.oob_answers = False
        server.say = b'{"return": [], "id": 0}\r\n{"return": {}}\r\n'
        stall = await silence_of(0.1, server, recorder)
        await probe.stop()
        assert stall.at_most_ns > 100_000_000
        assert stall.at_least_ns < 50_000_000
        assert stall.site is not None
