"""The committed pulse image is what its source builds, and both boot ways find what they need."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qmp_memlistener.guests import find_image
from qmp_memlistener.guests.pulse_memory import MAGIC

SOURCE = Path(__file__).resolve().parents[2] / "vm-images" / "pulse"
IMAGE = SOURCE / "pulse.img"
TOOLS = ("make", "as", "ld", "objcopy")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make, binutils)")
def test_the_source_builds_the_committed_image(tmp_path: Path) -> None:
    built = tmp_path / "pulse.img"
    build = tmp_path / "build"
    done = subprocess.run(
        ["make", "-C", str(SOURCE), f"OUT={built}", f"BUILD={build}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0 and "unrecognized option" in done.stderr:
        pytest.skip(f"this assembler does not know an option: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert built.read_bytes() == IMAGE.read_bytes(), (
        "run `make -C vm-images/pulse` and commit the image"
    )


def test_a_checkout_uses_its_own_image() -> None:
    assert find_image() == IMAGE


def test_the_image_is_a_disk_and_a_rom() -> None:
    image = IMAGE.read_bytes()
    assert len(image) == 1 << 16  # -bios takes multiples of 64 KiB
    assert image[510:512] == b"\x55\xaa"
    assert image[0xFFF0] in (0xE9, 0xEB)  # the reset vector jumps
    assert image.count(MAGIC) == 1
