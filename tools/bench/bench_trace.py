"""Decoding QEMU's trace log: lines a second on one core, and growth from 1,000 to 100,000 lines.

    python -m tools.bench.bench_trace

`kvm_set_user_memory` as 7.2 and 10.0 print it, with and without time stamps, alone and mixed with
as many lines of other events; fed in pieces of 64 KiB, as the tail of a log is read.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from qmp_memlistener.qmp import TraceDecoder
from tools.bench.growth import Figure, Sample, interleaved, print_growth, print_table, sizes

PIECE = 64 * 1024
READ_NS = 1 << 62  # later than all stamps
GOAL = "500,000 lines/s"

_OTHERS = (
    "flatview_new 0x55d0e0a0b0c0 (root 0x55d0e0a0b0d0)",
    "flatview_destroy 0x55d0e0a0b0c0 (root 0x55d0e0a0b0d0)",
    "flatview_destroy_rcu 0x55d0e0a0b0c0 (root 0x55d0e0a0b0d0)",
    "pci_update_mappings_add virtio-net-pci 00:03.0 4,0xfe000000+0x4000",
    "pci_update_mappings_del virtio-net-pci 00:03.0 4,0xfe000000+0x4000",
    "handle_hmp_command mon 0x7ffc5d0 cmdline: info mtree -o -D",
    "runstate_set current_run_state 6 (prelaunch) new_state 9 (running)",
    "something_else that is no record of ours at all 0x1234",
)


def lines(version: str, stamped: bool, mixed: bool, count: int) -> bytes:
    """A log of `count` lines."""
    rng = random.Random(count)
    out = []
    for i in range(count):
        if mixed and i % 2:
            text = _OTHERS[i // 2 % len(_OTHERS)]
        else:
            slot, gpa = rng.randrange(64), rng.randrange(1 << 24) << 12
            size = 0 if rng.random() < 0.5 else rng.randrange(1, 1 << 16) << 12
            ua = 0x7F0000000000 + gpa
            if version == "7.2":
                text = (
                    f"kvm_set_user_memory Slot#{slot} flags=0x0 gpa=0x{gpa:x} size=0x{size:x} "
                    f"ua=0x{ua:x} ret=0"
                )
            else:
                text = (
                    f"kvm_set_user_memory AddrSpace#0 Slot#{slot} flags=0x0 gpa=0x{gpa:x} "
                    f"size=0x{size:x} ua=0x{ua:x} guest_memfd=-1 guest_memfd_offset=0x0 ret=0"
                )
        stamp = f"4711@1700000000.{i % 1_000_000:06d}:" if stamped else ""
        out.append(f"{stamp}{text}\n")
    return "".join(out).encode()


def decode(log: bytes) -> int:
    """Decode it in pieces; how many records it gave."""
    decoder = TraceDecoder()
    found = 0
    for at in range(0, len(log), PIECE):
        found += len(decoder.feed(log[at : at + PIECE], READ_NS))
    return found


def run(quick: bool) -> list[Figure]:
    """Print the tables; the slowest rate is the figure."""
    count = 20_000 if quick else 100_000
    runs = 3 if quick else 7
    logs = {
        f"{version}{', stamped' if stamped else ''}{', mixed' if mixed else ''}": lines(
            version, stamped, mixed, count
        )
        for version in ("7.2", "10.0")
        for stamped in (False, True)
        for mixed in (False, True)
    }
    cases: dict[str, Callable[[], object]] = {
        name: partial(decode, text) for name, text in logs.items()
    }
    rates = {
        name: Sample(tuple(count / s for s in sample.values))
        for name, sample in interleaved(cases, runs).items()
    }
    print(f"\ndecoding of {count:,} lines, thousands a second on one core   (wanted: >= 500)")
    print_table(
        ["log", "median", "spread", "MB/s"],
        [
            [
                name,
                f"{rate.median / 1e3:.0f}",
                rate.spread(1e-3, 0),
                f"{rate.median * len(logs[name]) / count / 1e6:.0f}",
            ]
            for name, rate in rates.items()
        ],
    )
    grown = {n: lines("10.0", True, True, n) for n in sizes(quick)}
    growth = interleaved({str(n): partial(decode, text) for n, text in grown.items()}, runs)
    title = "growth with the length of the log (10.0, stamped, mixed)"
    print_growth(title, {int(n): s for n, s in growth.items()}, each="line")
    slowest = min(rates, key=lambda name: rates[name].median)
    return [
        Figure(
            "trace decoding, slowest kind of log",
            f">= {GOAL}",
            f"{rates[slowest].median:,.0f} lines/s ({slowest})",
        )
    ]


if __name__ == "__main__":
    run(quick=False)
