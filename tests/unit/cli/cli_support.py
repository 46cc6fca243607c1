"""What the tests of the verbs share: running them, sample texts, the types of a JSON contract."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qmp_memlistener.cli.main import main

__all__ = ["RamMap", "Ran", "check_types", "load", "process", "run", "sample_outputs", "tree"]

CONFORMANCE = Path(__file__).parents[2] / "conformance"
Json = dict[str, Any]


class Ran:
    """A finished verb: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def document(self) -> Json:
        """The one JSON document on stdout; nothing else may be there."""
        assert self.code == 0, self.err
        assert self.out.endswith("\n")
        document: Json = json.loads(self.out)
        return document

    def refused(self, code: int = 2) -> str:
        """stderr, once it is sure that it has a message and a remedy, and stdout nothing."""
        assert self.code == code, (self.code, self.out, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = self.err.strip().splitlines()
        assert any(line.lower().startswith("error: ") for line in lines), self.err
        assert any(line.startswith(("remedy: ", "Try ")) for line in lines), (
            f"no remedy: {self.err}"
        )
        return self.err


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> Ran:
    """Run a verb in this process."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return Ran(code, captured.out, captured.err)


def process(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    stdout: int = subprocess.PIPE,
) -> Ran:
    """Run a verb as a process of its own, with `env` added to a bare environment."""
    bare = {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "qmp_memlistener", *map(str, argv)],
        input=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=CONFORMANCE.parents[1],
        env={**bare, **(env or {})},
        timeout=30,
        check=False,
    )
    out = (done.stdout or b"").decode("utf-8", "surrogateescape")
    return Ran(done.returncode, out, done.stderr.decode("utf-8", "surrogateescape"))


def load(path: Path) -> Json:
    """A sample of the conformance tier."""
    with gzip.open(path) as file:
        sample: Json = json.load(file)
    return sample


def sample_outputs(directory: Path, name: str) -> dict[str, Path]:
    """The outputs of one recorded map as files, by the HMP command that printed them."""
    outputs = load(CONFORMANCE / "mtree" / f"{name}.json.gz")["outputs"]
    files: dict[str, Path] = {}
    for command, text in outputs.items():
        if command.startswith("info mtree"):
            files[command] = directory / command.replace(" ", "_")
            files[command].write_text(text)
    return files


class RamMap:
    """Writes the `info mtree -o -D` of a machine with one RAM block and things in front of it."""

    def __init__(self, size: int, block: str = "pc.ram", owner: str | None = None) -> None:
        self._size = size
        self._block = block
        self._owner = f" owner:{{obj path={owner}}}" if owner else ""
        self._covers: list[str] = []

    def cover(
        self, start: int, size: int, name: str, kind: str = "i/o", owner: str | None = None
    ) -> RamMap:
        """Put a region in front of the RAM."""
        by = f" owner:{{dev id={owner}}}" if owner else ""
        self._covers.append(_line(2, start, size, 1, kind, f"{name}{by}"))
        return self

    def text(self, newline: str = "\r\n") -> str:
        last = self._size - 1
        alias = f"alias ram-below-4g @{self._block} {0:016x}-{last:016x}{self._owner}"
        lines = [
            "address-space: memory",
            _line(1, 0, 1 << 64, 0, "i/o", "system"),
            _line(2, 0, self._size, 0, "ram", alias),
            *self._covers,
            "",
            f"memory-region: {self._block}",
            _line(1, 0, self._size, 0, "ram", f"{self._block}{self._owner}"),
            "",
        ]
        return newline.join(lines) + newline

    def file(self, path: Path) -> Path:
        path.write_bytes(self.text().encode())
        return path


def tree(*regions: str, space: str = "memory") -> str:
    """An address space with these regions, given as `START-LAST (prio N, KIND): NAME`."""
    head = [f"address-space: {space}", _line(1, 0, 1 << 64, 0, "i/o", "system")]
    return "\r\n".join([*head, *(f"    {r}" for r in regions), ""]) + "\r\n"


def _line(level: int, start: int, size: int, prio: int, kind: str, rest: str) -> str:
    return f"{'  ' * level}{start:016x}-{start + size - 1:016x} (prio {prio}, {kind}): {rest}"


def check_types(value: Mapping[str, Any], types: Mapping[str, object]) -> None:
    """Exactly these keys, each of its type: `int`, `str`, …, or a tuple of them.

    JSON has true and false beside integers, Python has them among these: told apart here.
    """
    assert value.keys() == types.keys(), value.keys() ^ types.keys()
    for key, wanted in types.items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        assert type(value[key]) in allowed, f"{key} is {value[key]!r}, not {wanted}"
