"""The source that misses nothing: QEMU's trace lines, with a snapshot when something changed.

QEMU logs the command that asks for a snapshot (event `handle_hmp_command`) before it runs, and
holds the BQL from there until the text is whole.  So the line is exactly where the snapshot
belongs among the operations, and no commit can be on the wrong side of it.
"""

from __future__ import annotations

import asyncio
import secrets
import time

from ..errors import CommandFailed, DeadlineExceeded, ProtocolViolation
from ..qmp import Command, Monitor, TraceSession, TraceTail
from ..qmp.trace_lines import new_marker
from ..qmp.trace_records import (
    BarMapping,
    FlatViewChange,
    FlatViewEvent,
    HmpCommand,
    MemoryDeviceChange,
    MemoryDeviceEvent,
    RunStateChange,
    SlotFailure,
    TraceRecord,
    VirtioMemEvent,
)
from ..records import Cause, CauseType, GuestState, Lost, Note, Record, SlotOp
from ..tracking import Tracker
from .source import (
    BusMasters,
    MakeTracker,
    OwnCommand,
    Patience,
    Publish,
    maps_of,
    snapshot_deadline,
)

__all__ = ["TraceSource"]

MIN_GAP_S = 0.002
"""At least this long between two snapshots, and `GAP_FACTOR` times what the last one took.

That is the longer of QEMU's time and ours: reading the text takes longer than printing it.
"""
GAP_FACTOR = 4.0
RETRY_S = 1.0
PENDING = 256
"""So many commits wait for one snapshot; a guest can make more than that."""
IO_SPACE = 1 << 16
"""BARs of I/O ports lie below, those of memory never do on the machines that have ports."""
_SLICE = 2_000
"""Lines folded before others have their turn: more transitions than the timeline or an inbox deals
with in its own, so that when there is too much of everything, transitions are there first."""
_LINE_DEADLINE = 5.0
_FINISH_DEADLINE = 1.0


class TraceSource:
    """A `Source` that feeds a tracker from one trace session; `read` runs as a task as well."""

    name = "trace"

    def __init__(
        self,
        monitor: Monitor,
        session: TraceSession,
        tail: TraceTail,
        publish: Publish,
        make_tracker: MakeTracker,
        own_command: OwnCommand,
    ) -> None:
        self._monitor = monitor
        self._own_command = own_command
        self._session = session
        self._tail = tail
        self._read_all = asyncio.Event()
        self._folded_to_ns: int | None = None  # while a batch is being folded
        self._publish = publish
        self._make_tracker = make_tracker
        self.tracker: Tracker | None = None
        self.masters = BusMasters()
        self.snapshots = 0
        self.snapshot_ns = 0
        self._patience = Patience(publish)
        self._line = _snapshot_line()
        self._armed = False
        self._marker: int | None = None
        self._mark_ns = 0
        self._at_mark = asyncio.Event()
        self._dirty = asyncio.Event()
        self._snapshot_lock = asyncio.Lock()
        self._sync: dict[int, asyncio.Event] = {}
        self._losses = 0
        self._losses_mended = 0
        self._early: list[TraceRecord] = []

    async def read(self) -> None:
        """Fold lines in as they come, until the tail is finished."""
        try:
            await self._read()
        finally:
            self._read_all.set()

    def poke(self) -> None:
        """Nothing to do: whatever happened is in the log."""

    def reported_to(self) -> int | None:
        """Everything up to this time is reported; None before the first snapshot."""
        if self.tracker is None:
            return None
        handed_out = self._folded_to_ns
        if handed_out is None:
            handed_out = self._tail.handed_out_ns
        waits = self.tracker.unreported_ns
        return handed_out if waits is None else min(waits, handed_out)

    async def finish(self) -> None:
        """Read the log to its end."""
        self._tail.finish()
        try:
            async with asyncio.timeout(_FINISH_DEADLINE):
                await self._read_all.wait()
        except TimeoutError:
            now = time.monotonic_ns()
            self._publish([Lost(t_ns=now, what="QEMU's log was not read to its end in time")])

    async def _read(self) -> None:
        async for batch in self._tail:
            self._folded_to_ns = batch.t_after_ns
            if batch.lost is not None:
                self._losses += 1
                self._hand_out([Lost(t_ns=batch.t_ns, what=batch.lost)])
                self._dirty.set()
            for at in range(0, len(batch.records), _SLICE):
                if at:
                    await asyncio.sleep(0)  # a signal, a reply, a release of stalls
                self._fold_some(batch.records[at : at + _SLICE])
            self._folded_to_ns = None

    def _fold_some(self, lines: list[TraceRecord]) -> None:
        extra = [record for line in lines if (record := self._fold(line)) is not None]
        self._hand_out(extra)

    def _hand_out(self, extra: list[Record]) -> None:
        tracker = self.tracker
        if tracker is not None and tracker.pending:
            tracker.relieve(PENDING)
            self._dirty.set()
        if extra or (tracker is not None and tracker.has_news):
            self._publish(extra)

    async def keep_snapshots(self) -> None:
        """Take a snapshot whenever something changed, without taking more than a fifth of it."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            start = time.monotonic()
            try:
                await self.snapshot()
            except DeadlineExceeded as exc:
                self._patience.stalled(exc)
                self._dirty.set()
                took_s = RETRY_S / GAP_FACTOR
            else:
                self._patience.answered()
                took_s = time.monotonic() - start
            await asyncio.sleep(max(MIN_GAP_S, GAP_FACTOR * took_s))

    async def snapshot(self) -> int:
        """Take one snapshot and fold it in; returns how long it took, in ns.

        Raises DeadlineExceeded, TargetLost, CommandFailed.
        """
        async with self._snapshot_lock:
            losses = self._losses  # one that comes later needs a later snapshot
            marker = self._marker = new_marker()
            self._armed = False
            self._at_mark.clear()
            replies = await self._monitor.pipeline(
                [_hmp(f"print {marker:#x}"), _hmp(self._line)], deadline=snapshot_deadline()
            )
            reply = replies[1]
            if isinstance(reply, CommandFailed):
                raise reply
            if not isinstance(reply.value, str):
                raise ProtocolViolation(f"{self._monitor.target} returned no text for info mtree")
            try:
                async with asyncio.timeout(_LINE_DEADLINE):
                    await self._at_mark.wait()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"QEMU's log {self._session.path} does not show the last command",
                    remedy="QEMU's log may have been redirected; attach again",
                ) from None
            maps = maps_of(reply.value)
            self.masters.take(reply.value, reply.t_start_ns, reply.t_end_ns)
            first = replies[0]
            start = first.t_start_ns if not isinstance(first, CommandFailed) else reply.t_start_ns
            took = reply.t_end_ns - start
            self._own_command("info mtree", max(start, self._mark_ns), reply.t_end_ns)
            self.snapshots += 1
            self.snapshot_ns += took
            if self.tracker is None:
                self.tracker = self._make_tracker(maps, reply.t_end_ns)
                early, self._early = self._early, []
                for line in early:
                    self._fold(line)
            elif losses != self._losses_mended:
                self.tracker.resync(maps, reply.t_end_ns)
            else:
                self.tracker.snapshot(maps, reply.t_end_ns)
            self._losses_mended = losses
            if self.tracker.pending or self._losses != losses:
                self._dirty.set()
            else:
                self._dirty.clear()  # what came meanwhile was before this snapshot's place
            self._publish(())
            return took

    async def settle(self) -> None:
        """Wait until everything QEMU has logged so far is folded in and reported."""
        number = await self._session.marker()
        seen = self._sync.setdefault(number, asyncio.Event())
        try:
            async with asyncio.timeout(_LINE_DEADLINE):
                await seen.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"QEMU's log {self._session.path} does not show the last command"
            ) from None
        finally:
            del self._sync[number]
        if self._unreported:
            async with self._snapshot_lock:
                pass  # one that is under way may cover it
        if self._unreported:
            await self.snapshot()

    @property
    def _unreported(self) -> bool:
        """A commit waits for a snapshot, or for the answer to one whose line has been read."""
        return self.tracker is not None and self.tracker.unreported_ns is not None

    def _fold(self, line: TraceRecord) -> Record | None:
        tracker = self.tracker
        match line:
            case HmpCommand():
                self._hmp(line)
            case _ if tracker is None:
                # the first snapshot shows what was before its line, not what came after
                if self._at_mark.is_set():
                    self._early.append(line)
            case SlotOp():
                tracker.commits.slot_operation(line)
            case FlatViewEvent(change=FlatViewChange.NEW):
                tracker.commits.view_rebuilt(line.t_ns, line.root, line.late_ns)
            case BarMapping():
                in_memory = line.addr + line.size > IO_SPACE
                tracker.commits.cause(_bar_cause(line), moves_bar=in_memory)
            case MemoryDeviceEvent(change=MemoryDeviceChange.PLUG | MemoryDeviceChange.UNPLUG):
                verb = "plugged" if line.change is MemoryDeviceChange.PLUG else "unplugged"
                tracker.commits.cause(
                    Cause(
                        CauseType.MEMORY_DEVICE, device=line.id, detail=f"{verb} at {line.addr:#x}"
                    ),
                    after=True,
                )
            case RunStateChange():
                return GuestState(
                    t_ns=line.t_ns,
                    status=line.new,
                    running=line.new == "running",
                    event="runstate_set",
                )
            case VirtioMemEvent():
                return Note(t_ns=line.t_ns, text=_virtio_mem_text(line))
            case SlotFailure():
                return Note(
                    t_ns=line.t_ns,
                    text=f"KVM refused slot {line.slot} at {line.start:#x}: {line.error}",
                )
        return None

    def _hmp(self, line: HmpCommand) -> None:
        if line.marker is not None:
            if line.marker == self._marker:
                self._armed = True
            seen = self._sync.get(line.marker)
            if seen is not None:
                seen.set()
            else:
                # the line may come before settle() knows the number it waits for
                self._sync[line.marker] = event = asyncio.Event()
                event.set()
                self._forget_old_syncs()
        elif self._armed and line.line == self._line:
            self._armed = False
            self._mark_ns = line.t_ns
            if self.tracker is not None:
                self.tracker.mark()
            self._at_mark.set()

    def _forget_old_syncs(self) -> None:
        while len(self._sync) > 64:
            del self._sync[next(iter(self._sync))]


def _snapshot_line() -> str:
    """The command, with blanks of our own: another agent's snapshots must not look like ours."""
    gaps = (" " * (1 + secrets.randbelow(32)) for _ in range(3))
    return "info{}mtree{}-o{}-D".format(*gaps)


def _hmp(line: str) -> Command:
    return Command("human-monitor-command", {"command-line": line})


def _bar_cause(line: BarMapping) -> Cause:
    verb = "mapped" if line.mapped else "unmapped"
    return Cause(
        CauseType.PCI_BAR,
        device=f"{line.device} {line.bus:02x}:{line.slot:02x}.{line.func}",
        detail=f"BAR {line.bar} {verb} at {line.addr:#x}, {line.size:#x} bytes",
    )


def _virtio_mem_text(line: VirtioMemEvent) -> str:
    known = {
        "addr": line.addr,
        "blocks": line.nb_blocks,
        "old size": line.old_size,
        "new size": line.new_size,
    }
    details = ", ".join(f"{k} {v:#x}" for k, v in known.items() if v is not None)
    return f"virtio-mem {line.event.replace('_', ' ')}: {details}".rstrip(": ")
