"""How a QEMU gets to write to a log of ours: by path, or by a descriptor that it is handed.

The threat.  QEMU's user, or a container around it, is not trusted with anything of ours, and the
file system that QEMU sees is not ours to write to: a link in there could lead root anywhere.  So
the log is a limited file to which no path leads (`host.limited_file`), or one in our own directory
(`host.state`), which a QEMU of our own user, or of root, that has our root opens by path.  Any
other QEMU, and any QEMU for a limited file, is handed a descriptor (`getfd` with SCM_RIGHTS) and
made to open /dev/fd/N.  Opening that asks for the rights on the file, which its user gets for this
one file, by ACL and through our descriptor; it has no way to the directory, and the file is removed
when we leave.  What is lent is taken back at once (`closefd`): QEMU has its own open file by then.

`getfd` and not `add-fd`: QEMU before 9.1 does not close a descriptor of a set while the guest is
paused (monitor_fdset_cleanup).  Its number is looked up in /proc.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from ..errors import CommandFailed, TraceReason, TraceUnavailable
from ..host.bounded import in_thread
from ..host.processes import Process
from .connection import Command, Monitor

__all__ = ["open_to_qemu"]

# POSIX ACL extended attribute, version 2 (include/uapi/linux/posix_acl{,_xattr}.h).
_ACL_NAME = "system.posix_acl_access"
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID = 0xFFFFFFFF


@asynccontextmanager
async def open_to_qemu(
    monitor: Monitor, process: Process, path: str, handle: int
) -> AsyncIterator[str]:
    """What this QEMU calls our file, for the length of the block.

    `handle` is the open file at `path`, "" when no path leads to it.  Raises TraceUnavailable, and
    as `Monitor.timed` does.
    """
    if process.uid in (0, os.geteuid()) and process.shares_root():
        # of a file without a path our own descriptor will do, where QEMU may follow it
        if path or not monitor.abilities.descriptors:
            yield path or f"/proc/{os.getpid()}/fd/{handle}"
            return
    elif not monitor.abilities.descriptors:
        raise _no_place(process, "its monitor is no UNIX socket, so it cannot be handed one")
    if process.uid not in (0, os.geteuid()):
        try:
            _allow(handle, process.uid, 0o6)
        except OSError as error:
            raise _no_place(process, f"no ACL can be set: {error.strerror}") from error
    name = f"qmp-memlistener-{secrets.token_hex(8)}"
    (reply,) = await monitor.pipeline([Command("getfd", {"fdname": name}, fd=handle)])
    if isinstance(reply, CommandFailed):
        raise reply
    try:
        number = await in_thread(_number_of, process, handle)
        if number is None:
            raise _no_place(process, "we may not see which descriptors it has")
        yield f"/dev/fd/{number}"
    finally:
        with contextlib.suppress(CommandFailed):
            await monitor.execute("closefd", {"fdname": name})


def _number_of(process: Process, handle: int) -> int | None:
    """The descriptor of this process that leads to our open file."""
    ours = os.fstat(handle)
    for found in process.file_descriptors() or ():
        if (found.device, found.inode) == (ours.st_dev, ours.st_ino):
            return found.number
    return None


def _allow(handle: int, uid: int, permissions: int) -> None:
    """Let one more user in, by ACL: `permissions` as in one octal digit.  Raises OSError."""
    mode = os.fstat(handle).st_mode
    entries: Sequence[tuple[int, int, int]] = (
        (_USER_OBJ, mode >> 6 & 7, _NO_ID),
        (_USER, permissions, uid),
        (_GROUP_OBJ, mode >> 3 & 7, _NO_ID),
        (_MASK, permissions | mode >> 3 & 7, _NO_ID),
        (_OTHER, mode & 7, _NO_ID),
    )
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(handle, _ACL_NAME, value)


def _no_place(process: Process, why: str) -> TraceUnavailable:
    return TraceUnavailable(
        TraceReason.NO_PLACE,
        f"no log file that we and QEMU (pid {process.pid}) can both use: {why}",
    )
