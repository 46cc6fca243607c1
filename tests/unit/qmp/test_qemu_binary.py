"""Which binaries are QEMUs: what is no ordinary file is passed over, and nothing is mapped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qmp_memlistener.agent.monitors import rules_of
from qmp_memlistener.host.files import find_text, open_foreign
from qmp_memlistener.host.processes import Process
from qmp_memlistener.qmp.emulator import emulator_of

TEXT = b"QEMU emulator version 9.8.7 (test)"


def started_as(path: Path) -> Process:
    """A process of another user: its executable is not ours to see."""
    return Process(os.getpid(), 1, (str(path), "-machine", "pc"), None, 0, 0, frozenset())


def fifo(path: Path) -> None:
    os.mkfifo(path)


def to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


def missing(path: Path) -> None:
    pass


def unreadable(path: Path) -> None:
    path.mkdir(0)


@pytest.mark.parametrize("make", [fifo, to_device, sparse, missing, unreadable])
@pytest.mark.timeout(20)
def test_what_cannot_be_a_binary_has_no_version(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "qemu-system-x86_64"
    make(path)
    found = emulator_of(started_as(path), asked_for=False)
    assert found in ((0, None), None)


def test_it_is_found_behind_a_hole_and_across_pieces(tmp_path: Path) -> None:
    path = tmp_path / "qemu-system-x86_64"
    for at in (0, (1 << 20) - 10, (1 << 20) - len(TEXT), (3 << 30) + 5):
        with path.open("wb") as file:
            file.seek(at)
            file.write(TEXT)
        os.utime(path, ns=(at, at))
        assert emulator_of(started_as(path), asked_for=False) == (0, "9.8.7")


def test_no_more_is_read_than_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes([1]) * (2 << 20) + TEXT)
    handle = open_foreign(str(path))
    assert find_text(handle, TEXT, limit=1 << 20) is None
    assert find_text(handle, TEXT, limit=8 << 20) == TEXT
    assert find_text(handle, TEXT[:4], extra=5) == TEXT[:9]
    assert find_text(handle, TEXT[-4:], extra=5) == TEXT[-4:]
    os.close(handle)


CHANGED = """
import os, sys
while True:
    with open(sys.argv[1], "r+b") as file:
        file.truncate(64 << 20)
        file.truncate(0)
"""
READ = """
import sys, time
from pathlib import Path
from tests.unit.qmp.test_qemu_binary import emulator_of, started_as
until = time.monotonic() + 0.7
while time.monotonic() < until:
    emulator_of(started_as(Path(sys.argv[1])), asked_for=False)
"""


def test_one_that_is_truncated_while_it_is_read(tmp_path: Path) -> None:
    """Mapped, it would be the end of us (SIGBUS)."""
    path = tmp_path / "qemu-system-x86_64"
    path.touch()
    with subprocess.Popen([sys.executable, "-c", CHANGED, str(path)]) as changer:
        done = subprocess.run(
            [sys.executable, "-c", READ, str(path)],
            check=False,
            timeout=60,
            cwd=Path(__file__).parents[3],
        )
        changer.kill()
    assert done.returncode == 0


def test_the_rules_of_an_odd_binary_are_those_of_its_version() -> None:
    assert rules_of("7.2.0", 1 << 30).queued is False
    assert rules_of("7.2.0", os.getpid()).queued is False
