"""A thread that runs one vCPU: enters the guest, counts its exits, and pauses when asked to.

One signal kicks it out of KVM_RUN.  It is blocked in the thread and unblocked by KVM while the
guest runs (KVM_SET_SIGNAL_MASK), so a kick is never lost and no handler ever runs; all other
signals stay away from the thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from . import abi, system
from .abi import ExitReason
from .vm import DirtyRings, Vcpu

__all__ = ["KICK", "Exits", "Surroundings", "VcpuThread"]

KICK = signal.SIGRTMAX - 5
_EVERYTHING = (1 << 64) - 1


class Surroundings(Protocol):
    """What the vCPUs of a machine share.

    `hole` is the range that is not RAM at present, `touched` says that the guest goes there on
    purpose.  `changes` counts what was done to host mappings.  `bql` is QEMU's big lock, for
    strategies that go through it.
    """

    hole: tuple[int, int]
    touched: bool
    changes: int
    bql: threading.Lock
    rings: DirtyRings | None


@dataclass(slots=True)
class Exits:
    """What a vCPU met so far.

    `spurious` exits are accesses to RAM that should be there; `hole` those to the hole; `faults`
    those of both that came as -EFAULT; `internal_errors` and `shutdowns` ended the guest.
    """

    spurious: int = 0
    hole: int = 0
    faults: int = 0
    internal_errors: int = 0
    shutdowns: int = 0

    @property
    def harm(self) -> int:
        """Whatever a guest should never see."""
        return self.spurious + self.internal_errors + self.shutdowns


class VcpuThread:
    """Runs a vCPU from `begin` to `stop`.

    Between `ask_to_pause` and `resume` it is out of KVM_RUN.  So is a guest that died, until
    `revive`.  `waits`: it met a hole, and only another mapping lets it go on.  `entered_ns` is when
    it last entered the guest after a pause.  `failure` is set when KVM_RUN fails in a way that
    no guest can cause.
    """

    def __init__(self, vcpu: Vcpu, surroundings: Surroundings) -> None:
        self.vcpu = vcpu
        self.exits = Exits()
        self.death: str | None = None
        self.failure: OSError | None = None
        self.entered_ns = 0
        self._around = surroundings
        self._hold = False
        self._through_bql = False
        self._stopping = False
        self.waits = False
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._paused: SimpleQueue[None] = SimpleQueue()
        self._entered: SimpleQueue[None] = SimpleQueue()
        self._requests = self._answered = 0
        name = f"vcpu-{vcpu.index}"
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    # -- the other side ------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the thread, paused; `resume` sends it into the guest."""
        self._requests += 1
        self._hold = True
        self._thread.start()
        self._paused.get()

    def ask_to_pause(self, through_bql: bool = False) -> None:
        """Kick it; `wait_paused` must follow."""
        self._through_bql = through_bql
        self._requests += 1
        self._hold = True
        self._tokens.put(None)  # it may be out already, dead or at a hole
        self._kick()

    def wait_paused(self) -> None:
        """It is out of KVM_RUN, or dead."""
        self._paused.get()

    def resume(self) -> None:
        """It may enter the guest; `wait_running` must follow."""
        self._hold = False
        self._tokens.put(None)

    def wait_running(self) -> None:
        """It is about to enter the guest; at once when it is dead."""
        if self.death is None and self.failure is None:
            self._entered.get()

    def memory_changed(self) -> None:
        """Host mappings were changed: a vCPU that waits at a hole tries again."""
        if self.waits:
            self._tokens.put(None)

    def revive(self) -> None:
        """A vCPU that died was given a new state, while it is held."""
        self.death = None

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping = True
        while self._thread.is_alive():
            self._tokens.put(None)
            self._kick()
            self._thread.join(0.01)

    def _kick(self) -> None:
        thread = self._thread.ident
        if thread is not None and self._thread.is_alive():
            signal.pthread_kill(thread, KICK)

    # -- the thread ----------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            self.vcpu.set_signal_mask(_EVERYTHING & ~(1 << (KICK - 1)))
            self._loop()
        except OSError as exc:
            self.failure = exc
        if not self._stopping:
            self._pause()  # `wait_paused` must return

    def _loop(self) -> None:
        fd, run, mmio = self.vcpu.fd, self.vcpu.run, self.vcpu.run.exit.mmio
        exits, around = self.exits, self._around
        enter = system.raw_ioctl
        while not self._stopping:
            if self._hold or self.death is not None:
                self._pause()
                continue
            changes = around.changes
            if enter(fd, abi.RUN, None) < 0:
                self._returned(ctypes.get_errno(), changes)
            elif run.exit_reason == ExitReason.MMIO:
                start, end = around.hole
                if start <= mmio.phys_addr < end:
                    exits.hole += 1
                else:
                    exits.spurious += 1
                if not mmio.is_write:
                    mmio.data = 0xFFFF_FFFF_FFFF_FFFF  # what an empty bus gives
            else:
                self._exited(run.exit_reason)

    def _returned(self, number: int, changes: int) -> None:
        """KVM_RUN failed with this errno."""
        if number == errno.EINTR:
            signal.sigtimedwait((KICK,), 0)
        elif number == errno.EFAULT:
            # no KVM without MEMORY_FAULT_INFO says where; some that have it do not either
            self.exits.faults += 1
            if self._at_hole():
                self.exits.hole += 1
            else:
                self.exits.spurious += 1
            self._wait_for_change(changes)
        else:
            raise OSError(number, os.strerror(number), "KVM_RUN")

    def _at_hole(self) -> bool:
        """An access that came as -EFAULT was to the hole, as far as is known."""
        run = self.vcpu.run
        start, end = self._around.hole
        if run.exit_reason == ExitReason.MEMORY_FAULT:
            gpa: int = run.exit.memory_fault.gpa
            return start <= gpa < end
        return self._around.touched and start < end

    def _exited(self, reason: int) -> None:
        if reason == ExitReason.INTERNAL_ERROR:
            self.exits.internal_errors += 1
            self.death = f"KVM internal error, suberror {self.vcpu.run.exit.internal.suberror}"
        elif reason == ExitReason.SHUTDOWN:
            self.exits.shutdowns += 1
            self.death = "shutdown (triple fault)"
        elif reason == ExitReason.DIRTY_RING_FULL and self._around.rings is not None:
            self._around.rings.drain()
        elif reason not in (ExitReason.INTR, ExitReason.IRQ_WINDOW_OPEN):
            raise OSError(errno.EPROTO, f"the guest left with exit reason {reason}", "KVM_RUN")

    def _wait_for_change(self, changes: int) -> None:
        """The instruction can only be repeated when the mapping is another one."""
        self.waits = True
        while self._around.changes == changes and not (self._hold or self._stopping):
            self._tokens.get()
        self.waits = False

    def _pause(self) -> None:
        """Out of the guest, until it is not held and lives."""
        through_bql = False
        while (self._hold or self.death is not None or self.failure) and not self._stopping:
            if self._hold and self._answered != self._requests:
                through_bql = self._through_bql
                if through_bql:
                    # QEMU's vCPU threads take the BQL on their way out, and see `stop` under it
                    self._pass_bql()
                self._answered = self._requests
                self._paused.put(None)
            self._tokens.get()
        if self._stopping:
            return
        if through_bql:
            self._pass_bql()
        self.entered_ns = time.monotonic_ns()
        self._entered.put(None)

    def _pass_bql(self) -> None:
        """Take the lock and give it back, unless the thread is to end."""
        while not self._stopping:
            if self._around.bql.acquire(timeout=0.05):
                self._around.bql.release()
                return
