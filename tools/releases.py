"""Releases of something out of Debian suites, side by side in a directory: `DIR/<LABEL>/`.

What side_by_side.py and guest_image.py have in common: the directory, its lock, one release after
the other, and the exit codes.  What a release is made of is up to them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.private_apt import Unavailable

__all__ = ["FAILED", "MISSING", "OK", "Broken", "Release", "cache_dir", "make", "say", "show"]

OK, FAILED, MISSING = 0, 1, 4

Known = Callable[[str], str | None]
"""What is there of a label, in words; None when nothing is, or nothing that is good enough."""


class Broken(Exception):
    """A package does not hold what it should, or what was made of it does not work: exit code 1."""


@dataclass(frozen=True, slots=True)
class Release:
    """A version and the Debian suites that carry it and what it needs.

    `series` are the first two numbers of the version, `architecture` is Debian's name for it.
    """

    label: str
    suite: str
    base: str
    architecture: str = "amd64"

    @property
    def series(self) -> str:
        return self.label.partition("-")[0]


def say(label: str, text: str) -> None:
    print(f"{label}: {text}", flush=True)


def cache_dir(variable: str, name: str) -> Path:
    """What the environment variable says, else `name` in our part of the user's cache."""
    explicit = os.environ.get(variable)
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qmp-memlistener" / name


def show(labels: Iterable[str], top: Path, known: Known) -> int:
    """Print what is there; exit code 0 also when nothing is."""
    for label in labels:
        what = known(label)
        say(label, f"{what} in {top / label}" if what else f"not in {top}")
    return OK


def make(labels: Iterable[str], top: Path, known: Known, one: Callable[[str], None]) -> int:
    """Call `one` for each label that is not known; returns the exit code.

    A label for which it raises Unavailable or Broken does not keep the others from being made.
    """
    worst = OK
    labels = tuple(dict.fromkeys(labels))
    with _locked(top, labels):
        for label in labels:
            began = time.monotonic()
            what = known(label)
            if what is not None:
                say(label, f"{what} is there already: {top / label}")
                continue
            try:
                one(label)
            except Unavailable as exc:
                say(label, f"not available here: {exc}")
                worst = MISSING
            except Broken as exc:
                say(label, f"does not work: {exc}")
                worst = worst or FAILED
            else:
                say(label, f"took {time.monotonic() - began:.1f} s")
    return worst


@contextmanager
def _locked(top: Path, labels: Iterable[str]) -> Iterator[None]:
    """Hold `top` for this process; a second run waits.  Leftovers of killed runs are removed."""
    top.mkdir(parents=True, exist_ok=True)
    with (top / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that works in {top}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for label in labels:
            for stale in top.glob(f".{label}.*"):
                shutil.rmtree(stale, ignore_errors=True)
        yield
