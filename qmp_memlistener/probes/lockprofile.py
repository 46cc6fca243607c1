"""The `lockprofile` probe: who waited for the BQL and how long in all, as QEMU itself counts it.

QEMU's synchronization profiler is off as a rule.  It is switched on around bursts, or for the whole
attachment when the user named the probe, and put back afterwards; when somebody else has it on it
stays on, and when somebody else switches it off it stays off.  It knows sums for each call site,
not single waits: what follows from two snapshots is stated in `LockProfileProbe`.  The text is
`lockprofile_text`'s business.

A note (`host.notes`, PID-START.sync-profile) is held as long as it is on by our doing, so that it
is switched off for good: should this process be killed, by the next attach or `doctor --clean`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..errors import MemListenerError, ProtocolViolation
from ..host import notes
from ..host.directory import HeldFile
from ..host.processes import Process
from ..qmp import Monitor, hmp, hmp_timed
from ..records import MeasurementRecord
from ..text import json_bytes, quoted
from .delivery import Progress
from .lockprofile_text import Profile, Waits, difference, read_profile
from .model import Context, Observation, ProbeInfo, ProbeUnavailable, Sink, StallKind, Verdict

__all__ = ["LockProfileProbe", "ProfilerNote", "left_on", "note_profiler", "switch_off"]

_WHAT = "sync-profile"
_RESOLUTION_NS = 1_000_000
# More than the call sites there are (20 to 60 on 7.2 to 11.1), so that none is left out: a site
# that one snapshot lacks would count with all it ever waited.
_ROWS = 1000
_PERIOD_S = 2.0
_DEADLINE_S = 2.0
_STOP_S = 2.0
_NOT_VISIBLE = "QEMU's process is not visible here"
_NAME_IT = (
    "run this on the host of that QEMU, or name the probe: then its profiler stays on should this "
    "process be killed"
)


class ProfilerNote(notes.DiskNote, frozen=True, kw_only=True):
    """The lock profiler of this QEMU is on by our doing."""

    what: str = _WHAT

    @property
    def text(self) -> str:
        """For people."""
        return f"the lock profiler is on in QEMU (pid {self.pid})"


def note_profiler(process: Process) -> HeldFile | None:
    """Write that the profiler of this QEMU is about to be switched on.

    A note that a dead owner left is taken over.  Remove it when the profiler is off again; close it
    when that failed.  None when a live process of ours holds one.  Raises MissingPrerequisite when
    there is no directory that is ours alone.
    """
    held = notes.hold(f"{process.key}.{_WHAT}")
    if held is None:
        return None
    try:
        held.write(json_bytes(ProfilerNote.about(process)))
    except OSError:
        held.close()
        raise
    return held


def left_on(process: Process | None = None) -> list[notes.Stale[ProfilerNote]]:
    """What dead owners of this user left switched on (in this QEMU), in QEMUs that still run."""
    found = notes.stale(_WHAT, ProfilerNote, key=None if process is None else process.key)
    return [left for left in found if left.note.pid is not None]


async def switch_off(monitor: Monitor, left: notes.Stale[ProfilerNote]) -> bool:
    """Do it over any monitor of that QEMU and remove the note.

    False when it was no longer left over: somebody switched it off, or has it in use.  Raises
    CommandFailed and as `Monitor.timed` does; then the note stays.
    """
    held = left.take()
    if held is None:
        return False
    with held:
        await hmp(monitor, "sync-profile off", quiet=True)
        held.remove()
    return True


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """`from_ns` and `to_ns` are the times of the command that took it."""

    profile: Profile
    from_ns: int
    to_ns: int


class LockProfileProbe:
    """Delivers, for each span between two snapshots, a measurement with for each call site

    - `bql_wait_ns@SITE`: how long taking the BQL took there, in ns, over all threads;
    - `count@SITE`: how often it was taken there, with or without a wait,

    and for each site whose wait exceeds the resolution an Observation of kind `bql_wait`: n times
    made w ns, so the longest single wait was at least w / n and at most w.  It ended between the
    snapshots, and so began at most w before the first one.  What QEMU's printing rounds off is in
    the bracket as well.  A wait that still goes on is counted when it is over.
    """

    info = ProbeInfo(
        name="lockprofile",
        measures=(StallKind.BQL_WAIT,),
        needs="nothing but the monitor",
        resolution_ns=_RESOLUTION_NS,
        cost="0.6 ms of main loop for each snapshot (around operations; every 2 s when named), "
        "and two clock reads for each lock taken meanwhile",
        share=0.001,
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._always = context.named or StallKind.BQL_WAIT in context.must_see
        self._progress = Progress(self._tell)
        self._lock = asyncio.Lock()
        self._bursts = 0
        self._sink: Sink | None = None
        self._claim: HeldFile | None = None
        self._undo = False
        self._on_ns = 0
        self._last: _Snapshot | None = None
        self._task: asyncio.Task[None] | None = None

    async def check(self) -> Verdict:
        """Usable when this QEMU has the profiler; asks whether it is on, changes nothing."""
        if self._context.guest is None and not self._context.named:
            return Verdict.no(_NOT_VISIBLE, _NAME_IT)
        try:
            await self._is_on()
        except MemListenerError as error:
            return Verdict.no(error.message, error.remedy)
        return Verdict(True)

    async def start(self, sink: Sink) -> None:
        """Put back what a dead process of ours left; switch on if it is to be on all the time."""
        self._sink = sink
        sink.measures(self.info.name, ())
        try:
            async with self._lock:
                await self._restore_stale(sink)
                if self._always:
                    await self._switch_on()
        except MemListenerError as error:
            await self.stop()
            raise ProbeUnavailable(error.message, remedy=error.remedy) from error
        except BaseException:
            await self.stop()
            raise
        if self._always:
            self._task = asyncio.create_task(self._keep_taking(), name="lock profile")
        self._progress.start()

    async def burst(self, on: bool) -> None:
        """Switch on before an operation, switch off after it; bursts may be nested."""
        self._bursts = max(0, self._bursts + (1 if on else -1))
        if on and self._bursts == 1:
            await self._guarded(self._begin)
        elif not on and self._bursts == 0:
            await self._guarded(self._end)

    async def flush(self) -> None:
        """Deliver what has been counted so far."""
        called_ns = time.monotonic_ns()
        if self._last is not None:
            await self._guarded(self._take)
        if self._sink is not None:
            self._sink.advance(self.info.name, called_ns)

    async def stop(self) -> None:
        """Deliver the rest, and leave the profiler as it was found."""
        self._progress.stop()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._guarded(self._take)
                await self._guarded(self._switch_off)
        except TimeoutError:
            pass
        finally:
            self._sink = None
            self._let_go()

    # -- inside ------------------------------------------------------------------------------

    async def _guarded(self, action: Callable[[], Awaitable[None]]) -> None:
        """One at a time; what fails is said, it does not end the probe."""
        try:
            async with self._lock:
                await action()
        except MemListenerError as error:
            if self._sink is not None and not self._context.monitor.lost.done():
                self._sink.lost(self.info.name, f"no lock profile: {error.message}")

    async def _begin(self) -> None:
        if self._last is None:
            await self._switch_on()
        else:
            await self._take()

    async def _end(self) -> None:
        await self._take()
        if not self._always:
            await self._switch_off()

    async def _keep_taking(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            await self._guarded(self._take)

    async def _restore_stale(self, sink: Sink) -> None:
        guest = self._context.guest
        if guest is None:
            return
        for left in left_on(guest.process):
            if await switch_off(self._context.monitor, left):
                sink.note(
                    "switched off the lock profiler, which a killed process of ours had left on"
                )

    async def _switch_on(self) -> None:
        """With the first snapshot.  Who had it on before us keeps it."""
        if not await self._is_on():
            guest = self._context.guest
            if guest is not None:
                self._claim = note_profiler(guest.process)
            # a live process of ours with a claim will switch it off itself
            self._undo = guest is None or self._claim is not None
            self._on_ns = time.monotonic_ns()
            await self._say("sync-profile on")
        self._last = await self._snapshot()
        if self._sink is not None:
            self._sink.measures(self.info.name, self.info.measures)

    async def _switch_off(self) -> None:
        self._last = None
        if self._sink is not None:
            self._sink.measures(self.info.name, ())
        self._on_ns = 0
        if self._undo:
            await self._say("sync-profile off")
            self._undo = False
        if self._claim is not None:
            self._claim.remove()
            self._claim = None

    def _let_go(self) -> None:
        """Of a claim that is still there: the profiler could not be switched off."""
        claim, self._claim = self._claim, None
        guest = self._context.guest
        if claim is None:
            return
        if guest is not None and guest.process.is_alive():
            claim.close()
        else:
            claim.remove()

    async def _take(self) -> None:
        """Another snapshot; deliver the difference to the one before."""
        before = self._last
        if before is None:
            return
        after = await self._snapshot()
        self._last = after
        still_on = await self._is_on()
        self._deliver(before, after)
        if not still_on:
            if self._sink is not None:
                what = "another client switched the lock profiler off: it stays off"
                self._sink.lost(self.info.name, what)
            self._undo = False  # what is put back already may be somebody else's by the end
            await self._switch_off()

    def _deliver(self, before: _Snapshot, after: _Snapshot) -> None:
        sink = self._sink
        if sink is None:
            return
        sites, reset = difference(before.profile, after.profile)
        if reset:
            sink.lost(
                self.info.name,
                "the lock profile was reset by another client: earlier waits are lost",
            )
        values: dict[str, int | float | str] = {}
        observations = []
        for site, waits in sorted(sites.items(), key=lambda s: s[1].total_ns, reverse=True):
            values[f"bql_wait_ns@{site}"] = waits.total_ns
            values[f"count@{site}"] = waits.count
            if waits.low_ns >= _RESOLUTION_NS and waits.count:
                observations.append(self._observation(site, waits, before, after))
        sink.measure(
            MeasurementRecord(
                probe=self.info.name,
                start_ns=before.from_ns,
                end_ns=after.to_ns,
                values=values,
            )
        )
        if observations:
            sink.observe(observations)
        sink.advance(self.info.name, after.from_ns)

    def _observation(
        self, site: str, waits: Waits, before: _Snapshot, after: _Snapshot
    ) -> Observation:
        # a wait that began before it was switched on is not counted (qsp_enable() exchanges the
        # functions that lock)
        start = max(self._on_ns, before.from_ns - waits.high_ns)
        at_most = min(waits.high_ns, after.to_ns - start)
        return Observation(
            kind=StallKind.BQL_WAIT,
            start_ns=start,
            end_ns=after.to_ns,
            at_least_ns=min(waits.low_ns // waits.count, at_most),
            at_most_ns=at_most,
            probe=self.info.name,
            site=site,
        )

    def _tell(self) -> None:
        if self._sink is not None:
            reached = time.monotonic_ns() if self._last is None else self._last.from_ns
            self._sink.advance(self.info.name, reached)

    async def _snapshot(self) -> _Snapshot:
        reply = await hmp_timed(
            self._context.monitor, "info sync-profile", _ROWS, deadline=_DEADLINE_S
        )
        return _Snapshot(read_profile(str(reply.value)), reply.t_start_ns, reply.t_end_ns)

    async def _is_on(self) -> bool:
        text = await hmp(self._context.monitor, _WHAT, deadline=_DEADLINE_S)
        state = text.strip().removeprefix("sync-profile is ")
        if state not in ("on", "off"):
            raise ProtocolViolation(f"not an answer to `sync-profile`: {quoted(text, 80)}")
        return state == "on"

    async def _say(self, command: str) -> None:
        await hmp(self._context.monitor, command, quiet=True, deadline=_DEADLINE_S)
