"""Uprobes against an independent reader: the same run seen by `UprobeReader` and by bpftrace.

bpftrace only prints hits; they are folded into windows here, by other rules than the reader's:
calls are told apart by nesting, the BQL's address comes from its unlock function.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest

from qmp_memlistener.guests import QemuBuild
from qmp_memlistener.probes import StallKind
from qmp_memlistener.probes.uprobes import Batch, UprobeReader
from tests.support.live import Vm, booted, cases, qmp

Span = tuple[int, int, int]
"""tid, start, end."""


def missing() -> str:
    """What the independent reader lacks here; empty when it can work."""
    if shutil.which("bpftrace") is None:
        return "bpftrace is not installed"
    return "" if os.geteuid() == 0 else "bpftrace needs root"


pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing()), reason=missing() or "bpftrace works"),
]

# what, thread, time, and an argument; -p alone does not keep bpftrace from other QEMUs' hits
SCRIPT = """
uprobe:FILE:memory_region_transaction_commit /pid == PID/ { printf("c+ %d %lu 0\\n", tid, nsecs); }
uretprobe:FILE:memory_region_transaction_commit /pid == PID/ {
  printf("c- %d %lu 0\\n", tid, nsecs);
}
uprobe:FILE:kvm_vm_ioctl /pid == PID/ { printf("i+ %d %lu %lx\\n", tid, nsecs, arg1); }
uretprobe:FILE:kvm_vm_ioctl /pid == PID/ { printf("i- %d %lu 0\\n", tid, nsecs); }
uretprobe:FILE:LOCK /pid == PID/ { printf("l- %d %lu 0\\n", tid, nsecs); }
uprobe:FILE:UNLOCK /pid == PID/ { @unlocking[tid] = 1; printf("u+ %d %lu 0\\n", tid, nsecs); }
uprobe:FILE:qemu_mutex_unlock_impl /pid == PID && @unlocking[tid]/ {
  delete(@unlocking[tid]); printf("m+ %d %lu %lx\\n", tid, nsecs, arg0);
}
uprobe:FILE:qemu_cond_wait_impl /pid == PID/ { printf("w+ %d %lu %lx\\n", tid, nsecs, arg1); }
uretprobe:FILE:qemu_cond_wait_impl /pid == PID/ { printf("w- %d %lu 0\\n", tid, nsecs); }
uprobe:FILE:qemu_cond_timedwait_impl /pid == PID/ { printf("w+ %d %lu %lx\\n", tid, nsecs, arg1); }
uretprobe:FILE:qemu_cond_timedwait_impl /pid == PID/ { printf("w- %d %lu 0\\n", tid, nsecs); }
"""
OLD = ("qemu_mutex_lock_iothread_impl", "qemu_mutex_unlock_iothread")
NEW = ("bql_lock_impl", "bql_unlock")
SKEW_NS = 20_000_000  # one stamps after the other, and the host may be busy in between
SLOT_IOCTLS = (0x4020AE46, 0x40A0AE49)


class Witness:
    """A running bpftrace; `lines` grows while it runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[tuple[int, str, int, int]] = []
        """time, what, tid, value."""
        self.remarks: list[str] = []
        self.news = asyncio.Event()

    async def read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            words = line.decode().split()
            if len(words) == 4 and words[0][-1] in "+-":
                what, tid, t_ns, value = words
                self.lines.append((int(t_ns), what, int(tid), int(value, 16)))
                self.news.set()
            elif words and not line.startswith((b"Attaching", b"@")):
                self.remarks.append(line.decode())

    async def saw(self, what: str, since_ns: int) -> None:
        """Until it has printed such a hit, not older than `since_ns`."""
        while not any(x[1] == what and x[0] >= since_ns for x in self.lines):
            self.news.clear()
            await self.news.wait()


@asynccontextmanager
async def bpftrace(vm: Vm, build: QemuBuild) -> AsyncIterator[Witness]:
    """bpftrace at work on the guest's QEMU; at the end everything it saw is read."""
    lock, unlock = OLD if build.version.startswith("7.") else NEW
    pid = str(vm.guest.process.pid)
    words = {"FILE": build.binary, "UNLOCK": unlock, "LOCK": lock, "PID": pid}
    script = re.sub("|".join(words), lambda found: words[found[0]], SCRIPT)
    process = await asyncio.create_subprocess_exec(
        *("bpftrace", "-B", "line", "-p", pid, "-e", script),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "BPFTRACE_PERF_RB_PAGES": "2048"},
        limit=1 << 20,
    )
    witness = Witness(process)
    reading = asyncio.create_task(witness.read())
    try:
        yield witness
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(reading, 20)
    finally:
        reading.cancel()
        if process.returncode is None:
            process.kill()
        await process.wait()


def folded(witness: Witness) -> dict[StallKind, list[Span]]:
    """Its hits as windows."""
    found: dict[StallKind, list[Span]] = defaultdict(list)
    calls: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    holds: dict[int, int] = {}
    hits = sorted(witness.lines)
    # once at most it is another mutex: while bpftrace was putting its probes in
    bql = Counter(value for _, what, _, value in hits if what == "m+").most_common(1)[0][0]
    for t_ns, what, tid, value in hits:
        releases = what == "u+" or (what == "w+" and value == bql)
        if releases and tid in holds:
            found[StallKind.BQL_HOLD].append((tid, holds.pop(tid), t_ns))
        if what == "l-":
            holds[tid] = t_ns
        elif what in ("c+", "i+", "w+"):
            calls[tid].append((what[0], t_ns, value))
        elif what in ("c-", "i-", "w-"):
            if not calls[tid] or calls[tid][-1][0] != what[0]:
                continue  # it was entered before bpftrace came
            _, start_ns, value = calls[tid].pop()
            if what == "c-":
                found[StallKind.COMMIT].append((tid, start_ns, t_ns))
            elif what == "i-" and value in SLOT_IOCTLS:
                found[StallKind.SLOT_UPDATE].append((tid, start_ns, t_ns))
            elif what == "w-" and value == bql:
                holds[tid] = t_ns
    return found


def paired(
    ours: Iterable[Span], theirs: Iterable[Span]
) -> tuple[list[tuple[Span, Span]], list[Span]]:
    """Windows of a thread in their order, side by side; and those without a partner."""
    pairs, alone = [], []
    queues: dict[int, tuple[deque[Span], deque[Span]]] = defaultdict(lambda: (deque(), deque()))
    for side, spans in enumerate((ours, theirs)):
        for span in sorted(spans, key=lambda s: s[1]):
            queues[span[0]][side].append(span)
    for mine, other in queues.values():
        while mine and other:
            if abs(mine[0][1] - other[0][1]) <= SKEW_NS:
                pairs.append((mine.popleft(), other.popleft()))
            else:
                alone.append((mine if mine[0][1] < other[0][1] else other).popleft())
        alone += [*mine, *other]
    return pairs, alone


@pytest.mark.asyncio
@cases("kvm")
async def test_the_same_windows_as_bpftrace_sees(build: QemuBuild, accel: str) -> None:
    """200 toggles: commits, slot updates and holds of the BQL agree in number and in length."""
    batches: list[Batch] = []
    async with booted(build, accel, smp=2) as vm, qmp(vm.guest.monitors[0]) as monitor:
        reader = UprobeReader(vm.guest.process.pid, batches.append)
        await asyncio.to_thread(reader.start)
        try:
            async with asyncio.timeout(60), bpftrace(vm, build) as witness:
                await monitor.execute("query-status")  # turns the main loop
                await asyncio.wrap_future(reader.set_bql(True))
                while not witness.lines:
                    await monitor.execute("query-status")
                await vm.toggle(2)
                await witness.saw("c-", 0)
                start_ns = time.monotonic_ns()
                await vm.toggle(200, period_ms=2)
                end_ns = time.monotonic_ns()
                await asyncio.wrap_future(reader.flush())
        finally:
            await asyncio.to_thread(reader.stop)
    assert witness.remarks == []
    assert [loss for b in batches for loss in b.losses] == []
    assert [b for b in batches if b.undecoded or b.contradictions] == []
    truth = folded(witness)
    for kind in (StallKind.COMMIT, StallKind.SLOT_UPDATE, StallKind.BQL_HOLD):
        ours = [(w.tid, w.start_ns, w.end_ns) for b in batches for w in b.windows if w.kind is kind]
        pairs, alone = paired(ours, truth[kind])
        seen = [pair for pair in pairs if start_ns <= pair[0][1] < end_ns]
        assert [span for span in alone if start_ns <= span[1] < end_ns] == []
        assert len(seen) >= 200
        off = statistics.median(abs(length(a) - length(b)) for a, b in seen)
        assert off <= 20_000


def length(span: Span) -> int:
    return span[2] - span[1]
