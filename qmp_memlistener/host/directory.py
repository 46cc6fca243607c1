"""A directory of ours and the files in it: read, replaced, held, attended, never waited for.

All that happens in a directory goes by its descriptor, so that nothing that is renamed or linked
meanwhile leads elsewhere.  What is no regular file of the directory's owner, or is larger than a
note can be, is no note: reading it returns None, and never waits.

    StateDirectory.write  a note: atomic, and synced when it returns
    StateDirectory.hold   a file that is locked with flock(2) as long as its holder lives: one that
                          can be locked belongs to a process that is dead
    StateDirectory.attend/is_attended  a file that several hold at once and that others may see;
                          a stranger who may read it cannot pretend to hold it

The kernel drops locks with their holder.  flock(2) is for files that only their owner may open;
locks of an open file description (fcntl(2), F_OFD_SETLK) are for files that others may look at: a
write lock needs a file that was opened for writing, so that a stranger who may only read it can
neither take it nor keep its owner from it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import struct
import weakref
from collections.abc import Callable
from functools import partial
from typing import Self, TypeVar

import msgspec

from . import files

__all__ = [
    "LONGEST",
    "HeldFile",
    "StateDirectory",
    "decoded",
    "is_write_locked",
    "names_in",
    "open_directory",
    "set_lock",
    "try_lock",
    "write_all",
]

LONGEST = 1 << 16
"""No note is longer, in bytes."""

_FLOCK = "@hhqqi0q"  # struct flock of 64-bit Linux
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ATTEMPTS = 16

T = TypeVar("T")


class HeldFile:
    """A small file that we hold: no other process holds it as long as this one is open.

    Used as a context manager it is closed at the end of the block, which leaves the file there.
    """

    def __init__(self, path: str, handle: int, unlink: Callable[[], None]) -> None:
        self.path = path
        self._handle = handle
        self._unlink = unlink

    def fileno(self) -> int:
        """A process that gets this descriptor holds the file, too."""
        return self._handle

    def read(self) -> bytes:
        """What it says; its writer may have been killed half-way.  Nothing if it is too long."""
        if os.fstat(self._handle).st_size > LONGEST:
            return b""
        return os.pread(self._handle, LONGEST, 0)

    def write(self, content: bytes) -> None:
        """Replace what it says; flushed to the file system when it returns.  Raises OSError."""
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        write_all(self._handle, content)
        os.fsync(self._handle)

    def remove(self) -> None:
        """Remove the file, then let go of it.  Idempotent."""
        if self._handle >= 0:
            self._unlink()
        self.close()

    def close(self) -> None:
        """Let go of it and leave it to whoever comes next.  Idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StateDirectory:
    """A directory of ours, or of a user that we look at, and what is in it, by name.

    `path` is for people and for programs that are given the place of something; `uid` is the owner.
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
            return names_in(self.handle)
        except OSError:
            return []

    def read(self, name: str) -> bytes | None:
        """What a file says; None when there is no regular file of the owner's of at most LONGEST.

        Raises OSError when it cannot be read now.
        """
        try:
            handle = self.open(name)
        except (FileNotFoundError, files.NotRegular, PermissionError):
            return None
        try:
            if os.fstat(handle).st_size > LONGEST:
                return None
            return b"".join(files.pieces(handle, LONGEST))
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
                handle = open_directory(name, self.handle)
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


def decoded(content: bytes | None, kind: type[T]) -> T | None:
    """What a note says, JSON of this type; None for anything else."""
    try:
        return msgspec.json.decode(content or b"", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def open_directory(name: str, base: int) -> int:
    """A directory in an open one, not by a link.  Raises OSError."""
    return os.open(name, _DIRECTORY, dir_fd=base)


def names_in(directory: int) -> list[str]:
    """What is in an open directory, sorted.  Raises OSError."""
    # its own descriptor: the position in a directory belongs to the open file
    handle = open_directory(".", directory)
    try:
        return sorted(os.listdir(handle))
    finally:
        os.close(handle)


def write_all(handle: int, content: bytes) -> None:
    """Write to an open file; a full file system is an OSError."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file with flock(2), or say that somebody else has it locked.

    A `shared` lock is had beside others of its kind.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def set_lock(handle: int, kind: int, byte: int) -> bool:
    """Lock one byte with an open-file-description lock (fcntl(2)), or say that it is taken.

    A write lock needs a file that was opened for writing: a stranger who may read it gets none.
    """
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return False
    return True


def is_write_locked(handle: int, byte: int = 0, length: int = 0) -> bool:
    """Somebody has a write lock in this range (the whole file); read locks are not seen."""
    asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, length, 0)
    answer = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, asked)
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK
