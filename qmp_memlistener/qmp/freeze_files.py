"""The files and kernel locks behind `freeze`, whose docstring says why they are as they are.

Here is how they are made, found, told alive from dead, and swept; what they mean is decided there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import msgspec

from ..host import state
from ..host.files import open_in_root
from ..host.locks import LONGEST, is_write_locked, set_lock
from ..host.processes import Process
from ..host.state import StateDirectory
from ..text import json_bytes

__all__ = ["Content", "Found", "Place", "claim", "confirm", "find", "places"]

_FILE = "freeze-"
# Byte 0 is locked as long as the holder lives, byte 1 until its claim has become a freeze: the
# other way round a stranger's read lock on byte 1 could keep it from becoming one.
_ALIVE, _CLAIMED = 0, 1


class Content(msgspec.Struct, frozen=True):
    """What a holder says of itself; `since_ns` is CLOCK_MONOTONIC."""

    pid: int
    since_ns: int
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """A live freeze, or (not `held`) a claim that may become one.

    `uid` is the file's owner; `content` is None when it makes no sense.
    """

    token: str
    uid: int
    held: bool
    content: Content | None


@dataclass(frozen=True, slots=True)
class Place:
    """A tmpfs where freezes of a guest are: an open directory, and the guest's name there.

    `here`: processes like us look there; `inside`: those in QEMU's container do.
    """

    shm: int
    name: str
    here: bool
    inside: bool


@contextmanager
def places(process: Process | None, name: str, inner_name: str) -> Iterator[list[Place]]:
    """/dev/shm here and, where that is another one or has another name, as QEMU sees it."""
    with ExitStack() as stack:
        found: list[Place] = []
        with contextlib.suppress(OSError):
            handle = os.open(state.SHM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            found.append(Place(handle, name, here=True, inside=False))
        if process is not None:
            with contextlib.suppress(OSError):
                handle = open_in_root(process, state.SHM, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, handle)
                if found and name == inner_name and _is_same(found[0].shm, handle):
                    found[0] = replace(found[0], inside=True)
                else:
                    found.append(Place(handle, inner_name, here=False, inside=True))
        yield found


def claim(place: Place, token: str, content: Content, stack: ExitStack) -> int:
    """A locked file for this guest, until `stack` is closed.  Raises OSError."""
    directory = state.directory_in(place.shm, state.SHM)
    # without a name nobody can open it before it is locked
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    handle = os.open(".", flags, 0o600, dir_fd=directory.handle)
    stack.callback(os.close, handle)
    os.write(handle, json_bytes(content))
    for byte in (_ALIVE, _CLAIMED):
        set_lock(handle, fcntl.F_WRLCK, byte)
    os.fchmod(handle, 0o644)
    name = f"{_FILE}{place.name}.{token}"
    link = f"/proc/self/fd/{handle}"
    os.link(link, name, dst_dir_fd=directory.handle, follow_symlinks=True)
    stack.callback(directory.remove, name)
    return handle


def confirm(handle: int) -> None:
    """The claim is a freeze from now on."""
    set_lock(handle, fcntl.F_UNLCK, _CLAIMED)


def find(where: Sequence[Place], honoured: Collection[int]) -> list[Found]:
    """Live files of the users `honoured`, each token once.  Dead ones are removed where we may."""
    found: dict[str, Found] = {}
    for place in where:
        for directory in state.directories_in(place.shm, state.SHM, honoured):
            found.update({f.token: f for f in _look_into(directory, place.name)})
    return list(found.values())


def _look_into(directory: StateDirectory, name: str) -> Iterator[Found]:
    for file in directory.names():
        if not file.startswith(_FILE):
            continue
        try:
            handle = directory.open(file)
        except OSError:
            continue
        try:
            if not is_write_locked(handle, _ALIVE, 1):
                directory.remove(file)
            elif file.startswith(f"{_FILE}{name}."):
                token = file.removeprefix(f"{_FILE}{name}.")
                held = not is_write_locked(handle, _CLAIMED, 1)
                yield Found(token, directory.uid, held, _content(handle))
        finally:
            os.close(handle)


def _content(handle: int) -> Content | None:
    try:
        return state.decoded(os.pread(handle, LONGEST, 0), Content)
    except OSError:
        return None


def _is_same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))
