"""What the lab's tests share: recorded material as files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

CONFORMANCE = Path(__file__).resolve().parents[1] / "conformance"


def slot_log(name: str, directory: Path) -> Path:
    """The trace lines of a sample of `tests/conformance/slots`, such as `7.2/pc-pam`."""
    with gzip.open(CONFORMANCE / "slots" / f"{name}.json.gz") as file:
        sample = json.load(file)
    path = directory / f"{name.replace('/', '-')}.log"
    path.write_text("".join(f"{line}\n" for step in sample["steps"] for line in step["log"]))
    return path


def recorded(path: Path, directory: Path) -> Path:
    """A file of `tests/conformance/replay`, unpacked."""
    out = directory / path.name.removesuffix(".gz")
    out.write_bytes(gzip.decompress(path.read_bytes()))
    return out


def recordings() -> list[Path]:
    return sorted((CONFORMANCE / "replay").rglob("*.gz"))
