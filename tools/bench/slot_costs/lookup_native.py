"""Compiles the C programs that measure beside Python, and runs the one that times look-ups.

Without a compiler `MissingPrerequisite` says so, and what is timed is left out.  Sources lie beside
this module; programs are built in a temporary directory and gone again afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qmp_memlistener.distribution import Distribution
from qmp_memlistener.errors import MissingPrerequisite, OperationFailed

__all__ = ["FLAGS", "LookupProgram", "Timings", "build", "compiler", "lookup_program"]

FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")

_SOURCE = Path(__file__).with_name("lookup.c")
_NAMES = ("cc", "gcc", "clang")
_REMEDY = "install a C compiler and the C library's headers (Debian: gcc, libc6-dev)"
_BUILD_TIMEOUT_S = 120.0
_RUN_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Timings:
    """What the C program timed with one number of slots.

    `lookups` by kind and structure, `updates` by layout and op; `counts` are the lines in which it
    says what it counted, to be compared with the model's.
    """

    lookups: dict[tuple[str, str], Distribution] = field(default_factory=dict)
    updates: dict[tuple[str, str], Distribution] = field(default_factory=dict)
    counts: dict[tuple[str, str, str], tuple[int, ...]] = field(default_factory=dict)


def compiler() -> str:
    """The C compiler: $CC, else cc, gcc or clang.  Raises MissingPrerequisite."""
    names = (os.environ["CC"],) if os.environ.get("CC") else _NAMES
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise MissingPrerequisite(f"there is no C compiler here ({', '.join(names)})", remedy=_REMEDY)


def build(source: Path, program: Path) -> str:
    """Compile one file; the compiler that did.  Raises MissingPrerequisite when that fails."""
    cc = compiler()
    command = [cc, *FLAGS, "-o", str(program), str(source)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise MissingPrerequisite(f"{cc} does not compile: {exc}", remedy=_REMEDY) from exc
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        why = (errors or done.stderr.splitlines() or [f"it ended with {done.returncode}"])[0]
        raise MissingPrerequisite(f"{cc} does not compile {source.name}: {why}", remedy=_REMEDY)
    return cc


@dataclass(frozen=True, slots=True)
class LookupProgram:
    """`lookup.c`, compiled."""

    compiler: str
    path: Path

    def time(
        self, slots: int, lookups: int, updates: int, blocks: int, seed: int, order: str
    ) -> Timings:
        """One run; what is run is the source's to say.  Raises OperationFailed when it fails."""
        numbers = (slots, lookups, updates, blocks, seed)
        return _run([str(self.path), *map(str, numbers), order])


@contextmanager
def lookup_program() -> Iterator[LookupProgram]:
    """Compiled for as long as the context lasts.  Raises MissingPrerequisite."""
    with tempfile.TemporaryDirectory(prefix="qmp-memlistener-") as directory:
        path = Path(directory) / "lookup"
        yield LookupProgram(build(_SOURCE, path), path)


def _run(command: Sequence[str]) -> Timings:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_RUN_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise OperationFailed(f"the look-up program did not run: {exc}") from exc
    if done.returncode:
        raise OperationFailed(
            f"the look-up program ended with {done.returncode}: {done.stderr.strip()}"
        )
    lookups: dict[tuple[str, str], list[int]] = {}
    updates: dict[tuple[str, str], list[int]] = {}
    counts: dict[tuple[str, str, str], tuple[int, ...]] = {}
    for line in done.stdout.splitlines():
        what, first, second, *numbers = line.split()
        values = tuple(map(int, numbers))
        if what == "block":
            count, ns = values
            lookups.setdefault((first, second), []).append(round(ns / count))
        elif what == "took":
            updates.setdefault((first, second), []).append(values[0])
        else:
            counts[what, first, second] = values
    return Timings(
        {key: Distribution.of(ns) for key, ns in lookups.items()},
        {key: Distribution.of(ns) for key, ns in updates.items()},
        counts,
    )
