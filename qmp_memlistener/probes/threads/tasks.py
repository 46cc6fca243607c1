"""The open files of one QEMU's threads in /proc, and what may be read there.

A descriptor of /proc/PID/task/TID belongs to that very thread: when it is gone, reading ends with
ESRCH, whoever has its number then.  So does the directory of the process, from which all are opened
after its start time was compared.  The kernel makes every line read here, and reading waits neither
for the process nor for its memory or files; only which system calls there are is found in the
program's file (`machine_of`), once.
"""

from __future__ import annotations

import contextlib
import enum
import os
import struct
from dataclasses import dataclass

from ...host.files import open_foreign
from ...host.processes import Process
from ..model import ProbeUnavailable
from .states import CALLS, Calls, parse_schedstat, parse_syscall

__all__ = ["Access", "Examined", "Task", "Tasks", "examine"]

_LINE = 256
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"
_EM_OFFSET = 18  # e_machine, in files of both classes
_TRIES = 20


class Access(enum.Enum):
    """What may be read: `syscall` (and with it everything), `wchan`, or `schedstat` alone."""

    SYSCALL = "syscall"
    WCHAN = "wchan"
    SCHEDSTAT = "schedstat"


@dataclass(frozen=True, slots=True)
class Examined:
    """What may be read of a process, and why not more.  `holds`: `wchan` can be read too, which
    tells of a stopped thread; without, its `stat` does."""

    access: Access
    calls: Calls | None
    holds: bool
    reason: str | None = None
    remedy: str | None = None


class Task:
    """One thread's open files.  Methods raise OSError: ProcessLookupError when it is gone."""

    def __init__(self, directory: int, tid: int, access: Access, *, holds: bool) -> None:
        self.tid = tid
        self._files: list[int] = []
        try:
            self._schedstat = self._open(directory, "schedstat")
            self._syscall = self._open(directory, "syscall") if access is Access.SYSCALL else -1
            # the kernel checks who reads it, not who opens it
            self._wchan = self._open(directory, "wchan") if holds else -1
            self._stat = -1 if holds else self._open(directory, "stat")
        except BaseException:
            self.close()
            raise

    def schedstat(self) -> bytes:
        return os.pread(self._schedstat, _LINE, 0)

    def syscall(self) -> bytes:
        return os.pread(self._syscall, _LINE, 0)

    def wchan(self) -> bytes:
        return os.pread(self._wchan, _LINE, 0)

    def state(self) -> bytes:
        """Field 3 of stat: R, S, D, T, ..."""
        return os.pread(self._stat, _LINE, 0).rpartition(b")")[2].lstrip()[:1]

    @property
    def reads_wchan(self) -> bool:
        return self._wchan >= 0

    def close(self) -> None:
        for handle in self._files:
            os.close(handle)
        self._files.clear()

    def _open(self, directory: int, name: str) -> int:
        path = f"task/{self.tid}/{name}"
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        self._files.append(handle)
        return handle


class Tasks:
    """The threads of one process, by id."""

    def __init__(self, process: Process) -> None:
        """Raises ProbeUnavailable when it is gone."""
        self._pid = process.pid
        self._directory = _open_process(process)

    def ids(self) -> set[int]:
        """Of all its threads.  Raises OSError when it is gone."""
        listing = os.open(
            "task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory
        )
        try:
            return {int(name) for name in os.listdir(listing)}
        finally:
            os.close(listing)

    def open(self, tid: int, examined: Examined) -> Task | None:
        """None when it is gone."""
        try:
            return Task(self._directory, tid, examined.access, holds=examined.holds)
        except (FileNotFoundError, ProcessLookupError):
            return None

    def vcpu_of(self, descriptor: int) -> int | None:
        """The number of the vCPU behind an open file of the process (kvm_vm_ioctl_create_vcpu:
        `anon_inode:kvm-vcpu:N`)."""
        try:
            link = os.readlink(f"fd/{descriptor}", dir_fd=self._directory)
        except OSError:
            return None
        head, _, number = link.rpartition(":")
        return int(number) if head == "anon_inode:kvm-vcpu" and number.isdigit() else None

    def close(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def _open_process(process: Process) -> int:
    try:
        directory = os.open(f"/proc/{process.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ProbeUnavailable(f"QEMU's process is gone: {error.strerror}") from error
    if not process.is_alive():
        os.close(directory)
        raise ProbeUnavailable("QEMU's process is gone")
    return directory


def examine(process: Process) -> Examined:
    """What may be read of its main thread.  Raises ProbeUnavailable where that is not enough."""
    directory = _open_process(process)
    try:
        return _examine(directory, process)
    except OSError as error:
        raise ProbeUnavailable(
            f"its threads cannot be read in /proc: {error.strerror}",
            remedy="run where /proc shows QEMU's process (hidepid, another PID namespace)",
        ) from error
    finally:
        os.close(directory)


def _examine(directory: int, process: Process) -> Examined:
    with contextlib.closing(Task(directory, process.pid, Access.SCHEDSTAT, holds=True)) as task:
        try:
            counted = parse_schedstat(task.schedstat()).times
        except ValueError:
            counted = 0
        if not counted:
            raise ProbeUnavailable(
                "the kernel keeps no schedule of threads",
                remedy="use a kernel with CONFIG_SCHED_INFO (distributions have it)",
            )
        holds = _tells_wchan(task)
    calls = CALLS.get(machine_of(process.pid) or -1)
    why = _why_no_syscall(directory, process)
    if why is None and calls is not None:
        return Examined(Access.SYSCALL, calls, holds)
    reason, remedy = why or (
        "the numbers of this machine's system calls are not known here",
        None,
    )
    if holds:
        return Examined(Access.WCHAN, None, holds, reason, remedy)
    return Examined(Access.SCHEDSTAT, None, holds, reason, remedy)


def _tells_wchan(task: Task) -> bool:
    """It names a function of the kernel at some time; a thread at work has none."""
    for _ in range(_TRIES):
        try:
            if task.wchan() not in (b"", b"0"):
                return True
        except PermissionError:
            return False
    return False


def _why_no_syscall(directory: int, process: Process) -> tuple[str, str | None] | None:
    """Why `syscall` cannot be read, and the remedy; None when it can."""
    try:
        with contextlib.closing(Task(directory, process.pid, Access.SYSCALL, holds=False)) as task:
            parse_syscall(task.syscall())
            return None
    except ValueError as error:
        return str(error), None
    except FileNotFoundError:
        return "the kernel tells no system calls (CONFIG_HAVE_ARCH_TRACEHOOK)", None
    except PermissionError:
        return why_forbidden(process)


def why_forbidden(process: Process) -> tuple[str, str]:
    """Why the kernel does not let us trace a process (ptrace(2), PTRACE_MODE_ATTACH)."""
    root = "run as root"
    if process.uid != os.geteuid():
        return "QEMU runs as another user", f"{root} or as the user that QEMU runs as"
    if (scope := _yama()) > 0:
        return (
            f"Yama forbids it (kernel.yama.ptrace_scope is {scope})",
            f"{root}, or set kernel.yama.ptrace_scope to 0",
        )
    if os.stat(f"/proc/{process.pid}").st_uid != process.uid:
        return "QEMU has changed its user, which makes it untraceable for that user", root
    return "QEMU has rights that we have not, or lives in another user namespace", root


def _yama() -> int:
    try:
        with open(_YAMA, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def machine_of(pid: int) -> int | None:
    """e_machine of the program's ELF header; None when it cannot be read."""
    try:
        handle = open_foreign(f"/proc/{pid}/exe", follow=True)
    except OSError:
        return None
    try:
        head = os.pread(handle, _EM_OFFSET + 2, 0)
    except OSError:
        return None
    finally:
        os.close(handle)
    if len(head) < _EM_OFFSET + 2 or head[:4] != b"\x7fELF":
        return None
    return int(struct.unpack_from("<H" if head[5] == 1 else ">H", head, _EM_OFFSET)[0])
