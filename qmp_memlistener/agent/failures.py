"""Notices that the guest failed or was reset, and publishes what is known of why.

What a failure looks like and what may be concluded from it is in `postmortem`.
"""

from __future__ import annotations

import asyncio
import stat
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CommandFailed, MemListenerError, TargetError
from ..host.bounded import in_thread
from ..probes import StallKind
from ..qmp import Monitor, MonitorEvent
from ..qmp.guest import read_registers, read_vcpus, translate
from ..records import GuestReset, GuestState, Record, SlotOp, StallRecord, TransitionRecord
from ..topology import MemoryMap
from .postmortem import (
    MapChange,
    StoppedVcpu,
    explain_reset,
    explain_stop,
    parse_dumps,
    parse_registers,
)
from .source import Publish

__all__ = ["FailureWatch", "stopped_vcpus"]

_KEPT = 64  # transitions
_ASK_S = 2.0
_SETTLE_S = 5.0
_STDERR_BYTES = 64 << 10
# a reset so soon after another is the firmware's doing, on a slow host too
_AGAIN_NS = 10_000_000_000

_GUEST_RESET = "guest-reset"
_KNOWN = "the guest requested it, or a vCPU had a triple fault: QEMU does not report which"
_ASKED = "a command requested it, or the machine did it"


@dataclass(slots=True)
class _History:
    """The latest transitions with their operations, which follow them, and the threads that made
    them, where a probe saw that."""

    changes: deque[tuple[TransitionRecord, list[SlotOp]]] = field(
        default_factory=lambda: deque(maxlen=_KEPT)
    )
    threads: dict[int, str] = field(default_factory=dict)

    def take(self, record: Record) -> None:
        if isinstance(record, TransitionRecord):
            self.changes.append((record, []))
        elif isinstance(record, SlotOp) and self.changes:
            transition, ops = self.changes[-1]
            if record.transition == transition.seq:
                ops.append(record)
        elif isinstance(record, StallRecord) and record.kind == StallKind.COMMIT:
            cause = record.cause
            if cause is not None and isinstance(cause.ref, int) and record.thread is not None:
                self.threads[cause.ref] = record.thread
                while len(self.threads) > _KEPT:
                    del self.threads[next(iter(self.threads))]

    def list(self) -> list[MapChange]:
        return [
            MapChange(t.seq, t.t_ns, tuple(ops), self.threads.get(t.seq)) for t, ops in self.changes
        ]


class FailureWatch:
    """Notices that the guest failed or was reset, and publishes a `GuestFailure` or a `GuestReset`
    that says what is known of why.

    Give it every record (`record`) and every QMP event (`event`) of the attachment.  `settle`
    returns when everything that happened so far has been published, `view` gives the present map,
    `machine` is the machine's type and `pid` QEMU's process where they are known.  A guest is asked
    only when it has stopped with an internal error, or was reset.
    """

    def __init__(
        self,
        monitor: Monitor,
        publish: Publish,
        *,
        settle: Callable[[], Awaitable[None]],
        view: Callable[[], MemoryMap],
        machine: str | None,
        pid: int | None,
    ) -> None:
        self._monitor = monitor
        self._publish = publish
        self._settle = settle
        self._view = view
        # i440FX keeps PAM and SMRAM over a reset (hw/pci-host/i440fx.c), q35.c's mch_reset does not
        self._maps_again = machine is None or "i440fx" not in machine
        self._pid = pid
        self._history = _History()
        self._failed = False
        self._reset_ns: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def _kept_out(self) -> bool:
        return self._monitor.version.release >= (8, 0)

    kinds = (TransitionRecord, SlotOp, StallRecord, GuestState)
    """What `record` wants to be given."""

    def record(self, record: Record) -> None:
        """A record of the attachment, in order."""
        self._history.take(record)
        if isinstance(record, GuestState):
            failed = record.status == "internal-error"
            if failed and not self._failed:
                self._start(self._stopped(record.t_ns))
            self._failed = failed

    def event(self, event: MonitorEvent) -> None:
        """A QMP event of the observer's monitor."""
        if event.name not in ("RESET", "SHUTDOWN"):
            return
        before, self._reset_ns = self._reset_ns, event.t_ns
        guests_own = event.data.get("reason") == _GUEST_RESET
        if event.name == "RESET" or guests_own:
            # a SeaBIOS that finds itself run before opens PAM and resets again (handle_post,
            # tryReboot)
            again = before is not None and event.t_ns - before < _AGAIN_NS
            self._start(self._reset(event, judged=guests_own and not again))

    async def close(self) -> None:
        """Ask no more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _stopped(self, t_ns: int) -> None:
        await self._wait_settled()
        cpus = await stopped_vcpus(self._monitor, self._pid)
        vcpus = await self._count_vcpus()
        failure = explain_stop(
            t_ns,
            cpus,
            self._history.list(),
            kept_out=self._kept_out,
            block_of=self._block_of,
            vcpus=vcpus,
        )
        self._publish([failure])

    async def _reset(self, event: MonitorEvent, *, judged: bool) -> None:
        """`judged`: it may be a death, and is reported with what speaks for that."""
        found = None
        if judged:
            vcpus = await self._count_vcpus()
            await self._wait_settled()
            found = explain_reset(
                event.t_ns,
                self._history.list(),
                kept_out=self._kept_out,
                vcpus=vcpus,
                maps_again=event.name == "RESET" and self._maps_again,
                block_of=self._block_of,
            )
        reason, guest = event.data.get("reason"), event.data.get("guest")
        possible, transition = found if found is not None else (None, None)
        self._publish(
            [
                GuestReset(
                    t_ns=event.t_ns,
                    reason=reason if isinstance(reason, str) else None,
                    guest=guest if isinstance(guest, bool) else None,
                    what=_KNOWN if reason == _GUEST_RESET else _ASKED,
                    shutdown=event.name == "SHUTDOWN",
                    possible=possible,
                    transition=transition,
                )
            ]
        )

    async def _count_vcpus(self) -> int | None:
        vcpus = await read_vcpus(self._monitor, deadline=_ASK_S)
        return len(vcpus) if vcpus is not None else None

    async def _wait_settled(self) -> None:
        """The transition may still be on its way; a guest that is gone leaves what there is."""
        try:
            async with asyncio.timeout(_SETTLE_S):
                await self._settle()
        except (MemListenerError, TimeoutError):
            pass

    def _block_of(self, gpa: int) -> str | None:
        found = self._view().view.lookup(gpa)
        return found.name if found is not None else None

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def stopped_vcpus(monitor: Monitor, pid: int | None) -> list[StoppedVcpu]:
    """Registers and next instruction of every vCPU of a stopped guest; empty if it does not say."""
    try:
        vcpus = parse_registers(await read_registers(monitor, deadline=_ASK_S))
        dumps = await in_thread(_dumps_of, pid) if pid is not None else frozenset[str]()
        found = []
        until = time.monotonic() + _ASK_S
        for vcpu in vcpus:
            gpa = None
            if time.monotonic() < until:
                gpa = await translate(monitor, vcpu.index, vcpu.linear, deadline=_ASK_S)
            found.append(StoppedVcpu(vcpu, gpa, vcpu.general in dumps))
        return found
    except (TargetError, CommandFailed):
        return []


def _dumps_of(pid: int) -> frozenset[str]:
    """What QEMU printed on its standard error, where that is a file that we may read."""
    path = Path(f"/proc/{pid}/fd/2")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return frozenset()
        with path.open("rb") as file:
            file.seek(max(0, found.st_size - _STDERR_BYTES))
            return parse_dumps(file.read(_STDERR_BYTES).decode(errors="replace"))
    except OSError:
        return frozenset()
