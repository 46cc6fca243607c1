"""Connecting to a socket in another root: no link in there leads to somebody else's monitor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmp_memlistener.errors import TargetUnreachable
from qmp_memlistener.qmp.dial import dial
from qmp_memlistener.qmp.targets import UnixTarget

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for another root directory")


@contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[int]:
    """A process in another root: a socket, a link to it, and a link to one outside."""
    inside = tmp_path / "root"
    inside.mkdir()
    (inside / "link").symlink_to("/own")
    (inside / "trap").symlink_to(tmp_path / "victim")
    script = "import os, sys; os.chroot(sys.argv[1]); print(flush=True); input()"
    with (
        listening(inside / "own"),
        listening(tmp_path / "victim"),
        subprocess.Popen(
            [sys.executable, "-c", script, str(inside)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child,
    ):
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
        child.kill()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["own", "link"])
async def test_a_socket_in_there(jail: int, tmp_path: Path, name: str) -> None:
    with await dial(UnixTarget(f"/proc/{jail}/root/{name}")) as sock:
        assert sock.getpeername() == str(tmp_path / "root" / "own")


@pytest.mark.asyncio
async def test_a_link_out_of_there(jail: int) -> None:
    with pytest.raises(TargetUnreachable):
        await dial(UnixTarget(f"/proc/{jail}/root/trap"))
