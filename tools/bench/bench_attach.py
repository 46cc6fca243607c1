"""One verb after another on the same guest: how long until each is attached and its probes work.

    python -m tools.bench.bench_attach

`watch --for 200ms` starts again as soon as the one before has ended.  The kernel takes the uprobes
of the last one out meanwhile, and opens new ones slowly as long as it does.
"""

from __future__ import annotations

import asyncio
import sys
import time

import msgspec

from qmp_memlistener.guests import LaunchedGuest
from tools.bench.growth import Figure, Sample, print_table
from tools.bench.live import Host, hosts, pulse_guest

ROUNDS = 4


async def _one(guest: LaunchedGuest) -> tuple[float, float, float]:
    """Seconds to the first map, to the last `probes` record, and in all."""
    start = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmp_memlistener", "watch", f"unix:{guest.monitors[0]}"),
        *("--json", "--for", "200ms"),
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert process.stdout is not None
    mapped = probes = 0.0
    async for line in process.stdout:
        if b'"type":"map"' in line:
            mapped = time.monotonic() - start
        elif b'"type":"probes"' in line:
            probes = time.monotonic() - start
            state = msgspec.json.decode(line)
    await process.wait()
    took = time.monotonic() - start
    if not any(p["name"] == "uprobes" and p["active"] for p in state["probes"]):
        probes = -probes
    return mapped, probes, took


async def _measure(host: Host) -> list[tuple[float, float, float]]:
    async with pulse_guest(host) as (guest, _):
        return [await _one(guest) for _ in range(ROUNDS)]


def run(quick: bool) -> list[Figure]:
    """A table a QEMU; the longest of the later ones is the figure."""
    figures = []
    for host in hosts(quick, ends=True):
        found = asyncio.run(_measure(host))
        print(f"\n{host}: seconds from the start")
        print_table(
            ["attachment", "map", "probes", "in all"],
            [
                [str(i + 1), f"{mapped:.2f}", _probes(probes), f"{took:.2f}"]
                for i, (mapped, probes, took) in enumerate(found)
            ],
        )
        later = Sample(tuple(took for _, _, took in found[1:]))
        figures.append(
            Figure(f"an attachment right after another, {host}", "<= 2 s", f"{later.median:.2f} s")
        )
    return figures


def _probes(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds > 0 else "not all"


if __name__ == "__main__":
    run(quick=False)
