"""Real QEMUs: discovery, connections, human-monitor commands, snapshots."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from qmp_memlistener.errors import (
    CommandFailed,
    DeadlineExceeded,
    InputError,
    MonitorBusy,
    TargetLost,
    TargetUnreachable,
)
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import (
    Flag,
    Monitor,
    MonitorState,
    PidTarget,
    TcpTarget,
    UnixTarget,
    companions_of,
    find_guest,
    find_guests,
    find_owner,
    hmp,
    measure_idle,
    read_facts,
    take_snapshot,
)
from qmp_memlistener.reports.guests import guest_document
from tests.support.any_monitor import AnyMonitor
from tests.support.bare_qemu import NEW_MOUNTS, can_unshare, moved, running
from tests.support.host import patience
from tests.support.live import NO_QEMU, QEMUS, best_accel, builds

LOADER = "/lib64/ld-linux-x86-64.so.2"

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
]


@pytest.mark.asyncio
@builds()
async def test_discovery_reads_everything_and_disturbs_nothing(
    build: QemuBuild, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    args = (
        *("-name", "guest=vm,,1,debug-threads=on"),
        *("-qmp", "unix:relative,server=on,wait=off"),
        *("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"),
        *("-chardev", f"socket,id=c,path={tmp_path}/c,server=on,wait=off"),
        *("-mon", "chardev=c,mode=control"),
        *("-chardev", f"socket,id=h,path={tmp_path}/h,server=on,wait=off"),
        *("-mon", "chardev=h,mode=readline"),
    )
    accel = best_accel(build)
    async with running(build, tmp_path, *args, accel=accel) as qemu:
        async with await Monitor.connect(UnixTarget(f"{tmp_path}/c")):
            guests = [g for g in find_guests() if g.pid == qemu.pid]
            documents = [guest_document(guest) for guest in guests]
        assert documents == [
            {
                "pid": qemu.pid,
                "name": "vm,1",
                "version": build.version,
                "machine": "q35",
                "accel": accel,
                "monitors": [
                    {"target": str(qemu.a), "state": "free", "why": None},
                    {"target": str(qemu.b), "state": "free", "why": None},
                    {"target": f"unix:{tmp_path}/relative", "state": "free", "why": None},
                    {"target": f"127.0.0.1:{port}", "state": "free", "why": None},
                    {"target": f"unix:{tmp_path}/c", "state": "busy", "why": None},
                ],
                "owners": [],
                "targets": [
                    "name:vm,1",
                    f"pid:{qemu.pid}",
                    str(qemu.a),
                    str(qemu.b),
                    f"unix:{tmp_path}/relative",
                    f"127.0.0.1:{port}",
                ],
                "visible": True,
                "notes": [],
            }
        ]
        human = [m for m in guests[0].monitors if m not in guests[0].qmp_monitors]
        assert [str(m.target) for m in human] == [f"unix:{tmp_path}/h"]
        # Looking has not taken a place: each free monitor still greets at once.
        for target in (qemu.a, UnixTarget(f"{tmp_path}/relative"), TcpTarget("127.0.0.1", port)):
            async with await Monitor.connect(target) as monitor:
                assert str(monitor.version) == build.version
                owner = find_owner(monitor.target, monitor.identity)
                assert owner is not None
                assert owner.pid == qemu.pid
    assert find_guest(qemu.pid) is None


@pytest.mark.asyncio
async def test_discovery_of_a_daemonised_qemu(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path, "-daemonize") as qemu:
        guest = qemu.guest()
        assert guest.command_line.daemonize
        assert guest.free_targets() == (qemu.a, qemu.b)


@pytest.mark.asyncio
async def test_discovery_of_a_qemu_whose_binary_was_replaced(tmp_path: Path) -> None:
    installed = QEMUS[0]
    copy = tmp_path / "qemu-system-x86_64"
    shutil.copy(installed.binary, copy)
    async with running(moved(installed, str(copy)), tmp_path) as qemu:
        copy.unlink()
        assert qemu.guest().version == installed.version


@pytest.mark.asyncio
@pytest.mark.skipif(not os.path.exists(LOADER), reason=f"{LOADER} is missing: no x86-64 glibc")
async def test_discovery_of_a_qemu_behind_a_loader(tmp_path: Path) -> None:
    build = moved(QEMUS[0], QEMUS[0].binary)
    async with running(build, tmp_path, prefix=(LOADER,)) as qemu:
        guest = qemu.guest()
        assert (guest.version, guest.machine) == (QEMUS[0].version, "q35")


@pytest.mark.asyncio
async def test_discovery_in_another_mount_namespace(tmp_path: Path) -> None:
    if not can_unshare():
        pytest.skip("unshare(1) may not create a mount namespace here: needs root")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    prefix = (*NEW_MOUNTS, "sh", "-c", script, "sh", str(hidden))
    inside = f"unix:{hidden}/qmp,server=on,wait=off"
    async with running(QEMUS[0], tmp_path, "-qmp", inside, prefix=prefix) as qemu:
        assert not (hidden / "qmp").exists()
        expected = UnixTarget(f"/proc/{qemu.pid}/root{hidden}/qmp")
        assert qemu.guest().free_targets()[-1] == expected
        async with await Monitor.connect(expected) as monitor:
            assert monitor.identity.pid == qemu.pid


@pytest.mark.asyncio
async def test_a_listener_that_qemu_inherited(tmp_path: Path) -> None:
    """libvirt opens the monitor's socket itself and passes the descriptor."""
    path = str(tmp_path / "inherited")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(1)
        chardev = f"socket,id=m,fd={server.fileno()},server=on,wait=off"
        process = await asyncio.create_subprocess_exec(
            *(QEMUS[0].binary, *QEMUS[0].args, "-nodefaults", "-display", "none"),
            *("-S", "-chardev", chardev, "-mon", "chardev=m,mode=control"),
            pass_fds=(server.fileno(),),
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **QEMUS[0].env},
        )
    try:
        async with await Monitor.connect(UnixTarget(path), deadline=20) as monitor:
            # SO_PEERCRED names whoever called listen(), which QEMU did not
            assert monitor.identity.pid == process.pid
            owner = find_owner(monitor.target, monitor.identity)
            assert owner is not None
            assert owner.pid == process.pid
            assert [str(m.target) for m in owner.qmp_monitors] == [f"unix:{path}"]
            assert owner.qmp_monitors[0].state is MonitorState.BUSY
    finally:
        process.kill()
        await process.wait()


@pytest.mark.asyncio
@builds()
async def test_snapshot_and_facts(build: QemuBuild, tmp_path: Path) -> None:
    args = ("-object", "memory-backend-ram,id=m0,size=16M", "-name", "vm")
    dimm = ("-m", "64,slots=2,maxmem=1G", "-device", "pc-dimm,id=d0,memdev=m0")
    async with (
        running(build, tmp_path, *args, *dimm) as qemu,
        await Monitor.connect(qemu.a) as monitor,
    ):
        facts = await read_facts(monitor)
        assert (facts.version, facts.name) == (build.version, "vm")
        assert (facts.status, facts.running) == ("prelaunch", False)
        assert (facts.kvm, facts.accel) == (False, "tcg")
        assert facts.machine is not None
        assert "q35" in facts.machine
        (device,) = facts.memory_devices
        assert (device.kind, device.id, device.addr, device.size) == (
            "dimm",
            "d0",
            1 << 32,
            1 << 24,
        )
        idle = await measure_idle(monitor)
        snapshot = await take_snapshot(monitor, idle)
        assert snapshot.text.startswith("address-space: ")
        assert "address-space: memory" in snapshot.text
        assert "owner:{" in snapshot.text
        assert snapshot.bql_cost_ns is not None
        assert 0 <= snapshot.bql_cost_ns <= snapshot.duration_ns
        assert (await take_snapshot(monitor)).bql_cost_ns is None


@pytest.mark.asyncio
@builds()
async def test_human_monitor_arguments_stay_single_arguments(
    build: QemuBuild, tmp_path: Path
) -> None:
    async with running(build, tmp_path) as qemu, await AnyMonitor.connect(qemu.a) as monitor:
        for name in ('a" b', "a b", "-f", "back\\slash", "new\nline", "d\u00e9j\u00e0", "%s%n"):
            with pytest.raises(CommandFailed) as error:
                await hmp(monitor, "device_del", name)
            assert name.splitlines()[0] in error.value.desc
        assert "-o" not in await hmp(monitor, "info mtree", Flag("o"))
        assert (await hmp(monitor, "print", 4711)).strip() == hex(4711)
        for command in ("info nosuch", "nosuch", "logfile", "info mtree nosuch"):
            with pytest.raises(CommandFailed):
                await hmp(monitor, command)
        with pytest.raises(CommandFailed) as error:
            await hmp(monitor, "logfile", "/nonexistent/log", quiet=True)
        assert "No such file" in error.value.desc
        with pytest.raises(InputError):
            await hmp(monitor, "device_del", "x" * 2000)


@pytest.mark.asyncio
async def test_a_busy_monitor_says_so_within_a_second(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.a) as first:
        start = time.monotonic()
        with pytest.raises(MonitorBusy):
            await Monitor.connect(qemu.a)
        assert time.monotonic() - start < 1
        async with await Monitor.connect(PidTarget(qemu.pid)) as second:
            assert second.target == qemu.b
            with pytest.raises(MonitorBusy):
                await Monitor.connect(PidTarget(qemu.pid))
        # The holder was not disturbed, and can come back.
        assert await first.execute("query-name") == {}
        await first.reconnect()
        assert await first.execute("query-name") == {}
    with pytest.raises(TargetUnreachable):
        await Monitor.connect(PidTarget(qemu.pid))
    with pytest.raises(TargetUnreachable):
        await Monitor.connect(qemu.a)


@pytest.mark.asyncio
async def test_a_busy_tcp_monitor(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = TcpTarget("127.0.0.1", probe.getsockname()[1])
    option = f"tcp:127.0.0.1:{target.port},server=on,wait=off"
    async with running(QEMUS[0], tmp_path, "-qmp", option), await Monitor.connect(target):
        start = time.monotonic()
        with pytest.raises(MonitorBusy):
            await Monitor.connect(target)
        assert time.monotonic() - start < 1


@pytest.mark.asyncio
async def test_companions(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        one = companions_of(find_owner(monitor.target, monitor.identity), [monitor.target])
        assert (one.operations, one.ping) == (qemu.b, None)
        assert len(one.without) == 1
        named = companions_of(qemu.guest(), [qemu.a], ping=UnixTarget("/elsewhere"))
        assert (named.operations, named.ping, named.without) == (
            qemu.b,
            UnixTarget("/elsewhere"),
            (),
        )
        async with await Monitor.connect(qemu.b):
            none = companions_of(qemu.guest(), [qemu.a, qemu.b])
            assert (none.operations, none.ping) == (None, None)
            assert len(none.without) == 2
    remote = companions_of(None, [TcpTarget("elsewhere", 1)])
    assert "--ping-monitor" in remote.without[-1]


@pytest.mark.asyncio
@builds()
async def test_a_killed_qemu_is_lost_at_once(build: QemuBuild, tmp_path: Path) -> None:
    async with running(build, tmp_path) as qemu, await Monitor.connect(qemu.a) as monitor:
        events = monitor.events()
        await monitor.execute("cont")
        assert (await anext(events)).name == "RESUME"
        start = time.monotonic()
        os.kill(qemu.pid, signal.SIGKILL)
        async with asyncio.timeout(patience(2)):
            error = await monitor.lost
        assert isinstance(error, TargetLost)
        with pytest.raises(TargetLost):
            async for _ in events:
                pass
        with pytest.raises(TargetLost):
            await monitor.execute("query-status")
        assert time.monotonic() - start < patience(2)


@pytest.mark.asyncio
async def test_a_stopped_qemu_neither_answers_nor_blocks_us(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu:
        monitor = await Monitor.connect(qemu.a)
        os.kill(qemu.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await monitor.execute("query-name", deadline=0.2)
        with pytest.raises(DeadlineExceeded):
            await Monitor.connect(qemu.b, deadline=0.3)
        await monitor.close()
        assert time.monotonic() - start < patience(2)
        os.kill(qemu.pid, signal.SIGCONT)
        async with await Monitor.connect(qemu.a) as again:
            assert await again.execute("query-name") == {}


@pytest.mark.asyncio
async def test_out_of_band_overtakes(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu, await AnyMonitor.connect(qemu.a) as monitor:
        assert monitor.abilities.out_of_band
        slow = asyncio.create_task(monitor.timed("query-qmp-schema"))
        await asyncio.sleep(0)
        fast = await monitor.timed("query-yank", oob=True)
        assert fast.t_end_ns < (await slow).t_end_ns


@pytest.mark.asyncio
@builds()
async def test_what_qemu_still_answers_to_the_client_before_is_not_for_us(
    build: QemuBuild, tmp_path: Path
) -> None:
    target = UnixTarget(f"{tmp_path}/a")
    async with running(build, tmp_path):
        for turn in range(600):
            async with await Monitor.connect(target, deadline=patience(10)) as monitor:
                assert await monitor.execute("query-name") == {}
            with socket.socket(socket.AF_UNIX) as hasty:
                hasty.connect(target.path)
                with hasty.makefile("rb") as answers:
                    while not answers.readline().startswith(b'{"QMP"'):
                        pass
                    hasty.sendall(b'{"execute":"qmp_capabilities","id":%d}' % turn)
                    while b'"id": %d' % turn not in answers.readline():
                        pass
                    hasty.sendall(b'{"execute":"query-status"}')
