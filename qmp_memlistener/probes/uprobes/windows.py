"""Hits in, windows out: the state of every thread and of the pause.

Pure: no clock, no process.  Hits come in the order of each thread; across threads the order matters
only for counting hand-offs of the BQL.  A window is reported only if its beginning and its end were
seen and nothing in between was lost.

What makes a window of BQL_HOLD sound: in 7.2 to 11.1 the lock is a static variable of cpus.c; it is
taken by bql_lock_impl only, and released by bql_unlock and by waits on a condition variable with
the lock as their mutex only (cpus.c, and do_run_on_cpu of cpus-common.c, which is handed it).  All
of them are probed.  Which waits are with that lock is known by its address, which qemu_mutex_lock
is given inside bql_lock_impl.  Until that is known every wait of a thread ends its hold unreported.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ...memslots import OpKind
from ...records import SlotOp, StallKind
from .calls import Call, Commands, CommandSpan, Pauses, Site, Span, Thread, Window
from .decode import Hit
from .functions import Func

__all__ = ["SLOT_IOCTLS", "Windows"]

SLOT_IOCTLS = (0x4020AE46, 0x40A0AE49)
"""KVM_SET_USER_MEMORY_REGION and KVM_SET_USER_MEMORY_REGION2 (include/uapi/linux/kvm.h)."""

_SLOT = struct.Struct("<IIQQQ")  # slot, flags, guest_phys_addr, memory_size, userspace_addr
_CLOCK_VIRTUAL = 1  # QEMU_CLOCK_VIRTUAL, include/qemu/timer.h
_NESTED_BYTES = 4096  # a callee's frame lies no deeper below that of bql_lock_impl


class Windows:
    """Folds hits into windows and commands, which `take` gives out.

    `main` is the id of the main thread, `popped` how far a return moves the stack pointer,
    `hit_ns` what one hit costs at most.
    """

    def __init__(self, main: int, *, popped: int = 8, hit_ns: int = 0) -> None:
        self.main = main
        self.bql: int | None = None
        """The lock's address, once learned."""
        self.undecoded = 0
        """Slot updates whose structure was not where it should be."""
        self.contradictions = 0
        """Holds dropped because the thread took the lock once more."""
        self._popped = popped
        self._hit_ns = hit_ns
        self._threads: dict[int, Thread] = {}
        self._bql_since: int | None = None
        self._short = self._short_ns = 0
        self._windows: list[Window] = []
        self._commands: list[CommandSpan] = []
        self._pauses = Pauses(main)
        self._monitors = Commands()
        self._entries: dict[Func, Callable[[Thread, Hit], None]] = {
            Func.COMMIT: self._enter,
            Func.SLOT_IOCTL: self._slot_ioctl,
            Func.INHIBIT_BEGIN: self._enter,
            Func.INHIBIT_END: self._inhibit_end,
            Func.PAUSE: self._pausing,
            Func.RESUME: self._enter,
            Func.CLOCK: self._clock,
            Func.COMMAND: self._command,
            Func.CURRENT_MONITOR: self._current_monitor,
            Func.MUTEX_LOCK: self._mutex_lock,
            Func.LEARN_LOCK: self._nothing,
            Func.BQL_LOCK: self._bql_lock,
            Func.BQL_UNLOCK: self._bql_unlock,
            Func.COND_WAIT: self._cond_wait,
            Func.COND_TIMEDWAIT: self._cond_wait,
        }
        self._returns: dict[Func, Callable[[Thread, Hit, Call], None]] = {
            Func.COMMIT: self._committed,
            Func.SLOT_IOCTL: self._slot_updated,
            Func.INHIBIT_BEGIN: self._inhibited,
            Func.PAUSE: self._paused,
            Func.RESUME: self._resumed,
            Func.BQL_LOCK: self._bql_locked,
            Func.COND_WAIT: self._bql_retaken,
            Func.COND_TIMEDWAIT: self._bql_retaken,
        }

    # -- what the reader knows ---------------------------------------------------------------------

    def thread(self, tid: int, since_ns: int) -> None:
        """All probes of a thread are in place from `since_ns` on; earlier hits of it are void."""
        self._threads[tid] = Thread(tid, since_ns)
        self._pauses.miscounted()  # what the new thread did until now is not known

    def ended(self, tid: int) -> None:
        """The thread is gone and all its hits have been fed."""
        self._threads.pop(tid, None)

    def bql_on(self, since_ns: int) -> None:
        """The lock's probes are in place on all threads from `since_ns` on."""
        self._bql_since = since_ns

    def bql_off(self) -> None:
        """They no longer are, and all their hits have been fed."""
        self._bql_since = None
        for thread in self._threads.values():
            thread.hold = None
            thread.calls = [f for f in thread.calls if f.role not in _BQL_ROLES]
        self._pauses.miscounted()

    def guest_runs(self, running: bool) -> None:
        """Whether the guest ran when the probes were in place; see `Pauses`."""
        self._pauses.known |= running

    def finish(self, now_ns: int) -> None:
        """Nothing more is coming: report a pause that has not ended."""
        self._tell(self._pauses.finish(now_ns))

    def take(self) -> tuple[list[Window], list[CommandSpan]]:
        """What was found since the last call."""
        found = self._windows, self._commands
        self._windows, self._commands = [], []
        return found

    def take_short(self) -> tuple[int, int]:
        """How many short commits were not reported since the last call, and their ns in all."""
        found = self._short, self._short_ns
        self._short = self._short_ns = 0
        return found

    # -- hits --------------------------------------------------------------------------------------

    def feed(self, hit: Hit) -> None:
        """The next hit of its thread."""
        thread = self._threads.get(hit.tid)
        if thread is None or hit.t_ns < thread.since_ns:
            return
        point = hit.point
        if point is None:
            self._reset(thread)
            return
        role = point.role
        if role in _BQL_ROLES and (self._bql_since is None or hit.t_ns < self._bql_since):
            return
        if hit.calls:
            self._short_calls(thread, hit)
            return
        thread.hits += 1
        if point.is_return:
            call = thread.end(role, hit.sp - self._popped)
            if call is not None:
                self._returns[role](thread, hit, call)
        else:
            self._entries[role](thread, hit)
        thread.last = hit

    def _short_calls(self, thread: Thread, hit: Hit) -> None:
        """Commits that did nothing, with nothing in between."""
        thread.hits += 2 * hit.calls
        thread.last = None
        if not any(f.role is Func.COMMIT for f in thread.calls):
            self._short += hit.calls
            self._short_ns += hit.result

    def _reset(self, thread: Thread) -> None:
        """Hits of this thread are missing: forget all that they might have ended."""
        thread.calls.clear()
        thread.hold = thread.inhibit = thread.last = None
        self._pauses.miscounted()
        if thread.tid == self.main:
            self._pauses.forget()
            self._monitors.forget()

    def _enter(self, thread: Thread, hit: Hit) -> None:
        assert hit.point is not None
        thread.begin(Call(hit.point.role, hit.sp, hit.t_ns, thread.hits))

    def _window(
        self,
        kind: StallKind,
        thread: Thread,
        since: Call | Span,
        end_ns: int,
        *,
        update: SlotOp | None = None,
        inner: bool = False,
        updates: int = 0,
    ) -> None:
        """From the hit that `since` was made at to this one.

        Both of these hits are partly in the window: the rest of the first after its time stamp,
        and the beginning of the last before its own.
        """
        cost = (thread.hits - since.hits + 1) * self._hit_ns
        at_least = max(0, end_ns - since.t_ns - cost)
        self._windows.append(
            Window(
                kind,
                thread.tid,
                since.t_ns,
                end_ns,
                at_least,
                since.site,
                update,
                None,
                inner,
                updates,
            )
        )

    # -- commits and slots -------------------------------------------------------------------------

    def _committed(self, thread: Thread, hit: Hit, call: Call) -> None:
        inner = any(f.role is Func.COMMIT for f in thread.calls)
        self._window(StallKind.COMMIT, thread, call, hit.t_ns, inner=inner, updates=call.updates)

    def _slot_ioctl(self, thread: Thread, hit: Hit) -> None:
        if hit.args[1] & 0xFFFFFFFF not in SLOT_IOCTLS:
            return
        at = hit.args[2] - hit.sp
        if not 0 <= at <= len(hit.stack) - _SLOT.size:
            self.undecoded += 1
            return
        call = Call(Func.SLOT_IOCTL, hit.sp, hit.t_ns, thread.hits)
        call.slot = _SLOT.unpack_from(hit.stack, at)
        thread.begin(call)

    def _slot_updated(self, thread: Thread, hit: Hit, call: Call) -> None:
        assert call.slot is not None
        slot, flags, gpa, size, hva = call.slot
        update = SlotOp(
            t_ns=hit.t_ns,
            as_id=slot >> 16,  # Documentation/virt/kvm/api.rst
            slot=slot & 0xFFFF,
            op=OpKind.ADD if size else OpKind.DELETE,
            gpa=gpa,
            size=size,
            flags=flags,
            ret=((hit.result & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000,
            hva=hva,
        )
        for outer in thread.calls:
            outer.updates += 1
        self._window(StallKind.SLOT_UPDATE, thread, call, hit.t_ns, update=update)

    def _inhibited(self, thread: Thread, hit: Hit, call: Call) -> None:
        thread.inhibit = Span(call.t_ns, call.hits, sure_ns=hit.t_ns)

    def _inhibit_end(self, thread: Thread, hit: Hit) -> None:
        span, thread.inhibit = thread.inhibit, None
        if span is not None:
            cost = (thread.hits - span.hits) * self._hit_ns
            at_least = max(0, hit.t_ns - span.sure_ns - cost)
            self._windows.append(
                Window(StallKind.VCPU_INHIBIT, thread.tid, span.t_ns, hit.t_ns, at_least)
            )

    # -- the main thread -----------------------------------------------------------------------

    def _pausing(self, thread: Thread, hit: Hit) -> None:
        self._enter(thread, hit)
        since = self._bql_since
        self._pauses.begin(hit.t_ns, since is not None and since <= hit.t_ns)

    def _paused(self, thread: Thread, hit: Hit, call: Call) -> None:
        del thread, call
        self._pauses.paused(hit.t_ns)

    def _clock(self, thread: Thread, hit: Hit) -> None:
        """Only inside resume_all_vcpus is it a sign: others call it for reasons of their own."""
        if hit.args[0] & 0xFFFFFFFF == _CLOCK_VIRTUAL and hit.args[1] & 0xFF and thread.calls:
            top = thread.calls[-1]
            top.real = top.role is Func.RESUME

    def _resumed(self, thread: Thread, hit: Hit, call: Call) -> None:
        del thread
        if call.real:
            self._tell(self._pauses.resumed(call.t_ns, hit.t_ns))

    def _command(self, thread: Thread, hit: Hit) -> None:
        del thread
        self._monitors.announce(hit.args[0])

    def _current_monitor(self, thread: Thread, hit: Hit) -> None:
        del thread
        command = self._monitors.monitor(hit.args[0], hit.args[1], hit.t_ns)
        if command is not None:
            self._commands.append(command)

    def _tell(self, window: Window | None) -> None:
        if window is not None:
            self._windows.append(window)

    # -- the BQL -----------------------------------------------------------------------------------

    def _nothing(self, thread: Thread, hit: Hit) -> None:
        """That it was the last hit is all that matters."""

    def _mutex_lock(self, thread: Thread, hit: Hit) -> None:
        """The first mutex that is locked inside bql_lock_impl is the BQL itself."""
        last = thread.last
        if (
            self.bql is None
            and last is not None
            and last.point is not None
            and last.point.role in (Func.LEARN_LOCK, Func.BQL_LOCK)
            and not last.point.is_return
            and 0 <= last.sp - hit.sp < _NESTED_BYTES  # 0: 11.1 ends in a jump to it
        ):
            self.bql = hit.args[0]

    def _bql_lock(self, thread: Thread, hit: Hit) -> None:
        if thread.hold is not None:
            # It is not recursive (an assertion in the function), so a release was not seen.
            self.contradictions += 1
            thread.hold = None
        site = Site(hit.args[0], hit.args[1] & 0x7FFFFFFF)
        thread.begin(Call(Func.BQL_LOCK, hit.sp, hit.t_ns, thread.hits, site))

    def _bql_locked(self, thread: Thread, hit: Hit, call: Call) -> None:
        self._window(StallKind.BQL_WAIT, thread, call, hit.t_ns)
        self._hold(thread, hit, call)

    def _bql_retaken(self, thread: Thread, hit: Hit, call: Call) -> None:
        self._hold(thread, hit, call)

    def _hold(self, thread: Thread, hit: Hit, call: Call) -> None:
        thread.hold = Span(hit.t_ns, thread.hits, call.site)
        self._pauses.handoff(thread.tid)

    def _bql_unlock(self, thread: Thread, hit: Hit) -> None:
        hold, thread.hold = thread.hold, None
        if hold is not None:
            self._window(StallKind.BQL_HOLD, thread, hold, hit.t_ns)

    def _cond_wait(self, thread: Thread, hit: Hit) -> None:
        """qemu_cond_wait_impl(cond, mutex, file, line), timedwait with ms before the file."""
        assert hit.point is not None
        role = hit.point.role
        if self.bql is None:
            thread.hold = None
            return
        if hit.args[1] != self.bql:
            return
        self._bql_unlock(thread, hit)
        at = 2 if role is Func.COND_WAIT else 3
        site = Site(hit.args[at], hit.args[at + 1] & 0x7FFFFFFF)
        thread.begin(Call(role, hit.sp, hit.t_ns, thread.hits, site))


_BQL_ROLES = frozenset((Func.BQL_LOCK, Func.BQL_UNLOCK, Func.COND_WAIT, Func.COND_TIMEDWAIT))
