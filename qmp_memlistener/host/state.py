"""Our state on disk: where it lies.

A user's state lies in a directory that only that user writes to, 0755:

    /dev/shm/qmp-memlistener-UID            tmpfs: gone with the boot, as every QEMU is
    /dev/shm/qmp-memlistener-UID.RANDOM     when somebody else has taken that name
    /tmp/qmp-memlistener-UID[.RANDOM]       when nothing can be written in /dev/shm

Which one is used depends on what is there, never on the environment, so that the next run finds
what this one left.  *All* directories of a user are searched.  Their owner counts and not their
name: a directory that belongs to another user, or that others may write to, is not ours, and a link
is no directory.

What is kept there, each in a form of its own (`directory` has the files, locks and their threats):

    KEY.WHAT[-TOKEN]         notes about what has to be undone in a QEMU (`notes`)
    KEY/, KEY.lock, KEY.live how a traced QEMU was, and who reads its log (`qmp.trace_notes`)
    freeze-KEY.TOKEN         a guest is frozen for real-time work (`qmp.freeze`)
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
import time
from collections.abc import Collection, Iterator

from ..errors import MissingPrerequisite
from .directory import StateDirectory, names_in, open_directory
from .processes import is_ending, is_key

__all__ = [
    "directories",
    "directories_in",
    "directory_in",
    "directory_of",
    "ending_authors",
    "own_directory",
]

SHM = "/dev/shm"
FALLBACK = "/tmp"

_NAME = "qmp-memlistener"
_ATTEMPTS = 16
_ALONE_S = 0.5
"""So long one of ours waits for another that is making the directory; a stranger may pretend to."""


def own_directory() -> StateDirectory:
    """Where new state of ours goes; made when there is none.

    Raises MissingPrerequisite when no place will do.
    """
    for directory in directories():
        if directory.is_writable():
            _open_to_readers(directory)
            return directory
    why = []
    for base in (SHM, FALLBACK):
        try:
            handle = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                directory = directory_in(handle, base)
            finally:
                os.close(handle)
        except OSError as error:
            why.append(f"{base}: {error.strerror}")
            continue
        if directory.is_writable():
            return directory
        why.append(f"{base}: nothing can be written there")
    raise MissingPrerequisite(
        f"no directory for notes ({', '.join(why)})",
        remedy=f"make room in {SHM}, or make it a tmpfs that every user may write to",
    )


def directories(uid: int | None = None) -> list[StateDirectory]:
    """All directories with state of a user (ours), the likeliest first."""
    owner = os.geteuid() if uid is None else uid
    plain = f"{_NAME}-{owner}"
    found: list[StateDirectory] = []
    for base in dict.fromkeys((SHM, FALLBACK)):
        try:
            handle = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found += _named(handle, base, plain, {owner})
        finally:
            os.close(handle)
    unique = {os.fstat(d.handle)[1:3]: d for d in reversed(found)}
    return list(reversed(unique.values()))


def directory_of(name: str) -> StateDirectory | None:
    """The one of ours that has a file or a directory of this name."""
    return next((d for d in directories() if d.has(name)), None)


def ending_authors() -> list[int]:
    """Agents of ours that were killed, or are at their end, and hold locks on our state still.

    What they noted is not stale before they are gone, but they look after it no more.
    """
    files = {inode for directory in directories() for inode in _inodes(directory)}
    try:
        with open("/proc/locks") as locks:
            # 1: FLOCK  ADVISORY  WRITE PID MAJOR:MINOR:INODE START END; proc_locks(5)
            held = [line.split() for line in locks]
    except OSError:
        return []
    found = {
        int(fields[4])
        for fields in held
        if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) in files
    }
    return sorted(pid for pid in found if is_ending(pid))


def _inodes(directory: StateDirectory) -> Iterator[int]:
    for name in directory.names():
        try:
            yield os.stat(name, dir_fd=directory.handle, follow_symlinks=False).st_ino
            below = directory.subdirectory(name, create=False) if is_key(name) else None
        except OSError:
            continue
        if below is not None:
            yield from _inodes(below)


def directories_in(base: int, path: str, uids: Collection[int]) -> list[StateDirectory]:
    """All directories with state of these users in one open directory, /dev/shm as a rule.

    `path` is how it is called.  Their owner counts, whatever user id they have in their name.
    """
    return list(_named(base, path, f"{_NAME}-", uids))


def directory_in(base: int, path: str) -> StateDirectory:
    """Our own in one open directory, made when there is none.  Raises OSError."""
    uid = os.geteuid()
    plain = f"{_NAME}-{uid}"
    found = list(_named(base, path, plain, {uid}))
    if found:
        _open_to_readers(found[0])
        return found[0]
    with _alone(plain):
        return _made_in(base, path, plain, uid)


def _made_in(base: int, path: str, plain: str, uid: int) -> StateDirectory:
    for attempt in range(_ATTEMPTS):
        found = list(_named(base, path, plain, {uid}))
        if found:
            _open_to_readers(found[0])
            return found[0]
        name = plain
        try:
            os.mkdir(name, 0o755, dir_fd=base)
        except FileExistsError:
            name = f"{plain}.{secrets.token_hex(8)}"
            os.mkdir(name, 0o755, dir_fd=base)
        if name == plain or len(list(_named(base, path, plain, {uid}))) == 1:
            continue
        # Another process of ours made one at the same time: one of them is enough.
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=base)
        time.sleep(secrets.randbelow(1000) / 1e6 * (attempt + 1))
    raise PermissionError(errno.EACCES, f"no directory of user id {uid} can be made", path)


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """No other process of ours (in this network namespace) is in the block, as a rule.

    The name of an abstract socket is had by one at a time, and goes with its process.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
        until = time.monotonic() + _ALONE_S
        while True:
            try:
                held.bind(f"\0{name}.making")
            except OSError:
                if time.monotonic() > until:
                    break
                time.sleep(0.002)
            else:
                break
        yield


def _named(base: int, path: str, prefix: str, uids: Collection[int]) -> Iterator[StateDirectory]:
    """`prefix` itself and `prefix.RANDOM`; any name that begins so where it ends in `-`."""
    try:
        names = names_in(base)
    except OSError:
        return
    for name in names:
        if prefix.endswith("-"):
            wanted = name.startswith(prefix)
        else:
            wanted = name == prefix or name.startswith(f"{prefix}.")
        if not wanted:
            continue
        try:
            opened = open_directory(name, base)
        except OSError:
            continue
        status = os.fstat(opened)
        if status.st_uid in uids and not status.st_mode & 0o022:
            yield StateDirectory(f"{path}/{name}", opened)
        else:
            os.close(opened)


def _open_to_readers(directory: StateDirectory) -> None:
    """Other users look for freezes there, whatever our umask was."""
    if stat.S_IMODE(os.fstat(directory.handle).st_mode) != 0o755:
        with contextlib.suppress(OSError):
            os.fchmod(directory.handle, 0o755)
