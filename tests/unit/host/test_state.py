"""The directory of our state: found again whatever others do to its name."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qmp_memlistener.errors import MissingPrerequisite
from qmp_memlistener.host import state
from qmp_memlistener.host.state import directories, own_directory
from tests.support.strangers import SQUATS, STRANGER, acting_as, needs_root

pytestmark = pytest.mark.usefixtures("shm")
UID = os.geteuid()


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


@needs_root
@pytest.mark.parametrize("squat", SQUATS)
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
