"""Opening what others own: files of other users and of guests, here and in other namespaces.

The threat.  The name comes from a command line, a descriptor, a mapping or a note that another user
wrote, and root opens it.  Behind the name there may be a FIFO without a writer, a device that
acts when it is opened, a sparse file of 40 GB, a file that is truncated while it is read (SIGBUS,
if it were mapped), a symbolic link to where its owner may not go; and in the mount namespace of a
container the links and the mounts are the container's.  So everything of others is opened here:

- first with O_PATH, which opens nothing; it must be a regular file, and only then is that very file
  opened, without following a link, without becoming its terminal, and without waiting;
- it is read with pread(2) in pieces of a stated size, up to a stated limit, and never mapped;
- a name in another root is resolved inside that root and without links (openat2(2), or component by
  component where a seccomp filter or an old kernel does not allow that): no link of a guest leads
  out of it.

A path may have one of these forms, and each is resolved accordingly:

    /proc/PID/root/PATH                   PATH in the root of that process
    /proc/PID/exe, …/fd/N, …/map_files/…  the kernel's links, which lead to the file itself
    anything else                         a path of ours; its last component is no link

A memfd that we are to write into is found by its name among the descriptors of a process, which
may change them at any moment, and may mount another file under such a name: `open_memfd` makes
sure of the file that it has opened.

Nothing here creates, truncates or changes a file.  All errors are OSErrors: FileNotFoundError and
PermissionError are Python's own, `NotRegular` is ours.  A file system that does not
answer (NFS, FUSE) still makes us wait: `bounded.call` sets a deadline for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator

from .processes import Process

__all__ = [
    "NotRegular",
    "find_text",
    "locate",
    "may_write",
    "open_foreign",
    "open_in_root",
    "open_memfd",
    "pieces",
    "stat_foreign",
]

PIECE = 1 << 20
SEARCHED = 256 << 20
"""How much of a program file is looked through: QEMU with debugging symbols has 150 MiB."""

_IN_ROOT = re.compile(r"/proc/(\d+)/root(/.*)?", re.DOTALL)
_KERNEL_LINK = re.compile(r"/proc/(?:\d+|self)/(?:exe|fd/\d+|map_files/[0-9a-f]+-[0-9a-f]+)")

_SYS_OPENAT2 = 437  # the same on every architecture
# include/uapi/linux/openat2.h
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_IN_ROOT = 0x02, 0x04, 0x10
_RETRIES = 16  # EAGAIN: something was renamed while `..` was resolved

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = [
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    ]


class NotRegular(OSError):
    """It is a FIFO, a device, a socket, a directory or a symbolic link."""


def open_foreign(
    path: str, flags: int = os.O_RDONLY, *, dir_fd: int | None = None, follow: bool = False
) -> int:
    """A descriptor of the regular file at `path`; `flags` is O_RDONLY, O_WRONLY or O_RDWR.

    `follow` allows the last component to be a link; in another root any component, and then within
    that root.  For reading only: what a link of a stranger leads to is his choice.  Raises OSError.
    """
    handle = locate(path, dir_fd, follow)
    try:
        _check_regular(handle, path)
        # BlockingIOError: somebody holds a lease on it (fcntl(2), F_SETLEASE).
        quiet = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{handle}", (flags & os.O_ACCMODE) | quiet)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(handle)


def stat_foreign(path: str, *, follow: bool = False) -> os.stat_result:
    """What is at `path`, of whatever kind; nothing is opened.  Raises OSError."""
    handle = locate(path, follow=follow)
    try:
        return os.fstat(handle)
    finally:
        os.close(handle)


def locate(path: str, dir_fd: int | None = None, follow: bool = False) -> int:
    """An O_PATH descriptor of what is at `path`, of whatever kind.  Raises OSError.

    /proc/self/fd/N leads to that very thing then, for stat(2), access(2) and connect(2).
    """
    inner = _IN_ROOT.fullmatch(path)
    if inner is not None:
        return _open_root(int(inner[1]), inner[2] or "/", os.O_PATH, follow)
    flags = os.O_PATH | os.O_CLOEXEC
    if not follow and _KERNEL_LINK.fullmatch(path) is None:
        flags |= os.O_NOFOLLOW
    return os.open(path, flags, dir_fd=dir_fd)


def open_in_root(process: Process, path: str, flags: int = os.O_PATH) -> int:
    """What `process` has at the absolute `path`, resolved in its root and without links.

    `flags` is O_PATH, for what may be anything, or has O_DIRECTORY.  Raises OSError, and
    ProcessLookupError when it is no longer that process.
    """
    handle = _open_root(process.pid, path, flags, follow=False)
    if not process.is_alive():
        os.close(handle)
        raise ProcessLookupError(errno.ESRCH, f"pid {process.pid} is another process now")
    return handle


def open_memfd(process: Process, name: str) -> tuple[int, int] | None:
    """The memfd that `process` made with this name: its number there, and ours to read and write.

    It was made with MFD_ALLOW_SEALING.  So no file of a file system is taken for it: those have
    a link, or the seal that no seal can be added (memfd_create(2), fcntl(2)).  None when there is
    none.  Raises PermissionError when the descriptors may not be seen.
    """
    descriptors = process.file_descriptors()
    if descriptors is None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"/proc/{process.pid}/fd")
    for found in descriptors:
        if not found.link.startswith(f"/memfd:{name} ("):
            continue
        with contextlib.suppress(OSError):
            handle = open_foreign(f"/proc/{process.pid}/fd/{found.number}", os.O_RDWR)
            if _is_sealable(handle) and process.is_alive():
                return found.number, handle
            os.close(handle)
    return None


def _is_sealable(handle: int) -> bool:
    try:
        seals: int = fcntl.fcntl(handle, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return seals != fcntl.F_SEAL_SEAL and os.fstat(handle).st_nlink == 0


def may_write(path: str, *, follow: bool = False) -> bool:
    """We may write to what is at `path`, of whatever kind; nothing is opened."""
    try:
        handle = locate(path, follow=follow)
    except (OSError, ValueError):
        return False
    try:
        return os.access(f"/proc/self/fd/{handle}", os.W_OK)
    finally:
        os.close(handle)


def find_text(handle: int, text: bytes, *, extra: int = 0, limit: int = SEARCHED) -> bytes | None:
    """The first place in an open file where `text` is, with `extra` bytes that follow it.

    At most `limit` bytes are read, holes are passed over.  None when it is not there.
    """
    longest = len(text) + extra
    before, at, read = b"", 0, 0
    while read < limit:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            break
        if start > at:
            before, at = b"", start
        piece = os.pread(handle, PIECE, at)
        if not piece:
            break
        at += len(piece)
        read += len(piece)
        window = before + piece
        found = window.find(text)
        if found >= 0:
            window = window[found:]
            if len(window) < longest:
                window += os.pread(handle, longest - len(window), at)
            return window[:longest]
        before = window[-longest:]
    return None


def pieces(handle: int, limit: int, start: int = 0) -> Iterator[bytes]:
    """The bytes of an open file from `start` on, at most `limit`, in pieces of at most 1 MiB."""
    end = start + limit
    while start < end:
        data = os.pread(handle, min(PIECE, end - start), start)
        if not data:
            return
        yield data
        start += len(data)


def _check_regular(handle: int, path: str) -> None:
    mode = os.fstat(handle).st_mode
    if stat.S_ISLNK(mode):
        raise NotRegular(errno.ELOOP, "a symbolic link", path)
    if not stat.S_ISREG(mode):
        raise NotRegular(errno.EINVAL, "not a regular file", path)


def _open_root(pid: int, path: str, flags: int, follow: bool) -> int:
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            return _openat2(root, path, flags, follow)
        except OSError as error:
            # an old kernel; or a container's seccomp filter, which may answer with either
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
        return _walk(root, path, flags)
    finally:
        os.close(root)


def _openat2(root: int, path: str, flags: int, follow: bool) -> int:
    resolve = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS
    if not follow:
        resolve |= _RESOLVE_NO_SYMLINKS
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    for _ in range(_RETRIES):
        handle = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(root),
            ctypes.c_char_p(name),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if handle >= 0:
            return int(handle)
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(number, os.strerror(number), path)


def _walk(root: int, path: str, flags: int) -> int:
    """As openat2 does it, without following any link."""
    parts = [p for p in path.split("/") if p not in ("", ".")]
    if ".." in parts:
        raise OSError(errno.EXDEV, "a path with .. in another root", path)
    step = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(".", step, dir_fd=root)
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        try:
            inner = os.open(
                part, flags | os.O_NOFOLLOW | os.O_CLOEXEC if last else step, dir_fd=handle
            )
        finally:
            os.close(handle)
        handle = inner
    if stat.S_ISLNK(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return handle
