"""Runs the benchmarks and prints one report; `make bench`.

    python tools/bench/run.py [--quick] [--only NAME ...]

Figures, never verdicts: the last table puts what was seen beside what is wanted.  Those that need
a guest start throw-away ones, under KVM where that works, and say so when there is no QEMU.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.bench.growth import Figure

ROOT = Path(__file__).resolve().parents[2]

# in the order of the report: name, and what it does
BENCHES = {
    "topology": "reading maps and their differences",
    "plan": "plans and slot tables",
    "trace": "decoding trace logs",
    "export": "recordings to Perfetto, CSV, Parquet, OpenMetrics",
    "burst": "a map that changes without a pause",
    "startup": "start-up of the command line",
    "snapshot": "what a snapshot costs a guest",
    "latency": "from QEMU's log line to the subscriber",
    "attach": "one attachment after another",
    "idle": "an attached agent with nothing to do",
    "threads": "what sampling its threads costs QEMU, beside pings",
    "toggle": "what a PAM toggle costs on each QEMU",
    "steer": "what a PAM toggle costs the other vCPU under each strategy of the interposer",
    "strategies": "what more memory costs a guest under each strategy",
    "lab": "a hole that comes and goes, on real KVM, under each strategy",
    "lab_cost": "what the lab's Python adds to a slot operation, beside C",
    "observer": "what the guest notices of being watched",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks and print one report.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, runs and QEMUs")
    parser.add_argument(
        "--only", action="append", choices=list(BENCHES), metavar="NAME",
        help=f"only this one; may be repeated: {', '.join(BENCHES)}",
    )  # fmt: skip
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tools.bench.growth import print_table

    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, Linux {platform.release()}")
    figures: list[Figure] = []
    for name in options.only or BENCHES:
        print(f"\n== {name}: {BENCHES[name]}", flush=True)
        started = time.monotonic()
        run: Callable[[bool], list[Figure]] = import_module(f"tools.bench.bench_{name}").run
        figures += run(options.quick)
        print(f"\n({time.monotonic() - started:.0f} s)", flush=True)
    print("\n== what is wanted, and what was seen here")
    rows = [[f.what, f.wanted, f.seen] for f in figures]
    print_table(["number", "wanted", "seen"], rows, words=3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
