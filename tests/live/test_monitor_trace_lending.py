"""Tracing a QEMU that is another user's or sees other files: it gets one log file, no more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.qmp import (
    Monitor,
    TcpTarget,
    TraceReason,
    TraceUnavailable,
    start_tracing,
)
from tests.support.bare_qemu import NEW_MOUNTS, Running, can_unshare, running
from tests.support.host import patience
from tests.support.leftovers import left_behind, log_targets
from tests.support.live import NO_QEMU, QEMUS, builds
from tests.support.tracing import check_traced, states

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not QEMUS, reason=NO_QEMU),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users"),
    pytest.mark.skipif(not can_unshare(), reason="unshare(1) may not make a mount namespace here"),
]

NOBODY = pwd.getpwnam("nobody")
AS_NOBODY = ("setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups")


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A directory of that user's."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY.pw_uid, NOBODY.pw_gid)
        yield Path(name)


def contained(script: str) -> tuple[str, ...]:
    """A mount namespace of its own, prepared by the script."""
    return (*NEW_MOUNTS, "sh", "-c", f'{script} && exec "$@"', "sh")


async def output_of(*command: str) -> str:
    """Both outputs."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    return (await process.communicate())[0].decode()


def links(pid: int) -> list[str]:
    """Where its descriptors lead, also those that were not opened by it."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return found


async def trace(qemu: Running) -> None:
    """Trace it for a moment, and see that it is left as it was."""
    async with await Monitor.connect(qemu.a) as monitor:
        before = await states(monitor)
        open_before = log_targets(qemu.pid)
        async with await start_tracing(monitor) as session:
            # no path leads there but QEMU's own descriptor
            assert session.path.startswith(f"/proc/{qemu.pid}/fd/")
            assert os.readlink(session.path) == "/qmp-memlistener.log"
            await check_traced(qemu, session, "tcg")
        assert await states(monitor) == before
        async with asyncio.timeout(patience(5)):  # QEMU closes its log after an RCU grace period
            while any("qmp-memlistener" in link for link in links(qemu.pid)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert log_targets(qemu.pid) == open_before
        assert left_behind(qemu.pid) == []


@pytest.mark.asyncio
@builds()
async def test_in_another_mount_namespace(build: QemuBuild, tmp_path: Path) -> None:
    prefix = contained("mount -t tmpfs none /dev/shm")
    async with running(build, tmp_path, prefix=prefix) as qemu:
        await trace(qemu)
        assert os.listdir(f"/proc/{qemu.pid}/root/dev/shm") == []


@pytest.mark.asyncio
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv(1)")
async def test_of_another_user(nobodys: Path) -> None:
    async with running(QEMUS[0], nobodys, prefix=AS_NOBODY) as qemu:
        await trace(qemu)
        async with (
            await Monitor.connect(qemu.a) as monitor,
            await start_tracing(monitor) as session,
        ):
            # that user beside us, for this file
            acl = os.getxattr(session.path, "system.posix_acl_access")
            assert NOBODY.pw_uid.to_bytes(4, "little") in acl
            assert os.stat(session.path).st_mode & 0o007 == 0


@pytest.mark.asyncio
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv(1)")
@pytest.mark.parametrize("trap", ["the directory", "the file"])
async def test_links_of_a_hostile_guest_lead_nowhere(nobodys: Path, trap: str) -> None:
    """QEMU's user prepares the /dev/shm that it sees: nothing of ours is written through it."""
    victim, dev = nobodys / "victim", nobodys / "dev"
    for directory in (victim, dev):
        directory.mkdir()
    (dev / "fd").symlink_to("/proc/self/fd")
    (dev / "stderr").symlink_to("/proc/self/fd/2")
    os.mknod(dev / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    if trap == "the file":
        (dev / "shm").mkdir()
    else:
        (dev / "shm").symlink_to(victim)
    prefix = (*contained(f"mount --bind {dev} /dev"), *AS_NOBODY)
    async with running(QEMUS[0], nobodys, prefix=prefix) as qemu:
        process = qemu.guest().process
        if trap == "the file":
            name = f"qmp-memlistener-0-{process.pid}-{process.start_ticks}.log"
            (dev / "shm" / name).symlink_to(victim / "made-by-root")
        await trace(qemu)
        assert os.listdir(victim) == []
        newer = ("-uid", "0", "-newer", str(nobodys / "pid"), "-type", "f")
        assert await output_of("find", str(nobodys), *newer) == ""


@pytest.mark.asyncio
async def test_a_tcp_monitor_cannot_be_handed_a_log(tmp_path: Path) -> None:
    prefix = contained("mount -t tmpfs none /dev/shm")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    option = ("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
    async with (
        running(QEMUS[0], tmp_path, *option, prefix=prefix) as qemu,
        await Monitor.connect(TcpTarget("127.0.0.1", port)) as monitor,
    ):
        before = await states(monitor)
        with pytest.raises(TraceUnavailable) as refused:
            await start_tracing(monitor, guest=qemu.guest())
        assert refused.value.reason is TraceReason.NO_PLACE
        assert "UNIX socket" in refused.value.message
        assert await states(monitor) == before
        assert left_behind(qemu.pid) == []
        assert os.listdir(f"/proc/{qemu.pid}/root/dev/shm") == []
