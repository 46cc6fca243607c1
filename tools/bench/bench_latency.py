"""From QEMU's log line to us: how old a slot operation is when it is read, and when it is told.

    python -m tools.bench.bench_latency

With `-msg timestamp=on` the line has QEMU's own stamp (microseconds, realtime clock), taken just
before it is written.  `read` is when the tail of the log has decoded the line; `told` is when a
subscriber of the agent has the record, with the snapshot that explains it taken in between.
"""

from __future__ import annotations

import asyncio
import time

from qmp_memlistener.agent import attach
from qmp_memlistener.guests import HOST_BRIDGE, I440FX, PAM_RAM, LaunchedGuest, Pulse
from qmp_memlistener.qmp import FlatViewEvent, Monitor, parse_target, start_tracing
from qmp_memlistener.records import Record, SlotOp, TransitionRecord
from tools.bench.growth import Figure, percentile, print_table
from tools.bench.live import Host, hosts, pulse_guest

PAUSES_MS = (100, 20)
"""Between two changes: one at a time, and faster than every snapshot can be taken."""


def run(quick: bool) -> list[Figure]:
    """Print a table a QEMU; the worst p90 of changes that come one at a time is the figure."""
    worst: dict[str, tuple[float, Host]] = {}
    for host in hosts(quick):
        for name, p90 in asyncio.run(_measure(host, 30 if quick else 100)).items():
            worst[name] = max(worst.get(name, (0.0, host)), (p90, host), key=lambda x: x[0])
    return [
        Figure(f"log line to {name}, p90", "(no limit set)", f"{p90 / 1e3:.0f} µs ({host})")
        for name, (p90, host) in worst.items()
    ]


async def _measure(host: Host, writes: int) -> dict[str, float]:
    ages: dict[str, list[float]] = {}
    async with pulse_guest(host, "-msg", "timestamp=on") as (guest, pulse):
        for pause_ms in PAUSES_MS:
            read = await _read_by_the_tail(guest, pulse, writes, pause_ms)
            ages[f"the tail, {pause_ms} ms apart"] = read
            told = await _told_to_a_subscriber(guest, pulse, writes, pause_ms)
            ages |= {f"{name}, {pause_ms} ms apart": age for name, age in told.items()}
    print(f"\n{host}: {writes} changes; µs since QEMU's stamp")
    print_table(
        ["who", "lines", "p50", "p90", "p99", "most"],
        [
            [
                name,
                f"{len(age)}",
                *(f"{percentile(age, p) / 1e3:.0f}" for p in (50, 90, 99, 100)),
            ]
            for name, age in ages.items()
            if age
        ],
    )
    first = f", {PAUSES_MS[0]} ms apart"
    return {
        name.removesuffix(first): percentile(age, 90)
        for name, age in ages.items()
        if age and name.endswith(first)
    }


async def _change(pulse: Pulse, writes: int, pause_ms: int) -> None:
    """Open and close a PAM segment."""
    for i in range(writes):
        value = PAM_RAM << 4 if i % 2 == 0 else 0
        await pulse.write_config(HOST_BRIDGE, I440FX.pam, value, 1)
        await asyncio.sleep(pause_ms / 1e3)


async def _read_by_the_tail(
    guest: LaunchedGuest, pulse: Pulse, writes: int, pause_ms: int
) -> list[float]:
    """The tail of the log alone, no snapshots."""
    ages: list[float] = []
    async with (
        await Monitor.connect(parse_target(f"unix:{guest.monitors[0]}")) as monitor,
        await start_tracing(monitor) as session,
        session.tail() as tail,
    ):

        async def collect() -> None:
            async for batch in tail:
                now = time.monotonic_ns()
                ages.extend(
                    now - line.t_ns
                    for line in batch.records
                    if isinstance(line, SlotOp | FlatViewEvent)
                )

        collecting = asyncio.create_task(collect())
        await _change(pulse, writes, pause_ms)
        collecting.cancel()
        await asyncio.wait([collecting])
    return ages


async def _told_to_a_subscriber(
    guest: LaunchedGuest, pulse: Pulse, writes: int, pause_ms: int
) -> dict[str, list[float]]:
    """The whole agent; the records' times are QEMU's stamps."""
    ages: dict[str, list[float]] = {"a subscriber: operation": [], "a subscriber: transition": []}

    def on_record(record: Record) -> None:
        now = time.monotonic_ns()
        if isinstance(record, SlotOp) and not record.predicted:
            ages["a subscriber: operation"].append(now - record.t_ns)
        elif isinstance(record, TransitionRecord):
            ages["a subscriber: transition"].append(now - record.t_ns)

    async with attach(f"unix:{guest.monitors[0]}", probes=()) as agent:
        await agent.settle()
        stop = agent.subscribe(on_record)
        await _change(pulse, writes, pause_ms)
        await agent.settle()
        stop()
    return ages


if __name__ == "__main__":
    run(quick=False)
