"""Tracing real QEMUs through their log: every line seen, everything put back, nothing cut."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild, QTest
from qmp_memlistener.monitor import (
    TRACE_EVENTS,
    FlatViewEvent,
    HmpCommand,
    Monitor,
    RunStateChange,
    SlotOp,
    TraceReason,
    TraceRecord,
    TraceSession,
    TraceTail,
    TraceUnavailable,
    UnixTarget,
    hmp,
    restore_stale,
    start_tracing,
    trace_control,
    trace_setup,
)
from qmp_memlistener.monitor.procfs import Process
from qmp_memlistener.monitor.trace_notes import Place
from qmp_memlistener.monitor.trace_setup import event_states
from tests.live.test_monitor_qemu import (
    NEW_MOUNTS,
    NO_QEMU,
    QEMUS,
    Running,
    accel_for,
    can_unshare,
    every_qemu,
    running,
)

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
]

BASE = Path(f"/dev/shm/qmp-memlistener-{os.geteuid()}")


async def states(monitor: Monitor) -> dict[str, bool]:
    """Every trace event of this QEMU."""
    return await event_states(monitor, ["*"])


def left_behind(qemu: Running) -> list[str]:
    """What there is about this QEMU on disk."""
    if not BASE.exists():
        return []
    return [n for n in os.listdir(BASE) if n.startswith(f"{qemu.pid}-")]


async def toggle_pam(qemu: Running, times: int) -> None:
    """RAM in place of the BIOS area at 0xe0000 and back: two transitions each time."""
    async with await QTest.connect(qemu.qtest) as qtest:
        await qtest.outl(0xCF8, 0x80000094)
        for _ in range(times):
            await qtest.outb(0xCFC + 1, 0x33)
            await qtest.outb(0xCFC + 1, 0x00)


async def read_until_marker(
    tail: TraceTail, session: TraceSession, seconds: float = 10
) -> list[TraceRecord]:
    """Everything that was logged before this call."""
    number = await session.marker()
    records: list[TraceRecord] = []
    async with asyncio.timeout(seconds):
        async for batch in tail:
            assert batch.lost is None
            records += batch.records
            if any(isinstance(r, HmpCommand) and r.marker == number for r in batch.records):
                return records
    raise AssertionError("the log ended")


async def check_traced(qemu: Running, session: TraceSession, accel: str) -> list[TraceRecord]:
    async with session.tail() as tail:
        await toggle_pam(qemu, 3)
        records = await read_until_marker(tail, session)
        assert tail.decoder.unknown == 0
    slots = [r for r in records if isinstance(r, SlotOp)]
    assert any(isinstance(r, FlatViewEvent) for r in records)
    assert bool(slots) == (accel == "kvm")
    assert all(r.ret == 0 and r.as_id == 0 for r in slots)
    return records


@pytest.mark.asyncio
@every_qemu
async def test_trace_and_leave_no_trace(build: QemuBuild, tmp_path: Path) -> None:
    accel = accel_for(build)
    reader, writer = os.pipe()
    async with running(build, tmp_path, accel=accel, stderr=writer) as qemu:
        os.close(writer)
        os.set_blocking(reader, False)
        async with await Monitor.connect(qemu.a) as monitor:
            before = await states(monitor)
            # The accelerator may have something to say about the host's CPU first.
            said = read_all(reader)
            session = await start_tracing(monitor)
            assert not session.in_place
            assert not session.shared
            assert session.remarks == ()
            assert session.missing == ()
            assert session.events == frozenset(TRACE_EVENTS)
            await check_traced(qemu, session, accel)
            assert os.stat(session.path).st_mode & 0o777 == 0o600
            assert os.stat(os.path.dirname(session.path)).st_mode & 0o777 == 0o700
            assert left_behind(qemu)
            restored = await session.stop()
            assert restored.log == "/dev/stderr"
            assert restored.remarks == ()
            assert await states(monitor) == before
            assert left_behind(qemu) == []
            assert read_all(reader) == b"", said
            # The log is back where it was.
            await monitor.execute("trace-event-set-state", {"name": "vm_state*", "enable": True})
            await monitor.execute("cont")
            assert b"vm_state_notify running 1" in read_all(reader)
            assert await session.stop() == trace_control.Restored()
    os.close(reader)


@contextmanager
def writing(path: Path) -> Iterator[int]:
    with open(path, "wb") as f:
        yield f.fileno()


def read_all(fd: int) -> bytes:
    data = b""
    try:
        while piece := os.read(fd, 65536):
            data += piece
    except BlockingIOError:
        pass
    return data


@pytest.mark.asyncio
@every_qemu
async def test_two_hundred_toggles_none_missed(build: QemuBuild, tmp_path: Path) -> None:
    accel = accel_for(build)
    async with (
        running(build, tmp_path, accel=accel) as qemu,
        await Monitor.connect(qemu.a) as monitor,
        await start_tracing(monitor) as session,
        session.tail() as tail,
    ):
        await toggle_pam(qemu, 1)
        once = await read_until_marker(tail, session)
        await toggle_pam(qemu, 200)
        all_of_them = await read_until_marker(tail, session)
        # Views are freed late, everything else comes in the order it happened.
        assert steps(all_of_them) == steps(once) * 200
        count = Counter(type(r) for r in all_of_them)
        assert count[SlotOp] == 200 * Counter(type(r) for r in once)[SlotOp]
        assert bool(count[SlotOp]) == (accel == "kvm")


def steps(records: list[TraceRecord]) -> list[tuple[int, ...]]:
    """What identifies slot operations and new views among runs of the same machine."""
    out: list[tuple[int, ...]] = []
    for r in records:
        if isinstance(r, SlotOp):
            out.append((r.slot, r.flags, r.gpa, r.size, r.ua))
        elif isinstance(r, FlatViewEvent) and r.change.value == "new":
            out.append((r.root,))
    return out


@pytest.mark.asyncio
@every_qemu
@pytest.mark.parametrize("how", ["-D", "stderr", "-D -daemonize"])
async def test_a_log_of_its_own_is_read_in_place_and_never_cut(
    build: QemuBuild, tmp_path: Path, how: str
) -> None:
    accel = accel_for(build)
    log = tmp_path / "qemu.log"
    args = () if how == "stderr" else ("-D", str(log), *how.split()[1:])
    with writing(log if how == "stderr" else Path(os.devnull)) as stderr:
        async with (
            running(build, tmp_path, *args, accel=accel, stderr=stderr) as qemu,
            await Monitor.connect(qemu.a) as monitor,
        ):
            await monitor.execute("trace-event-set-state", {"name": "vm_state*", "enable": True})
            await monitor.execute("cont")
            before = await states(monitor)
            head = await asyncio.to_thread(log.read_bytes)
            assert b"vm_state_notify running 1" in head
            session = await start_tracing(monitor)
            assert session.in_place
            assert any(str(log) in r for r in session.remarks)
            await check_traced(qemu, session, accel)
            restored = await session.stop()
            assert restored.log is None
            assert "vm_state_notify" not in restored.events
            assert await states(monitor) == before
            assert left_behind(qemu) == []
            await monitor.execute("stop")
            now = await asyncio.to_thread(log.read_bytes)
            assert now.startswith(head)
            assert b"vm_state_notify running 0" in now[len(head) :]


@pytest.mark.asyncio
@every_qemu
async def test_a_daemonised_qemu_gets_its_silence_back(build: QemuBuild, tmp_path: Path) -> None:
    async with (
        running(build, tmp_path, "-daemonize") as qemu,
        await Monitor.connect(qemu.a) as monitor,
    ):
        async with await start_tracing(monitor) as session:
            await check_traced(qemu, session, "tcg")
            assert os.readlink(f"/proc/{qemu.pid}/fd/2") == session.path
        assert os.readlink(f"/proc/{qemu.pid}/fd/2") == "/dev/null"
        assert left_behind(qemu) == []


@pytest.mark.asyncio
@every_qemu
async def test_time_stamps_of_qemu(build: QemuBuild, tmp_path: Path) -> None:
    async with (
        running(build, tmp_path, "-msg", "timestamp=on") as qemu,
        await Monitor.connect(qemu.a) as monitor,
        await start_tracing(monitor) as session,
    ):
        assert session.timestamps
        records = await check_traced(qemu, session, "tcg")
        stamps = [r.stamp_ns for r in records]
        assert all(s is not None for s in stamps)
        assert stamps == sorted(s for s in stamps if s is not None)
        has_tid = monitor.version.release <= (10, 0)
        assert all((r.tid is not None) == has_tid for r in records)


@pytest.mark.asyncio
@every_qemu
async def test_a_standard_error_that_cannot_be_opened_again(
    build: QemuBuild, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with (
            running(build, tmp_path, stderr=theirs.fileno()) as qemu,
            await Monitor.connect(qemu.a) as monitor,
        ):
            before = await states(monitor)
            async with await start_tracing(monitor) as session:
                assert any("socket" in r for r in session.remarks)
                await check_traced(qemu, session, "tcg")
                restored = await session.stop()
            assert restored.log == "/dev/null"
            assert len(restored.remarks) == 1
            assert await states(monitor) == before
            # With a log in use, nothing is taken away that could not be given back.
            await monitor.execute("trace-event-set-state", {"name": "vm_state*", "enable": True})
            before = await states(monitor)
            with pytest.raises(TraceUnavailable) as refused:
                await start_tracing(monitor)
            assert refused.value.reason is TraceReason.LOG_NOT_RESTORABLE
            assert await states(monitor) == before
            assert left_behind(qemu) == []


@pytest.mark.asyncio
async def test_a_fifo_that_has_lost_its_reader_is_not_opened(tmp_path: Path) -> None:
    """Opening it would hang QEMU's main loop."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY)
    async with running(QEMUS[0], tmp_path, stderr=writer) as qemu:
        os.close(writer)
        async with await Monitor.connect(qemu.a) as monitor:
            session = await start_tracing(monitor)
            assert session.remarks == ()
            os.close(reader)
            restored = await session.stop()
            assert restored.log == "/dev/null"
            assert await monitor.execute("query-name", deadline=2) == {}


AGENT = """
import asyncio, sys
from qmp_memlistener.monitor import Monitor, UnixTarget, start_tracing
async def main():
    monitor = await Monitor.connect(UnixTarget(sys.argv[1]))
    session = await start_tracing(monitor)
    print(session.path, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@asynccontextmanager
async def agent_process(
    target: UnixTarget,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Another agent, in a process of its own, that traces; and the path of its log."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, target.path),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            path = (await process.stdout.readline()).decode().strip()
        yield process, path
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.asyncio
@every_qemu
@pytest.mark.parametrize("then", ["restore", "trace"])
async def test_a_killed_agent_is_cleaned_up_after(
    build: QemuBuild, tmp_path: Path, then: str
) -> None:
    async with running(build, tmp_path) as qemu, await Monitor.connect(qemu.b) as monitor:
        before = await states(monitor)
        async with agent_process(qemu.a) as (agent, path):
            assert path
            assert await states(monitor) != before
            # As long as it lives, nobody restores behind its back.
            assert await restore_stale(monitor) is None
            agent.send_signal(signal.SIGKILL)
            await agent.wait()
        assert await states(monitor) != before
        assert left_behind(qemu)
        if then == "restore":
            restored = await restore_stale(monitor)
            assert restored is not None
            assert restored.log == "/dev/stderr"
            assert set(restored.events) >= set(TRACE_EVENTS) & before.keys()
        else:
            async with await start_tracing(monitor) as session:
                assert not session.shared
                await check_traced(qemu, session, "tcg")
        assert await states(monitor) == before
        assert left_behind(qemu) == []
        assert await restore_stale(monitor) is None


@pytest.mark.asyncio
@every_qemu
async def test_two_agents_share_the_log(build: QemuBuild, tmp_path: Path) -> None:
    async with (
        running(build, tmp_path) as qemu,
        await Monitor.connect(qemu.a) as a,
        await Monitor.connect(qemu.b) as b,
    ):
        before = await states(a)
        one = await start_tracing(a, ["flatview_new", "runstate_set"])
        two = await start_tracing(b, ["flatview_new", "vm_state_notify"])
        assert (one.shared, two.shared) == (False, True)
        assert one.path == two.path
        async with one.tail() as first, two.tail() as second:
            await toggle_pam(qemu, 2)
            seen = [steps(await read_until_marker(t, s)) for t, s in ((first, one), (second, two))]
            assert seen[0] == seen[1] != []
            left = await one.stop()
            assert set(left.events) == {"runstate_set"}
            assert left.log is None
            await toggle_pam(qemu, 1)
            assert steps(await read_until_marker(second, two)) == seen[1][: len(seen[1]) // 2]
        assert (await two.stop()).log == "/dev/stderr"
        assert await states(a) == before
        assert left_behind(qemu) == []


@pytest.mark.asyncio
async def test_an_agent_beside_one_that_is_killed(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.b) as monitor:
        before = await states(monitor)
        async with agent_process(qemu.a) as (agent, path):
            session = await start_tracing(monitor)
            assert session.shared
            assert session.path == path
            agent.send_signal(signal.SIGKILL)
            await agent.wait()
            await check_traced(qemu, session, "tcg")
            assert (await session.stop()).log == "/dev/stderr"
        assert await states(monitor) == before
        assert left_behind(qemu) == []


@pytest.mark.asyncio
async def test_a_lost_monitor_is_replaced_for_restoring(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu:
        monitor = await Monitor.connect(qemu.a)
        before = await states(monitor)
        session = await start_tracing(monitor)
        await monitor.close()
        restored = await session.stop()
        assert restored.remarks == ()
        async with await Monitor.connect(qemu.b) as other:
            assert await states(other) == before
        assert left_behind(qemu) == []


@pytest.mark.asyncio
async def test_qemu_dies_while_it_is_traced(tmp_path: Path) -> None:
    async with (
        running(QEMUS[0], tmp_path) as qemu,
        await Monitor.connect(qemu.a) as monitor,
        await start_tracing(monitor) as session,
        session.tail() as tail,
    ):
        await toggle_pam(qemu, 50)
        os.kill(qemu.pid, signal.SIGKILL)
        await monitor.lost
        tail.finish()
        async with asyncio.timeout(5):
            records = [r async for batch in tail for r in batch.records]
        seen = steps(records)
        assert seen == seen[: len(seen) // 50] * 50 != []
        await session.stop()
        assert left_behind(qemu) == []


@pytest.mark.asyncio
async def test_cancelling_a_start_anywhere_restores(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        before = await states(monitor)
        guest = qemu.guest()
        loop = asyncio.get_running_loop()
        started = loop.time()
        await (await start_tracing(monitor, guest=guest)).stop()
        whole = loop.time() - started
        cancelled = 0
        for part in range(60):
            task = asyncio.create_task(start_tracing(monitor, guest=guest))
            handle = loop.call_later(whole * part / 50, task.cancel)
            try:
                await (await task).stop()
            except asyncio.CancelledError:
                cancelled += 1
            handle.cancel()
            assert await states(monitor) == before
            assert left_behind(qemu) == []
        assert cancelled


@pytest.mark.asyncio
@every_qemu
@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ("/nonexistent/log", TraceReason.LOG_REFUSED),
        ("/dev/null", TraceReason.NOT_LOGGED),
    ],
)
async def test_a_log_that_qemu_does_not_write_to(
    build: QemuBuild,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    theirs: str,
    reason: TraceReason,
) -> None:
    """As with a QEMU that may not open our file, or whose trace backend is not the log."""
    create = trace_setup._create_log

    def other_place(process: Process, place: Place) -> tuple[str, str]:
        return create(process, place)[0], theirs

    monkeypatch.setattr(trace_setup, "_create_log", other_place)
    reader, writer = os.pipe()
    async with running(build, tmp_path, stderr=writer) as qemu:
        os.close(writer)
        os.set_blocking(reader, False)
        async with await Monitor.connect(qemu.a) as monitor:
            before = await states(monitor)
            with pytest.raises(TraceUnavailable) as refused:
                await start_tracing(monitor)
            assert refused.value.reason is reason
            assert refused.value.remedy is not None
            assert await states(monitor) == before
            assert left_behind(qemu) == []
            # 7.2 has no log at all after a file that it could not open: it is put back too.
            await monitor.execute("trace-event-set-state", {"name": "vm_state*", "enable": True})
            await monitor.execute("cont")
            assert b"vm_state_notify running 1" in read_all(reader)
    os.close(reader)


@pytest.mark.asyncio
async def test_a_log_per_thread_is_refused(tmp_path: Path) -> None:
    # With an event on, the main thread has its log open and writes the marker to it; the
    # lines of the vCPUs would go elsewhere.
    args = ("-d", "tid,guest_errors", "-D", f"{tmp_path}/log-%d", "-trace", "runstate_set")
    async with running(QEMUS[0], tmp_path, *args) as qemu, await Monitor.connect(qemu.a) as monitor:
        before = await states(monitor)
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor)
        assert refused.value.reason is TraceReason.LOG_PER_THREAD
        assert await states(monitor) == before
        assert left_behind(qemu) == []


@pytest.mark.asyncio
async def test_a_log_that_two_qemus_share_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    async with AsyncExitStack() as stack:
        with writing(tmp_path / "log") as log:
            start = stack.enter_async_context
            qemu = await start(running(QEMUS[0], tmp_path / "1", stderr=log))
            await start(running(QEMUS[0], tmp_path / "2", stderr=log))
        monitor = await stack.enter_async_context(await Monitor.connect(qemu.a))
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor)
        assert refused.value.reason is TraceReason.LOG_SHARED


@pytest.mark.asyncio
async def test_a_guest_whose_process_is_not_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_control, "find_owner", lambda *_: None)
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor)
        assert refused.value.reason is TraceReason.NO_PROCESS
        assert await restore_stale(monitor) is None


@pytest.mark.asyncio
async def test_events_that_this_qemu_does_not_have(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor, ["no_such_event"])
        assert refused.value.reason is TraceReason.NO_EVENTS
        async with await start_tracing(monitor, ["no_such_event", "runstate_set"]) as session:
            assert session.missing == ("no_such_event",)
            async with session.tail() as tail:
                await monitor.execute("cont")
                records = await read_until_marker(tail, session)
            assert [(r.old, r.new) for r in records if isinstance(r, RunStateChange)] == [
                ("prelaunch", "running")
            ]


@pytest.mark.asyncio
async def test_a_log_that_somebody_else_redirected(tmp_path: Path) -> None:
    other = tmp_path / "other.log"
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        await hmp(monitor, "logfile", str(other), quiet=True)
        async with await start_tracing(monitor) as session:
            assert session.in_place
            await check_traced(qemu, session, "tcg")
        assert other.stat().st_size > 0


@pytest.mark.asyncio
async def test_qemu_in_another_mount_namespace(tmp_path: Path) -> None:
    if not can_unshare():
        pytest.skip("unshare(1) may not create a mount namespace here: needs root")
    script = 'mount -t tmpfs none /dev/shm && exec "$@"'
    prefix = (*NEW_MOUNTS, "sh", "-c", script, "sh")
    async with (
        running(QEMUS[0], tmp_path, prefix=prefix) as qemu,
        await Monitor.connect(qemu.a) as monitor,
    ):
        before = await states(monitor)
        async with await start_tracing(monitor) as session:
            assert session.path.startswith(f"/proc/{qemu.pid}/root/dev/shm/")
            await check_traced(qemu, session, "tcg")
        assert await states(monitor) == before
        assert os.listdir(f"/proc/{qemu.pid}/root/dev/shm") == []
        assert left_behind(qemu) == []


@pytest.mark.asyncio
async def test_qemu_of_another_user() -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv(1) to start QEMU as another user")
    nobody = pwd.getpwnam("nobody")
    prefix = ("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
    directory = Path("/dev/shm") / f"test-monitor-{os.getpid()}"
    directory.mkdir()
    try:
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
        async with (
            running(QEMUS[0], directory, prefix=prefix) as qemu,
            await Monitor.connect(qemu.a) as monitor,
        ):
            before = await states(monitor)
            async with await start_tracing(monitor) as session:
                await check_traced(qemu, session, "tcg")
                # Only that user beside us.
                acl = os.getxattr(session.path, "system.posix_acl_access")
                assert nobody.pw_uid.to_bytes(4, "little") in acl
                assert os.stat(session.path).st_mode & 0o007 == 0
            assert await states(monitor) == before
            assert left_behind(qemu) == []
    finally:
        shutil.rmtree(directory)


@pytest.mark.asyncio
async def test_another_users_agent_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root's agent is at work; to us, as any other user, its place is another one's."""
    if os.geteuid() != 0:
        pytest.skip("needs root to stand for two users")
    async with (
        running(QEMUS[0], tmp_path) as qemu,
        await Monitor.connect(qemu.a) as a,
        await Monitor.connect(qemu.b) as b,
    ):
        async with await start_tracing(a):
            monkeypatch.setattr(os, "geteuid", lambda: 65534)
            with pytest.raises(TraceUnavailable) as refused:
                await start_tracing(b)
            monkeypatch.undo()
            assert refused.value.reason is TraceReason.OTHER_AGENT
            assert refused.value.remedy is not None
        assert left_behind(qemu) == []
