"""Start-up: whole processes of the command line beside an interpreter that does nothing.

    python -m tools.bench.bench_startup

Compiled modules are kept in a directory of their own and are there when the clock runs, as in an
installation; the checkout is not touched.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tools.bench.growth import Figure, interleaved, print_table, ratios
from tools.bench.synthetic import tree_text

NOTHING = "python -c pass"


def run(quick: bool) -> list[Figure]:
    """Print the table; the figure is --version."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        cpu: dict[str, list[float]] = {}
        tree = directory / "mtree.txt"
        tree.write_text(tree_text(60))
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = str(directory / "compiled")
        own = [sys.executable, "-m", "qmp_memlistener"]
        commands = {
            NOTHING: [sys.executable, "-c", "pass"],
            "--version": [*own, "--version"],
            "--help": [*own, "--help"],
            "show --help": [*own, "show", "--help"],
            "show --from FILE": [*own, "show", "--from", str(tree)],
            "show --from FILE --json": [*own, "show", "--from", str(tree), "--json"],
            "plan --json": [*own, "plan", "--before", str(tree), "--after", str(tree), "--json"],
            "list --json": [*own, "list", "--json"],
            "import the library": [sys.executable, "-c", "from qmp_memlistener import attach"],
        }

        def ran(name: str, command: list[str]) -> None:
            before = _children_cpu()
            done = subprocess.run(
                command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
            )
            if done.returncode:
                raise SystemExit(f"{command} failed: {done.stderr.decode()[-2000:]}")
            cpu.setdefault(name, []).append(_children_cpu() - before)

        samples = interleaved(
            {name: partial(ran, name, command) for name, command in commands.items()},
            5 if quick else 15,
            clock=time.perf_counter,
        )
    base = samples[NOTHING]
    print("\nstart to end of a process   (wanted: --version <= 200 ms)")
    print_table(
        ["command", "median ms", "spread ms", "to nothing", "of it CPU ms"],
        [
            [
                name,
                f"{s.median * 1e3:.0f}",
                s.spread(1e3, 0),
                f"{ratios(s, base).median:.1f}x",
                f"{statistics.median(cpu[name][1:]) * 1e3:.0f}",
            ]
            for name, s in samples.items()
        ],
    )
    version = samples["--version"]
    return [
        Figure(
            "qmp-memlistener --version",
            "<= 0.2 s",
            f"{version.median:.3f} s, {ratios(version, base).median:.1f}x of an empty interpreter",
        )
    ]


def _children_cpu() -> float:
    """Seconds of CPU of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    run(quick=False)
