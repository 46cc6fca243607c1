"""Where the images of our guests are, and building those that are not there.

Those of the bare-metal guests are package data, or in a checkout's vm-images.  Those of Linux
guests, a kernel and an initramfs, lie in the user's cache, one directory a kernel series, each with
a description; scripts in vm-images build them from packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from ..errors import InputError, MissingPrerequisite

__all__ = ["Description", "Images", "find_built_image"]

_VM_IMAGES = Path(__file__).resolve().parents[2] / "vm-images"
_BUILD_TIMEOUT = 900.0


def find_built_image(guest: str, name: str) -> Path:
    """The image `name` of `vm-images/<guest>`.  Raises MissingPrerequisite when it is nowhere."""
    package = Path(__file__).resolve().parents[1]
    candidates = (
        package / "_images" / name,
        _VM_IMAGES / guest / name,
    )
    for path in candidates:
        if path.is_file():
            return path
    raise MissingPrerequisite(
        f"the {guest} guest's image is at none of {', '.join(map(str, candidates))}",
        remedy=f"build it with `make -C vm-images/{guest}`, or install the package again",
    )


class Description(msgspec.Struct):
    """What tools/guest_image.py writes of every image; it may have more than is needed."""

    label: str
    release: str
    version: str
    kernel: str
    initramfs: str
    modules: tuple[str, ...]
    builtin: tuple[str, ...]


D = TypeVar("D", bound=Description)


@dataclass(frozen=True, slots=True)
class Images:
    """The images of one guest.

    `name` is its directory in vm-images and in the user's cache, `title` what messages call it;
    `variable` of the environment names another directory than the one in the cache.
    """

    name: str
    title: str
    variable: str

    def directory(self) -> Path:
        named = os.environ.get(self.variable)
        if named:
            return Path(named)
        cache = os.environ.get("XDG_CACHE_HOME")
        return Path(cache or Path.home() / ".cache") / "qmp-memlistener" / self.name

    def find(self, label: str, kind: type[D]) -> D:
        """The description of the image that was built last; its files are there.

        Raises MissingPrerequisite when there is none or a file of it is missing, and InputError for
        a description that is not one.
        """
        home = self.directory() / label
        described = home / f"{self.name}.json"
        remedy = f"build it in a checkout: python vm-images/{self.name}/build.py {label}"
        try:
            known = msgspec.json.decode(described.read_bytes(), type=kind)
        except FileNotFoundError:
            raise MissingPrerequisite(
                f"the {self.title} {label} is not in {home}", remedy=remedy
            ) from None
        except (OSError, msgspec.MsgspecError) as exc:
            raise InputError(
                f"{described} does not describe the {self.title}: {exc}", remedy=remedy
            ) from exc
        for path in (known.kernel, known.initramfs):
            if not Path(path).is_file():
                raise MissingPrerequisite(
                    f"the {self.title} {label} is incomplete: {path} is missing", remedy=remedy
                )
        return known

    def build(self, label: str) -> None:
        """Build the image if it is not there or if something it is made of has changed.

        Blocks; does nothing outside a checkout.  Raises MissingPrerequisite that says what is
        missing.
        """
        script = _VM_IMAGES / self.name / "build.py"
        if not script.is_file():
            return
        try:
            done = subprocess.run(
                [sys.executable, str(script), "--dir", str(self.directory()), label],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_BUILD_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MissingPrerequisite(
                f"the {self.title} {label} was not built within {_BUILD_TIMEOUT:.0f} s"
            ) from None
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()
            raise MissingPrerequisite(
                f"the {self.title} cannot be built: {said[-1] if said else 'no message'}",
                remedy=f"run python vm-images/{self.name}/build.py {label} to see all of it",
            )
