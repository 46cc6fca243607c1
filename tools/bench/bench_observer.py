"""What the guest notices of being watched: heartbeats a second of the pulse guest.

    python -m tools.bench.bench_observer

With no agent, with one that traces, with one that polls, and with none again: how far the last
ratio is from 1 is what this machine can tell.  Nothing changes in the guest meanwhile.
"""

from __future__ import annotations

import asyncio
import time

from qmp_memlistener.guests import Pulse
from tools.bench.growth import Figure, Sample, print_table, ratios
from tools.bench.live import Host, hosts, pulse_guest, watching

BASE = "none"
MODES: dict[str, tuple[str, ...] | None] = {
    BASE: None,
    "trace": (),
    "polling": ("--no-trace",),
    "none again": None,
}


def run(quick: bool) -> list[Figure]:
    """Print a table a QEMU; the smallest ratio of each way to watch is the figure."""
    lowest: dict[str, tuple[float, Host]] = {}
    for host in hosts(quick, ends=True):
        for mode, ratio in asyncio.run(_measure(host, quick)).items():
            lowest[mode] = min(lowest.get(mode, (9.0, host)), (ratio, host), key=lambda x: x[0])
    return [
        Figure(f"heartbeats while watched, {mode}", ">= 0.98 of without", f"{ratio:.3f} ({host})")
        for mode, (ratio, host) in lowest.items()
        if mode != BASE
    ]


async def _measure(host: Host, quick: bool) -> dict[str, float]:
    seconds, rounds = (1.0, 3) if quick else (2.0, 7)
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    async with pulse_guest(host) as (guest, pulse):
        for _ in range(rounds):
            for mode, options in MODES.items():
                if options is None:
                    rates[mode].append(await _rate(pulse, seconds))
                else:
                    async with watching(guest, *options):
                        await asyncio.sleep(1.0)
                        rates[mode].append(await _rate(pulse, seconds))
    samples = {mode: Sample(tuple(values)) for mode, values in rates.items()}
    by_mode = {mode: ratios(sample, samples[BASE]) for mode, sample in samples.items()}
    print(f"\n{host}: heartbeats, thousands a second, {rounds} rounds of {seconds:.0f} s")
    print_table(
        ["agent", "median", "spread", "to none", "spread"],
        [
            [
                mode,
                f"{sample.median / 1e3:.1f}",
                sample.spread(1e-3),
                f"{by_mode[mode].median:.3f}",
                by_mode[mode].spread(digits=3),
            ]
            for mode, sample in samples.items()
        ],
    )
    return {mode: ratio.median for mode, ratio in by_mode.items()}


async def _rate(pulse: Pulse, seconds: float) -> float:
    start, count = time.monotonic_ns(), pulse.heartbeat(0).count
    await asyncio.sleep(seconds)
    beats = pulse.heartbeat(0).count - count
    return beats * 1e9 / (time.monotonic_ns() - start)


if __name__ == "__main__":
    run(quick=False)
