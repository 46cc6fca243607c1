"""The error tree.  Every error states what happened to whom, the remedy, and its exit code.

::

    MemListenerError                  exit 1
     +- OperationFailed               1   a check or an operation on the guest failed
     |   +- CommandFailed             1   QEMU refused a command
     |   +- CommandNotAllowed         1   a command that is not known to be harmless was not sent
     |   +- GuestFrozen               1   real-time work runs, the guest must not be touched
     |   +- GuestMigrating            1   a migration has the guest, it may not be paused
     +- InputError                    2   bad usage or bad input
     |   +- MtreeError                2   not an `info mtree` text, with line number
     |   +- RecordingError            2   not a recording, or one from the future
     +- TargetError                   3   the target ...
     |   +- TargetUnreachable         3   ... cannot be connected to
     |   +- MonitorBusy               3   ... has a monitor, and another client uses it
     |   +- WrongGuest                3   ... is another guest than the one that was meant
     |   +- TargetLost                3   ... went away while we were attached
     |   +- DeadlineExceeded          3   ... did not answer in time
     |   +- ProtocolViolation         3   ... does not speak QMP
     +- MissingPrerequisite           4   a privilege or a component is missing here
         +- TraceUnavailable          4   ... for tracing this guest through its log

The command line prints `message` and, on a second line, `remedy`; a library user catches
the class.  Exit codes are part of the command-line contract (README, "Exit codes").
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from .text import quoted

__all__ = [
    "CommandFailed",
    "CommandNotAllowed",
    "DeadlineExceeded",
    "GuestFrozen",
    "GuestMigrating",
    "InputError",
    "MemListenerError",
    "MissingPrerequisite",
    "MonitorBusy",
    "MtreeError",
    "OperationFailed",
    "ProtocolViolation",
    "RecordingError",
    "TargetError",
    "TargetLost",
    "TargetUnreachable",
    "TraceReason",
    "TraceUnavailable",
    "WrongGuest",
]


class MemListenerError(Exception):
    """Base of every error this package raises on purpose.

    `message` says what happened and to whom; `remedy` what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class OperationFailed(MemListenerError):
    """A check did not hold or an operation on the guest failed."""


class CommandFailed(OperationFailed):
    """QEMU answered a command with an error; `error_class` and `desc` are QEMU's own."""

    def __init__(
        self, command: str, error_class: str, desc: str, *, remedy: str | None = None
    ) -> None:
        super().__init__(f"QEMU refused {command}: {desc}", remedy=remedy)
        self.command = command
        self.error_class = error_class
        self.desc = desc

    @classmethod
    def of(cls, command: str, error: Mapping[str, object]) -> CommandFailed:
        """From the `error` of a reply."""
        kind = str(error.get("class", "GenericError"))
        remedy = "this QEMU does not have that command" if kind == "CommandNotFound" else None
        return cls(command, kind, str(error.get("desc", "")), remedy=remedy)


class CommandNotAllowed(OperationFailed):
    """Nothing was sent: the command is not on the list of those known to be harmless."""


class GuestFrozen(OperationFailed):
    """Somebody froze the guest for real-time work (`watch --freeze`): nothing was done to it."""


class GuestMigrating(OperationFailed):
    """A migration is under way, or has taken the guest: a pause would leave it paused at the
    destination, or run it at both ends."""


class InputError(MemListenerError):
    """Bad usage or bad input: a file that is not what it should be, options that clash."""

    exit_code = 2


class MtreeError(InputError):
    """Text that no QEMU prints for `info mtree`; `line_no` counts from 1."""

    def __init__(self, line_no: int, line: str, why: str, *, remedy: str | None = None) -> None:
        super().__init__(
            f"line {line_no} is not `info mtree` output ({why}): {quoted(line)}",
            remedy=remedy
            or "give the unchanged output of `info mtree`, with any of -f -d -o -D, "
            "of QEMU 7.2 to 11.1",
        )
        self.line_no = line_no
        self.line = line
        self.why = why

    def of(self, path: str) -> MtreeError:
        """The same error of a file that has a name."""
        named = MtreeError(self.line_no, self.line, self.why, remedy=self.remedy)
        named.message = f"{path}: {self.message}"
        named.args = (named.message,)
        return named


class RecordingError(InputError):
    """A file that is not a recording of ours, or has a newer schema than we know."""


class TargetError(MemListenerError):
    """Something is wrong with the guest that was named as the target."""

    exit_code = 3


class TargetUnreachable(TargetError):
    """No monitor answers at the given address."""


class MonitorBusy(TargetError):
    """The monitor exists but serves another client (a QMP monitor serves one at a time)."""


class WrongGuest(TargetError):
    """Another guest answers than the one that was meant; no command was sent to it."""


class TargetLost(TargetError):
    """The connection ended while it was in use: QEMU quit, was killed, or closed it."""


class DeadlineExceeded(TargetError):
    """The peer did not answer in time."""


class ProtocolViolation(TargetError):
    """The peer answered, but not in QMP."""


class MissingPrerequisite(MemListenerError):
    """A privilege or a component is missing on this host."""

    exit_code = 4


class TraceReason(StrEnum):
    """Why tracing is not possible."""

    NOT_ASKED = "not-asked"
    NO_PROCESS = "no-process"
    NO_EVENTS = "no-events"
    NOT_LOGGED = "not-logged"
    LOG_REFUSED = "log-refused"
    LOG_UNREADABLE = "log-unreadable"
    LOG_SHARED = "log-shared"
    LOG_OF_GUEST = "log-of-guest"
    LOG_PER_THREAD = "log-per-thread"
    LOG_NOT_RESTORABLE = "log-not-restorable"
    NO_PLACE = "no-place"
    OTHER_AGENT = "other-agent"


_REMEDIES = {
    TraceReason.NOT_ASKED: "leave --no-trace out (trace=True in the library)",
    TraceReason.NO_PROCESS: "run this on the guest's host, in a place that sees QEMU's process",
    TraceReason.NO_EVENTS: "use a QEMU built with trace events (--enable-trace-backends=log)",
    TraceReason.NOT_LOGGED: "use a QEMU whose trace backend is log (this one may have dtrace "
    "only, or be an 8.0 or 8.1, which cannot leave stderr); uprobes work without it",
    TraceReason.LOG_REFUSED: "run as the user that QEMU runs as; SELinux or AppArmor may forbid "
    "QEMU to write to our file; a QEMU with -chroot needs /dev/fd in there",
    TraceReason.LOG_UNREADABLE: "run as root or as the user that may read QEMU's log",
    TraceReason.LOG_SHARED: "give QEMU a log of its own (-D FILE) that no other process writes to",
    TraceReason.LOG_OF_GUEST: "give QEMU a log of its own (-D FILE), and keep its standard output "
    "and the guest's consoles out of it",
    TraceReason.LOG_PER_THREAD: "start QEMU without -d tid",
    TraceReason.LOG_NOT_RESTORABLE: "start QEMU with -D FILE; that file is then read in place",
    TraceReason.NO_PLACE: "make /dev/shm writable for this user; a QEMU of another user or in "
    "another container needs a monitor on a UNIX socket (-qmp unix:PATH) and an agent run by root",
    TraceReason.OTHER_AGENT: "end the other agent, or run as its user: then both share the log",
}


class TraceUnavailable(MissingPrerequisite):
    """This guest cannot be traced through its log; `reason` is the kind of obstacle."""

    def __init__(self, reason: TraceReason, message: str) -> None:
        super().__init__(message, remedy=_REMEDIES[reason])
        self.reason = reason


def not_created(path: str, error: OSError, *, if_exists: str) -> InputError | MissingPrerequisite:
    """Why a new file or directory is not there; `if_exists` is the remedy when something is."""
    if isinstance(error, FileExistsError):
        return InputError(f"{path} exists already", remedy=if_exists)
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return InputError(
            f"{path or 'the empty file name'} cannot be created",
            remedy="name a file in an existing directory",
        )
    return MissingPrerequisite(
        f"{path} cannot be created: {error.strerror or error}", remedy="choose a writable directory"
    )
