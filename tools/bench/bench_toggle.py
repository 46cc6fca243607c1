"""What one toggle of a PAM register costs a guest, on each QEMU here, under KVM.

    python -m tools.bench.bench_toggle

CPU 0 of the pulse guest opens and closes RAM at 0xf0000, which deletes and adds again the slot of
all RAM above 1 MiB; CPU 1 only beats.  Gaps are what the guest itself noticed at the moments of the
writes, with nothing attached.  Then the same again with uprobes for what QEMU did meanwhile; these
slow it down by some microseconds a hit, so gaps and windows do not add up exactly.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from qmp_memlistener.errors import OperationFailed
from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    Gap,
    GuestSpec,
    Pulse,
    ToggleWrite,
    TscClock,
    boot_args,
    launch,
)
from qmp_memlistener.probes import ProbeUnavailable, StallKind
from qmp_memlistener.probes.uprobes import Batch, UprobeReader, Window
from tools.bench.growth import Figure, Sample, print_table
from tools.bench.live import Host, hosts

PERIOD_US = 3_000
THRESHOLD_US = 60
"""Above what beats take under a slow KVM; a write without a longer gap counts as 0."""

OWN, OTHER = "gap of the vCPU that writes", "gap of the other vCPU"
OWN_SAME, OTHER_SAME = f"{OWN}, same value again", f"{OTHER}, same value again"
INHIBIT, COMMIT = "vCPUs kept out (vcpu_inhibit)", "commit"
MISSING, SURELY_MISSING = "RAM without a slot, at most", "RAM without a slot, at least"
ROWS = (OWN, OWN_SAME, OTHER, OTHER_SAME, COMMIT, INHIBIT, MISSING, SURELY_MISSING)

Round = dict[str, float]
"""The median of each row in one run, in us."""


@dataclass
class Gaps:
    """Collects a CPU's gaps while it makes them: its ring holds but the latest."""

    pulse: Pulse
    cpu: int
    found: list[Gap] = field(default_factory=list)
    seen: int = 0

    def take(self) -> None:
        look = self.pulse.look(self.cpu, self.seen)
        if look is not None and look.beat.gaps >= self.seen:
            self.found += look.gaps
            self.seen = look.beat.gaps

    def at(self, write: ToggleWrite) -> int:
        """The longest gap during a write, in ticks."""
        end = write.begin_tsc + write.ticks
        during = (
            g.ticks for g in self.found if g.end_tsc - g.ticks < end and write.begin_tsc < g.end_tsc
        )
        return max(during, default=0)


def run(quick: bool) -> list[Figure]:
    """Print a table a QEMU; what a toggle takes from each vCPU are the figures."""
    usable = [host for host in hosts(quick) if host.accel == "kvm"]
    if not usable:
        print("\nleft out: KVM is not usable with any QEMU here")
        return []
    rounds: dict[str, list[Round]] = {str(host): [] for host in usable}
    remarks: set[str] = set()
    count, runs = (40, 2) if quick else (200, 5)
    for _ in range(runs):
        for host in usable:
            rounds[str(host)].append(asyncio.run(_measure(host, count, remarks)))
    for remark in sorted(remarks):
        print(f"\n{remark}")
    figures = []
    for name, found in rounds.items():
        samples = {
            row: Sample(tuple(r[row] for r in found))
            for row in ROWS
            if all(row in r for r in found)
        }
        print(f"\n{name}: a PAM toggle, us; medians of {runs} runs of {count} toggles")
        print_table(
            ["what", "median", "spread"],
            [[row, f"{s.median:.0f}", s.spread(digits=0)] for row, s in samples.items()],
        )
        seen = ", ".join(f"{samples[row].median:.0f}" for row in (OWN, OTHER))
        figures.append(
            Figure(
                f"PAM toggle, gap of the writing and of the other vCPU ({name})",
                "a figure, us",
                seen,
            )
        )
    return figures


async def _measure(host: Host, count: int, remarks: set[str]) -> Round:
    """A fresh guest: toggles and the control without uprobes, then toggles with them."""
    spec = GuestSpec(machine="pc", accel=host.accel, smp=2, args=boot_args())
    async with launch(spec.on(host.build)) as guest:
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready()
            clock = await calibrated(pulse)
            for cpu in (0, 1):
                await pulse.reset(cpu, threshold=clock.ticks(THRESHOLD_US * 1000))
            found: Round = {}
            for values, own, other in (
                ((PAM_RAM << 4, 0), OWN, OTHER),
                ((0, 0), OWN_SAME, OTHER_SAME),
            ):
                gaps = Gaps(pulse, 0), Gaps(pulse, 1)
                writes = await toggle_all(pulse, clock, values, count, gaps)
                for row, of in ((own, gaps[0]), (other, gaps[1])):
                    ticks = statistics.median(of.at(write) for write in writes)
                    found[row] = clock.duration_ns(round(ticks)) / 1e3
            try:
                windows = await _windows(guest.pid, pulse, clock, count)
            except ProbeUnavailable as exc:
                remarks.add(f"without what QEMU does meanwhile: {exc.message}")
            else:
                found |= _medians(windows)
            return found


async def _windows(pid: int, pulse: Pulse, clock: TscClock, count: int) -> list[Window]:
    """What uprobes see while the guest toggles.  Raises ProbeUnavailable."""
    batches: list[Batch] = []
    reader = UprobeReader(pid, batches.append)
    await asyncio.to_thread(reader.start)
    try:
        await toggle_all(pulse, clock, (PAM_RAM << 4, 0), count, ())
        await asyncio.wrap_future(reader.flush())
    finally:
        await asyncio.to_thread(reader.stop)
    lost = sum(loss.count for batch in batches for loss in batch.losses)
    if lost:
        raise OperationFailed(f"{lost} records of uprobes were lost")
    return [window for batch in batches for window in batch.windows]


async def toggle_all(
    pulse: Pulse,
    clock: TscClock,
    values: tuple[int, int],
    count: int,
    gaps: Sequence[Gaps],
) -> tuple[ToggleWrite, ...]:
    for one in gaps:
        one.take()
    period = clock.ticks(PERIOD_US * 1000)
    toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, values, count, period=period, unit="ticks")
    while toggle.done < count:
        await asyncio.sleep(0.005)
        for one in gaps:
            one.take()
    await asyncio.sleep(0.005)
    for one in gaps:
        one.take()
    return toggle.writes().writes


def _medians(windows: Sequence[Window]) -> Round:
    """Of the commits that updated slots, and of what lies in them."""
    commits = [w for w in windows if w.kind is StallKind.COMMIT and w.updates and not w.inner]
    found: dict[str, list[int]] = {}
    for commit in commits:
        found.setdefault(COMMIT, []).append(commit.end_ns - commit.start_ns)
        inside = [w for w in windows if commit.start_ns <= w.start_ns and w.end_ns <= commit.end_ns]
        for window in inside:
            if window.kind is StallKind.VCPU_INHIBIT:
                found.setdefault(INHIBIT, []).append(window.end_ns - window.start_ns)
        updates = [w for w in inside if w.kind is StallKind.SLOT_UPDATE and w.update is not None]
        deletes = [w for w in updates if w.update is not None and not w.update.size]
        adds = [w for w in updates if w.update is not None and w.update.size]
        if deletes and adds:
            first, last = deletes[0], adds[-1]
            found.setdefault(MISSING, []).append(last.end_ns - first.start_ns)
            found.setdefault(SURELY_MISSING, []).append(max(0, last.start_ns - first.end_ns))
    medians = {row: statistics.median(ns) / 1e3 for row, ns in found.items()}
    return {INHIBIT: 0.0} | medians  # 7.2 keeps nobody out


async def calibrated(pulse: Pulse) -> TscClock:
    """A vCPU may have to wait for its turn on a busy machine."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await pulse.calibrate(0.05)
            except OperationFailed:
                await asyncio.sleep(0.05)


if __name__ == "__main__":
    run(quick=False)
