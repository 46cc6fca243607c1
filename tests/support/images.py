"""Images that are committed beside the source that builds them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["check_image"]

_TOOLS = ("make", "as", "ld", "objcopy")


def check_image(image: Path, scratch: Path) -> None:
    """The Makefile beside `image` builds these very bytes; skips without the tools."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (make, binutils)")
    built = scratch / image.name
    done = subprocess.run(
        ["make", "-C", str(image.parent), f"OUT={built}", f"BUILD={scratch / 'build'}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0 and "unrecognized option" in done.stderr:
        pytest.skip(f"this assembler does not know an option: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert built.read_bytes() == image.read_bytes(), (
        f"run `make -C vm-images/{image.parent.name}` and commit the image"
    )
