"""The interposer under random operations, against a KVM of the harness's own.

    python -m tools.soak_interposer [--count 100000] [--sanitizer address|thread|none] [--seed 1]

What QEMU, the agent and KVM do, and what must hold, is in tests/support/steer_harness.c.  A
sequence that fails is made small by hypothesis and printed, with what happened in it.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

__all__ = ["SANITIZERS", "SEQUENCES", "Harness", "build", "soak"]

SANITIZERS = {"address": "address,undefined", "thread": "thread", "none": ""}
_SOURCE = Path(__file__).parent.parent / "tests/support/steer_harness.c"
_WORD = st.integers(0, 2**32 - 1)
SEQUENCES = st.lists(_WORD, min_size=1, max_size=30)
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build(directory: Path, sanitizer: str) -> Path:
    """The harness, built."""
    program = directory / f"steer-harness-{sanitizer}"
    which = SANITIZERS[sanitizer]
    subprocess.run(
        [
            *(os.environ.get("CC", "cc"), "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-tsan"),
            *([f"-fsanitize={which}", "-fno-sanitize-recover=undefined"] if which else []),
            *("-o", str(program), str(_SOURCE), "-pthread"),
        ],
        check=True,
    )
    return program


class Harness:
    """The program at work; it is started anew when a sequence ended it."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._log.close()

    def run(self, words: Sequence[int]) -> str:
        """Empty when all held."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(_bytes_of(words))
        self._process.stdin.flush()
        said = self._process.stdout.readline().decode().strip()
        if said == "ok":
            return ""
        if not said:
            self._end()
            self._log.seek(0)
            said = self._log.read()[-6000:].decode(errors="replace") or "it ended"
        return said

    def explain(self, words: Sequence[int]) -> str:
        """What happens in it."""
        ran = subprocess.run(
            [self._program, "-v"], input=_bytes_of(words), capture_output=True, check=False
        )
        return (ran.stderr + ran.stdout).decode(errors="replace")

    def _start(self) -> subprocess.Popen[bytes]:
        self._log.seek(0)
        self._log.truncate()
        return subprocess.Popen(
            [self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **_OPTIONS},
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _bytes_of(words: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(words)}I", len(words), *words)


def soak(sanitizer: str, count: int, seed: int) -> None:
    """Raises AssertionError when something does not hold."""
    with (
        tempfile.TemporaryDirectory() as directory,
        Harness(build(Path(directory), sanitizer)) as harness,
    ):

        @seeded(seed)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(SEQUENCES)
        def holds(words: list[int]) -> None:
            wrong = harness.run(words)
            assert not wrong, f"{wrong}\n{harness.explain(words)}"

        holds()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--sanitizer", choices=list(SANITIZERS), default="address")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    soak(options.sanitizer, options.count, options.seed)
    print(
        f"{options.count} sequences with {SANITIZERS[options.sanitizer] or 'no sanitizer'}: "
        f"all held ({time.monotonic() - began:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
