"""What a toggle costs the other vCPU under each strategy of the interposer, beside QEMU's own way.

    python -m tools.bench.bench_steer

As bench_toggle, on the oldest QEMU with the interposer preloaded and, beside it, on the first one
from 8.0 on, which keeps vCPUs out by itself.  All take turns.  Also: how long RAM above 1 MiB was
without a slot while vCPUs ran (from the interposer's ring), and writes of a register that change
nothing, two exits each, without and with the interposer at rest: in one guest, by turns, because
two guests differ by more than it costs, and in CPU time of the vCPU that writes.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    GuestSpec,
    LaunchedGuest,
    Pulse,
    boot_args,
    launch,
)
from qmp_memlistener.host.processes import Process
from qmp_memlistener.records import Mode
from qmp_memlistener.steer import OBJECT, Event, EventKind, open_channel, release, steer
from tests.support.steer import preloaded
from tools.bench.bench_toggle import THRESHOLD_US, Gaps, calibrated, toggle_all
from tools.bench.growth import Figure, Sample, print_table, ratios
from tools.bench.live import Host, hosts

OWN_INHIBIT, OFF = "QEMU's own inhibit", "off"
STRATEGIES = {
    "observe": (Mode.OBSERVE, False),
    "pause": (Mode.PAUSE, False),
    "inhibit": (Mode.INHIBIT, False),
    "hole": (Mode.HOLE, False),
    "hole strict": (Mode.HOLE, True),
}
_HIGH = 0x210000
_EXITS_S = 0.3
_TURNS = 5


def run(quick: bool) -> list[Figure]:
    """Print a table; what is wanted of the interposer are the figures."""
    usable = [host for host in hosts(False) if host.accel == "kvm"]
    older = [h for h in usable if int(h.build.version.split(".")[0]) < 8]
    newer = [h for h in usable if h not in older]
    if not older or not OBJECT.exists():
        print("\nleft out: needs QEMU 7.2 or older under KVM, and a C compiler")
        return []
    cases: dict[str, tuple[Host, Mode | None, bool]] = {OFF: (older[-1], None, False)}
    cases |= {name: (older[-1], *how) for name, how in STRATEGIES.items()}
    if newer:
        cases[OWN_INHIBIT] = (newer[0], None, False)
    runs, count = (2, 40) if quick else (10, 200)
    other: dict[str, list[float]] = {name: [] for name in cases}
    missing: dict[str, list[float]] = {name: [] for name in cases}
    exits: list[float] = []
    for _ in range(runs):
        for name, (host, mode, strict) in cases.items():
            gap, without = asyncio.run(_measure(host, mode, strict, count))
            other[name].append(gap)
            missing[name].append(without)
        exits.append(asyncio.run(_exits_kept(older[-1])))
    print(f"\nQEMU {older[-1].build.version}, beside {newer[0].build.version if newer else 'none'}")
    print_table(
        ["", "other vCPU's gap, us", "spread", "RAM missing while vCPUs run, us at most"],
        [
            [
                name,
                f"{statistics.median(gaps):.0f}",
                Sample(tuple(gaps)).spread(digits=0),
                "not measured" if not cases[name][1] else f"{max(missing[name]):.0f}",
            ]
            for name, gaps in other.items()
        ],
    )
    return [*_figures(other, missing, exits)]


def _figures(
    other: dict[str, list[float]], missing: dict[str, list[float]], exits: list[float]
) -> Sequence[Figure]:
    kept = max(missing["inhibit"] + missing["hole"] + missing["hole strict"] + missing["pause"])
    rate = Sample(tuple(exits))
    found = [
        Figure("RAM missing while vCPUs run, under a strategy", "0 us", f"{kept:.0f} us"),
        Figure(
            "exits/s with the interposer at rest, to without",
            ">= 0.99",
            f"{rate.median:.3f} ({rate.spread(digits=3)})",
        ),
    ]
    if OWN_INHIBIT in other:
        gap = ratios(Sample(tuple(other["hole strict"])), Sample(tuple(other[OWN_INHIBIT])))
        what = "other vCPU's gap, hole strict to QEMU's own inhibit"
        found.append(Figure(what, "<= 0.6", f"{gap.median:.2f} ({gap.spread(digits=2)})"))
    return found


async def _measure(host: Host, mode: Mode | None, strict: bool, count: int) -> tuple[float, float]:
    """The median gap and the longest time without a slot, both in us."""
    async with _guest(host, mode, strict) as (guest, pulse):
        clock = await calibrated(pulse)
        await pulse.reset(1, threshold=clock.ticks(THRESHOLD_US * 1000))
        values = (PAM_RAM << 4, 0)
        await toggle_all(pulse, clock, values, 4, ())  # slots of before, and the split
        events = _Events(guest) if mode else None
        gaps = Gaps(pulse, 1)
        writes = await toggle_all(pulse, clock, values, count, (gaps,))
        ticks = statistics.median(gaps.at(write) for write in writes)
        without = events.without_slot() if events else 0.0
        return clock.duration_ns(round(ticks)) / 1e3, without


@asynccontextmanager
async def _guest(
    host: Host, mode: Mode | None, strict: bool
) -> AsyncIterator[tuple[LaunchedGuest, Pulse]]:
    env = preloaded(mode) if mode else {}
    if strict:
        env["QMP_MEMLISTENER_STRICT"] = "1"
    spec = GuestSpec(machine="pc", accel=host.accel, smp=2, args=boot_args(), env=env)
    async with launch(spec.on(host.build)) as guest:
        assert guest.ram is not None
        with Pulse(guest.ram) as pulse:
            await pulse.wait_ready()
            yield guest, pulse


async def _exits_kept(host: Host) -> float:
    """What is left of the exits/s of a guest while the interposer is in its QEMU, at rest."""
    rates: dict[Mode, list[float]] = {Mode.OFF: [], Mode.OBSERVE: []}
    async with _guest(host, None, False) as (guest, pulse):
        process = Process.read(guest.pid)
        assert process is not None
        await steer(process, Mode.OBSERVE)
        await _exits(pulse, time.monotonic_ns)
        channel = open_channel(process)
        assert channel is not None
        with channel:
            tid = min(v.tid for v in channel.vcpus())  # CPU 0: the other one does not exit
        for turn in range(2 * _TURNS):
            mode = (Mode.OFF, Mode.OBSERVE)[turn % 2]
            if mode is Mode.OBSERVE:
                await steer(process, mode)
            else:
                await release(process)
            rates[mode].append(await _exits(pulse, lambda: _cpu_ns(guest.pid, tid)))
    return statistics.median(rates[Mode.OBSERVE]) / statistics.median(rates[Mode.OFF])


def _cpu_ns(pid: int, tid: int) -> int:
    with open(f"/proc/{pid}/task/{tid}/schedstat") as file:
        return int(file.read().split()[0])


async def _exits(pulse: Pulse, clock_ns: Callable[[], int]) -> float:
    """Writes in a second of that clock."""
    toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (0, 0), 1 << 30)
    await asyncio.sleep(_EXITS_S / 5)
    begun, since = toggle.done, clock_ns()
    await asyncio.sleep(_EXITS_S)
    rate = (toggle.done - begun) / (clock_ns() - since) * 1e9
    await toggle.stop()
    return rate


class _Events:
    """What the ring says since now."""

    def __init__(self, guest: LaunchedGuest) -> None:
        process = Process.read(guest.pid)
        assert process is not None
        channel = open_channel(process)
        assert channel is not None
        self._channel = channel
        channel.skip()

    def without_slot(self) -> float:
        """The longest time that no slot held `_HIGH` and vCPUs ran, in us."""
        events: list[Event] = []
        while found := self._channel.read_events():
            events += found
        assert not self._channel.lost
        self._channel.close()
        parks = [e for e in events if e.kind is EventKind.PARK and not e.rc]
        longest, gone = 0, None
        for e in (e for e in events if e.kind is EventKind.KVM and not e.rc and not e.slot >> 16):
            if not e.size and e.gpa <= _HIGH:
                gone = e
            elif gone is not None and e.gpa <= _HIGH < e.gpa + e.size:
                if not any(p.begin_ns <= gone.begin_ns and e.end_ns <= p.end_ns for p in parks):
                    longest = max(longest, e.end_ns - gone.begin_ns)
                gone = None
        return longest / 1e3


if __name__ == "__main__":
    for figure in run(quick=False):
        print(f"{figure.what}: {figure.seen}, wanted {figure.wanted}")
