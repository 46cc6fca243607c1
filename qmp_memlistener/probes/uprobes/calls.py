"""What a thread is in, and what its hits are folded into: calls, windows, commands.  Pure.

Values are made by `windows`; strings are still addresses.  `Pauses` and `Commands` follow what the
main thread alone does: pausing all vCPUs, and carrying out commands.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ...records import SlotOp, StallKind
from .decode import Hit
from .functions import Func

__all__ = ["Call", "CommandSpan", "Commands", "Pauses", "Site", "Span", "Thread", "Window"]


class Site(msgspec.Struct, frozen=True, gc=False):
    """A place in QEMU's source as the lock functions are given it: address of the name, and
    line."""

    file: int
    line: int


class Window(msgspec.Struct, frozen=True, gc=False):
    """A stall in `[start_ns, end_ns)`, at least `at_least_ns` long, caused or suffered by `tid`.

    COMMIT: `inner` inside another one of that thread; `updates` slot updates are in it.
    """

    kind: StallKind
    tid: int
    start_ns: int
    end_ns: int
    at_least_ns: int
    site: Site | None = None
    update: SlotOp | None = None
    handoffs: int | None = None
    inner: bool = False
    updates: int = 0


class CommandSpan(msgspec.Struct, frozen=True, gc=False):
    """A command between its beginning and its end; `info` is the address of its QmpCommand.

    0 for a command of an HMP monitor.
    """

    info: int
    start_ns: int
    end_ns: int


_MOST = 64


@dataclass(slots=True)
class Call:
    """It began at `t_ns`, with `hits` of its thread before it, and returns to `sp`.

    `slot` is the ioctl's argument, `updates` counts the slot updates in it.  `real`: it is a
    resume_all_vcpus that resumes.
    """

    role: Func
    sp: int
    t_ns: int
    hits: int
    site: Site | None = None
    slot: tuple[int, int, int, int, int] | None = None
    updates: int = 0
    real: bool = False


@dataclass(slots=True)
class Span:
    """Something that began: a hold, an inhibition."""

    t_ns: int
    hits: int
    site: Site | None = None
    sure_ns: int = 0


@dataclass(slots=True)
class Thread:
    """A thread whose probes are all in place from `since_ns` on; the youngest call is the last."""

    tid: int
    since_ns: int
    hits: int = 0
    calls: list[Call] = field(default_factory=list)
    hold: Span | None = None
    inhibit: Span | None = None
    last: Hit | None = None

    def begin(self, call: Call) -> None:
        """A call begins.  One of the same function at the same place must have ended unseen."""
        self.end(call.role, call.sp)
        if len(self.calls) >= _MOST:
            self.calls.clear()
        self.calls.append(call)

    def end(self, role: Func, sp: int) -> Call | None:
        """The youngest call of that function at that place on the stack has ended.

        No function whose return is probed can switch coroutines, so calls of a thread nest, and
        those that began later have ended too.
        """
        calls = self.calls
        for i in range(len(calls) - 1, -1, -1):
            call = calls[i]
            if call.sp == sp and call.role is role:
                del calls[i:]
                return call
        return None


# -- the main thread ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Pause:
    start_ns: int
    handoffs: int | None
    paused_ns: int | None = None


class Pauses:
    """From pause_all_vcpus to the resume_all_vcpus that really resumes (cpus.c).

    resume_all_vcpus does nothing while the guest is not to run, as in a system_reset of a stopped
    guest.  A guest that was stopped when the probes came has an unknown past: its pauses are
    reported from the next one on.
    """

    def __init__(self, tid: int) -> None:
        self.known = False
        """Whether the guest was seen, or said, to run."""
        self._tid = tid
        self._pause: _Pause | None = None

    def begin(self, t_ns: int, counting: bool) -> None:
        """pause_all_vcpus is entered; `counting`: all uses of the BQL are seen."""
        if self._pause is None and self.known:
            self._pause = _Pause(t_ns, 0 if counting else None)

    def paused(self, t_ns: int) -> None:
        """It returns: all vCPUs are paused."""
        if self._pause is not None and self._pause.paused_ns is None:
            self._pause.paused_ns = t_ns

    def handoff(self, tid: int) -> None:
        """A thread has got the BQL."""
        pause = self._pausing
        if pause is not None and pause.handoffs is not None and tid != self._tid:
            pause.handoffs += 1

    def miscounted(self) -> None:
        """Some thread may have got the BQL unseen."""
        pause = self._pausing
        if pause is not None:
            pause.handoffs = None

    def resumed(self, enter_ns: int, leave_ns: int) -> Window | None:
        """resume_all_vcpus ran, and had a guest to resume."""
        self.known = True
        return self._end(enter_ns, leave_ns)

    def forget(self) -> None:
        """Hits of the main thread are missing."""
        self._pause = None
        self.known = False

    def finish(self, now_ns: int) -> Window | None:
        """Nothing more is coming: a pause that has not ended lasts until now at least."""
        return self._end(now_ns, now_ns)

    @property
    def _pausing(self) -> _Pause | None:
        """The pause, as long as pause_all_vcpus has not returned."""
        pause = self._pause
        return pause if pause is not None and pause.paused_ns is None else None

    def _end(self, sure_until_ns: int, end_ns: int) -> Window | None:
        pause, self._pause = self._pause, None
        if pause is None or end_ns <= pause.start_ns:
            return None
        sure = pause.paused_ns
        at_least = 0 if sure is None else max(0, sure_until_ns - sure)
        handoffs = None if sure is None else pause.handoffs
        return Window(
            StallKind.VCPU_PAUSE, self._tid, pause.start_ns, end_ns, at_least, handoffs=handoffs
        )


class Commands:
    """Commands of all monitors, QMP and HMP.

    A command runs in some coroutine with its monitor set as the current one, and unset (NULL) right
    after it (do_qmp_dispatch_bh and qmp_dispatch in qmp-dispatch.c, handle_hmp_command in hmp.c).
    What QMP command it is was said just before (qmp_command_available).
    """

    def __init__(self) -> None:
        self._running: dict[int, CommandSpan] = {}
        self._announced = 0

    def announce(self, info: int) -> None:
        """qmp_command_available is asked about a command."""
        self._announced = info

    def monitor(self, coroutine: int, monitor: int, t_ns: int) -> CommandSpan | None:
        """monitor_set_cur is entered; returns the command that has ended.

        An HMP command inside a QMP one sets and restores a monitor in between: the second is no
        end, being not NULL, and one in a coroutine of its own was not announced.
        """
        running = self._running
        if not monitor:
            command = running.pop(coroutine, None)
            return None if command is None else CommandSpan(command.info, command.start_ns, t_ns)
        if coroutine not in running and (self._announced or not running):
            running[coroutine] = CommandSpan(self._announced, t_ns, t_ns)
            self._announced = 0
        return None

    def forget(self) -> None:
        """Hits of the main thread are missing."""
        self._running.clear()
        self._announced = 0
