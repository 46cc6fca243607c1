"""The freeze between users and across containers: who is honoured, and what strangers cannot do."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import GuestFrozen
from qmp_memlistener.host import state
from qmp_memlistener.qmp.freeze import (
    FreezeKey,
    check_not_frozen,
    freeze_key,
    frozen_by,
    hold_freeze,
)
from qmp_memlistener.qmp.targets import parse_target
from tests.support.strangers import SQUATS, STRANGER, acting_as, needs_root
from tests.unit.qmp.freeze_support import (
    Holding,
    frozen_files,
    key_of,
    place,
    standing_in,
)

pytestmark = needs_root
OWNER = 65534


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with place(monkeypatch) as path:
        yield path


@pytest.fixture
def qemu() -> Iterator[subprocess.Popen[bytes]]:
    """It runs as a user of its own, as libvirt has it."""
    with standing_in(uid=OWNER) as process:
        yield process


@pytest.fixture
def key(qemu: subprocess.Popen[bytes]) -> FreezeKey:
    return key_of(qemu.pid)


# -- who is honoured -----------------------------------------------------------------------------


def test_the_key_knows_whose_guest_it_is(key: FreezeKey) -> None:
    assert key.owner == OWNER


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize(
    ("holder", "other"), [(0, OWNER), (OWNER, 0), (0, STRANGER), (OWNER, STRANGER)]
)
def test_root_and_the_owner_are_honoured_by_all(
    shm: Path, qemu: subprocess.Popen[bytes], holder: int, other: int, umask: int
) -> None:
    with (
        Holding(shm, qemu.pid, uid=holder, umask=umask) as one,
        Holding(shm, qemu.pid, uid=other) as two,
    ):
        assert one.go() == "held"
        assert f"by pid {one.pid} (uid {holder}) since" in two.go()


def test_a_stranger_binds_only_himself(
    shm: Path, qemu: subprocess.Popen[bytes], key: FreezeKey
) -> None:
    with (
        Holding(shm, qemu.pid, uid=STRANGER) as stranger,
        Holding(shm, qemu.pid, uid=STRANGER) as same,
        Holding(shm, qemu.pid, uid=OWNER) as owner,
    ):
        answer = stranger.go()
        assert answer.startswith("held only verbs of user id 65533 honour the freeze: QEMU ")
        assert frozen_by(key) is None
        check_not_frozen(key)
        assert same.go().startswith("GuestFrozen")
        assert owner.go() == "held"


@pytest.mark.parametrize("run", range(3))
def test_root_and_the_owner_at_once(shm: Path, qemu: subprocess.Popen[bytes], run: int) -> None:
    with (
        Holding(shm, qemu.pid, uid=0) as root,
        Holding(shm, qemu.pid, uid=OWNER) as owner,
    ):
        for racer in (root, owner) if run % 2 else (owner, root):
            racer.start()
        answers = {racer.answer().split()[0] for racer in (root, owner)}
        assert answers == {"held", "GuestFrozen"}


def test_an_address_belongs_to_nobody_and_a_socket_to_its_owner(shm: Path) -> None:
    assert freeze_key(parse_target("10.0.0.1:4444"), None).owner is None
    socket = shm / "socket"
    socket.touch()
    os.chown(socket, OWNER, OWNER)
    assert freeze_key(parse_target(f"unix:{socket}"), None).owner == OWNER


# -- what strangers cannot do --------------------------------------------------------------------


@pytest.mark.parametrize("squat", SQUATS)
@pytest.mark.asyncio
async def test_taking_the_name_of_the_directory(
    shm: Path, key: FreezeKey, squat: Callable[[Path], None]
) -> None:
    with acting_as(STRANGER):
        squat(shm / "qmp-memlistener-0")
    for _ in range(2):  # the second time in the directory that is there by now
        async with hold_freeze(key, "all the same"):
            with acting_as(OWNER):
                holder = frozen_by(key)
            assert holder is not None
            assert holder.uid == 0
    (ours,) = [name for name in os.listdir(shm) if os.lstat(shm / name).st_uid == 0]
    assert ours.startswith("qmp-memlistener-0.")


def test_forging_a_freeze(shm: Path, key: FreezeKey) -> None:
    """A live freeze of a stranger, in whatever directory he finds or makes."""
    strangers = shm / "qmp-memlistener-0"
    worlds = shm / "qmp-memlistener-1"
    roots = shm / "qmp-memlistener-2"
    for directory in (worlds, roots):
        directory.mkdir()
    worlds.chmod(0o777)
    with acting_as(STRANGER):
        strangers.mkdir()
        handles = []
        for directory in (strangers, worlds):
            path = directory / f"freeze-{key.name}.forged"
            handles.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
            fcntl.fcntl(handles[-1], fcntl.F_OFD_SETLK, lock(fcntl.F_WRLCK, 0))
    # as if root could be made to link a stranger's file into a directory of root's
    os.link(strangers / f"freeze-{key.name}.forged", roots / f"freeze-{key.name}.forged")
    assert frozen_by(key) is None
    for handle in handles:
        os.close(handle)


def lock(kind: int, byte: int, length: int = 1) -> bytes:
    return struct.pack("@hhqqi0q", kind, os.SEEK_SET, byte, length, 0)


@pytest.mark.asyncio
async def test_locking_the_file_of_another(shm: Path, key: FreezeKey) -> None:
    """Who may only read it can neither write-lock it nor, by a read lock, keep it alive."""
    async with hold_freeze(key, "holder"):
        (file,) = frozen_files(shm)
        with acting_as(STRANGER):
            with pytest.raises(PermissionError):
                os.open(file, os.O_RDWR)
            handle = os.open(file, os.O_RDONLY)
        for kind, byte, expected in (
            (fcntl.F_WRLCK, 0, errno.EBADF),
            (fcntl.F_WRLCK, 1, errno.EBADF),
            (fcntl.F_RDLCK, 0, errno.EAGAIN),
        ):
            with pytest.raises(OSError) as refused:
                fcntl.fcntl(handle, fcntl.F_OFD_SETLK, lock(kind, byte))
            assert refused.value.errno == expected
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, lock(fcntl.F_RDLCK, 1))
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert frozen_by(key) is not None
    assert frozen_by(key) is None
    os.close(handle)


def test_a_stranger_cannot_keep_a_dead_freeze_alive(
    shm: Path, qemu: subprocess.Popen[bytes], key: FreezeKey
) -> None:
    with Holding(shm, qemu.pid, uid=OWNER) as holder:
        assert holder.go() == "held"
        (file,) = frozen_files(shm)
        with acting_as(STRANGER):
            handle = os.open(file, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        holder.kill()
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, lock(fcntl.F_RDLCK, 0, 2))
        with acting_as(STRANGER):
            assert frozen_by(key) is None
            assert frozen_files(shm) == [file]  # it is not his to remove
        assert frozen_by(key) is None
        assert frozen_files(shm) == []
        os.close(handle)


def test_odd_files_do_no_harm(shm: Path, key: FreezeKey) -> None:
    directory = shm / "qmp-memlistener-0"
    directory.mkdir()
    os.mkfifo(directory / f"freeze-{key.name}.fifo")
    (directory / f"freeze-{key.name}.link").symlink_to("/etc/passwd")
    (directory / f"freeze-{key.name}.dir").mkdir()
    (directory / f"freeze-{key.name}.dead").touch()
    assert frozen_by(key) is None
    assert sorted(p.suffix for p in directory.iterdir()) == [".dir", ".fifo", ".link"]
    assert Path("/etc/passwd").exists()


# -- containers ----------------------------------------------------------------------------------

unshare = shutil.which("unshare")
needs_namespaces = pytest.mark.skipif(
    unshare is None
    or subprocess.run(
        [unshare, "-m", "-p", "-f", "--mount-proc", "true"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="needs the right to make mount and pid namespaces",
)


@contextmanager
def container(
    shm: Path, script: str = "mount -t tmpfs tmpfs {shm} && chmod 1777 {shm}"
) -> Iterator[tuple[int, list[str]]]:
    """A process in its own pid namespace with its own tmpfs; its pid here, how to get in."""
    script = script.format(shm=shm, parent=shm.parent)
    command = [
        *("unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc"),
        *("sh", "-c", f"{script} && echo up && exec sleep 60"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            inner = int(children)
            yield inner, ["nsenter", "-t", str(inner), "-m", "-p", f"--wd={os.getcwd()}"]
        finally:
            process.kill()


@needs_namespaces
def test_a_freeze_inside_is_seen_outside(shm: Path) -> None:
    with container(shm) as (pid, enter):
        key = key_of(pid)
        assert key.inner_name.startswith("1-")
        with Holding(shm, 1, within=enter) as holder:
            assert holder.go() == "held"
            assert frozen_files(shm) == []
            seen = frozen_by(key)
            assert seen is not None
            assert seen.reason == "a control loop runs"
            holder.release()
        assert frozen_by(key) is None


@needs_namespaces
@pytest.mark.asyncio
async def test_a_freeze_outside_is_seen_inside_and_outside(shm: Path) -> None:
    with container(shm) as (pid, enter):
        key = key_of(pid)
        with Holding(shm, 1, within=enter) as inside, Holding(shm, pid) as outside:
            async with hold_freeze(key, "from the node") as held:
                assert held.remarks == ()
                assert len(frozen_files(shm)) == 1
                assert len(frozen_files(Path(f"/proc/{pid}/root{shm}"))) == 1
                for other in (inside, outside):
                    assert "GuestFrozen" in await asyncio.to_thread(other.go)
        assert frozen_files(shm) == frozen_files(Path(f"/proc/{pid}/root{shm}")) == []


@needs_namespaces
@pytest.mark.asyncio
async def test_a_guest_elsewhere_with_the_same_pid_inside_is_another(shm: Path) -> None:
    with container(shm) as (one, _), container(shm) as (two, _):
        async with hold_freeze(key_of(one), ""):
            check_not_frozen(key_of(two))
            assert frozen_by(key_of(two)) is None


@pytest.fixture
def nested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place whose parent can be covered in a container."""
    shm = tmp_path / "parent" / "shm"
    shm.mkdir(parents=True)
    monkeypatch.setattr(state, "SHM", str(shm))
    return shm


@needs_namespaces
@pytest.mark.parametrize(
    "script",
    [
        "mount -t tmpfs tmpfs {shm} && mount -o remount,ro {shm}",
        "mount -t tmpfs tmpfs {parent} && ln -s /etc {shm}",
        "mount -t tmpfs tmpfs {parent}",
    ],
    ids=["read-only", "a link to somewhere else", "not there"],
)
@pytest.mark.asyncio
async def test_a_container_that_cannot_be_written_is_remarked(nested: Path, script: str) -> None:
    before = sorted(os.listdir("/etc"))
    with container(nested, script) as (pid, _):
        async with hold_freeze(key_of(pid), "") as held:
            (remark,) = held.remarks
            assert remark.startswith("agents inside QEMU's container do not see the freeze")
            assert len(frozen_files(nested)) == 1
            with Holding(nested, pid) as other:
                assert "GuestFrozen" in await asyncio.to_thread(other.go)
    assert sorted(os.listdir("/etc")) == before


@needs_namespaces
@pytest.mark.asyncio
async def test_without_a_place_here_the_one_inside_will_do(nested: Path) -> None:
    """As for an agent whose own container has no /dev/shm."""
    os.rmdir(nested)
    script = "mount -t tmpfs tmpfs {parent} && mkdir -m 1777 {shm}"
    with container(nested, script) as (pid, enter), Holding(nested, 1, within=enter) as inside:
        key = key_of(pid)
        async with hold_freeze(key, "") as held:
            assert held.remarks == ("agents outside QEMU's container do not see the freeze",)
            assert "GuestFrozen" in await asyncio.to_thread(inside.go)
            with pytest.raises(GuestFrozen):
                async with hold_freeze(key, ""):
                    pass
