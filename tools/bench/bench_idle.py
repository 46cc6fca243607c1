"""An attached agent that has nothing to do: its CPU, its memory, and QEMU's main loop meanwhile.

    python -m tools.bench.bench_idle

A `watch` process on a pulse guest whose map does not change, with trace events, polling, and with
the probes that it takes by default, measured when it has calmed down.
"""

from __future__ import annotations

import asyncio
import time

from qmp_memlistener.guests import LaunchedGuest
from tools.bench.growth import Figure, Sample, print_table
from tools.bench.live import Host, cpu_ns, hosts, main_thread_ns, peak_rss, pulse_guest, watching

CALM_S = 4.0  # polling slows down to one snapshot a second within 3 s
MODES: dict[str, tuple[str, ...] | None] = {
    "no agent": None,
    "trace": ("--probes", "none"),
    "polling": ("--no-trace", "--probes", "none"),
    "default probes": (),
    "all but the pulse": ("--probes", "runstate,trace,ping,kvmstats"),
}


def run(quick: bool) -> list[Figure]:
    """Print a table a QEMU; the largest share and memory are the figures."""
    shares: dict[str, float] = {}
    memory: dict[str, float] = {}
    for host in hosts(quick, ends=True):
        for mode, (share, rss) in asyncio.run(_measure(host, quick)).items():
            shares[mode] = max(shares.get(mode, 0.0), share)
            memory[mode] = max(memory.get(mode, 0.0), rss)
    return [
        figure
        for mode in shares
        for figure in (
            Figure(f"idle agent, {mode}: CPU", "<= 1 % of a core", f"{shares[mode]:.2f} %"),
            Figure(f"idle agent, {mode}: peak memory", "<= 80 MB", f"{memory[mode] / 1e6:.0f} MB"),
        )
    ]


async def _measure(host: Host, quick: bool) -> dict[str, tuple[float, float]]:
    seconds, rounds = (4.0, 1) if quick else (6.0, 3)
    agent: dict[str, list[float]] = {mode: [] for mode in MODES}
    loop: dict[str, list[float]] = {mode: [] for mode in MODES}
    memory: dict[str, list[float]] = {mode: [] for mode in MODES}
    async with pulse_guest(host) as (guest, _):
        for _ in range(rounds):
            for mode, options in MODES.items():
                if options is None:
                    _, main = await _shares(guest, None, seconds)
                else:
                    async with watching(guest, *options) as pid:
                        await asyncio.sleep(CALM_S)
                        own, main = await _shares(guest, pid, seconds)
                        agent[mode].append(own)
                        memory[mode].append(peak_rss(pid))
                loop[mode].append(main)
    print(f"\n{host}: {rounds} times {seconds:.0f} s of nothing   (wanted: <= 1 %, <= 80 MB)")
    rows = []
    for mode in MODES:
        main_share = Sample(tuple(loop[mode]))
        row = [mode, "", "", ""]
        if agent[mode]:
            own_share = Sample(tuple(agent[mode]))
            row[1:] = [
                f"{own_share.median:.2f}",
                own_share.spread(digits=2),
                f"{max(memory[mode]) / 1e6:.0f}",
            ]
        rows.append([*row, f"{main_share.median:.2f}", main_share.spread(digits=2)])
    columns = ["agent", "CPU %", "spread", "peak MB", "QEMU's main thread %", "spread"]
    print_table(columns, rows)
    return {
        mode: (Sample(tuple(agent[mode])).median, max(memory[mode]))
        for mode in MODES
        if agent[mode]
    }


async def _shares(guest: LaunchedGuest, pid: int | None, seconds: float) -> tuple[float, float]:
    """Percent of a core that the agent and QEMU's main thread take."""
    start = time.monotonic_ns()
    main, own = main_thread_ns(guest.pid), cpu_ns(pid) if pid is not None else 0
    await asyncio.sleep(seconds)
    main, own = main_thread_ns(guest.pid) - main, (cpu_ns(pid) if pid is not None else 0) - own
    took = time.monotonic_ns() - start
    return own * 100 / took, main * 100 / took


if __name__ == "__main__":
    run(quick=False)
