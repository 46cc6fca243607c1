"""Where the built images of our bare-metal guests lie: package data, or a checkout's vm-images."""

from __future__ import annotations

from pathlib import Path

from .errors import MissingPrerequisite

__all__ = ["find_built_image"]


def find_built_image(guest: str, name: str) -> Path:
    """The image `name` of `vm-images/<guest>`.  Raises MissingPrerequisite when it is nowhere."""
    package = Path(__file__).resolve().parent
    candidates = (
        package / "_images" / name,
        package.parent / "vm-images" / guest / name,
    )
    for path in candidates:
        if path.is_file():
            return path
    raise MissingPrerequisite(
        f"the {guest} guest's image is at none of {', '.join(map(str, candidates))}",
        remedy=f"build it with `make -C vm-images/{guest}`, or install the package again",
    )
