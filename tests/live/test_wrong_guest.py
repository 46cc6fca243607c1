"""Another QEMU answers where the guest that is meant did: it is refused, and nothing is sent to it.

The other one traces what its monitors receive.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener import attach
from qmp_memlistener.errors import TargetError, WrongGuest
from qmp_memlistener.probes.model import Context, ProbeUnavailable
from qmp_memlistener.probes.ping import PingProbe
from qmp_memlistener.qmp import (
    Companions,
    Monitor,
    PidTarget,
    TcpTarget,
    UnixTarget,
    read_facts,
)
from qmp_memlistener.qmp.identity import GuestIdentity
from qmp_memlistener.updates.pause.guard import ResumeGuard
from tests.support.bare_qemu import Running, running
from tests.support.live import NO_QEMU, QEMUS
from tests.support.probes import Recorder
from tests.support.verbs import run_verb, started_verb

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.asyncio,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
]

DIMM = (
    *("--object", "memory-backend-ram,id=m0,size=16M"),
    *("--device", "pc-dimm,id=d0,memdev=m0"),
)
HOW = pytest.mark.parametrize("how", ["bound again", "symbolic link"])


def listening(path: Path) -> tuple[str, ...]:
    return ("-qmp", f"unix:{path},server=on,wait=off")


class Other:
    """The second QEMU, which logs the commands that it gets."""

    def __init__(self, qemu: Running, log: Path) -> None:
        self.pid = qemu.pid
        self.a = qemu.a
        self._log = log

    def received(self) -> list[str]:
        found = re.findall(r'handle_qmp_command .*?"execute": "([^"]+)"', self._log.read_text())
        assert len(found) == self._log.read_text().count("handle_qmp_command")
        return found


@asynccontextmanager
async def meant(tmp_path: Path, *args: str, monitors: bool = False) -> AsyncIterator[Running]:
    """The guest that is meant; with a monitor at `q`."""
    directory = tmp_path / "meant"
    directory.mkdir()
    args = ("-name", "meant", *listening(tmp_path / "q"), *args)
    async with running(QEMUS[0], directory, *args, monitors=monitors) as qemu:
        yield qemu


@asynccontextmanager
async def other(tmp_path: Path, how: str = "") -> AsyncIterator[Other]:
    """Another one, which answers at `q` from now on."""
    directory = tmp_path / "other"
    directory.mkdir()
    log = directory / "log"
    args = ["-name", "other", "-trace", "handle_qmp_command", "-D", str(log)]
    if how == "bound again":
        args += listening(tmp_path / "q")
    async with running(QEMUS[0], directory, *args) as qemu:
        if how == "symbolic link":
            (tmp_path / "q").unlink()
            (tmp_path / "q").symlink_to(qemu.a.path)
        yield Other(qemu, log)


def check_refusal(error: TargetError, one: int, two: int) -> None:
    """Both are named."""
    assert error.exit_code == 3
    assert f'"other" (pid {two}), and QEMU "meant" (pid {one}) is meant' in error.message


@HOW
async def test_every_connection_is_compared(tmp_path: Path, how: str) -> None:
    q = UnixTarget(str(tmp_path / "q"))
    async with meant(tmp_path) as qemu, await Monitor.connect(q) as monitor:
        assert monitor.identity == GuestIdentity.of(qemu.guest().process)
        assert monitor.identity.remark is None
        await monitor.reconnect()
        async with other(tmp_path, how) as another:
            with pytest.raises(WrongGuest) as connected:
                await Monitor.connect(q, meant=monitor.identity)
            with pytest.raises(WrongGuest) as again:
                await monitor.reconnect()
            with pytest.raises(WrongGuest) as guarded:
                await ResumeGuard.start([q], monitor.identity)
            for error in (connected, again, guarded):
                check_refusal(error.value, qemu.pid, another.pid)
            with pytest.raises(TargetError) as by_pid:
                await Monitor.connect(PidTarget(qemu.pid))
            assert by_pid.value.exit_code == 3
            assert another.received() == []
            async with await Monitor.connect(q) as theirs:
                assert theirs.identity.pid == another.pid
            assert "query-uuid" not in another.received()


@pytest.mark.alone
@HOW
async def test_verbs(tmp_path: Path, how: str) -> None:
    """A watch of the guest that is meant was killed; then another one takes its path."""
    q = tmp_path / "q"
    async with meant(tmp_path) as qemu:
        async with started_verb("watch", q, "--probes", "none") as watch:
            await watch.ready()
            watch.process.send_signal(signal.SIGKILL)
            await watch.process.wait()
        async with other(tmp_path, how) as another:
            target = f"pid:{qemu.pid}"
            plugged, cleaned = await asyncio.gather(
                run_verb("hotplug", target, *DIMM), run_verb("doctor", "--clean")
            )
            plugged.check_error(3, target)
            assert "not cleaned" in cleaned.err
            assert another.received() == []


@HOW
async def test_the_agents_other_connections(tmp_path: Path, how: str) -> None:
    """Monitors that were free at the attachment, and lead elsewhere when they are needed."""
    q, first = UnixTarget(str(tmp_path / "q")), tmp_path / "first"
    async with (
        meant(tmp_path, *listening(first)) as qemu,
        attach(str(first), probes=(), trace=False) as agent,
    ):
        assert agent.companions.operations == q
        async with agent.operating() as monitor:
            assert monitor.target == q
        async with other(tmp_path, how) as another:
            async with agent.operating() as monitor:
                assert monitor is agent.monitor
            facts = await read_facts(agent.monitor)
            companions = Companions(None, q, None, ())
            probe = PingProbe(Context(None, qemu.pid, facts, agent.monitor, companions, None))
            with pytest.raises(ProbeUnavailable, match=f"pid {another.pid}.*pid {qemu.pid}"):
                await probe.start(Recorder())
            with pytest.raises(WrongGuest) as guarded:
                await ResumeGuard.start([q], agent.monitor.identity)
            check_refusal(guarded.value, qemu.pid, another.pid)
            assert another.received() == []


async def test_what_is_the_same_guest_is_accepted(tmp_path: Path) -> None:
    async with meant(tmp_path, "-daemonize") as qemu:
        identity = GuestIdentity.of(qemu.guest().process)
        q = UnixTarget(str(tmp_path / "q"))
        async with await Monitor.connect(q, meant=identity) as monitor:
            assert monitor.identity.pid == qemu.pid


async def test_behind_a_forwarder(tmp_path: Path) -> None:
    """Whose process it is is not known: the UUID and the name are compared."""
    paths: list[str] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_unix_connection(paths[-1])

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(4096):
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, ours), copy(theirs, writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    target = TcpTarget("127.0.0.1", server.sockets[0].getsockname()[1])
    async with server, meant(tmp_path, monitors=True) as qemu, other(tmp_path) as another:
        paths.append(qemu.a.path)
        async with attach(target, probes=(), trace=False) as agent:
            assert any("UUID and name" in remark for remark in agent.remarks)
        async with await Monitor.connect(target) as monitor:
            await monitor.reconnect()
            paths.append(another.a.path)
            with pytest.raises(WrongGuest, match=r"the guest .*other, and the guest .*meant"):
                await monitor.reconnect()
            with pytest.raises(WrongGuest):
                await ResumeGuard.start([target], monitor.identity)
        expected = {"qmp_capabilities", "query-cpus-fast", "query-uuid", "query-name"}
        assert set(another.received()) <= expected


FORWARDER = """
import os, select, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
while True:
    ours, _ = listener.accept()
    if os.fork():
        ours.close()
        continue
    theirs = socket.socket(socket.AF_UNIX)
    theirs.connect(sys.argv[2])
    while True:
        for source in select.select([ours, theirs], [], [])[0]:
            data = source.recv(65536)
            if not data:
                os._exit(0)
            (theirs if source is ours else ours).sendall(data)
"""


@asynccontextmanager
async def forwarder(path: Path, to: str) -> AsyncIterator[str]:
    """As `socat UNIX-LISTEN:path,fork UNIX-CONNECT:to`: a process of its own, QEMU is not seen."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", FORWARDER, str(path), to), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield str(path)
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("named", [False, True])
async def test_a_second_forwarder_or_the_guests_own_monitor(tmp_path: Path, named: bool) -> None:
    """Of a guest without UUID and name nobody can tell that it is the same: refused, with the way
    out, which is to give it one."""
    name = ("-name", "known") if named else ()
    args = (*name, *listening(tmp_path / "third"), "-device", "pcie-root-port,id=rp0,chassis=1")
    async with (
        running(QEMUS[0], tmp_path, *args) as qemu,
        forwarder(tmp_path / "fa", qemu.a.path) as first,
        forwarder(tmp_path / "fb", qemu.b.path) as second,
    ):
        for monitor in (second, str(tmp_path / "third")):
            opening = attach(first, probes=("ping",), trace=False, ping_monitor=monitor)
            if named:
                async with opening as agent:
                    await agent.probes_started()
                    assert "ping" in agent.measuring.names
                    assert any("only UUID and name show" in remark for remark in agent.remarks)
                continue
            with pytest.raises(WrongGuest, match="neither a UUID nor a name") as error:
                async with opening:
                    pass
            assert "-name, -uuid" in str(error.value.remedy)
        async with attach(first, probes=(), trace=False) as agent:
            assert any("neither a UUID" in remark for remark in agent.remarks) != named
            await agent.monitor.reconnect()
        ran = await run_verb(
            *("hotplug", first, "--device", "virtio-rng-pci,id=x", "--strategy", "pause"),
            *("--guard-monitor", second, "--no-trace", "--probes", "none", "--wait", "100ms"),
        )
        if named:
            assert ran.code == 0, ran
        else:
            assert ran.code == 3, ran
            told = ran.err.partition("error: ")[2]
            assert "neither a UUID nor a name" in told
            assert "-name, -uuid" in told.partition("remedy: ")[2]
