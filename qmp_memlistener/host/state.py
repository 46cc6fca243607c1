"""Our state on disk: one scheme for every note, lock and log that we keep.

A user's state lies in a directory that only that user writes to, 0755:

    /dev/shm/qmp-memlistener-UID            tmpfs: gone with the boot, as every QEMU is
    /dev/shm/qmp-memlistener-UID.RANDOM     when somebody else has taken that name
    /tmp/qmp-memlistener-UID[.RANDOM]       when nothing can be written in /dev/shm

Which one is used depends on what is there, never on the environment, so that the next run finds
what this one left.  *All* directories of a user are searched, also those that earlier versions made
below /run/user/UID and $XDG_RUNTIME_DIR.  Their owner counts and not their name: a directory that
belongs to another user, or that others may write to, is not ours, and a link is no directory.

A directory is opened once.  All that happens in it goes by its descriptor, so that nothing that is
renamed or linked meanwhile leads elsewhere.  What is no regular file of the directory's owner, or
is larger than a note can be, is no note: reading it says so (None), and never waits.

    own_directory()       where new state goes               directories(uid)   all that a user has
    StateDirectory.write  a note: atomic, and synced when it returns
    StateDirectory.hold   a file that is locked with flock(2) as long as its holder lives: one that
                          can be locked belongs to a process that is dead
    StateDirectory.attend/is_attended  a file that several hold at once and that others may see;
                          a stranger who may read it cannot pretend to hold it
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import socket
import stat
import time
import weakref
from collections.abc import Collection, Iterator
from functools import partial
from typing import TypeVar

import msgspec

from ..errors import MissingPrerequisite
from . import files
from .locks import LONGEST, HeldFile, is_write_locked, set_lock, try_lock, write_all

__all__ = [
    "StateDirectory",
    "decoded",
    "directories",
    "directories_in",
    "directory_in",
    "directory_of",
    "own_directory",
]

T = TypeVar("T")

SHM = "/dev/shm"
FALLBACK = "/tmp"
RUNTIME = "/run/user"

_NAME = "qmp-memlistener"
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ATTEMPTS = 16
_ALONE_S = 0.5
"""So long one of ours waits for another that is making the directory; a stranger may pretend to."""


class StateDirectory:
    """A directory of ours, or of a user that we look at, and what is in it, by name.

    `path` is for people and for programs that are told where something lies; `uid` is the owner.
    `handle` is its descriptor, closed with the object.
    """

    def __init__(self, path: str, handle: int) -> None:
        self.path = path
        self.handle = handle
        self.uid = os.fstat(handle).st_uid
        self.close = weakref.finalize(self, os.close, handle)

    def names(self) -> list[str]:
        """What is in it, sorted; nothing when it is gone."""
        try:
            # its own descriptor: the position in a directory belongs to the open file
            handle = os.open(".", _OPEN_DIRECTORY, dir_fd=self.handle)
        except OSError:
            return []
        try:
            return sorted(os.listdir(handle))
        except OSError:
            return []
        finally:
            os.close(handle)

    def read(self, name: str, *, limit: int = LONGEST) -> bytes | None:
        """What a file says; None when there is no regular file of the owner's of at most `limit`.

        Raises OSError when it cannot be read now.
        """
        try:
            handle = self.open(name)
        except (FileNotFoundError, files.NotRegular, PermissionError):
            return None
        try:
            if os.fstat(handle).st_size > limit:
                return None
            return b"".join(files.pieces(handle, limit))
        finally:
            os.close(handle)

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A regular file of the owner's.  Raises OSError."""
        handle = files.open_foreign(name, flags, dir_fd=self.handle)
        if os.fstat(handle).st_uid != self.uid:
            os.close(handle)
            raise PermissionError(errno.EPERM, "a file of another user", f"{self.path}/{name}")
        return handle

    def create(self, name: str, mode: int = 0o600) -> int:
        """A new, empty file, open for reading and writing; what had the name is removed.

        Raises OSError.
        """
        for _ in range(_ATTEMPTS):
            self.remove(name)
            try:
                handle = os.open(name, _CREATE, mode, dir_fd=self.handle)
            except FileExistsError:
                continue
            os.fchmod(handle, mode)  # whatever the umask is
            return handle
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.path}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Replace a note by a whole new one; it is on disk when this returns.  Raises OSError."""
        handle = self.create(f"{name}.new")
        try:
            write_all(handle, content)
            os.fsync(handle)
        except OSError:
            self.remove(f"{name}.new")
            raise
        finally:
            os.close(handle)
        self.rename(f"{name}.new", name)
        os.fsync(self.handle)

    def rename(self, old: str, new: str) -> None:
        """Another name for what is in it; what had that name is removed.  Raises OSError."""
        try:
            os.rename(old, new, src_dir_fd=self.handle, dst_dir_fd=self.handle)
        except IsADirectoryError:
            self.remove(new)
            os.rename(old, new, src_dir_fd=self.handle, dst_dir_fd=self.handle)

    def remove(self, name: str) -> None:
        """Remove what has this name, with everything in it.  Nothing is said when that fails."""
        try:
            os.unlink(name, dir_fd=self.handle)
        except IsADirectoryError:
            shutil.rmtree(name, ignore_errors=True, dir_fd=self.handle)
        except OSError:
            pass

    def has(self, name: str) -> bool:
        """Something has this name."""
        try:
            os.stat(name, dir_fd=self.handle, follow_symlinks=False)
        except OSError:
            return False
        return True

    def subdirectory(self, name: str, *, create: bool = True) -> StateDirectory | None:
        """A directory in it, for its owner alone; None, without `create`, when there is none.

        Raises OSError when it cannot be made or opened.
        """
        for _ in range(_ATTEMPTS):
            try:
                handle = os.open(name, _OPEN_DIRECTORY, dir_fd=self.handle)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                if not create:
                    return None
                if error.errno != errno.ENOENT:
                    self.remove(name)  # a file, or a link
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=self.handle)
                continue
            if os.fstat(handle).st_uid == self.uid:
                return StateDirectory(f"{self.path}/{name}", handle)
            os.close(handle)
            if not create:
                return None
            self.remove(name)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.path}/{name}")

    def hold(self, name: str, *, create: bool = True, shared: bool = False) -> HeldFile | None:
        """Lock a file; also one whose owner is dead, with what that one wrote.

        `shared`: only to read it, beside others who do.  None when a live process holds it or,
        without `create`, when there is none.  Raises OSError.
        """
        for _ in range(_ATTEMPTS):
            if not create and not self._has_file(name):
                return None
            handle = self._open_or_create(name, 0o600)
            if handle is None:
                continue
            try:
                if not try_lock(handle, shared=shared):
                    os.close(handle)
                    return None
                if self._is_at(handle, name):
                    return HeldFile(f"{self.path}/{name}", handle, partial(self.remove, name))
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its owner removed it between our opening and locking it
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), f"{self.path}/{name}")

    def attend(self, name: str) -> int:
        """Hold a file beside others, for everybody to see, until the descriptor is closed.

        Each holder write-locks a byte of its own, which only the owner of the file can.
        """
        for _ in range(_ATTEMPTS):
            handle = self._open_or_create(name, 0o644)
            if handle is None:
                continue
            while not set_lock(handle, fcntl.F_WRLCK, secrets.randbits(62)):
                pass
            if self._is_at(handle, name):
                return handle
            os.close(handle)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), f"{self.path}/{name}")

    def is_attended(self, name: str) -> bool:
        """Somebody holds the file with `attend`."""
        try:
            handle = self.open(name)
        except OSError:
            return False
        try:
            return is_write_locked(handle)
        finally:
            os.close(handle)

    def is_writable(self) -> bool:
        """A note can be written: the file system is neither full nor read-only."""
        try:
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            handle = os.open(".", flags, 0o600, dir_fd=self.handle)
        except OSError as error:
            # a file system without such files; that it is full shows when a note is written
            return error.errno in (errno.EOPNOTSUPP, errno.EISDIR)
        try:
            return os.write(handle, b"\0") == 1
        except OSError:
            return False
        finally:
            os.close(handle)

    def _open_or_create(self, name: str, mode: int) -> int | None:
        """Open for writing; None when another process was quicker to create it."""
        try:
            return self.open(name, os.O_RDWR)
        except FileNotFoundError:
            pass
        except (files.NotRegular, PermissionError):
            self.remove(name)
        try:
            handle = os.open(name, _CREATE, mode, dir_fd=self.handle)
        except FileExistsError:
            return None
        os.fchmod(handle, mode)
        return handle

    def _has_file(self, name: str) -> bool:
        try:
            os.close(self.open(name))
        except (FileNotFoundError, files.NotRegular, PermissionError):
            return False
        return True

    def _is_at(self, handle: int, name: str) -> bool:
        """The open file still has that name: whoever held it before may have removed it."""
        try:
            status = os.stat(name, dir_fd=self.handle, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(handle), status)


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
    places = [(SHM, plain), (FALLBACK, plain), (f"{RUNTIME}/{owner}", _NAME)]
    if uid is None and (runtime := os.environ.get("XDG_RUNTIME_DIR")):
        places.append((runtime, _NAME))
    found: list[StateDirectory] = []
    for base, name in places:
        try:
            handle = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found += _named(handle, base, name, {owner})
        finally:
            os.close(handle)
    unique = {os.fstat(d.handle)[1:3]: d for d in reversed(found)}
    return list(reversed(unique.values()))


def decoded(content: bytes | None, kind: type[T]) -> T | None:
    """What a note says, JSON of this type; None for anything else."""
    try:
        return msgspec.json.decode(content or b"", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def directory_of(name: str) -> StateDirectory | None:
    """The one of ours that has a file or a directory of this name."""
    return next((d for d in directories() if d.has(name)), None)


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
    handle = os.open(".", _OPEN_DIRECTORY, dir_fd=base)
    try:
        names = sorted(n for n in os.listdir(handle) if n.startswith(prefix))
    except OSError:
        return
    finally:
        os.close(handle)
    for name in names:
        if not (prefix.endswith("-") or name == prefix or name.startswith(f"{prefix}.")):
            continue
        try:
            opened = os.open(name, _OPEN_DIRECTORY, dir_fd=base)
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
