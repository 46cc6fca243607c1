"""The state of a listener is read from the kernel, without connecting to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qmp_memlistener.host.processes import Process, socket_inodes
from qmp_memlistener.qmp import MonitorState, TcpTarget, UnixTarget
from qmp_memlistener.qmp.sockets import ListenerState, address_of_inode, listener_state


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen_unix(stack: ExitStack, path: str) -> socket.socket:
    server = stack.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(path)
    server.listen(4)
    return server


def connect_unix(stack: ExitStack, path: str) -> socket.socket:
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.connect(path)
    return client


def test_unix_listener_counts_accepted_and_waiting_clients(
    tmp_path: Path, stack: ExitStack
) -> None:
    path = str(tmp_path / "qmp")
    target = UnixTarget(path)
    assert listener_state(target) == ListenerState(False, 0, 0)
    server = listen_unix(stack, path)
    assert listener_state(target) == ListenerState(True, 0, 0)
    connect_unix(stack, path)
    assert listener_state(target) == ListenerState(True, 0, 1)
    accepted = stack.enter_context(server.accept()[0])
    connect_unix(stack, path)
    state = listener_state(target)
    assert state == ListenerState(True, 1, 1)
    assert state is not None
    assert state.monitor_state is MonitorState.BUSY
    accepted.close()
    assert listener_state(target, pid=os.getpid()) == ListenerState(True, 0, 1)


def test_listeners_bound_to_the_same_relative_path_are_told_apart(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    inodes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        server = listen_unix(stack, "qmp")
        inodes.append(os.fstat(server.fileno()).st_ino)
        if name == "a":
            connect_unix(stack, "qmp")
            client = stack.enter_context(server.accept()[0])
            inodes.append(os.fstat(client.fileno()).st_ino)
    target = UnixTarget("qmp")
    assert listener_state(target, inodes=inodes[:2]) == ListenerState(True, 1, 0)
    assert listener_state(target, inodes=inodes[2:]) == ListenerState(True, 0, 0)


def test_path_of_an_inherited_listener(tmp_path: Path, stack: ExitStack) -> None:
    path = str(tmp_path / "with space")
    server = listen_unix(stack, path)
    me = Process.read(os.getpid())
    assert me is not None
    inodes = socket_inodes(me.pid)
    assert inodes is not None
    assert address_of_inode(inodes[server.fileno()], os.getpid()) == UnixTarget(path)
    assert address_of_inode(1, os.getpid()) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tcp_listener(host: str, stack: ExitStack) -> None:
    server = stack.enter_context(socket.socket(socket.AF_INET))
    server.bind(("127.0.0.1", 0))
    server.listen(4)
    target = TcpTarget(host, server.getsockname()[1])
    assert listener_state(target) == ListenerState(True, 0, 0)
    stack.enter_context(socket.create_connection(server.getsockname()))
    state = listener_state(target)
    assert state == ListenerState(True, 0, 1)
    stack.enter_context(server.accept()[0])
    state = listener_state(target)
    assert state == ListenerState(True, 1, 0)


def test_no_such_process() -> None:
    assert listener_state(UnixTarget("/x"), pid=1 << 22) is None
    assert Process.read(1 << 22) is None


def test_own_process_is_read() -> None:
    me = Process.read(os.getpid())
    assert me is not None
    assert me.uid == os.geteuid()
    assert me.is_alive()
    assert me.shares_root()
    assert me.shares_network()
    assert me.cwd() == os.getcwd()
    descriptors = me.file_descriptors()
    assert descriptors is not None
    assert {0, 1, 2} & {f.number for f in descriptors}
