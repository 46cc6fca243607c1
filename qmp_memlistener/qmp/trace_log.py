"""Where a running QEMU's log goes, whether it can be redirected, and how to put it back.

What util/log.c does with `logfile PATH` (compared in 7.2, 10.0.2 and master):

- It closes the log file it had and opens PATH: 7.2 appends (truncates only the first file that
  a daemonised QEMU opens), 10.0 **always truncates**.  So a user's log file, or a stderr that is
  a file, must never be opened by it again: such a log is read in place and never redirected.
- When PATH cannot be opened, 7.2 has no log at all from then on, 10.0 keeps a log on stderr.
- There is no name for "stderr as before".  /dev/stderr is /proc/self/fd/2, which opens the same
  file once more: right for terminals, devices and pipes, impossible (ENXIO) for sockets such as
  the journal's, forbidden when the pipe belongs to another user; and on a FIFO (not a pipe) that
  nobody reads the open itself would wait for ever, with QEMU's main loop in it.
- A daemonised QEMU logs only to a file, and `logfile` makes that file its stderr too; without
  -D it had /dev/null there.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from ..host.files import NotRegular, open_foreign, stat_foreign
from ..host.processes import FileDescriptor, Process, path_seen_by
from .cmdline import CommandLine
from .trace_errors import TraceReason, TraceUnavailable
from .trace_notes import Note

__all__ = [
    "LogFile",
    "RestoreTarget",
    "find_log_files",
    "open_log",
    "restore_target",
]


@dataclass(frozen=True, slots=True)
class LogFile:
    """A regular file that may be QEMU's log; `path` is how we open it, `name` is for people."""

    path: str
    name: str
    device: int
    inode: int

    def size(self) -> int:
        """Bytes now.  Raises OSError."""
        return stat_foreign(self.path, follow=True).st_size


@dataclass(frozen=True, slots=True)
class RestoreTarget:
    """What to say to `logfile` when we leave.  `faithful`: the log is then where it was;
    else `why` says what it will be missing."""

    path: str
    faithful: bool
    why: str = ""


def find_log_files(process: Process, command_line: CommandLine) -> list[LogFile]:
    """Files that may be QEMU's log now, likeliest first.  Only a marker proves one.

    fopen() opens the log without O_CLOEXEC, everything else in QEMU sets it: so the candidates
    are inherited or unflagged descriptors of regular files that are open for writing.  Raises
    TraceUnavailable when -D names a file that we may not read.
    """
    descriptors = process.file_descriptors()
    if descriptors is not None:
        found: dict[tuple[int, int], FileDescriptor] = {}
        for f in descriptors:
            if f.is_regular and f.is_writable and (f.number == 2 or not f.flags & os.O_CLOEXEC):
                found.setdefault((f.device, f.inode), f)
        # The log is opened late or on demand; files that were inherited have low numbers.
        ordered = sorted(found.values(), key=lambda f: f.number, reverse=True)
        return [
            LogFile(f"/proc/{process.pid}/fd/{f.number}", f.link, f.device, f.inode)
            for f in ordered
        ]
    if command_line.log_file is None:
        return []
    path = path_seen_by(process, command_line.log_file.replace("%d", str(process.pid)))
    try:
        if path is None:
            raise PermissionError
        os.close(open_foreign(path, follow=True))
        status = stat_foreign(path, follow=True)
    except NotRegular:
        return []
    except OSError as error:
        raise TraceUnavailable(
            TraceReason.LOG_UNREADABLE,
            f"QEMU (pid {process.pid}) logs to {command_line.log_file}, which we may not read",
        ) from error
    return [LogFile(path, command_line.log_file, status.st_dev, status.st_ino)]


def restore_target(process: Process, command_line: CommandLine) -> RestoreTarget:
    """How to put the log back where a QEMU has it that does not log to a file of its own."""
    if command_line.daemonize:
        return RestoreTarget("/dev/null", faithful=True)
    descriptors = process.file_descriptors()
    if descriptors is None:
        return _silent("what its stderr is cannot be seen by this user")
    stderr = next((f for f in descriptors if f.number == 2), None)
    if stderr is None:
        return _silent("its stderr is closed")
    if stderr.is_regular:
        return _silent("its stderr is a file, which `logfile` would truncate")
    if stat.S_ISSOCK(stderr.mode):
        return _silent("its stderr is a socket, which cannot be opened again")
    if not _may_write(process, stderr):
        return _silent("its stderr belongs to another user")
    return _try_stderr(process)


def _silent(why: str) -> RestoreTarget:
    return RestoreTarget("/dev/null", faithful=False, why=why)


def _try_stderr(process: Process) -> RestoreTarget:
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        os.close(os.open(f"/proc/{process.pid}/fd/2", flags))
    except OSError as error:
        # ENXIO: a FIFO without a reader.
        return _silent(f"its stderr cannot be opened again ({os.strerror(error.errno or 0)})")
    return RestoreTarget("/dev/stderr", faithful=True)


def _may_write(process: Process, f: FileDescriptor) -> bool:
    if process.uid == 0:
        return True
    if f.uid == process.uid:
        return bool(f.mode & stat.S_IWUSR)
    if f.gid == process.gid or f.gid in process.groups:
        return bool(f.mode & stat.S_IWGRP)
    return bool(f.mode & stat.S_IWOTH)


def open_log(process: Process, note: Note) -> tuple[int, str]:
    """The file that QEMU logs to while it is traced, open, and what it is called: for reading only
    when it is QEMU's own.  Raises OSError; FileNotFoundError when QEMU no longer has it open.

    A limited file is found by what it is: QEMU may have another file under that number by now.
    """
    if note.in_place is not None:
        return open_foreign(note.in_place, follow=True), note.in_place
    log = note.log
    if log is None or not log.inode:
        return open_foreign(note.path, os.O_RDWR, follow=True), note.path
    for f in process.file_descriptors() or ():
        if (f.device, f.inode) == (log.device, log.inode):
            path = f"/proc/{process.pid}/fd/{f.number}"
            handle = open_foreign(path, os.O_RDWR, follow=True)
            status = os.fstat(handle)
            if (status.st_dev, status.st_ino) == (log.device, log.inode):
                return handle, path
            os.close(handle)
    raise FileNotFoundError(errno.ENOENT, "QEMU no longer logs to our file", note.path)
