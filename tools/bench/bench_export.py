"""Exporting a recording: events a second in each format, growth from 10,000 events, memory.

    python -m tools.bench.bench_export [--quick]

Events are records as a guest that changes its map gives them: one transition in five, the rest slot
operations and stalls.  Seconds are CPU time of this process; memory is that of a process of its
own, with everything that it imports.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from qmp_memlistener.exports import Format, export
from qmp_memlistener.memslots import OpKind
from qmp_memlistener.records import (
    Cause,
    CauseType,
    Detail,
    Header,
    MapRecord,
    Record,
    RecordingWriter,
    Section,
    SlotOp,
    StallCause,
    StallCauseType,
    StallKind,
    StallRecord,
    TransitionRecord,
)
from qmp_memlistener.topology import Hole, Kind
from tools.bench.growth import Figure, Sample, interleaved, print_growths, print_table

GOAL = 200_000
MOST_MB = 1000
START_NS = 4_853_196_607_839
STEP_NS = 1_000_000
BASE = 0xC0000


def events() -> Iterator[Record]:
    """Without end: a page of i/o that comes and goes, with two slot operations and two stalls."""
    seq = 0
    while True:
        at = START_NS + seq * STEP_NS
        seq += 1
        before = Section(BASE, 0x40000, Kind.RAM, "pc.ram", BASE, "/objects/pc.ram", True)
        after = [
            Section(BASE, 0x10000, Kind.RAM, "pc.ram", BASE, "/objects/pc.ram", True),
            Section(BASE + 0x10000, 0x1000, Kind.IO, "regs", 0, "/machine/peripheral/d0", False),
        ]
        hole = [Hole("pc.ram", BASE + 0x10000, 0x1000, BASE + 0x10000, "regs", "d0")]
        punched = seq % 2 == 1
        yield TransitionRecord(
            seq=seq,
            t_ns=at + 300_000,
            cause=Cause(CauseType.PCI_BAR, "ivshmem-plain 00:04.0", "BAR 0 mapped at 0xd0000"),
            removed=[before] if punched else after,
            added=after if punched else [before],
            holes_punched=hole if punched else [],
            holes_filled=[] if punched else hole,
            detail=Detail.FULL,
            slot_ops=2,
        )
        for op, late in ((OpKind.DELETE, 100_000), (OpKind.ADD, 200_000)):
            yield SlotOp(
                t_ns=at + late, as_id=0, slot=3, op=op, gpa=BASE, size=0x40000, flags=0,
                transition=seq, hva=0x7FF7D0000000,
            )  # fmt: skip
        for kind, start, end in (
            (StallKind.COMMIT, 50_000, 310_000),
            (StallKind.MISSING, 100_000, 200_000),
        ):
            yield StallRecord(
                kind=kind, start_ns=at + start, end_ns=at + end, at_least_ns=end - start - 40_000,
                at_most_ns=end - start, probe="uprobes", witnesses=["trace", "uprobes"],
                thread="qemu-system-x86", site="memory_region_transaction_commit", incident=seq,
                cause=StallCause(StallCauseType.TRANSITION, seq, end - start - 40_000),
                during=[seq],
            )  # fmt: skip


def write_recording(path: Path, count: int) -> None:
    """A recording of `count` events behind its header and map."""
    header = Header(
        tool_version="0", monotonic_ns=START_NS, realtime_ns=1_795_885_403_433_242_726,
        host_kernel="6.18", target="unix:/run/vm.qmp", qemu_version="11.1.3", machine="pc",
        accel="kvm", guest_name="vm", pid=4711, source="trace", stamp_bound_ns=200_000,
    )  # fmt: skip
    found = events()
    with RecordingWriter(str(path), header) as writer:
        writer.write(MapRecord(t_ns=START_NS, address_space="memory", ranges=[], ram_blocks=[]))
        while count:
            some = list(islice(found, min(count, 10_000)))
            writer.write_all(some)
            count -= len(some)


_PEAK = """
import sys
from qmp_memlistener.exports import Format, export
export(sys.argv[1], Format(sys.argv[2]), sys.argv[3])
status = open("/proc/self/status").read()
print(status.split("VmHWM:")[1].split()[0])
"""


def peak_mb(source: Path, to: Format, output: Path) -> float:
    """The largest resident size of a process that exports."""
    command = [sys.executable, "-c", _PEAK, str(source), to, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def run(quick: bool) -> list[Figure]:
    """Print the tables; the slowest format and the largest process are the figures."""
    sizes = (10_000, 100_000) if quick else (10_000, 100_000, 1_000_000)
    largest = sizes[-1]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sources = {n: directory / f"{n}.jsonl" for n in sizes}
        for n, path in sources.items():
            write_recording(path, n)
        seconds: dict[str, dict[int, Sample]] = {to: {} for to in Format}
        for n in sizes:
            cases = {str(to): _exporting(sources[n], to, directory / "out") for to in Format}
            for to, sample in interleaved(cases, 1 if n >= 1_000_000 else 3).items():
                seconds[to][n] = sample
        memory = {to: peak_mb(sources[largest], to, directory / f"peak.{to}") for to in Format}
    print_growths("exports by number of events", seconds, at=largest, wanted="n log n")
    rates = {to: largest / by_size[largest].median for to, by_size in seconds.items()}
    print(f"\n{largest:,} events   (wanted: >= {GOAL:,} events/s, <= {MOST_MB:,} MB)")
    print_table(
        ["format", "events/s", "peak MB"],
        [[to, f"{rates[to]:,.0f}", f"{memory[to]:.0f}"] for to in Format],
    )
    slowest = min(rates, key=lambda to: rates[to])
    heaviest = max(memory, key=lambda to: memory[to])
    return [
        Figure(
            f"export of {largest:,} events, slowest format",
            f">= {GOAL:,} events/s",
            f"{rates[slowest]:,.0f} events/s ({slowest})",
        ),
        Figure(
            f"memory of an export of {largest:,} events",
            f"<= {MOST_MB:,} MB",
            f"{memory[heaviest]:.0f} MB ({heaviest})",
        ),
    ]


def _exporting(source: Path, to: Format, output: Path) -> Callable[[], object]:
    def once() -> None:
        place = output.with_suffix(f".{to}")
        export(str(source), to, str(place))
        if place.is_dir():
            for file in place.iterdir():
                file.unlink()
            place.rmdir()
        else:
            place.unlink()

    return once


if __name__ == "__main__":
    run(quick="--quick" in sys.argv[1:])
