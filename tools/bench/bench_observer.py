"""What the guest notices of being watched: by nobody, by an agent, by an agent with each probe.

    python -m tools.bench.bench_observer

Three loads: a pulse guest that only beats (heartbeats a second), one whose CPU opens and closes PAM
as fast as it can (writes a second, each makes QEMU delete and add slots), and a boot of Linux
under TCG, from `cont` until it takes commands.  The ways to watch take turns, and the first of
them comes again at the end: how far that ratio is from 1 is what this machine can tell.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import AsyncExitStack

from qmp_memlistener.guests import (
    HOST_BRIDGE,
    I440FX,
    PAM_RAM,
    Pulse,
)
from qmp_memlistener.guests.linux import LinuxImage, LinuxSpec, boot_linux
from qmp_memlistener.qmp import Monitor, UnixTarget
from tools.bench.growth import Figure, Sample, print_table, ratios
from tools.bench.live import Host, hosts, pulse_guest, watching

BASE = "nobody"
AGAIN = "nobody again"
TRACE = "agent, trace"
IDLE = "agent, polling"
MODES: dict[str, tuple[str, ...] | None] = {
    BASE: None,
    IDLE: ("--no-trace", "--probes", "none"),
    TRACE: ("--probes", "none"),
    "runstate": ("--probes", "runstate"),
    "pulse": ("--probes", "pulse"),
    "kvmstats": ("--probes", "kvmstats"),
    "ping": ("--probes", "ping"),
    "lockprofile": ("--probes", "lockprofile"),
    "uprobes, BQL too": ("--probes", "uprobes"),
    "default set": (),
    AGAIN: None,
}
WRITES = 100
_CALM_S = 0.5

Rates = dict[str, dict[str, list[float]]]


def run(quick: bool) -> list[Figure]:
    """Print a table a QEMU; the smallest ratio of each way to watch is the figure."""
    lowest: dict[tuple[str, str], tuple[float, Host]] = {}
    for host in hosts(quick, ends=True):
        for load, by_mode in asyncio.run(_measure(host, quick)).items():
            for mode, ratio in by_mode.items():
                worst = lowest.get((load, mode), (9.0, host))
                lowest[load, mode] = min(worst, (ratio, host), key=lambda x: x[0])
    return [
        Figure(
            f"{load}, watched by {mode}",
            ">= 0.98 of nobody" if mode in (IDLE, TRACE) else "stated",
            f"{ratio:.3f} ({host})",
        )
        for (load, mode), (ratio, host) in lowest.items()
        if mode != BASE
    ]


async def _measure(host: Host, quick: bool) -> dict[str, dict[str, float]]:
    seconds, rounds = (0.5, 2) if quick else (1.0, 5)
    rates: Rates = defaultdict(lambda: defaultdict(list))
    async with pulse_guest(host) as (guest, pulse):
        for _ in range(rounds):
            for mode, options in MODES.items():
                async with AsyncExitStack() as stack:
                    if options is not None:
                        await stack.enter_async_context(watching(guest, *options))
                        await asyncio.sleep(_CALM_S)
                    rates["heartbeats"][mode].append(await _heartbeats(pulse, seconds))
                    rates["PAM writes"][mode].append(await _writes(pulse))
    image = LinuxImage.build()
    for _ in range(rounds):
        for mode, options in MODES.items():
            rates["boots of Linux, TCG,"][mode].append(await _boots(host, image, options))
    return {load: _report(host, load, by_mode, rounds) for load, by_mode in rates.items()}


def _report(
    host: Host, load: str, by_mode: dict[str, list[float]], rounds: int
) -> dict[str, float]:
    samples = {mode: Sample(tuple(values)) for mode, values in by_mode.items()}
    to_base = {mode: ratios(sample, samples[BASE]) for mode, sample in samples.items()}
    where = host.build.version if "boots" in load else str(host)
    print(f"\n{where}: {load} a second, {rounds} rounds")
    print_table(
        ["watched by", "median", "spread", "to nobody", "spread"],
        [
            [
                mode,
                f"{sample.median:.4g}",
                sample.spread(),
                f"{to_base[mode].median:.3f}",
                to_base[mode].spread(digits=3),
            ]
            for mode, sample in samples.items()
        ],
    )
    return {mode: ratio.median for mode, ratio in to_base.items()}


async def _heartbeats(pulse: Pulse, seconds: float) -> float:
    start, count = time.monotonic_ns(), pulse.heartbeat(0).count
    await asyncio.sleep(seconds)
    beats = pulse.heartbeat(0).count - count
    return beats * 1e9 / (time.monotonic_ns() - start)


async def _writes(pulse: Pulse) -> float:
    start = time.monotonic_ns()
    toggle = await pulse.toggle(HOST_BRIDGE, I440FX.pam, (PAM_RAM << 4, 0), WRITES)
    await toggle.wait()
    return WRITES * 1e9 / (time.monotonic_ns() - start)


async def _boots(host: Host, image: LinuxImage, options: tuple[str, ...] | None) -> float:
    """Boots a second, of one boot: the guest is started stopped, so that the agent sees it all."""
    spec = LinuxSpec(machine="pc", pulse_us=None, args=("-S",))
    async with AsyncExitStack() as stack:
        linux = await stack.enter_async_context(boot_linux(image, spec, host.build, wait=False))
        if options is not None:
            await stack.enter_async_context(watching(linux.guest, *options))
            await asyncio.sleep(_CALM_S)
        target = UnixTarget(str(linux.guest.monitors[1]))  # pings take the last one
        async with await Monitor.connect(target) as monitor:
            start = time.monotonic_ns()
            await monitor.execute("cont")
            await linux.wait_booted()
            return 1e9 / (time.monotonic_ns() - start)


if __name__ == "__main__":
    run(quick=False)
