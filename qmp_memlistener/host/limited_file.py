"""An empty file that never holds more than a stated size, whoever writes to it and whoever lives.

QEMU's log is written by QEMU alone, as long as it runs: an agent that was killed cannot stop it,
and a log on a file system that others use would fill that.  So the file is the only one on a tmpfs
of its own, whose size is the bound.  Writing beyond it fails with ENOSPC, which QEMU's log does not
mind (util/log.c does not look at what fprintf returns); what is given back by punching holes can
be written again, so that with a reader the log goes on for ever.

The tmpfs is mounted nowhere: no path leads to the file, it is there for those who have a
descriptor, and gone with the last.  Root makes it with fsopen(2); others in a user namespace of
their own, by running this file as a program, which passes the descriptor on.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys

__all__ = ["give_back", "is_full", "limited_file"]

_NAME = "qmp-memlistener.log"
_DEADLINE_S = 10.0

# the same on every architecture
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
# include/uapi/linux/mount.h
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8
# include/uapi/linux/sched.h
_CLONE_NEWUSER, _CLONE_NEWNS = 0x10000000, 0x00020000

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 0x1, 0x2  # include/uapi/linux/falloc.h
_PAGE = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.syscall.restype = ctypes.c_long


def limited_file(size: int) -> int:
    """A descriptor, open for reading and writing, of a file of at most `size` bytes.

    Takes 1 ms for root, else what it takes to start an interpreter.  Raises OSError where this
    kernel does not let us.
    """
    try:
        return _make(size)
    except PermissionError:
        return _from_namespace(size)


def give_back(handle: int, start: int, end: int) -> bool:
    """Give the pages in `[start, end)` back; size and offsets stay.  False when that failed."""
    length = end - start
    mode = _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE
    return length <= 0 or bool(_libc.fallocate64(handle, mode, start, length) == 0)


def is_full(status: os.stat_result, limit: int) -> bool:
    """Something may not have fitted in since the last time that pages were given back."""
    return status.st_blocks * 512 > limit - _PAGE


def _make(size: int) -> int:
    """Needs CAP_SYS_ADMIN in the user namespace of our mount namespace."""
    context = _syscall(_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        for key, value in ((b"size", str(size)), (b"nr_inodes", "2"), (b"mode", "700")):
            _syscall(_FSCONFIG, context, _FSCONFIG_SET_STRING, key, value.encode(), 0)
        _syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall(_FSMOUNT, context, _FSMOUNT_CLOEXEC, _NOSUID_NODEV_NOEXEC)
    finally:
        os.close(context)
    try:
        return os.open(_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=mount)
    finally:
        os.close(mount)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    result = _libc.syscall(
        ctypes.c_long(number),
        *(ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments),
    )
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(result)


def _from_namespace(size: int) -> int:
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(_DEADLINE_S)
        with theirs:
            child = subprocess.Popen(
                (sys.executable, "-I", "-S", __file__, str(theirs.fileno()), str(size)),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            _, handles, _, _ = socket.recv_fds(ours, 16, 1)
        finally:
            child.kill()
            child.wait()
    if not handles:
        raise PermissionError("no user namespace may be made here")
    os.set_inheritable(handles[0], False)
    return handles[0]


def _serve(handle: int, size: int) -> None:
    """In a process of its own: become root of a namespace in which only we are mapped."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    with socket.socket(fileno=handle) as sock:
        socket.send_fds(sock, [b"log"], [_make(size)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
