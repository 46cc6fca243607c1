"""Why a guest cannot be traced through its log: one reason each, with the remedy."""

from __future__ import annotations

from enum import StrEnum

from ..errors import MissingPrerequisite

__all__ = ["TraceReason", "TraceUnavailable"]


class TraceReason(StrEnum):
    """What stands in the way of tracing."""

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
    TraceReason.LOG_SHARED: "give QEMU a log of its own (-D FILE) that nobody else writes to",
    TraceReason.LOG_OF_GUEST: "give QEMU a log of its own (-D FILE), and keep its standard output "
    "and the guest's consoles out of it",
    TraceReason.LOG_PER_THREAD: "start QEMU without -d tid",
    TraceReason.LOG_NOT_RESTORABLE: "start QEMU with -D FILE; that file is then read in place",
    TraceReason.NO_PLACE: "make /dev/shm writable for this user; a QEMU of another user or in "
    "another container needs a monitor on a UNIX socket (-qmp unix:PATH) and an agent run by root",
    TraceReason.OTHER_AGENT: "end the other agent, or run as its user: then both share the log",
}


class TraceUnavailable(MissingPrerequisite):
    """This guest cannot be traced through its log; `reason` says which kind of obstacle."""

    def __init__(self, reason: TraceReason, message: str) -> None:
        super().__init__(message, remedy=_REMEDIES[reason])
        self.reason = reason
