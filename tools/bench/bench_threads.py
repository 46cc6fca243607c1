"""What thread sampling costs: QEMU's CPU time and the guest's heartbeats, and our CPU time.

    python -m tools.bench.bench_threads

A pulse guest is watched without probes, with the probe `threads`, without probes again, and with
`ping`, in turns.  How far the second turn without is from the first is what this machine can tell.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict

from qmp_memlistener.guests import LaunchedGuest, Pulse
from tools.bench.growth import Figure, Sample, print_table, ratios
from tools.bench.live import Host, cpu_ns, hosts, main_thread_ns, pulse_guest, watching

BASE = "no probe"
AGAIN = "no probe, again"
MODES = {BASE: "none", "threads": "threads", AGAIN: "none", "ping": "ping"}
COLUMNS = ("main thread", "all threads", "heartbeats", "agent")
CALM_S = 1.0


def run(quick: bool) -> list[Figure]:
    """Print a table a QEMU; the ratios to no probe are the figures."""
    figures = []
    for host in hosts(quick, ends=True):
        found = asyncio.run(_measure(host, quick))
        for mode in MODES:
            if mode == BASE:
                continue
            for column in COLUMNS[:3]:
                ratio = found[mode][column]
                figures.append(
                    Figure(
                        f"QEMU with {mode}: {column}, to no probe ({host})",
                        "as no probe, again" if mode == "threads" else "stated",
                        f"{ratio.median:.3f} ({ratio.spread(digits=3)})",
                    )
                )
    return figures


async def _measure(host: Host, quick: bool) -> dict[str, dict[str, Sample]]:
    seconds, rounds = (1.0, 3) if quick else (2.0, 8)
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    async with pulse_guest(host) as (guest, pulse):
        for _ in range(rounds):
            for mode, probes in MODES.items():
                async with watching(guest, "--probes", probes) as pid:
                    await asyncio.sleep(CALM_S)
                    for column, value in zip(
                        COLUMNS, await _shares(guest, pulse, pid, seconds), strict=True
                    ):
                        values[mode][column].append(value)
    samples = {m: {c: Sample(tuple(v)) for c, v in by.items()} for m, by in values.items()}
    to_base = {
        mode: {c: ratios(sample, samples[BASE][c]) for c, sample in by.items()}
        for mode, by in samples.items()
    }
    print(f"\n{host}: {rounds} rounds of {seconds:.0f} s")
    print_table(
        [
            "probe",
            "main thread %",
            "ratio",
            "all threads %",
            "ratio",
            "beats/s",
            "ratio",
            "agent %",
        ],
        [
            [
                mode,
                *(
                    text
                    for c in COLUMNS[:3]
                    for text in (f"{by[c].median:.4g}", f"{to_base[mode][c].median:.3f}")
                ),
                f"{by['agent'].median:.2f}",
            ]
            for mode, by in samples.items()
        ],
    )
    return to_base


async def _shares(
    guest: LaunchedGuest, pulse: Pulse, pid: int, seconds: float
) -> tuple[float, float, float, float]:
    """The columns: percent of a CPU, and heartbeats a second."""
    start = time.monotonic_ns()
    main, whole, own = main_thread_ns(guest.pid), cpu_ns(guest.pid), cpu_ns(pid)
    beats = pulse.heartbeat(0).count
    await asyncio.sleep(seconds)
    main, whole = main_thread_ns(guest.pid) - main, cpu_ns(guest.pid) - whole
    own, beats = cpu_ns(pid) - own, pulse.heartbeat(0).count - beats
    took = time.monotonic_ns() - start
    main = max(main, took // 100_000)  # a main loop that did nothing at all is no ratio's base
    return main * 100 / took, whole * 100 / took, beats * 1e9 / took, own * 100 / took


if __name__ == "__main__":
    run(quick=False)
