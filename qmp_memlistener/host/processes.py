"""What /proc says about one process: command line, start time, sockets, file descriptors.

Plain synchronous reads of small files.  Everything here copes with a process that disappears
and with another user's process, whose `fd`, `exe` and `root` links only root may read: such
facts are None, never a guess.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = [
    "FileDescriptor",
    "Process",
    "Sketch",
    "boot_id",
    "is_ending",
    "is_key",
    "path_seen_by",
    "paths_seen_by",
    "process_ids",
    "process_of",
    "socket_inodes",
]

# execve(2) takes at most 6 MiB (MAX_ARG_STRINGS, fs/exec.c); a process may claim any part of its
# memory to be its arguments (prctl(2), PR_SET_MM_MAP).
_LONGEST_ARGV = 8 << 20
_MOST_ARGUMENTS = 1 << 16
_KEY = re.compile(r"([0-9]{1,10})-([0-9]{1,20})")
_PF_EXITING = 4  # include/linux/sched.h; field 9 of stat
_PENDING = (b"SigPnd:", b"ShdPnd:")
_SIGKILL_BIT = 1 << (signal.SIGKILL - 1)
_SOCKET_LINK = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class FileDescriptor:
    """One open file of a process.  `flags` are those of open(2), from fdinfo."""

    number: int
    link: str
    device: int
    inode: int
    mode: int
    uid: int
    gid: int
    flags: int

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


@dataclass(frozen=True, slots=True)
class Process:
    """A live process.  `start_ticks` (field 22 of stat) tells two users of one pid apart.

    `exe` is None when it may not be read; " (deleted)" is stripped from it.
    """

    pid: int
    start_ticks: int
    argv: tuple[str, ...]
    exe: str | None
    uid: int
    gid: int
    groups: frozenset[int]
    parent: int = 0

    @classmethod
    def read(cls, pid: int) -> Process | None:
        """The process, or None when there is none (any more), or it is a zombie."""
        try:
            _, fields = _stat(f"/proc/{pid}")
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                argv = f.read(_LONGEST_ARGV).split(b"\0", _MOST_ARGUMENTS)[:-1]
            with open(f"/proc/{pid}/status", "rb") as f:
                status = dict(line.split(b":", 1) for line in f.read().splitlines() if b":" in line)
        except OSError:
            return None
        if fields[0] in (b"Z", b"X"):
            return None
        try:
            exe: str | None = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
        except OSError:
            exe = None
        return cls(
            pid=pid,
            start_ticks=int(fields[19]),
            argv=tuple(os.fsdecode(a) for a in argv),
            exe=exe,
            # The fourth number is the file-system id: the one that opens files.
            uid=int(status[b"Uid"].split()[3]),
            gid=int(status[b"Gid"].split()[3]),
            groups=frozenset(int(g) for g in status.get(b"Groups", b"").split()),
            parent=int(fields[1]),
        )

    @property
    def key(self) -> str:
        """Names it in file names, for as long as the host runs."""
        return f"{self.pid}-{self.start_ticks}"

    def is_alive(self) -> bool:
        """The same process still runs."""
        now = Process.read(self.pid)
        return now is not None and now.start_ticks == self.start_ticks

    async def has_ended(self) -> bool:
        """It is gone, or will be within half a second: a monitor often hangs up before."""
        for _ in range(10):
            if not self.is_alive():
                return True
            await asyncio.sleep(0.05)
        return False

    def started_at(self) -> float:
        """When it began, in seconds since the epoch, to about a second."""
        with open("/proc/stat") as f:
            boot = next((line.split()[1] for line in f if line.startswith("btime ")), "0")
        return int(boot) + self.start_ticks / os.sysconf("SC_CLK_TCK")

    def is_stopped(self) -> bool:
        """A signal (SIGSTOP) or a debugger keeps it from running now."""
        return self._state() in (b"T", b"t")

    def is_stuck(self) -> bool:
        """Its main thread waits in the kernel, uninterruptibly, and has done so for 30 ms.

        Then the file system that it waits for may not answer us either.
        """
        for _ in range(3):
            if self._state() != b"D":
                return False
            time.sleep(0.01)
        return self._state() == b"D"

    def _state(self) -> bytes:
        try:
            return _stat(f"/proc/{self.pid}")[1][0]
        except (OSError, IndexError):
            return b""

    def cwd(self) -> str | None:
        try:
            return os.readlink(f"/proc/{self.pid}/cwd")
        except OSError:
            return None

    def shares_root(self) -> bool:
        """Paths mean the same to it and to us.  True when it cannot be found out."""
        try:
            theirs, ours = os.stat(f"/proc/{self.pid}/root"), os.stat("/")
            same_mounts = os.readlink(f"/proc/{self.pid}/ns/mnt") == os.readlink(
                "/proc/self/ns/mnt"
            )
        except OSError:
            return True
        return same_mounts and (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)

    def shares_network(self) -> bool:
        """It lives in our network namespace.  True when it cannot be found out."""
        try:
            theirs = os.readlink(f"/proc/{self.pid}/ns/net")
        except OSError:
            return True
        return theirs == os.readlink("/proc/self/ns/net")

    def file_descriptors(self) -> tuple[FileDescriptor, ...] | None:
        """Every open file, or None when we may not look."""
        directory = f"/proc/{self.pid}/fd"
        try:
            numbers = os.listdir(directory)
        except OSError:
            return None
        found = []
        for number in sorted(numbers, key=int):
            try:
                link = os.readlink(f"{directory}/{number}")
                status = os.stat(f"{directory}/{number}")
                with open(f"/proc/{self.pid}/fdinfo/{number}") as f:
                    info = f.read()
            except OSError:
                continue
            flags = re.search(r"^flags:\s*([0-7]+)", info, re.MULTILINE)
            found.append(
                FileDescriptor(
                    number=int(number),
                    link=link,
                    device=status.st_dev,
                    inode=status.st_ino,
                    mode=status.st_mode,
                    uid=status.st_uid,
                    gid=status.st_gid,
                    flags=int(flags[1], 8) if flags else 0,
                )
            )
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Sketch:
    """What the kernel tells of a process without touching its memory or its files: never waits.

    `name` is the first 15 bytes of what it calls itself.
    """

    name: str
    start_ticks: int
    uid: int
    gid: int

    @classmethod
    def read(cls, pid: int) -> Sketch | None:
        try:
            name, fields = _stat(f"/proc/{pid}")
            owner = os.stat(f"/proc/{pid}")
            return cls(os.fsdecode(name), int(fields[19]), owner.st_uid, owner.st_gid)
        except (OSError, IndexError):
            return None


def _stat(process: str) -> tuple[bytes, list[bytes]]:
    """The name (field 2 of stat) and the fields from the third on.  Raises OSError.

    `process` is its directory in /proc, or that of one of its threads.
    """
    with open(f"{process}/stat", "rb") as f:
        # the name may hold spaces and parentheses
        head, _, tail = f.read().rpartition(b")")
    return head.partition(b"(")[2], tail.split()


def is_key(text: str) -> bool:
    """It has the form of `Process.key`."""
    return _KEY.fullmatch(text) is not None


def process_of(key: str) -> Process | None:
    """The process with this `Process.key`, None when it has ended."""
    process = Process.read(int(key.partition("-")[0])) if is_key(key) else None
    return process if process is not None and process.key == key else None


def is_ending(pid: int) -> bool:
    """It was killed or has ended, and its threads are on their last way through the kernel.

    That takes seconds where the kernel has much to close; its locks are held for so long.
    """
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return all(_is_ending(f"/proc/{pid}/task/{thread}") for thread in threads)


def _is_ending(thread: str) -> bool:
    try:
        _, fields = _stat(thread)
        with open(f"{thread}/status", "rb") as f:
            pending = [int(line.split()[1], 16) for line in f if line.startswith(_PENDING)]
    except OSError:
        return True  # it has left
    return bool(int(fields[6]) & _PF_EXITING) or any(p & _SIGKILL_BIT for p in pending)


def process_ids() -> Iterator[int]:
    """Ids of all processes, ascending."""
    yield from sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def boot_id() -> str:
    """Changes with every boot of the host; a pid and start time mean something within one."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f.read().strip()


def path_seen_by(process: Process, path: str) -> str | None:
    """The name under which *we* reach what `process` calls `path`.

    Relative paths are relative to its working directory, and a process in another mount
    namespace or chroot is reached through /proc/PID/root.  None when that cannot be known.
    """
    if path.startswith("@"):
        return path
    if not os.path.isabs(path):
        cwd = process.cwd()
        if cwd is None:
            return None
        path = os.path.join(cwd, path)
    return path if process.shares_root() else f"/proc/{process.pid}/root{path}"


def paths_seen_by(process: Process, path: str) -> list[str]:
    """All names under which we may reach what `process` once called `path`, likeliest first.

    It may have left its root or its directory since (-chroot, -daemonize): its parent's and ours
    are tried as well.  Whether one of them leads to the same file is for the caller to check.
    """
    now = path_seen_by(process, path)
    found = [] if now is None else [now]
    parent = Process.read(process.parent)
    if parent is not None and (again := path_seen_by(parent, path)) is not None:
        found.append(again)
    if os.path.isabs(path):
        found.append(path)
    return list(dict.fromkeys(found))


def socket_inodes(pid: int) -> dict[int, int] | None:
    """File descriptor number to socket inode, or None when we may not look.

    Asks the kernel alone: neither the process nor any file of its can make us wait.
    """
    directory = f"/proc/{pid}/fd"
    found = {}
    try:
        for number in os.listdir(directory):
            try:
                match = _SOCKET_LINK.fullmatch(os.readlink(f"{directory}/{number}"))
            except OSError:
                continue
            if match is not None:
                found[int(number)] = int(match[1])
    except OSError:
        return None
    return found
