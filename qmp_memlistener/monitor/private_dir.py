"""A directory that only this user writes to, and small files in it that tell whether we live.

    /dev/shm/qmp-memlistener-UID/     0755  (else $XDG_RUNTIME_DIR/qmp-memlistener)

It is on tmpfs: gone with the boot, as every QEMU is.  A file is held with a flock(2) lock, which
the kernel drops with its owner: a file that can be locked belongs to a process that is dead.
What the files say, and when they are written, is up to those who write them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from typing import Self

from ..errors import MissingPrerequisite

__all__ = ["SHM", "HeldFile", "private_directory", "shm_directory", "try_lock"]

SHM = "/dev/shm"
_LONGEST = 1 << 16


def private_directory(*, create: bool = True) -> str:
    """The path of this user's directory: ours alone to write, and no symbolic link.

    With `create` it is made when there is none.  Raises MissingPrerequisite when no place will do.
    """
    uid = os.geteuid()
    choices = [shm_directory(uid)]
    if "XDG_RUNTIME_DIR" in os.environ:
        choices.append(os.path.join(os.environ["XDG_RUNTIME_DIR"], "qmp-memlistener"))
    for path in choices:
        try:
            if create:
                os.makedirs(path, mode=0o755, exist_ok=True)
            status = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o022:
            return path
    raise MissingPrerequisite(
        f"no directory for notes: {' and '.join(choices)} are unusable",
        remedy="make one of them a directory that only this user may write to",
    )


def shm_directory(uid: int) -> str:
    """Where the directory of a user is, unless another place had to do."""
    return f"{SHM}/qmp-memlistener-{uid}"


class HeldFile:
    """A small file that we hold: no other process holds it as long as this one is open.

    Used as a context manager it is closed at the end of the block, which leaves the file there.
    """

    def __init__(self, path: str, handle: int) -> None:
        self.path = path
        self._handle = handle

    @classmethod
    def hold(cls, path: str, *, create: bool = True) -> Self | None:
        """Open and lock it; also one whose owner is dead, with what that one wrote.

        None when a live process holds it or, without `create`, when there is none.  Raises OSError
        (a symbolic link is not followed).
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        while True:
            try:
                handle = os.open(path, flags, 0o600)
            except FileNotFoundError:
                if create:
                    raise
                return None
            try:
                if not try_lock(handle):
                    os.close(handle)
                    return None
                if _is_at(handle, path):
                    return cls(path, handle)
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its owner removed it between our opening and locking it

    def read(self) -> bytes:
        """What it says; its writer may have been killed half-way."""
        return os.pread(self._handle, _LONGEST, 0)

    def write(self, content: bytes) -> None:
        """Replace what it says; flushed to the file system when it returns."""
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content, 0)
        os.fsync(self._handle)

    def remove(self) -> None:
        """Remove the file, then let go of it.  Idempotent."""
        if self._handle >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
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


def try_lock(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file with flock(2), or say that somebody else has it locked."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: int, path: str) -> bool:
    """The open file is still the one at `path`: whoever held it before may have removed it."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), status)
