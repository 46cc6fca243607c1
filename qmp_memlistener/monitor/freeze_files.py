"""The files and kernel locks behind `freeze`, whose docstring says why they are as they are.

Here is how they are made, found, told alive from dead, and swept; what they mean is decided there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import msgspec

from ..host.processes import Process

__all__ = ["SHM", "Content", "Found", "Place", "claim", "confirm", "find", "places"]

SHM = "/dev/shm"
_DIRECTORY = "qmp-memlistener-"
_FILE = "freeze-"
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FLOCK = "@hhqqi0q"  # struct flock of 64-bit Linux
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
            handle = os.open(SHM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            found.append(Place(handle, name, here=True, inside=False))
        if process is not None:
            with contextlib.suppress(OSError):
                handle = _open_theirs(process)
                stack.callback(os.close, handle)
                if found and name == inner_name and _is_same(found[0].shm, handle):
                    found[0] = replace(found[0], inside=True)
                else:
                    found.append(Place(handle, inner_name, here=False, inside=True))
        yield found


def claim(place: Place, token: str, content: Content, stack: ExitStack) -> int:
    """A locked file for this guest, until `stack` is closed.  Raises OSError."""
    directory = _own_directory(place.shm)
    stack.callback(os.close, directory)
    # without a name nobody can open it before it is locked
    handle = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    stack.callback(os.close, handle)
    os.write(handle, msgspec.json.encode(content))
    for byte in (_ALIVE, _CLAIMED):
        _set_lock(handle, fcntl.F_WRLCK, byte)
    os.fchmod(handle, 0o644)
    name = f"{_FILE}{place.name}.{token}"
    os.link(f"/proc/self/fd/{handle}", name, dst_dir_fd=directory, follow_symlinks=True)
    stack.callback(_unlink, name, directory)
    return handle


def confirm(handle: int) -> None:
    """The claim is a freeze from now on."""
    _set_lock(handle, fcntl.F_UNLCK, _CLAIMED)


def find(where: Sequence[Place], honoured: Collection[int]) -> list[Found]:
    """Live files of the users `honoured`, each token once.  Dead ones are removed where we may."""
    found: dict[str, Found] = {}
    for place in where:
        for directory, uid in _directories(place.shm, honoured):
            found.update({f.token: f for f in _look_into(directory, uid, place.name)})
    return list(found.values())


def _own_directory(shm: int) -> int:
    """Our directory, open: everybody may read it and only we may write."""
    uid = os.geteuid()
    plain = f"{_DIRECTORY}{uid}"
    # another user may have taken the name
    names = [plain, *(n for n in sorted(os.listdir(shm)) if n.startswith(f"{plain}."))]
    for name in [*names, f"{plain}.{secrets.token_hex(8)}"]:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=shm)
            handle = os.open(name, _OPEN_DIRECTORY, dir_fd=shm)
        except OSError:
            if name in names:
                continue
            raise
        status = os.fstat(handle)
        if status.st_uid == uid:
            if stat.S_IMODE(status.st_mode) != 0o755:
                os.fchmod(handle, 0o755)  # whatever the umask was
            return handle
        os.close(handle)
    raise PermissionError(f"no directory of user id {uid}")


def _directories(shm: int, honoured: Collection[int]) -> Iterator[tuple[int, int]]:
    """Directories of users that count, open until the next one is asked for."""
    try:
        names = os.listdir(shm)
    except OSError:
        return
    for name in names:
        if not name.startswith(_DIRECTORY):
            continue
        try:
            handle = os.open(name, _OPEN_DIRECTORY, dir_fd=shm)
        except OSError:
            continue
        try:
            status = os.fstat(handle)
            if status.st_uid in honoured and not status.st_mode & 0o022:
                yield handle, status.st_uid
        finally:
            os.close(handle)


def _look_into(directory: int, uid: int, name: str) -> Iterator[Found]:
    for file in os.listdir(directory):
        if not file.startswith(_FILE):
            continue
        try:
            handle = os.open(file, _OPEN_FILE, dir_fd=directory)
        except OSError:
            continue
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != uid:
                continue
            if not _is_locked(handle, _ALIVE):
                _unlink(file, directory)
            elif file.startswith(f"{_FILE}{name}."):
                token = file.removeprefix(f"{_FILE}{name}.")
                yield Found(token, uid, not _is_locked(handle, _CLAIMED), _content(handle))
        finally:
            os.close(handle)


def _content(handle: int) -> Content | None:
    try:
        return msgspec.json.decode(os.pread(handle, 1 << 16, 0), type=Content)
    except (msgspec.DecodeError, OSError):
        return None


def _open_theirs(process: Process) -> int:
    handle = os.open(f"/proc/{process.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in SHM.strip("/").split("/"):
            inner = os.open(part, _OPEN_DIRECTORY, dir_fd=handle)
            os.close(handle)
            handle = inner
        if not process.is_alive():
            raise ProcessLookupError(f"pid {process.pid} is another process now")
    except OSError:
        os.close(handle)
        raise
    return handle


def _is_same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def _set_lock(handle: int, kind: int, byte: int) -> None:
    fcntl.fcntl(handle, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))


def _is_locked(handle: int, byte: int) -> bool:
    """Somebody has a write lock on it; a read lock is no obstacle and so not seen."""
    asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, asked)
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK


def _unlink(name: str, directory: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=directory)
