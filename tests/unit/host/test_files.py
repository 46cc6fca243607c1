"""Files of others: what is no ordinary file is refused at once, and nothing leads out of a root."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_memlistener.host import bounded, files
from qmp_memlistener.host.files import (
    NotRegular,
    open_foreign,
    open_in_root,
    open_memfd,
    pieces,
    stat_foreign,
)
from qmp_memlistener.host.processes import Process

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root, for a root directory of its own")


@contextmanager
def quick(seconds: float = 5) -> Iterator[None]:
    """What hangs fails, instead of hanging."""

    def hangs(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(path: str, *, dir_fd: int | None = None, follow: bool = False) -> bytes:
    handle = open_foreign(path, dir_fd=dir_fd, follow=follow)
    try:
        return b"".join(pieces(handle, 1 << 20))
    finally:
        os.close(handle)


def test_an_ordinary_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    assert read(str(path)) == b"text"
    handle = os.open(tmp_path, os.O_PATH)
    assert read("file", dir_fd=handle) == b"text"
    os.close(handle)
    assert stat_foreign(str(path)).st_size == 4


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def directory(path: Path) -> None:
    path.mkdir()


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere")


def device(path: Path) -> None:
    if not ROOT:
        pytest.skip("needs root, to make a device node")
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # zero: endless
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        pytest.skip("device nodes cannot be used here")


@pytest.mark.parametrize("make", [fifo, unix_socket, directory, link, dangling, device])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_what_is_no_regular_file_is_refused_and_not_opened(
    tmp_path: Path, make: Callable[[Path], None], flags: int
) -> None:
    path = tmp_path / "odd"
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    with quick(), pytest.raises(NotRegular):
        open_foreign(str(path), flags)
    with quick(), pytest.raises(NotRegular):
        read(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_is_followed_on_demand(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to("fifo")
    assert read(str(tmp_path / "link"), follow=True) == b"text"
    with quick(), pytest.raises(NotRegular):
        open_foreign(str(tmp_path / "to-fifo"), follow=True)


def test_of_a_sparse_file_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as f:
        f.truncate(40 << 30)
    handle = open_foreign(str(path))
    with quick():
        sizes = [len(p) for p in pieces(handle, 3 * files.PIECE + 7)]
    os.close(handle)
    assert sizes == [files.PIECE] * 3 + [7]


def test_a_file_that_is_truncated_meanwhile_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * files.PIECE))
    handle = open_foreign(str(path))
    found = []
    for piece in pieces(handle, 1 << 30):
        found.append(len(piece))
        os.truncate(path, files.PIECE + 5)
    os.close(handle)
    assert found == [files.PIECE, 5]


def test_what_is_gone_or_forbidden_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_foreign(str(tmp_path / "gone"))
    if ROOT:
        return
    (tmp_path / "file").touch(0)
    with pytest.raises(PermissionError):
        open_foreign(str(tmp_path / "file"))


def test_a_lease_does_not_make_us_wait(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    handle = os.open(path, os.O_RDWR)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with quick(), pytest.raises(BlockingIOError):
            open_foreign(str(path))
    finally:
        os.close(handle)
        signal.signal(signal.SIGIO, before)


def test_the_kernels_links_lead_to_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    with path.open("rb") as f:
        path.unlink()
        assert read(f"/proc/self/fd/{f.fileno()}") == b"text"
        assert read(f"/proc/{os.getpid()}/fd/{f.fileno()}") == b"text"
    one, other = os.pipe()
    with quick(), pytest.raises(NotRegular):
        open_foreign(f"/proc/self/fd/{one}")
    os.close(one)
    os.close(other)
    handle = open_foreign(f"/proc/{os.getpid()}/exe")
    assert next(pieces(handle, 4)) == b"\x7fELF"
    os.close(handle)


# -- another root --------------------------------------------------------------------------------


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Process]:
    """A process with another root directory, in which links lead everywhere."""
    inside = tmp_path / "root"
    (inside / "dir").mkdir(parents=True)
    (inside / "dir" / "file").write_bytes(b"inside")
    (inside / "dir" / "link").symlink_to("file")
    (inside / "secret").symlink_to("/etc/passwd")
    (inside / "up").symlink_to("../../../../../../etc/passwd")
    (inside / "there").symlink_to("/etc")
    os.mkfifo(inside / "fifo")
    script = "import os, sys; os.chroot(sys.argv[1]); os.chdir('/'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(inside)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = Process.read(child.pid)
        assert process is not None
        yield process
        child.kill()


@pytest.fixture(params=["openat2", "walked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the system call, and as where it is missing."""
    if request.param == "walked":

        def missing(*_: object) -> int:
            raise OSError(errno.ENOSYS, "")

        monkeypatch.setattr(files, "_openat2", missing)
    return str(request.param)


@needs_root
@pytest.mark.usefixtures("way")
def test_a_file_in_another_root(jail: Process) -> None:
    assert read(f"/proc/{jail.pid}/root/dir/file") == b"inside"
    handle = open_in_root(jail, "/dir", os.O_RDONLY | os.O_DIRECTORY)
    assert sorted(os.listdir(handle)) == ["file", "link"]
    os.close(handle)
    os.close(open_in_root(jail, "/fifo"))
    os.close(open_in_root(jail, "/"))
    with pytest.raises(FileNotFoundError):
        read(f"/proc/{jail.pid}/root/etc/passwd")


@needs_root
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "path", ["/secret", "/up", "/there/passwd", "/dir/link", "/dir/../../../etc/passwd"]
)
def test_no_link_leads_out_of_it(jail: Process, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for attempt in (
        lambda: open_in_root(jail, path),
        lambda: open_foreign(f"/proc/{jail.pid}/root{path}"),
        lambda: stat_foreign(f"/proc/{jail.pid}/root{path}"),
    ):
        with pytest.raises(OSError):
            attempt()
    assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_links_that_are_followed_stay_inside(jail: Process) -> None:
    root = f"/proc/{jail.pid}/root"
    assert read(f"{root}/dir/link", follow=True) == b"inside"
    for path in ("/secret", "/up", "/there/passwd"):
        with pytest.raises(FileNotFoundError):
            read(f"{root}{path}", follow=True)


@needs_root
def test_another_process_with_the_same_id_is_not_taken_for_it(jail: Process) -> None:
    other = replace(jail, start_ticks=jail.start_ticks + 1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessLookupError):
        open_in_root(other, "/dir")
    assert len(os.listdir("/proc/self/fd")) == before


@needs_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
@pytest.mark.usefixtures("way")
def test_a_mount_namespace_has_its_own_files(tmp_path: Path) -> None:
    script = f"mount -t tmpfs t {tmp_path} && echo inner >{tmp_path}/name && echo up && sleep 60"
    (tmp_path / "name").write_text("outer")
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", f"{script}"],
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        if child.stdout.readline() != b"up\n":
            pytest.skip("no mount namespace can be made here")
        assert read(f"/proc/{child.pid}/root{tmp_path}/name") == b"inner\n"
        child.kill()


# -- deadlines -----------------------------------------------------------------------------------


def test_what_takes_too_long_is_left_behind() -> None:
    one, other = os.pipe()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        bounded.call(lambda: os.read(one, 1), 0.05)
    assert time.monotonic() - began < 2
    os.write(other, b"x")
    assert bounded.call(lambda: 5, 5) == 5
    with pytest.raises(ZeroDivisionError):
        bounded.call(lambda: 1 // 0, 5)
    os.close(other)


def test_a_memfd_is_taken_that_can_be_no_file_of_a_file_system() -> None:
    ours = Process.read(os.getpid())
    assert ours is not None
    made = os.memfd_create("of-a-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    # as every file of a tmpfs is: no seal can be added
    unsealable = os.memfd_create("of-a-test-that-is-none", os.MFD_CLOEXEC)
    try:
        found = open_memfd(ours, "of-a-test")
        assert found is not None
        number, handle = found
        os.write(handle, b"text")
        os.close(handle)
        assert (number, os.pread(made, 9, 0)) == (made, b"text")
        assert open_memfd(ours, "of-a-test-that-is-none") is None
        assert open_memfd(ours, "of-nobody") is None
    finally:
        os.close(made)
        os.close(unsealable)
