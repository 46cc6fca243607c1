"""State on disk: found again whatever others do to its name, and odd files never make us wait."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.host import directory as directory_module
from qmp_memlistener.host import state
from qmp_memlistener.host.directory import (
    LONGEST,
    HeldFile,
    StateDirectory,
    set_lock,
    try_lock,
)
from qmp_memlistener.host.state import directories, own_directory
from tests.support.own_state import keep_state_in

UID = os.geteuid()
STRANGER = 65533
needs_root = pytest.mark.skipif(UID != 0, reason="needs root, to be other users")


@pytest.fixture(autouse=True)
def shm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands for /dev/shm, and another beside it for /tmp; other users may go there."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        shm, fallback = Path(name, "shm"), Path(name, "tmp")
        for path in (shm, fallback):
            path.mkdir()
            path.chmod(0o1777)
        keep_state_in(shm, monkeypatch, fallback=fallback)
        yield shm


@pytest.fixture
def fallback(shm: Path) -> Path:
    return shm.parent / "tmp"


@pytest.fixture
def place() -> StateDirectory:
    return own_directory()


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """File operations of this thread are that user's."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


# -- which directory -----------------------------------------------------------------------------


def test_it_is_made_when_it_is_needed(shm: Path) -> None:
    assert directories() == []
    made = own_directory()
    assert made.path == str(shm / f"qmp-memlistener-{UID}")
    assert stat.S_IMODE(os.stat(made.path).st_mode) == 0o755
    assert [d.path for d in directories()] == [made.path]
    assert own_directory().path == made.path


def test_whatever_the_umask_is() -> None:
    before = os.umask(0o077)
    try:
        made = own_directory()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(made.path).st_mode) == 0o755


def test_the_environment_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = own_directory()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / name))
        assert own_directory().path == made.path
        assert os.listdir(tmp_path / name) == []


def test_what_an_earlier_version_left_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    (runtime / "qmp-memlistener").mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    (found,) = directories()
    assert found.path == str(runtime / "qmp-memlistener")
    monkeypatch.setenv("XDG_RUNTIME_DIR", state.SHM)  # the same one twice
    own_directory()
    assert len(directories()) == len({d.path for d in directories()})


def squat_directory(name: Path) -> None:
    name.mkdir(mode=0o777)


def squat_link(name: Path) -> None:
    name.symlink_to("/etc")


def squat_file(name: Path) -> None:
    name.write_text("x")


def squat_fifo(name: Path) -> None:
    os.mkfifo(name)


@needs_root
@pytest.mark.parametrize("squat", [squat_directory, squat_link, squat_file, squat_fifo])
def test_somebody_else_has_the_name(shm: Path, squat: Callable[[Path], None]) -> None:
    taken = shm / f"qmp-memlistener-{UID}"
    with acting_as(STRANGER):
        squat(taken)
    made = own_directory()
    assert made.path.startswith(f"{taken}.")
    made.write("note", b"ours")
    # the next run finds it, also when the name has become free
    assert own_directory().path == made.path
    if taken.is_dir() and not taken.is_symlink():
        taken.rmdir()
    else:
        taken.unlink()
    assert own_directory().path == made.path
    assert [d.read("note") for d in directories()] == [b"ours"]
    assert [d.path for d in directories(UID)] == [made.path]


@needs_root
def test_a_strangers_directories_do_not_count(shm: Path) -> None:
    with acting_as(STRANGER):
        for suffix in ("", ".1", ".ffffffffffffffff"):
            (shm / f"qmp-memlistener-{UID}{suffix}").mkdir()
    assert directories() == []
    made = own_directory()
    assert [d.path for d in directories()] == [made.path]
    assert [d.uid for d in directories(STRANGER)] == []


def test_one_that_others_may_write_to_does_not_count(shm: Path) -> None:
    wide = shm / f"qmp-memlistener-{UID}"
    wide.mkdir()
    wide.chmod(0o777)
    (wide / "note").write_text("forged")
    made = own_directory()
    assert made.path.startswith(f"{wide}.")
    assert made.read("note") is None


def test_where_nothing_can_be_written_another_place_will_do(shm: Path, fallback: Path) -> None:
    os.rmdir(shm)
    made = own_directory()
    assert made.path == str(fallback / f"qmp-memlistener-{UID}")
    made.write("note", b"ours")
    shm.mkdir()
    shm.chmod(0o1777)
    assert own_directory().path == made.path  # where the last run was
    os.rmdir(shm)
    made.remove("note")
    os.rmdir(made.path)
    os.rmdir(fallback)
    with pytest.raises(MissingPrerequisite) as refused:
        own_directory()
    fallback.mkdir()
    assert state.SHM in refused.value.message
    assert refused.value.remedy


@needs_root
def test_a_full_or_read_only_tmpfs(shm: Path, fallback: Path) -> None:
    """In a mount namespace of its own."""
    script = """
import os, sys
from qmp_memlistener.host import state
state.SHM, state.FALLBACK = sys.argv[1:]
first = state.own_directory()
first.write("note", b"before")
fill = os.open(f"{state.SHM}/fill", os.O_WRONLY | os.O_CREAT)
try:
    while True:
        os.write(fill, bytes(65536))
except OSError:
    os.close(fill)
assert not first.is_writable()
second = state.own_directory()
print(first.path, second.path, *[d.read("note") for d in state.directories()])
try:
    first.write("note", b"x" * 60000)
except OSError as error:
    print(error.strerror, first.read("note"), first.names())
os.unlink(f"{state.SHM}/fill")
print(state.own_directory().path)
os.system(f"mount -o remount,ro {state.SHM}")
print(state.own_directory().path, len(state.directories()))
"""
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c",
         f'mount -t tmpfs -o size=256k,mode=1777 t {shm} && exec "$@"', "sh",
         sys.executable, "-c", script, str(shm), str(fallback)],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no mount namespace can be made here")
    here, there = (f"{base}/qmp-memlistener-{UID}" for base in (shm, fallback))
    assert done.stdout.splitlines() == [
        f"{here} {there} b'before' None",
        "No space left on device b'before' ['note']",
        here,
        f"{there} 2",
    ], done.stderr


@needs_root
def test_several_at_once_agree(shm: Path) -> None:
    """Somebody has the name, and twelve of ours start at the same moment."""
    with acting_as(STRANGER):
        (shm / f"qmp-memlistener-{UID}").mkdir()
    script = """
import sys
import tempfile
from qmp_memlistener.host import state
state.SHM, state.FALLBACK = sys.argv[1:]
print("ready", flush=True)
input()
print(state.own_directory().path, flush=True)
input()
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(shm), str(shm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(12)
    ]
    try:
        for run in runs:
            assert run.stdout is not None
            assert run.stdout.readline() == "ready\n"
        for run in runs:
            assert run.stdin is not None
            run.stdin.write("\n")
            run.stdin.flush()
        paths = {run.stdout.readline() for run in runs if run.stdout is not None}
    finally:
        for run in runs:
            run.communicate("\n")
    (path,) = paths
    assert [d.path for d in directories()] == [path.rstrip()]


# -- files in it ---------------------------------------------------------------------------------


def test_a_note_is_replaced_whole(place: StateDirectory) -> None:
    assert place.read("note") is None
    place.write("note", b"a long text")
    place.write("note", b"text")
    assert place.read("note") == b"text"
    assert place.names() == ["note"]
    assert stat.S_IMODE(os.stat(f"{place.path}/note").st_mode) == 0o600
    assert place.has("note")
    place.remove("note")
    place.remove("note")
    assert not place.has("note")


def odd_fifo(path: Path) -> None:
    os.mkfifo(path)


def odd_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def odd_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "victim")


def odd_directory(path: Path) -> None:
    (path / "in").mkdir(parents=True)


def odd_huge(path: Path) -> None:
    with path.open("wb") as f:
        f.truncate(40 << 30)


ODD = [odd_fifo, odd_socket, odd_link, odd_directory, odd_huge]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.timeout(20)
def test_what_is_no_note_is_none_and_makes_room(
    place: StateDirectory, shm: Path, odd: Callable[[Path], None]
) -> None:
    victim = shm / "victim"
    victim.write_text("precious")
    for name in ("note", "note.new", "held", "live", "sub"):
        odd(Path(place.path, name))
    assert place.read("note") is None
    assert place.hold("none", create=False) is None
    assert not place.is_attended("live")
    place.write("note", b"text")
    assert place.read("note") == b"text"
    with place.hold("held") or pytest.fail("somebody holds it") as held:
        assert held.read() == b""
        held.write(b"ours")
        assert held.read() == b"ours"
        assert place.hold("held") is None
    handle = place.attend("live")
    assert place.is_attended("live")
    os.close(handle)
    sub = place.subdirectory("sub")
    assert sub is not None
    sub.write("note", b"text")
    assert victim.read_text() == "precious"
    assert sorted(os.listdir(shm)) == [os.path.basename(place.path), "victim"]


@needs_root
def test_a_strangers_file_in_our_directory_is_no_note(place: StateDirectory) -> None:
    """As if we could be made to link one there."""
    Path(place.path, "note").write_bytes(b"forged")
    os.chown(f"{place.path}/note", STRANGER, STRANGER)
    assert place.read("note") is None


def test_what_others_do_to_the_path_does_not_matter(place: StateDirectory, shm: Path) -> None:
    os.rename(place.path, shm / "elsewhere")
    (shm / "victim").mkdir()
    os.symlink(shm / "victim", place.path)
    place.write("note", b"text")
    held = place.hold("held")
    assert held is not None
    assert os.listdir(shm / "victim") == []
    assert sorted(os.listdir(shm / "elsewhere")) == ["held", "note"]
    held.remove()
    assert os.listdir(shm / "elsewhere") == ["note"]


def test_one_holds_it_and_the_next_finds_what_it_wrote(place: StateDirectory) -> None:
    assert place.hold("note", create=False) is None
    assert place.names() == []
    first = place.hold("note")
    assert first is not None
    first.write(b"a long text")
    first.write(b"text")
    assert place.hold("note") is None
    first.close()
    second = place.hold("note", create=False)
    assert second is not None
    with second:
        assert second.read() == b"text"
        second.write(b"x" * (LONGEST + 1))
        assert second.read() == b""
    assert place.has("note")


def test_it_is_removed_once(place: StateDirectory) -> None:
    first = place.hold("note")
    assert first is not None
    first.remove()
    second = place.hold("note")
    assert second is not None
    first.remove()
    assert place.has("note")
    place.remove("note")
    second.remove()
    second.close()


def test_one_that_was_removed_meanwhile_is_not_held(
    place: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = directory_module.try_lock

    def removed_first(handle: int, *, shared: bool = False) -> bool:
        monkeypatch.setattr(directory_module, "try_lock", lock)
        place.remove("note")
        return lock(handle, shared=shared)

    monkeypatch.setattr(directory_module, "try_lock", removed_first)
    held = place.hold("note")
    assert isinstance(held, HeldFile)
    assert place.has("note")
    assert place.hold("note") is None
    held.remove()


def test_several_attend_and_a_reader_cannot_pretend_to(place: StateDirectory) -> None:
    assert not place.is_attended("live")
    one, two = place.attend("live"), place.attend("live")
    os.close(one)
    assert place.is_attended("live")
    os.close(two)
    assert not place.is_attended("live")
    if UID != 0:
        return
    with acting_as(STRANGER):
        handle = os.open(f"{place.path}/live", os.O_RDONLY)
    set_lock(handle, fcntl.F_RDLCK, 0)
    try_lock(handle)
    assert not place.is_attended("live")
    os.close(place.attend("live"))
    os.close(handle)


@pytest.mark.timeout(60)
def test_random_bytes_and_entries_are_never_more_than_no_note(place: StateDirectory) -> None:
    """A bounded fuzz: whatever lies there, every access returns, and a note can be written."""
    dice = random.Random(1)
    for _ in range(150):
        path = Path(place.path, "note")
        what = dice.randrange(7)
        if what < len(ODD):
            ODD[what](path)
        else:
            path.write_bytes(dice.randbytes(dice.choice((0, 1, 100, LONGEST, LONGEST + 1))))
            path.chmod(dice.choice((0o600, 0o644, 0o200 if UID == 0 else 0o600)))
        content = place.read("note")
        assert content is None or len(content) <= LONGEST
        held = place.hold("note", create=bool(dice.randrange(2)))
        if held is not None:
            held.read()
            held.close()
        place.write("note", b"text")
        assert place.read("note") == b"text"
        place.remove("note")
    assert place.names() == []
