"""What one snapshot (`info mtree -o -D`) costs: text, round trip, bound of the BQL time, parsing.

    python -m tools.bench.bench_snapshot

Guests that have not started (-S): a pc, a q35, and a q35 with 32 root ports, all up at once and
asked in turn.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from qmp_memlistener.guests import GuestSpec, launch
from qmp_memlistener.qmp import Monitor, measure_idle, parse_target, take_snapshot
from qmp_memlistener.topology import read_map
from tools.bench.growth import Figure, Sample, print_table
from tools.bench.live import Host, hosts

PORTS = tuple(
    word
    for i in range(32)
    for word in (
        "-device",
        f"pcie-root-port,bus=pcie.0,id=rp{i},chassis={i + 1},addr={4 + i // 8:x}.{i % 8}"
        + (",multifunction=on" if i % 8 == 0 else ""),
    )
)
MACHINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pc": ("pc", ()),
    "q35": ("q35", ()),
    "q35, 32 root ports": ("q35", PORTS),
}


def run(quick: bool) -> list[Figure]:
    """Print a table a QEMU; no figure of the design depends on it."""
    for host in hosts(quick):
        asyncio.run(_measure(host, 10 if quick else 40))
    return []


async def _measure(host: Host, rounds: int) -> None:
    trips: dict[str, list[float]] = {name: [] for name in MACHINES}
    bounds: dict[str, list[float]] = {name: [] for name in MACHINES}
    parsing: dict[str, list[float]] = {name: [] for name in MACHINES}
    texts: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        monitors = {}
        for name, (machine, args) in MACHINES.items():
            spec = GuestSpec(machine=machine, accel=host.accel, args=("-S", *args))
            guest = await stack.enter_async_context(launch(spec.on(host.build)))
            monitor = await Monitor.connect(parse_target(f"unix:{guest.monitors[0]}"))
            monitors[name] = await stack.enter_async_context(monitor)
        for _ in range(rounds):
            for name, monitor in monitors.items():
                shot = await take_snapshot(monitor, await measure_idle(monitor))
                texts[name] = shot.text
                trips[name].append(shot.duration_ns / 1e6)
                bounds[name].append((shot.bql_cost_ns or 0) / 1e6)
                start = time.process_time_ns()
                read_map(shot.text)
                parsing[name].append((time.process_time_ns() - start) / 1e6)
    print(f"\n{host}: one snapshot, {rounds} rounds")
    print_table(
        ["machine", "text KiB", "lines", "round trip ms", "spread", "BQL at most ms", "parse ms"],
        [
            [
                name,
                f"{len(text) / 1024:.0f}",
                f"{text.count(chr(10)):,}",
                f"{Sample(tuple(trips[name])).median:.2f}",
                Sample(tuple(trips[name])).spread(digits=2),
                f"{Sample(tuple(bounds[name])).median:.2f}",
                f"{Sample(tuple(parsing[name])).median:.2f}",
            ]
            for name, text in texts.items()
        ],
    )


if __name__ == "__main__":
    run(quick=False)
