"""The `uprobes` probe: what `UprobeReader` sees, delivered to the event loop.

Here is the policy: when to look at the BQL and what that may cost.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future

from ...errors import DeadlineExceeded
from ...host.bounded import in_thread
from ...qmp.guest import read_vcpus, try_status
from ...records import CommandRecord, MeasurementRecord
from ..delivery import Inbox
from ..model import Context, Observation, ProbeInfo, ProbeUnavailable, Sink, StallKind, Verdict
from .observing import Observer, ThreadNames
from .program import examine
from .reader import Batch, UprobeReader

__all__ = ["Governor", "UprobesProbe"]

_LIMIT = 0.5
"""Of one CPU; what the probes may take unless the user says otherwise."""

_ASK_DEADLINE = 2.0
_ANSWER_DEADLINE = 5.0
_BQL_KINDS = (StallKind.BQL_WAIT, StallKind.BQL_HOLD)
_NAME = "uprobes"


class UprobesProbe:
    """Stalls as QEMU's own functions show them, stamped by the kernel."""

    info = ProbeInfo(
        name=_NAME,
        measures=(
            StallKind.COMMIT,
            StallKind.SLOT_UPDATE,
            StallKind.VCPU_INHIBIT,
            StallKind.VCPU_PAUSE,
            StallKind.BQL_WAIT,
            StallKind.BQL_HOLD,
            StallKind.MISSING,
        ),
        needs="root, or CAP_PERFMON as QEMU's user; Linux 4.17 or later on x86-64",
        resolution_ns=5_000,
        cost="1 to 2 us for each transaction, KVM ioctl of the machine and command, "
        "and during operations for each use of the BQL",
        share=0.001,
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._guest = context.guest
        self._names = ThreadNames(context.pid or 0)
        self._observer = Observer(_NAME, self._names, context.must_see)
        self._always = context.named or any(kind in context.must_see for kind in _BQL_KINDS)
        self._may_look = True
        self._looking = False
        self._looked = False
        self._bursts = 0
        self._reader: UprobeReader | None = None
        self._governor: Governor | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._start_ns = 0
        self._hits = 0
        self._untaken = 0
        self._ended = False

    async def check(self) -> Verdict:
        """Reads QEMU's program file and asks the kernel; nothing is put into QEMU."""
        try:
            await in_thread(examine, self._pid())
        except ProbeUnavailable as error:
            return Verdict.no(error.message, error.remedy)
        return Verdict(True)

    async def start(self, sink: Sink) -> None:
        """Put the probes in; 50 ms.  Raises ProbeUnavailable."""
        pid = self._pid()
        inbox = Inbox(asyncio.get_running_loop())
        self._names = ThreadNames(pid)
        self._observer = Observer(_NAME, self._names, self._context.must_see)
        self._start_ns = time.monotonic_ns()
        self._sink = sink

        def deliver(batch: Batch) -> None:
            """In the reader's thread."""
            for tid in batch.threads:
                self._names.forget(tid)
            self._observer.add_short_commits(*batch.short)
            observations = self._observer.observe(batch.windows, reader.strings)
            commands = self._observer.commands(batch.commands, reader.strings)
            if inbox.full:
                self._untaken += len(observations) + len(commands)
                observations, commands = [], []
            inbox.post(len(observations) + len(commands), self._take, batch, observations, commands)

        reader = UprobeReader(pid, deliver, floor_ns=self._observer.floor_ns)
        starting = asyncio.ensure_future(in_thread(reader.start))
        try:
            await asyncio.shield(starting)
            self._reader = reader
            self._prepare(reader)
            await self._get_to_know(reader)
            self._say_measured(looking=False)
            if self._always:
                await self._look(True)
        except BaseException:
            reader.give_up()
            await asyncio.wait((starting,))
            if not starting.cancelled():
                starting.exception()  # whatever it was, this attempt is over
            await in_thread(reader.stop)
            self._reader = None
            raise

    async def burst(self, on: bool) -> None:
        """Look at the BQL while at least one operation is under way.

        Takes 5 ms the first time, more when the kernel is taking out other probes, and 1 ms later.
        """
        self._bursts += 1 if on else -1
        if not self._always and self._bursts == (1 if on else 0):
            await self._look(on)

    async def flush(self) -> None:
        """Deliver all that has ended by now."""
        if self._reader is not None:
            await _within(self._reader.flush())

    async def stop(self) -> None:
        """Deliver the rest and end recording; the kernel takes the probes out in the background.

        That is some seconds' work for the kernel (see `release`), and costs QEMU next to nothing.
        """
        reader, self._reader = self._reader, None
        if reader is None:
            return
        if self._refreshing is not None:
            self._refreshing.cancel()
        await asyncio.shield(in_thread(reader.stop))
        if self._looked and not reader.bql_known:
            self._sink.note(
                "uprobes did not find the BQL's address: holds after a wait were not reported"
            )
        self._measure(reader)

    # -- talking to QEMU and to the reader -----------------------------------------------------

    def _pid(self) -> int:
        if self._guest is None:
            raise ProbeUnavailable(
                "QEMU's process is not visible from here",
                remedy="run on QEMU's host, in its process-id namespace or one above",
            )
        return self._guest.pid

    def _prepare(self, reader: UprobeReader) -> None:
        limit = self._context.max_share
        if not self._context.must_see:
            bound = _LIMIT if limit is None else limit
            self._governor = Governor(bound, reader.hit_ns, time.monotonic_ns())
        for kind, functions in reader.missing.items():
            if kind is not StallKind.VCPU_INHIBIT:  # before 8.0 there is no such thing to be seen
                self._sink.note(f"uprobes cannot measure {kind}: this QEMU has no {functions}")

    async def _get_to_know(self, reader: UprobeReader) -> None:
        """Names of the vCPUs, and whether the guest runs."""
        await self._learn_names()
        status = await try_status(self._context.monitor, deadline=_ASK_DEADLINE)
        if status is not None:
            await _within(reader.guest_runs(status.running))

    async def _learn_names(self) -> None:
        # without an answer threads are called as they call themselves
        vcpus = await read_vcpus(self._context.monitor, deadline=_ASK_DEADLINE)
        if vcpus is not None:
            self._names.learn_vcpus(vcpus)

    async def _look(self, on: bool) -> None:
        if self._reader is None or (on and not self._may_look):
            return
        self._looking = on
        self._looked |= on
        try:
            if not on:
                self._say_measured(looking=False)
            await _within(self._reader.set_bql(on))
            self._say_measured(looking=on)
        except DeadlineExceeded:
            self._sink.note("uprobes watch the BQL late: the kernel is busy with other probes")
        except OSError as error:
            self._may_look = self._looking = False
            self._sink.note(f"uprobes do not watch the BQL: {error.strerror}")

    def _say_measured(self, *, looking: bool) -> None:
        """Kinds whose functions this QEMU has; those of the BQL only while it is looked at."""
        missing = set(self._reader.missing) if self._reader is not None else set()
        if missing & {StallKind.COMMIT, StallKind.SLOT_UPDATE}:
            missing.add(StallKind.MISSING)  # which follows from both
        if not looking:
            missing.update(_BQL_KINDS)
        self._sink.measures(_NAME, [k for k in self.info.measures if k not in missing])

    # -- in the event loop ---------------------------------------------------------------------

    def _take(
        self, batch: Batch, observations: list[Observation], commands: list[CommandRecord]
    ) -> None:
        sink = self._sink
        untaken, self._untaken = self._untaken, 0
        if untaken:
            sink.lost(_NAME, "windows and commands that came faster than they were taken", untaken)
        for loss in batch.losses:
            sink.lost(_NAME, f"records of thread {self._names[loss.tid]}", loss.count)
        if batch.undecoded:
            sink.lost(_NAME, "slot updates whose structure was not found", batch.undecoded)
        if batch.contradictions:
            sink.lost(_NAME, "holds of the BQL whose end was not seen", batch.contradictions)
        if observations:
            sink.observe(observations)
        for command in commands:
            sink.command(command)
        # what lies in a window that has not ended is decided together with it
        sink.advance(_NAME, min(batch.until_ns, batch.open_ns or batch.until_ns))
        if batch.threads and self._reader is not None and self._refreshing is None:
            self._refreshing = asyncio.create_task(self._learn_names(), name="uprobes names")
            self._refreshing.add_done_callback(self._refreshed)
        if batch.error is not None and not self._ended:
            self._ended = True
            sink.failed(_NAME, batch.error)
        self._hits += sum(batch.hits.values())
        self._govern(batch)

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshing = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._sink.note(f"uprobes cannot read the names of new threads: {error}")

    def _govern(self, batch: Batch) -> None:
        governor, reader = self._governor, self._reader
        if governor is None or reader is None:
            return
        if not governor.add(time.monotonic_ns(), sum(batch.hits.values())):
            return
        taken = (
            f"uprobes took {governor.share:.0%} of a CPU from QEMU, "
            f"more than the {governor.limit:.0%} allowed"
        )
        if self._looking:
            self._looking = self._may_look = False
            reader.set_bql(False)
            self._say_measured(looking=False)
            self._sink.note(f"{taken}: the BQL is no longer watched")
        elif self._context.max_share is not None and not self._ended:
            self._ended = True
            error = ProbeUnavailable(taken, remedy="allow more with --max-overhead")
            self._sink.failed(_NAME, error)
            self._stopping = asyncio.create_task(self.stop(), name="uprobes stop")

    def _measure(self, reader: UprobeReader) -> None:
        """What was too short to be reported, and what looking cost."""
        now = time.monotonic_ns()
        values = self._observer.counts()
        values["hits"] = self._hits
        values["hit_ns"] = reader.hit_ns
        values["share"] = round(self._hits * reader.hit_ns / max(1, now - self._start_ns), 6)
        self._sink.measure(
            MeasurementRecord(probe=_NAME, start_ns=self._start_ns, end_ns=now, values=values)
        )


async def _within(future: Future[None]) -> None:
    """Wait for the reader.  Raises DeadlineExceeded, or what it raised."""
    try:
        async with asyncio.timeout(_ANSWER_DEADLINE):
            await asyncio.wrap_future(future)
    except TimeoutError:
        raise DeadlineExceeded(
            f"the reader of uprobes did not answer within {_ANSWER_DEADLINE:g} s",
            remedy="is this host overloaded?",
        ) from None


_INTERVAL_NS = 250_000_000
_PATIENCE_NS = 1_000_000_000


class Governor:
    """Watches hits per second times the cost of one, as a share of one CPU.

    Pure.  `limit` is that share, `hit_ns` what a hit costs.  A peak is borne: only a share above
    the limit for more than a second is too much.
    """

    def __init__(self, limit: float, hit_ns: int, start_ns: int) -> None:
        self.limit = limit
        self.share = 0.0
        """Over the last interval."""
        self._hit_ns = hit_ns
        self._since_ns = start_ns
        self._good_ns = start_ns
        self._hits = 0

    def add(self, t_ns: int, hits: int) -> bool:
        """There were `hits` until now; true when it is too much.  Begins anew after that."""
        self._hits += hits
        elapsed = t_ns - self._since_ns
        if elapsed < _INTERVAL_NS:
            return False
        self.share = self._hits * self._hit_ns / elapsed
        self._since_ns, self._hits = t_ns, 0
        if self.share <= self.limit:
            self._good_ns = t_ns
        if t_ns - self._good_ns <= _PATIENCE_NS:
            return False
        self._good_ns = t_ns
        return True
