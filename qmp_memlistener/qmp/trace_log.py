"""Where a running QEMU's log goes, whether it can be redirected, and how to put it back.

What util/log.c does with `logfile PATH` (compared in 7.2, 10.0.2 and master):

- It closes the log file it had and opens PATH: 7.2 appends (truncates only the first file that
  a daemonised QEMU opens), 10.0 **always truncates**.  So a user's log file, or a stderr that is
  a file, must never be opened by it again: such a log is read in place and never redirected.
- When PATH cannot be opened, 7.2 has no log at all from then on, 10.0 keeps a log on stderr.
- There is no name for "stderr as before".  /dev/stderr is /proc/self/fd/2, which opens the same
  file once more: right for terminals, devices and pipes, impossible (ENXIO) for sockets such as
  the journal's, forbidden when the pipe belongs to another user; and on a FIFO (not a pipe) that
  is not read the open itself would wait for ever, with QEMU's main loop in it.
- A daemonised QEMU logs only to a file, and `logfile` makes that file its stderr too; without
  -D it had /dev/null there.

Who else writes to the log?  Its lines would be taken for QEMU's own.  The threat: the log is read
in place where QEMU has one (`-D FILE`, a stderr that is a file).  If the guest's console goes to
the same file (`-serial file:x -D x`, `-serial stdio >x 2>&1`), the guest writes trace lines of its
choice: slot operations that never were.  So does any other process that has the file open, and
passes on what a guest says.  A standard output that nothing of the guest's can reach is no writer
(libvirt makes one file of both).  Such a file is refused, with the way out (`check_writers`).  Who
started QEMU may have kept the file open, other than as its own output: that is only said.

Files are identified by device and inode, not by name: by the descriptors that QEMU and the others
have. Where QEMU's cannot be seen its command line has to do, and doubt is a refusal.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..errors import TraceReason, TraceUnavailable
from ..host.files import NotRegular, open_foreign, stat_foreign
from ..host.processes import FileDescriptor, Process, path_seen_by, process_ids
from .cmdline import CommandLine
from .trace_notes import Redirection

__all__ = ["LogFile", "check_writers", "find_log_files", "restore_target"]

_INODE = re.compile(r"^ino:\s*(\d+)", re.MULTILINE)
_FLAGS = re.compile(r"^flags:\s*([0-7]+)", re.MULTILINE)
# What query-chardev calls devices whose output may be in a file that cannot be identified.
_OUTPUTS = ("file", "stdio", "console", "fd")


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


def restore_target(process: Process, command_line: CommandLine) -> Redirection:
    """How to put the log back where a QEMU has it that does not log to a file of its own."""
    if command_line.daemonize:
        return Redirection(restore_path="/dev/null", kept=True)
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


def _silent(why: str) -> Redirection:
    return Redirection(restore_path="/dev/null", kept=False, why=why)


def _try_stderr(process: Process) -> Redirection:
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        os.close(os.open(f"/proc/{process.pid}/fd/2", flags))
    except OSError as error:
        # ENXIO: a FIFO without a reader.
        return _silent(f"its stderr cannot be opened again ({os.strerror(error.errno or 0)})")
    return Redirection(restore_path="/dev/stderr", kept=True)


def _may_write(process: Process, f: FileDescriptor) -> bool:
    if process.uid == 0:
        return True
    if f.uid == process.uid:
        return bool(f.mode & stat.S_IWUSR)
    if f.gid == process.gid or f.gid in process.groups:
        return bool(f.mode & stat.S_IWGRP)
    return bool(f.mode & stat.S_IWOTH)


# -- who else writes to it -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    device: int
    inode: int


def check_writers(
    device: int, inode: int, process: Process, command_line: CommandLine, chardevs: Collection[str]
) -> str:
    """Refuse a log that somebody else writes to; `chardevs` are QEMU's names of its character
    devices' other ends (query-chardev).

    Reads the descriptors of every process.  Returns a remark for the user, "" when there is nothing
    to say.  Raises TraceUnavailable.
    """
    log = _File(device, inode)
    descriptors = process.file_descriptors()
    if descriptors is None:
        why = _by_command_line(log, process, command_line, chardevs)
    else:
        why = _by_descriptors(log, process, command_line, descriptors, chardevs)
    if why is not None:
        raise TraceUnavailable(
            TraceReason.LOG_OF_GUEST,
            f"a guest could write lines of its own to the log of QEMU (pid {process.pid}): {why}",
        )
    ancestors = _ancestors(process)
    remark = ""
    for other, numbers in _other_writers(log, process, descriptors or ()):
        name = os.path.basename(other.argv[0]) if other.argv else "a process"
        if other.pid in ancestors and numbers.isdisjoint((1, 2)):
            remark = (
                f"{name} (pid {other.pid}), which started QEMU, has its log open too: what it "
                "writes there is read as QEMU's"
            )
            continue
        raise TraceUnavailable(
            TraceReason.LOG_SHARED,
            f"another process has the log of QEMU (pid {process.pid}) open for writing: {name} "
            f"(pid {other.pid})",
        )
    return remark


def _by_descriptors(
    log: _File,
    process: Process,
    command_line: CommandLine,
    descriptors: Collection[FileDescriptor],
    chardevs: Collection[str],
) -> str | None:
    """The log is stderr, or what fopen() made: inheritable.  All else is QEMU's use of the file.

    Every other open() of QEMU's sets O_CLOEXEC (qemu_open, util/osdep.c).
    """
    mine = [
        f for f in descriptors if (f.device, f.inode) == (log.device, log.inode) and f.is_writable
    ]
    unused = command_line.stdout_unused and not any(c.startswith("stdio") for c in chardevs)
    if any(f.number == 1 for f in mine) and not unused:
        return "it is its standard output as well"
    others = [f for f in mine if f.number not in (1, 2)]
    if any(f.flags & os.O_CLOEXEC for f in others):
        return "a character or block device of the guest is the same file"
    named = command_line.log_file is not None and _is(
        log, path_seen_by(process, command_line.log_file.replace("%d", str(process.pid)))
    )
    # of one beside stderr it is known that it is the log when -D says so
    allowed = 1 if named or len(others) == len(mine) else 0
    if len(others) > allowed:
        return f"descriptor {others[0].number} that it inherited is the same file"
    return None


def _by_command_line(
    log: _File, process: Process, command_line: CommandLine, chardevs: Collection[str]
) -> str | None:
    if any(_is(log, path_seen_by(process, path)) for path in command_line.guest_files):
        return "a character device of the guest writes to the same file"
    unclear = [name for name in chardevs if name.partition(":")[0] in _OUTPUTS]
    if command_line.guest_on_stdout or command_line.unread or unclear:
        return "where the output of its character devices goes cannot be seen by this user"
    return None


def _is(log: _File, path: str | None) -> bool:
    if path is None:
        return False
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    return (status.st_dev, status.st_ino) == (log.device, log.inode)


def _ancestors(process: Process) -> set[int]:
    found: set[int] = set()
    parent = Process.read(process.parent)
    while parent is not None and parent.pid not in found:
        found.add(parent.pid)
        parent = Process.read(parent.parent)
    return found


def _other_writers(
    log: _File, process: Process, descriptors: Collection[FileDescriptor]
) -> Iterator[tuple[Process, set[int]]]:
    """Processes, and under which numbers they have it open.  QEMU's children are left out: they
    inherit the log (`migrate exec:`, scripts)."""
    inodes = {log.inode}
    for f in descriptors:
        if (f.device, f.inode) == (log.device, log.inode):
            inodes.add(_info(process.pid, f.number)[0] or log.inode)
    for pid in process_ids():
        numbers = _writes(pid, log, inodes) if pid != process.pid else set()
        other = Process.read(pid) if numbers else None
        if other is not None and other.parent != process.pid:
            yield other, numbers


def _writes(pid: int, log: _File, inodes: Collection[int]) -> set[int]:
    """`inodes` are what fdinfo calls the file: on overlayfs another number than stat(2)'s."""
    directory = f"/proc/{pid}/fd"
    found: set[int] = set()
    try:
        names = os.listdir(directory)
    except OSError:
        return found
    for name in names:
        try:
            # no stat(2) of files that are none of our business: theirs may not answer
            if not os.readlink(f"{directory}/{name}").startswith("/"):
                continue
            inode, flags = _info(pid, int(name))
            if flags & os.O_ACCMODE == os.O_RDONLY or (inode or log.inode) not in inodes:
                continue
            status = os.stat(f"{directory}/{name}")
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (log.device, log.inode):
            found.add(int(name))
    return found


def _info(pid: int, number: int) -> tuple[int | None, int]:
    """Inode (None before Linux 5.14) and flags of a descriptor, from the kernel's own memory.

    Raises OSError.
    """
    with open(f"/proc/{pid}/fdinfo/{number}") as f:
        info = f.read()
    inode, flags = _INODE.search(info), _FLAGS.search(info)
    return int(inode[1]) if inode else None, int(flags[1], 8) if flags else os.O_RDWR
