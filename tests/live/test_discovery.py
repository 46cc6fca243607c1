"""QEMUs that are not where their command line says, not called as usual, or not ours to look at."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import DeadlineExceeded, MonitorBusy
from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import Guest, Monitor, MonitorState, UnixTarget, find_guest
from qmp_memlistener.qmp.discovery import find_guests
from tests.support.bare_qemu import moved, running
from tests.support.live import NO_QEMU, QEMUS, best_accel
from tests.support.verbs import run_verb

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
    pytest.mark.asyncio,
]

PLAIN = ("-nodefaults", "-display", "none", "-S", "-m", "64")
NOBODY = 65534


@asynccontextmanager
async def started(
    build: QemuBuild, *args: str, cwd: Path, argv0: str | None = None
) -> AsyncIterator[int]:
    """A QEMU with exactly these options beside PLAIN; its process id."""
    process = await asyncio.create_subprocess_exec(
        *(argv0 or build.binary, *build.args, *PLAIN, *args),
        executable=build.binary,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, **build.env},
    )
    try:
        yield process.pid
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def listed(pid: int, monitors: int = 1) -> Guest:
    """As soon as that many monitors would serve us."""
    async with asyncio.timeout(20):
        while True:
            guest = find_guest(pid)
            if guest is not None and len(guest.free_targets()) >= monitors:
                return guest
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "argv0"),
    [
        (".qemu-system-x86_64-wrapped", "/opt/bin/qemu-system-x86_64"),
        ("qemu-acme-system-x86_64", None),
        ("vm-engine", None),
    ],
)
async def test_the_binary_is_looked_at_and_not_its_name(
    tmp_path: Path, name: str, argv0: str | None
) -> None:
    shutil.copy(QEMUS[0].binary, tmp_path / name)
    build = moved(QEMUS[0], str(tmp_path / name))
    qmp = f"unix:path={tmp_path}/q,server=on,wait=off"
    async with started(build, "-qmp", qmp, cwd=tmp_path, argv0=argv0) as pid:
        guest = await listed(pid)
        assert guest.version == build.version
        assert guest.free_targets() == (UnixTarget(f"{tmp_path}/q"),)
        assert pid in [g.pid for g in find_guests()]


async def test_what_is_called_qemu_and_is_none() -> None:
    process = await asyncio.create_subprocess_exec(
        *("qemu-system-x86_64", "-c", "import time; time.sleep(60)", "-qmp", "unix:/x,server"),
        executable=sys.executable,
    )
    try:
        assert find_guest(process.pid) is None
        assert process.pid not in [g.pid for g in find_guests()]
    finally:
        process.kill()
        await process.wait()


async def test_sockets_bound_before_a_chroot(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("-chroot needs root")
    jail = tmp_path / "jail"
    jail.mkdir()
    # a socket of that name in the jail is another one
    decoy = await asyncio.start_unix_server(lambda *_: None, tmp_path / "decoy")
    (jail / str(tmp_path).lstrip("/")).mkdir(parents=True)
    os.link(tmp_path / "decoy", jail / str(tmp_path).lstrip("/") / "q")
    qmp = f"unix:{tmp_path}/q,server=on,wait=off"
    chroot = ("-qmp", qmp, "-qmp", "unix:relative,server,nowait", "-chroot", str(jail))
    async with decoy, started(QEMUS[0], *chroot, cwd=tmp_path) as pid:
        guest = await listed(pid, 1)
        assert guest.free_targets()[0] == UnixTarget(f"{tmp_path}/q")
        async with await Monitor.connect(guest.free_targets()[0]) as monitor:
            assert monitor.identity.pid == pid


async def test_a_path_that_another_qemu_has_bound_again(tmp_path: Path) -> None:
    args = ("-qmp", f"unix:{tmp_path}/q,server=on,wait=off")
    async with started(QEMUS[0], *args, cwd=tmp_path) as first:
        await listed(first)
        async with started(QEMUS[0], *args, cwd=tmp_path) as second:
            await listed(second)
            guest = find_guest(first)
            assert guest is not None
            (monitor,) = guest.monitors
            assert (monitor.target, monitor.state) == (None, MonitorState.UNREACHABLE)
            assert "another socket" in monitor.why


async def test_readconfig(tmp_path: Path) -> None:
    accel = best_accel(QEMUS[0])
    config = tmp_path / "vm.conf"
    config.write_text(
        f'# a machine\n[machine]\ntype = "q35"\naccel = "{accel}"\n\n'
        '[chardev "m"]\nbackend = "socket"\npath = "rc.sock"\nserver = "on"\nwait = "off"\n\n'
        '[mon]\nchardev = "m"\nmode = "control"\n'
    )
    async with started(QEMUS[0], "-readconfig", "vm.conf", cwd=tmp_path) as pid:
        guest = await listed(pid)
        assert (guest.machine, guest.accel, guest.notes) == ("q35", accel, ())
        assert guest.free_targets() == (UnixTarget(f"{tmp_path}/rc.sock"),)
        config.unlink()
        unread = find_guest(pid)
        assert unread is not None
        assert unread.monitors == ()
        assert unread.accel == ("kvm" if accel == "kvm" else None)
        assert "vm.conf" in unread.notes[0]
        os.mkfifo(config)  # is not waited for
        assert (await run_verb("list", "--json")).documents[0]["guests"]


async def test_the_qemu_of_another_user(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv(1) to look as another user")
    script = (
        "import json\n"
        "from qmp_memlistener.qmp import find_guests\n"
        "from qmp_memlistener.reports.guests import guest_document\n"
        "print(json.dumps([guest_document(g) for g in find_guests()]))"
    )
    async with running(QEMUS[0], tmp_path, "-name", "theirs") as qemu:
        process = await asyncio.create_subprocess_exec(
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
            *(sys.executable, "-c", script),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        (guest,) = [g for g in json.loads(out) if g["pid"] == qemu.pid]
        assert not guest["visible"]
        assert {(m["state"], m["why"]) for m in guest["monitors"]} == {
            ("unreachable", "no permission")
        }
        assert "permission" in guest["notes"][0]


async def test_a_stopped_qemu_is_not_called_busy(tmp_path: Path) -> None:
    async with running(QEMUS[0], tmp_path) as qemu:
        client = await Monitor.connect(qemu.b)
        os.kill(qemu.pid, signal.SIGSTOP)
        try:
            # every time: also when the backlog is full of those who have given up
            for _ in range(4):
                with pytest.raises(DeadlineExceeded, match="stopped"):
                    await Monitor.connect(qemu.a)
            with pytest.raises(DeadlineExceeded, match="stopped"):
                await Monitor.connect(qemu.b)
        finally:
            os.kill(qemu.pid, signal.SIGCONT)
        with pytest.raises(MonitorBusy):
            await Monitor.connect(qemu.b)
        await client.close()
