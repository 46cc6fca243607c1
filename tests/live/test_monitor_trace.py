"""Tracing real QEMUs through their log: every line seen, everything put back, nothing cut."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from pathlib import Path

import pytest

from qmp_memlistener.agent.checkup import examine_guest
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import (
    TRACE_EVENTS,
    Command,
    FlatViewEvent,
    Monitor,
    RunStateChange,
    TraceBatch,
    TraceReason,
    TraceTail,
    TraceUnavailable,
    hmp,
    start_tracing,
    trace_control,
    trace_notes,
)
from qmp_memlistener.records import SlotOp
from tests.support.bare_qemu import running
from tests.support.leftovers import file_has, left_behind
from tests.support.live import NO_QEMU, QEMUS, best_accel, builds
from tests.support.tracing import (
    check_traced,
    read_all,
    read_until_marker,
    states,
    steps,
    toggle_pam,
    writing,
)

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("own", [True, False])
async def test_a_log_that_nothing_limits_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """QEMU's own, and ours where this user can make no limited file: an agent that is killed leaves
    the events on."""

    def refuse(size: int) -> int:
        raise PermissionError(size)

    monkeypatch.setattr(trace_notes, "limited_file", refuse)
    log = ("-D", str(tmp_path / "log")) if own else ()
    async with running(QEMUS[0], tmp_path, *log) as qemu:
        (tmp_path / "log").touch()
        async with await Monitor.connect(qemu.a) as monitor:
            async with await start_tracing(monitor) as session:
                assert session.in_place == own
                (remark,) = [r for r in session.remarks if "no limit" in r or "with a limit" in r]
                assert "until the next attach or `doctor --clean`" in remark
                assert str(session.unlimited) in remark
            checks = {c.name: c for c in (await examine_guest(str(qemu.b)))[1]}
            check = checks["its trace log in a file of limited size"]
            assert not check.usable
            assert ("-D" if own else "user namespaces") in str(check.remedy)


@pytest.mark.asyncio
@builds()
async def test_trace_and_leave_no_trace(build: QemuBuild, tmp_path: Path) -> None:
    accel = best_accel(build)
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
            assert left_behind(qemu.pid)
            restored = await session.stop()
            assert restored.log == "/dev/stderr"
            assert restored.remarks == ()
            assert await states(monitor) == before
            assert left_behind(qemu.pid) == []
            assert read_all(reader) == b"", said
            # The log is back where it was.
            await monitor.execute("trace-event-set-state", {"name": "vm_state*", "enable": True})
            await monitor.execute("cont")
            assert b"vm_state_notify running 1" in read_all(reader)
            assert await session.stop() == trace_control.Restored()
    os.close(reader)


@pytest.mark.asyncio
@builds()
async def test_two_hundred_toggles_none_missed(build: QemuBuild, tmp_path: Path) -> None:
    accel = best_accel(build)
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


@pytest.mark.asyncio
@builds()
@pytest.mark.parametrize("how", ["-D", "stderr", "-D -daemonize"])
async def test_a_log_of_its_own_is_read_in_place_and_never_cut(
    build: QemuBuild, tmp_path: Path, how: str
) -> None:
    accel = best_accel(build)
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
            assert left_behind(qemu.pid) == []
            await monitor.execute("stop")
            now = await asyncio.to_thread(log.read_bytes)
            assert now.startswith(head)
            assert b"vm_state_notify running 0" in now[len(head) :]


@pytest.mark.asyncio
@builds()
async def test_a_daemonised_qemu_gets_its_silence_back(build: QemuBuild, tmp_path: Path) -> None:
    async with (
        running(build, tmp_path, "-daemonize") as qemu,
        await Monitor.connect(qemu.a) as monitor,
    ):
        async with await start_tracing(monitor) as session:
            await check_traced(qemu, session, "tcg")
            assert os.readlink(f"/proc/{qemu.pid}/fd/2") == os.readlink(session.path)
        assert os.readlink(f"/proc/{qemu.pid}/fd/2") == "/dev/null"
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
@builds()
async def test_time_stamps_of_qemu(build: QemuBuild, tmp_path: Path) -> None:
    async with (
        running(build, tmp_path, "-msg", "timestamp=on") as qemu,
        await Monitor.connect(qemu.a) as monitor,
        await start_tracing(monitor) as session,
    ):
        assert session.timestamps
        records = await check_traced(qemu, session, "tcg")
        times = [r.t_ns for r in records]
        assert times == sorted(times)
        assert len(set(times)) > len(times) / 2, "lines read at once have times of their own"


@pytest.mark.asyncio
@builds()
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
            assert left_behind(qemu.pid) == []


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
@builds()
async def test_a_log_that_somebody_redirects_meanwhile_is_left_to_them(
    build: QemuBuild, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs.log"
    async with (
        running(build, tmp_path) as qemu,
        await Monitor.connect(qemu.a) as monitor,
        await Monitor.connect(qemu.b) as other,
    ):
        before = await states(monitor)
        session = await start_tracing(monitor)
        await hmp(other, "logfile", str(theirs), quiet=True)
        await other.execute("trace-event-set-state", {"name": "vm_state*", "enable": True})
        restored = await session.stop()
        assert restored.log is None
        assert any("another client" in remark for remark in restored.remarks)
        assert {n for n, on in (await states(monitor)).items() if on} == {
            *(n for n, on in before.items() if on),
            *(n for n in before if n.startswith("vm_state")),
        }
        assert left_behind(qemu.pid) == []
        await monitor.execute("cont")
        await file_has(theirs, b"vm_state_notify running 1")


@pytest.mark.asyncio
async def test_events_that_somebody_switched_meanwhile_are_left(tmp_path: Path) -> None:
    async with (
        running(QEMUS[0], tmp_path) as qemu,
        await Monitor.connect(qemu.a) as monitor,
        await Monitor.connect(qemu.b) as other,
    ):

        async def switch(name: str, enable: bool) -> None:
            await other.execute("trace-event-set-state", {"name": name, "enable": enable})

        await switch("runstate_set", True)
        async with await start_tracing(monitor) as session:
            await switch("flatview_new", False)  # ours, already put back
            await switch("runstate_set", False)  # theirs, was on before us
            await switch("handle_hmp_command", False)  # what the marker needs
            restored = await session.stop()
        assert "kvm_set_user_memory" in restored.events
        assert {"flatview_new", "runstate_set", "handle_hmp_command"}.isdisjoint(restored.events)
        assert restored.log is not None
        now = await states(monitor)
        assert not any(now[e] for e in (*TRACE_EVENTS, "handle_hmp_command"))


@pytest.mark.asyncio
@builds()
async def test_a_log_that_nobody_reads_has_a_bound(
    build: QemuBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 128 * 1024
    monkeypatch.setattr(trace_notes, "LOG_LIMIT", limit)
    async with running(build, tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        async with await start_tracing(monitor) as session:
            for _ in range(limit // 32):
                await monitor.pipeline([HMP] * 32)
                if (await asyncio.to_thread(os.stat, session.path)).st_size == limit:
                    break
            await monitor.pipeline([HMP] * 32)  # lost, and QEMU does not mind
            status = await asyncio.to_thread(os.stat, session.path)
            assert status.st_size == limit
            assert status.st_blocks * 512 <= limit
            async with session.tail() as tail:
                batches = await batches_until_loss(tail)
                assert batches[-1].lost is not None
                assert "full" in batches[-1].lost
                # there is room again, and nothing is garbled
                await toggle_pam(qemu, 1)
                records = await read_until_marker(tail, session)
                assert any(isinstance(r, FlatViewEvent) for r in records)
                assert tail.decoder.unknown == 0
        # also one that is full is known for ours, and put back
        assert (await monitor.execute("query-status")) is not None
        assert left_behind(qemu.pid) == []


HMP = Command("human-monitor-command", {"command-line": "print 0x1"})


async def batches_until_loss(tail: TraceTail) -> list[TraceBatch]:
    found: list[TraceBatch] = []
    async with asyncio.timeout(10):
        async for batch in tail:
            found.append(batch)
            if batch.lost is not None:
                break
    return found


@pytest.mark.asyncio
async def test_a_full_log_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that was killed: nobody read, and the next one restores."""
    limit = 16 * 1024
    monkeypatch.setattr(trace_notes, "LOG_LIMIT", limit)
    reader, writer = os.pipe()
    async with (
        running(QEMUS[0], tmp_path, stderr=writer) as qemu,
        await Monitor.connect(qemu.a) as monitor,
    ):
        os.close(writer)
        os.set_blocking(reader, False)
        session = await start_tracing(monitor)
        for _ in range(20):
            await monitor.pipeline([HMP] * 32)
        assert (await asyncio.to_thread(os.stat, session.path)).st_size == limit
        restored = await session.stop()
        assert restored.log == "/dev/stderr"
        assert restored.remarks == ()
        read_all(reader)
        await monitor.execute("trace-event-set-state", {"name": "vm_state*", "enable": True})
        await monitor.execute("cont")
        assert b"vm_state_notify running 1" in read_all(reader)
    os.close(reader)
